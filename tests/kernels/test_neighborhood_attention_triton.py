"""The Triton kernels, run by Triton's interpreter, against the definition: outputs and every gradient."""

import math
from dataclasses import dataclass

import pytest
import torch
from mixerzoo.kernels.neighborhood_attention import na2d, neighborhood_attention, neighborhood_attention_reference
from mixerzoo.kernels.neighborhood_attention._geometry import Window
from torch import Tensor

_triton = pytest.importorskip("mixerzoo.kernels.neighborhood_attention._triton")

pytestmark = pytest.mark.usefixtures("triton_interpreter", "poisoned_memory")


@pytest.fixture(autouse=True)
def few_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 with the wide blocks of half precision: a quarter of the interpreter's work."""
    if "shipped_config" not in request.keywords:
        monkeypatch.setitem(_triton.CONFIGS, 4, _triton.CONFIGS[2])


@dataclass(frozen=True)
class Case:
    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    is_causal: tuple[bool, ...] | bool = False
    heads: int = 2
    head_dim: int = 16
    batch: int = 1
    rpb: bool = True

    def per_axis(self, value: object) -> tuple:
        return value if isinstance(value, tuple) else (value,) * len(self.spatial)

    @property
    def geometry(self) -> dict[str, tuple]:
        return {name: self.per_axis(getattr(self, name)) for name in ("stride", "dilation", "is_causal")}

    @property
    def windows(self) -> tuple[Window, ...]:
        return tuple(Window(*axis) for axis in zip(self.kernel_size, *self.geometry.values(), strict=True))

    def inputs(self) -> dict[str, Tensor]:
        shape = (self.batch, *self.spatial, self.heads, self.head_dim)
        tensors = {name: torch.randn(shape, dtype=torch.float64) for name in ("query", "key", "value")}
        if self.rpb:
            tensors["rpb"] = torch.randn(self.heads, *(2 * size - 1 for size in self.kernel_size), dtype=torch.float64)
        return tensors


CASES = {
    "smallest": Case((1,), (1,), heads=1, batch=2),
    "row": Case((67,), (7,), dilation=3),
    "row-causal-strided": Case((70,), (9,), stride=4, is_causal=True, heads=1),
    "map": Case((9, 10), (7, 5)),
    "one-window": Case((7, 7), (7, 7), heads=3),
    "two-tiles": Case((8, 16), (3, 3)),
    "prime": Case((13, 11), (5, 5), heads=1, head_dim=20),
    "even-window": Case((9, 10), (4, 6), rpb=False),
    "dilated": Case((11, 13), (3, 5), dilation=(3, 2), heads=1, batch=2),
    "dilated-once": Case((10, 11), (3, 5), dilation=(3, 2), heads=1),
    "dilation-groups-of-one-window": Case((14, 14), (7, 7), dilation=2, heads=1),
    "blocks": Case((7, 9), (3, 3), heads=1),
    "strided": Case((15, 12), (5, 6), stride=(2, 3), rpb=False),
    "strided-bias": Case((14, 10), (5, 5), stride=(4, 2), heads=1),
    "blocked": Case((12, 12), (6, 6), stride=6, rpb=False),
    "causal": Case((10, 8), (5, 5), is_causal=(True, False), heads=1),
    "causal-strided-dilated": Case((20, 17), (5, 3), stride=(3, 2), dilation=(2, 3), is_causal=True, heads=1),
    "volume": Case((4, 5, 6), (3, 3, 5), heads=1),
    "volume-mixed": Case((6, 5, 4), (3, 3, 3), (1, 2, 1), (2, 1, 1), is_causal=(False, False, True), heads=1),
    "window-wider-than-a-tile": Case((17, 13), (13, 11), heads=1),
}


def run(case: Case, inputs: dict[str, Tensor], grad: Tensor | None) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    out, lse = neighborhood_attention(**leaves, kernel_size=case.kernel_size, **case.geometry)
    grad = torch.ones_like(out) if grad is None else grad
    out.backward(grad.to(out.dtype))
    return {"out": out.detach(), "lse": lse.detach(), **{f"grad_{name}": leaf.grad for name, leaf in leaves.items()}}


def reference(case: Case, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    out, lse = neighborhood_attention_reference(
        *(leaves.get(name) for name in ("query", "key", "value", "rpb")), case.windows, case.head_dim**-0.5
    )
    out.backward(grad.double())
    return {"out": out.detach(), "lse": lse.detach(), **{f"grad_{name}": leaf.grad for name, leaf in leaves.items()}}


def distance(got: Tensor, want: Tensor) -> float:
    """Relative to the whole tensor, with a floor where the exact value is zero (softmax over one key)."""
    assert got.isfinite().all()
    return float((got.double() - want).norm() / max(float(want.norm()), 0.25 * math.sqrt(want.numel())))


LONG = {
    *("causal-strided-dilated", "dilated", "dilation-groups-of-one-window", "map"),
    *("volume", "volume-mixed", "window-wider-than-a-tile"),
}
"""Cases that take the interpreter more than four seconds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CASES]
)
def test_float32_matches_the_definition(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    grad = torch.randn(inputs["query"].shape, dtype=torch.float64)
    got = run(case, {key: tensor.float() for key, tensor in inputs.items()}, grad)
    for key, want in reference(case, inputs, grad).items():
        assert distance(got[key], want) < 2e-6, key


@pytest.mark.shipped_config
def test_float32_matches_the_definition_as_shipped() -> None:
    test_float32_matches_the_definition("blocks")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [pytest.param("map", marks=pytest.mark.slow), "causal"])
def test_half_precision_is_as_good_as_the_definition_in_that_dtype(name: str, dtype: torch.dtype) -> None:
    """No more than twice the error of dense attention computed in the same dtype."""
    case = CASES[name]
    inputs = {key: tensor.to(dtype) for key, tensor in case.inputs().items()}
    grad = torch.randn(inputs["query"].shape, dtype=torch.float64).to(dtype)
    exact = reference(case, inputs, grad)

    leaves = {key: tensor.clone().requires_grad_() for key, tensor in inputs.items()}
    dense, _ = neighborhood_attention_reference(*leaves.values(), case.windows, case.head_dim**-0.5)
    dense.backward(grad)
    allowed = {"out": dense.detach(), **{f"grad_{key}": leaf.grad for key, leaf in leaves.items()}}

    got = run(case, inputs, grad)
    for key, half in allowed.items():
        assert got[key].dtype == dtype
        assert distance(got[key], exact[key]) < 2 * distance(half, exact[key]) + torch.finfo(dtype).eps / 8, key


def test_gradients_may_be_expanded_or_permuted() -> None:
    case = Case((6, 9), (3, 3), heads=2, head_dim=8)
    inputs = {key: tensor.float() for key, tensor in case.inputs().items()}
    shape = inputs["query"].shape
    for grad in (torch.ones(()).expand(shape), torch.randn(tuple(reversed(shape))).permute(4, 3, 2, 1, 0)):
        got = run(case, inputs, grad)
        for key, want in reference(case, inputs, grad).items():
            assert distance(got[key], want) < 2e-6, key


def test_views_of_a_fused_projection_are_read_in_place() -> None:
    fused = torch.randn(1, 7, 9, 3, 2, 16)
    query, key, value = fused.unbind(3)
    torch.testing.assert_close(
        na2d(query, key, value, 3), na2d(query.contiguous(), key.contiguous(), value.contiguous(), 3), rtol=0, atol=0
    )
    with torch.no_grad():  # different layouts for each
        mixed = na2d(query, key.transpose(1, 2).contiguous().transpose(1, 2), value.contiguous(), 3)
    torch.testing.assert_close(mixed, na2d(query, key, value, 3), rtol=0, atol=0)


@pytest.mark.slow
def test_backward_repeats_bit_for_bit() -> None:
    case = CASES["map"]
    inputs = {key: tensor.float() for key, tensor in case.inputs().items()}
    first, second = run(case, inputs, None), run(case, inputs, None)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_huge_value_outside_a_window_does_not_reach_it() -> None:
    query, key, value = torch.randn(3, 1, 9, 9, 1, 16).unbind(0)
    usual = na2d(query, key, value, 3)
    value[:, 8, 8] = 1e30
    changed = (na2d(query, key, value, 3) != usual).any(-1).squeeze().nonzero()
    assert {tuple(position.tolist()) for position in changed} == {(y, x) for y in (7, 8) for x in (7, 8)}


def test_an_empty_batch_has_empty_gradients() -> None:
    query = torch.randn(0, 5, 5, 2, 16, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    na2d(query, query, query, 3, rpb=rpb).sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape
    assert rpb.grad is not None and not rpb.grad.any()


def test_a_wide_head_takes_the_plain_operators() -> None:
    query = torch.randn(1, 3, 4, 1, 300)
    out = na2d(query, query, query, 3)
    want, _ = neighborhood_attention_reference(query, query, query, None, (Window(3, 1, 1, False),) * 2, 300**-0.5)
    torch.testing.assert_close(out, want)
