"""STViT-R: official outputs of classifier and detector, files, sizes that the published code refuses."""

from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.vision.backbones.stvitr import SemanticUnit, WindowBlock
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

PARAMETERS = {"stvitr_swin_small": 49_625_518, "stvitr_swin_base": 87_812_336}  # of the authors' training logs
BLOCKS = ("window", "generate", "refine", "local", "mix", "recover")
RECORDED = (0, 1, 2, 4, 5, 11, 17)


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": 1000}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})


def published(golden, name: str) -> dict[str, Tensor]:
    """With the masks that the published files hold besides."""
    gold = golden(name)
    masks = gold.record.get("checkpoint_extra_float_buffers", {})
    return {**gold.checkpoint(), **{key: torch.zeros(shape) for key, shape in masks.items()}}


@torch.no_grad()
def test_official_classifier(golden, tmp_path: Path) -> None:
    gold = golden("stvitr_swin_small")
    model = load("stvitr_swin_small", {"model": published(golden, "stvitr_swin_small")}, tmp_path).eval()
    got = {}

    def record(name: str):
        return lambda module, inputs, output: got.__setitem__(name, output.flatten(1, 2))

    for number in RECORDED:
        block = model.stages[2].blocks[number // 6].get_submodule(BLOCKS[number % 6])
        block.register_forward_hook(record(f"stage2_block{number}"))
    features, stages = model.forward_intermediates(gold.picture())
    got["logits"] = model.forward_head(features)
    got |= {f"stage{i}": stages[i].flatten(2).transpose(1, 2) for i in (0, 1, 3)}
    assert got.keys() == gold.record["outputs"].keys()
    errors = {output: gold.error(output, tensor) for output, tensor in got.items()}
    assert max(errors.values()) < 5e-6, errors


@torch.no_grad()
def test_official_detector(golden, tmp_path: Path) -> None:
    """Also at sizes of which one axis, and both, are no whole windows: then the mask is another."""
    gold = golden("stvitr_det_swin_small")
    names = gold.record["outputs"].keys()
    checkpoint = {f"backbone.{key}": w for key, w in gold.checkpoint().items()}
    checkpoint["neck.fpn_convs.0.conv.weight"] = torch.zeros(1)
    model = load("stvitr_det_swin_small", {"state_dict": checkpoint}, tmp_path, features_only=True).eval()
    assert sum(p.numel() for p in model.parameters()) == gold.record["params"]
    errors = {}
    for outputs, size in gold.record["inputs"].items():
        for i, feature in enumerate(model(gold.picture(size))):
            output = outputs.replace("*", str(i + 2))
            errors[output] = gold.error(output, feature)
    assert errors.keys() == names and max(errors.values()) < 5e-6, errors


# Tables and files


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_count(name: str, count: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == count


def test_published_settings() -> None:
    model = timm.create_model("stvitr_swin_small", device="meta")
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.init_values for m in model.modules() if isinstance(m, LayerScale)} == {1e-5}
    assert model.no_weight_decay() == {key for key, _ in model.named_parameters() if "bias_table" in key}
    assert len(model.no_weight_decay()) == 9
    rates = [
        m.drop_path2.drop_prob
        for m in model.modules()
        if hasattr(m, "drop_path2") and m.drop_path2.__class__ is DropPath
    ]
    assert len(rates) == 23
    assert rates == pytest.approx([0.3 * i / 23 for i in range(1, 24)])
    first = model.stages[2].blocks[0].generate
    assert isinstance(first.drop_path1, nn.Identity), "published: no stochastic depth without a shortcut"


NARROW = {"embed_dim": 32, "num_heads": (1, 2, 4, 8)}


def narrowed(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """A third of the channels and heads of a published file: loads faster."""
    narrow = {}
    for name, tensor in checkpoint.items():
        sides = [side // 3 if side % 48 == 0 else side for side in tensor.shape]
        if name.endswith("bias_table"):
            sides[1] = tensor.shape[1] // 3
        narrow[name] = tensor[tuple(slice(side) for side in sides)].clone()
    return narrow


def test_checkpoints(golden, tmp_path: Path) -> None:
    official = narrowed(published(golden, "stvitr_swin_small"))
    want = load("stvitr_swin_small", {"model": official}, tmp_path, **NARROW).state_dict()
    got = load("stvitr_swin_small", want, tmp_path, **NARROW).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert load("stvitr_swin_small", official, tmp_path, num_classes=7, **NARROW).head.fc.weight.shape == (7, 256)

    # Detectors begin with the classifier's weights, and a detector's file has no classifier.
    backbone = load("stvitr_det_swin_small", official, tmp_path, **NARROW).state_dict()
    assert all(torch.equal(backbone[key], want[key]) for key in want)
    assert backbone.keys() - want.keys() == {f"stages.{i}.out_norm.{p}" for i in range(4) for p in ("weight", "bias")}
    detector = narrowed(golden("stvitr_det_swin_small").checkpoint())
    model = load("stvitr_det_swin_small", detector, tmp_path, **NARROW)
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.stages[1].out_norm.weight, detector["norm1.weight"])

    del official["layers.2.blocks.7.layer_scale_2"]
    with pytest.raises(ValueError, match=r"missing: 1 \(stages\.2\.blocks\.1\.generate\.ls2\.gamma\)"):
        load("stvitr_swin_small", official, tmp_path, **NARROW)


# Other sizes than the published


def small(**kwargs: Any) -> nn.Module:
    args = {"depths": (1, 2, 1, 2), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "init_values": 1.0, **kwargs}
    return timm.create_model("stvitr_swin_small", **args).eval()


@pytest.mark.parametrize("detection", [False, True])
@torch.no_grad()
def test_every_map_size(detection: bool) -> None:
    """Third-stage maps from 1 to 22 positions: partial windows, windows larger than the map, no NaN anywhere."""
    model = small(detection=detection)
    for height, width in ((1, 1), (16, 352), (112, 113), (176, 240), (225, 31)):
        x = torch.randn(1, 3, height, width)
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [tuple(y.shape[2:]) for y in maps] == [
            (-(-height // side), -(-width // side)) for side in (4, 8, 16, 32)
        ]
        assert all(y.isfinite().all() for y in maps)


@torch.no_grad()
def test_windows_that_wrap_do_not_see_across() -> None:
    """Against one matrix of attention over the whole map, whose mask says which positions share a window."""
    block = WindowBlock(
        8, 2, window_size=7, shift=3, shifts_single=False, mlp_ratio=1.0, proj_drop=0.0, drop_path=0.0
    ).eval()
    nn.init.normal_(block.attn.relative_position_bias_table)
    for height, width in ((14, 21), (7, 14), (5, 7)):
        x = torch.randn(1, height, width, 8)
        got = block._attend(x)
        whole = F.pad(x, (0, 0, 0, -width % 7, 0, -height % 7)).flatten(1, 2)
        query, key, value = block.attn.qkv(whole).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        places = []
        for length in (height, width):
            length += -length % 7
            places.append(torch.arange(length) + (4 if length > 7 else 0))  # a window begins at 3, the first at -4
        rows, columns = (p.flatten() for p in torch.meshgrid(*places, indexing="ij"))
        together = (rows[:, None] // 7 == rows // 7) & (columns[:, None] // 7 == columns // 7)
        distance = (rows[:, None] - rows + 6) * 13 + columns[:, None] - columns + 6
        table = block.attn.relative_position_bias_table
        bias = table[distance.clamp(0, 168)].permute(2, 0, 1).masked_fill(~together, -torch.inf)
        out = F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)
        want = block.attn.proj(out).unflatten(1, (height + -height % 7, width + -width % 7))[:, :height, :width]
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_recovery_writes_tokens_back_to_the_map() -> None:
    """What is beyond the window of a position reaches it within one unit, and through the tokens only."""
    unit = small().stages[2].blocks[0]
    assert isinstance(unit, SemanticUnit)
    x = torch.randn(1, 28, 28, 128)
    y, windowed = unit(x), unit.window(x)
    x[0, 27, 27] += 5
    assert torch.equal(unit.window(x)[0, :21, :21], windowed[0, :21, :21])
    assert (unit(x) - y)[0, 0, 0].abs().max() > 1e-5
    nn.init.zeros_(unit.recover.ls1.gamma)
    far = unit(x)[0, 0, 0]
    x[0, 27, 27] += 5
    assert torch.equal(unit(x)[0, 0, 0], far)


@pytest.mark.exhaustive
@torch.no_grad()
def test_detector_runs_everywhere(tmp_path: Path) -> None:
    """What the contract asks of the first model of a file, of the other graph."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small(detection=True, depths=(1, 2, 1, 1))
    scripted = torch.jit.script(model)
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(free,))
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert onnx_program is not None
    onnx_program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in ((1, 3, 64, 64), (3, 3, 113, 75), (1, 3, 224, 160), (1, 3, 224, 224)):
        x = torch.randn(*size)
        want = model(x)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for got in (scripted(x), program.module()(x), torch.as_tensor(logits)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_four_stages_are_needed() -> None:
    with pytest.raises(ValueError, match="for each of four stages"):
        timm.create_model("stvitr_swin_small", depths=(2, 2, 3), device="meta")
