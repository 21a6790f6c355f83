"""Whole models through PyTorch's compilers and exporters, one of each group of `test_backbones_contract.py`.

It costs a minute a model, so the slow tests take a sample of the groups; the others have the mark "exhaustive".
"""

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import FIRST, SAMPLE, assert_near, minimal, picture, training_pictures
from mixerzoo.vision._openvino import run_openvino, write_openvino
from mixerzoo.vision.backbones import TokenReducedViT


def _expensive(name: str, sample: Collection[str] = SAMPLE) -> Any:
    return pytest.param(name, marks=pytest.mark.slow if name in sample else pytest.mark.exhaustive)


@pytest.fixture(params=[_expensive(name) for name in FIRST])
def sampled(request: pytest.FixtureRequest) -> str:
    return request.param


def test_compiles_without_graph_breaks(sampled: str) -> None:
    model = minimal(sampled).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = training_pictures(model)
    torch.manual_seed(0)  # for models that draw what they keep
    out = compiled(x)
    out.square().mean().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(0)
    want = model(x)
    assert_near(out, want, 1e-5)
    want.square().mean().backward()
    for a, b in zip(got, model.parameters(), strict=True):
        assert_near(a, b.grad)


@torch.no_grad()
def test_compiles_with_inductor(sampled: str) -> None:
    model, x = minimal(sampled), picture()
    torch._dynamo.reset()
    assert_near(torch.compile(model, fullgraph=True)(x), model(x))


DYNAMIC = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
UNTRACED = [(1, 64, 64), (3, 113, 75), (2, 224, 160)]  # a map of one position cannot be a symbol


# NAT's files with free sizes are those of test_export.py.
@pytest.mark.parametrize("sampled", [_expensive(name, SAMPLE - {"nat_mini"}) for name in FIRST])
@torch.no_grad()
def test_exports_with_dynamic_sizes(sampled: str, tmp_path: Path) -> None:
    """As a program, and as ONNX and OpenVINO from the same trace: tracing is what takes long."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = minimal(sampled)
    scale = 4 if model.feature_info[-1]["reduction"] > 32 else 1  # wavelets halve the last map once more
    # Windows of tokens and counts that are cut to rates are long symbols, minutes a trace: there ToMe stands for all.
    is_free = sampled.startswith("tome") or not (isinstance(model, TokenReducedViT) or sampled.startswith("stvitr"))
    sizes = DYNAMIC if is_free else {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (picture(scale * 96, scale * 128, batch=2),), dynamic_shapes=(sizes,))
    assert not [node for node in program.graph.nodes if "mixerzoo" in str(node.target)], "standard operators only"
    untraced = UNTRACED if is_free else [(1, 96, 128), (3, 96, 128)]
    images = [picture(scale * height, scale * width, batch) for batch, height, width in untraced]
    module = program.module()
    for x in images:
        assert_near(module(x), model(x))

    # Unoptimised, which takes half the time; test_export.py has the files that users get.
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert onnx_program is not None
    onnx_program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for x in images:
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_near(torch.as_tensor(logits), model(x))

    if importlib.util.find_spec("openvino") is not None:
        write_openvino(tmp_path / "model.onnx", tmp_path / "model.xml", {})
        for x, [logits] in zip(images, run_openvino(tmp_path / "model.xml", images), strict=True):
            assert_near(logits, model(x))
