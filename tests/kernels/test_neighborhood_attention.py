"""Neighborhood attention on the CPU against NATTEN's recorded results, its own definition and PyTorch's checks."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixerzoo.kernels import _runtime
from mixerzoo.kernels.neighborhood_attention import (
    _native,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    neighborhood_attention_reference,
)
from mixerzoo.kernels.neighborhood_attention._geometry import Window
from torch import Tensor

RECORDS = json.loads((Path(__file__).parents[1] / "goldens" / "na_ops.json").read_text())["cases"]


@pytest.fixture(params=["native", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's two ways: the compiled kernel where an install built it, and PyTorch operators."""
    if request.param == "plain":
        monkeypatch.setattr(_native, "is_available", lambda: False)
    elif not _native.is_available():
        pytest.skip("no compiler built the native kernel on this machine")
    return request.param


def recorded_input(case: dict[str, Any], leaf: str, shape: tuple[int, ...]) -> Tensor:
    """The input that the record was made with, rebuilt from its name."""
    seed = zlib.crc32(f"na_ops.{case['name']}.{leaf}".encode())
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).standard_normal(shape))


def recorded_inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    batch, spatial, heads, dim = case["batch"], case["shape"], case["heads"], case["head_dim"]
    heads_kv, dim_v = case["heads_kv"], case["head_dim_v"]
    inputs = {
        "query": recorded_input(case, "q", (batch, *spatial, heads, dim)),
        "key": recorded_input(case, "k", (batch, *spatial, heads_kv, dim)),
        "value": recorded_input(case, "v", (batch, *spatial, heads_kv, dim_v)),
    }
    if case["rpb"]:
        inputs["rpb"] = recorded_input(case, "rpb", (heads, *(2 * size - 1 for size in case["kernel_size"]))) / 2
    if case["extra_kv"]:
        inputs["additional_keys"] = recorded_input(case, "ak", (batch, case["extra_kv"], heads_kv, dim))
        inputs["additional_values"] = recorded_input(case, "av", (batch, case["extra_kv"], heads_kv, dim_v))
    return inputs


def recorded_distance(got: Tensor, want: dict[str, Any]) -> float:
    flat = got.detach().double().flatten()
    places = torch.linspace(0, flat.numel() - 1, len(want["samples"])).long()
    samples = torch.tensor(want["samples"], dtype=torch.float64)
    moments = [flat.mean() - want["mean"], flat.std(unbiased=False) - want["std"]]
    return max(float((flat[places] - samples).abs().max()), *(abs(float(moment)) for moment in moments))


def results(case: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients under the record's names."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    geometry = {name: case[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}
    out, lse = neighborhood_attention(**leaves, **geometry)
    (out * recorded_input(case, "do", tuple(out.shape)).to(out.dtype)).sum().backward()
    short = {"query": "dq", "key": "dk", "value": "dv", "rpb": "drpb", "additional_keys": "dak"}
    short["additional_values"] = "dav"
    got = {"out": out, "lse": lse}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        got[short[name]] = leaf.grad
    return got


@pytest.mark.parametrize("case", RECORDS, ids=lambda case: case["name"])
def test_float64_equals_natten(case: dict[str, Any]) -> None:
    got = results(case, recorded_inputs(case))
    assert got.keys() == case["outputs"].keys()
    for name, want in case["outputs"].items():
        assert recorded_distance(got[name], want) < 1e-12 * max(want["absmax"], 1), name


@pytest.mark.parametrize("case", RECORDS[::5], ids=lambda case: case["name"])
def test_float32_equals_natten(case: dict[str, Any], path: str) -> None:
    got = results(case, {name: tensor.float() for name, tensor in recorded_inputs(case).items()})
    for name, want in case["outputs"].items():
        assert recorded_distance(got[name], want) < 3e-5 * max(want["absmax"], 1), name


@pytest.mark.parametrize("case", RECORDS[::3], ids=lambda case: case["name"])
def test_export_path_equals_natten(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "wants_plain_ops", lambda: True)
    got = results(case, recorded_inputs(case))
    for name, want in case["outputs"].items():
        assert recorded_distance(got[name], want) < 1e-12 * max(want["absmax"], 1), name


def make_inputs(
    *spatial: int, dim: int = 4, batch: int = 1, table: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, key and value with two heads, and a bias table for windows of the sizes `table`."""
    tensors = [torch.randn(batch, *spatial, 2, dim, dtype=dtype) for _ in range(3)]
    return [*tensors, torch.randn(2, *(2 * size - 1 for size in table), dtype=dtype)] if table else tensors


@st.composite
def geometries(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Window, ...]]:
    rank = draw(st.integers(1, 3))
    windows, spatial = [], []
    for _ in range(rank):
        size = draw(st.integers(1, 5))
        window = Window(size, draw(st.integers(1, size)), draw(st.integers(1, 3)), draw(st.booleans()))
        windows.append(window)
        spatial.append(draw(st.integers(size * window.dilation, size * window.dilation + 12 // rank)))
    return tuple(spatial), tuple(windows)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometries())
def test_every_geometry_matches_the_definition(geometry: tuple[tuple[int, ...], tuple[Window, ...]]) -> None:
    spatial, windows = geometry
    odd = all(window.size % 2 for window in windows)
    inputs = make_inputs(*spatial, batch=2, table=tuple(window.size for window in windows) if odd else ())
    leaves = [[tensor.clone().requires_grad_() for tensor in inputs] for _ in range(3)]
    grad, grad_lse = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:-1], dtype=torch.float64)

    def table(tensors: list[Tensor]) -> Tensor | None:
        return tensors[3] if odd else None

    arguments = {
        "kernel_size": [window.size for window in windows],
        "stride": [window.stride for window in windows],
        "dilation": [window.dilation for window in windows],
        "is_causal": [window.is_causal for window in windows],
    }
    want = neighborhood_attention_reference(*leaves[0][:3], table(leaves[0]), windows, 0.5)
    got = neighborhood_attention(*leaves[1][:3], **arguments, scale=0.5, rpb=table(leaves[1]))
    native = None
    if _native.is_available():
        single = [tensor.detach().float().requires_grad_() for tensor in inputs]
        native = neighborhood_attention(*single[:3], **arguments, scale=0.5, rpb=table(single))
        torch.autograd.backward(native, (grad.float(), grad_lse.float()))
    for outputs in (want, got):
        torch.autograd.backward(outputs, (grad, grad_lse))
    for i, tensor in enumerate(want):
        torch.testing.assert_close(got[i], tensor, rtol=1e-11, atol=1e-11)
        if native is not None:
            torch.testing.assert_close(native[i].double(), tensor, rtol=1e-4, atol=1e-5)
    for i, leaf in enumerate(leaves[0]):
        torch.testing.assert_close(leaves[1][i].grad, leaf.grad, rtol=1e-10, atol=1e-10)
        if native is not None:
            torch.testing.assert_close(single[i].grad.double(), leaf.grad, rtol=1e-4, atol=2e-5)


def test_the_whole_map_as_window_is_dense_attention() -> None:
    query, key, value = make_inputs(5, 7)
    heads_first = [tensor.flatten(1, 2).transpose(1, 2) for tensor in (query, key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2).unflatten(1, (5, 7))
    torch.testing.assert_close(na2d(query, key, value, (5, 7)), dense)


def test_a_window_of_one_returns_the_values() -> None:
    query, key, value = make_inputs(4, 3, 5)
    torch.testing.assert_close(na3d(query, key, value, 1), value)


def test_a_query_sees_exactly_its_window() -> None:
    """One-hot values read the attended positions back, without the definition's own mask."""
    length = 11
    value = torch.eye(length, dtype=torch.float64).view(1, length, 1, length)
    query = torch.zeros(1, length, 1, length, dtype=torch.float64)
    seen = na1d(query, query, value, 3, dilation=2)[0, :, 0] > 0
    expected = {0: {0, 2, 4}, 1: {1, 3, 5}, 5: {3, 5, 7}, 9: {5, 7, 9}, 10: {6, 8, 10}}
    assert {row: set(seen[row].nonzero().flatten().tolist()) for row in expected} == expected


def test_gradcheck_of_output_and_log_sum_exp() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(6, 7, table=(3, 3))]

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> tuple[Tensor, Tensor]:
        return neighborhood_attention(q, k, v, 3, dilation=(2, 1), stride=(1, 2), is_causal=(False, True), rpb=rpb)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("table", [(), (1, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, table: tuple[int, ...], path: str) -> None:
    *tensors, rpb = (*make_inputs(1, 5, 6, table=table, dtype=dtype), *([] if table else [None]))
    geometry = ([1, 3, 3], [1, 1, 2], [1, 1, 1], [False, True, False], 0.5)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in (*tensors, rpb)]
    torch.library.opcheck(torch.ops.mixerzoo.neighborhood_attention.default, (*leaves, *geometry))
    out, lse = torch.ops.mixerzoo.neighborhood_attention(*leaves, *geometry)
    saved = [None if tensor is None else tensor.detach() for tensor in (out, *leaves, lse, lse)]
    torch.library.opcheck(torch.ops.mixerzoo.neighborhood_attention_backward.default, (*saved, *geometry))


def test_gradients_may_be_expanded_or_permuted(path: str) -> None:
    inputs = make_inputs(6, 5, table=(3, 3), dtype=torch.float32)
    shape = inputs[0].shape
    for grad in (torch.ones(()).expand(shape), torch.randn(tuple(reversed(shape))).permute(4, 3, 2, 1, 0)):
        leaves = [[tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2)]
        na2d(*leaves[0][:3], 3, rpb=leaves[0][3]).backward(grad)
        na2d(*leaves[1][:3], 3, rpb=leaves[1][3]).backward(grad.contiguous())
        for one, other in zip(*leaves, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_backward_repeats_bit_for_bit(path: str) -> None:
    inputs = make_inputs(20, 17, batch=2, dim=16, table=(7, 7), dtype=torch.float32)
    runs = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        na2d(*leaves[:3], 7, rpb=leaves[3]).square().sum().backward()
        runs.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_cpu(dtype: torch.dtype, path: str) -> None:
    """No more than twice the error of rounding the exact result once."""
    inputs = [tensor.to(dtype) for tensor in make_inputs(9, 10, dim=16, table=(5, 5))]
    want, _ = neighborhood_attention_reference(*(t.double() for t in inputs), (Window(5, 1, 1, False),) * 2, 0.25)
    got = na2d(*inputs[:3], 5, rpb=inputs[3])
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= 2 * (want.to(dtype).double() - want).norm()


FUNCTIONAL: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "forward_ad": lambda f, x, t: _forward_mode(f, x, t),
    "grad": lambda f, x, t: torch.func.grad(lambda y: (f(y) * t).sum())(x),
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](t)[0],
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack([x, t])),
    "hessian_vector": lambda f, x, t: torch.func.jvp(torch.func.grad(lambda y: f(y).square().sum()), (x,), (t,))[1],
}


def _forward_mode(function: Callable[[Tensor], Tensor], primal: Tensor, tangent: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(primal, tangent))
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert found is not None
    return found


@pytest.mark.parametrize("transform", FUNCTIONAL)
def test_functional_transforms_follow_the_definition(transform: str) -> None:
    query, key, value, rpb = make_inputs(5, 6, table=(3, 3))
    tangent = torch.randn_like(query)
    windows = (Window(3, 1, 1, False),) * 2

    def attend(x: Tensor) -> Tensor:
        return na2d(x, key + x, value * x, 3, scale=0.5, rpb=rpb)

    def define(x: Tensor) -> Tensor:
        return neighborhood_attention_reference(x, key + x, value * x, rpb, windows, 0.5)[0]

    got, want = (FUNCTIONAL[transform](function, query, tangent) for function in (attend, define))
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want)


class Attend(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return na2d(x, x + 1, x * 2, 3, dilation=(1, 2))


@pytest.mark.slow
def test_the_compiled_graph_holds_the_operator_and_the_exported_one_does_not() -> None:
    x = torch.randn(2, 8, 9, 2, 4)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Attend(), fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(x), Attend()(x), rtol=0, atol=0)
    assert any("mixerzoo" in str(node.target) for graph in graphs for node in graph.graph.nodes)

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height", min=3), 2: torch.export.Dim("width", min=6)}
    for strict in (False, True):
        exported = torch.export.export(Attend(), (x,), dynamic_shapes={"x": sizes}, strict=strict)
        assert not [node for node in exported.graph.nodes if "mixerzoo" in str(node.target)]
        for shape in [(2, 8, 9), (1, 3, 6), (3, 17, 11), (2, 30, 7)]:
            other = torch.randn(*shape, 2, 4)
            torch.testing.assert_close(exported.module()(other), Attend()(other))


REFUSED = {
    "rank": (lambda q: na2d(q[0], q[0], q[0], 3), r"na2d needs query as \[batch, height.*got shape \(8, 8, 2, 4\)"),
    "key shape": (lambda q: na2d(q, q[:, 1:], q, 3), r"key must match query.*\(1, 7, 8, 2, 4\)"),
    "value shape": (lambda q: na2d(q, q, q[:, :, 1:], 3), r"value must match key.*\(1, 8, 7, 2, 4\)"),
    "heads": (lambda q: na2d(q, *[q[..., [0, 1, 1], :]] * 2, 3), "multiple of key heads.*2 and 3"),
    "dtype": (lambda q: na2d(q, q.double(), q, 3), "share dtype and device"),
    "integers": (lambda q: na2d(q.long(), q.long(), q.long(), 3), "floating point"),
    "even with rpb": (lambda q: na2d(q, q, q, 4, rpb=torch.zeros(2, 7, 7)), r"odd windows.*\(4, 4\)"),
    "rpb shape": (lambda q: na2d(q, q, q, 3, rpb=torch.zeros(2, 7, 7)), r"\(2, 5, 5\); got \(2, 7, 7\)"),
    "too small": (lambda q: na2d(q, q, q, 5, dilation=2), "axis 0 has length 8, but kernel_size 5.*least 10.*pad"),
    "too small, causal": (lambda q: na2d(q, q, q, 9, is_causal=(True, False)), "causal axis 0 has length 8.*least 9"),
    "axes": (lambda q: na2d(q, q, q, (3, 3, 3)), r"kernel_size needs one value or 2.*\(3, 3, 3\)"),
    "stride": (lambda q: na2d(q, q, q, 3, stride=4), "between 1 and kernel_size.*stride 4 and kernel_size 3"),
    "size": (lambda q: na2d(q, q, q, 0), "at least 1"),
    "half of extra": (lambda q: na2d(q, q, q, 3, additional_keys=q[:, 0]), "together"),
    "extra shape": (lambda q: na2d(q, q, q, 3, additional_keys=q, additional_values=q), r"must be \[batch, extra"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_numbers(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 8, 8, 2, 4))
