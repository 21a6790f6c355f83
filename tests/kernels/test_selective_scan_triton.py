"""The Triton kernels of the selective scan, run by Triton's interpreter, against standard operators in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mixerzoo.kernels.cross_scan import ATROUS, BIDIRECTIONAL, CROSS, ScanPath
from mixerzoo.kernels.selective_scan import _plain
from torch import Tensor

_triton = pytest.importorskip("mixerzoo.kernels.selective_scan._triton")

pytestmark = pytest.mark.usefixtures("triton_interpreter", "poisoned_memory")

ROT90 = (ScanPath(by_columns=True, flip_columns=True), ScanPath(flip_rows=True))
NAMES = ("x", "delta", "projected", "dt_weight", "dt_bias", "A", "D")


@dataclass(frozen=True)
class Case:
    size: tuple[int, int]
    paths: tuple[ScanPath, ...] = (ScanPath(),)
    state: int = 1
    rank: int = 2  # 0: delta is given
    dim: int = 3
    batch: int = 1
    inputs: int = 1
    slots: int | None = None
    bias: bool = True
    D: bool = True
    softplus: bool = True
    merge: bool = True

    @property
    def options(self) -> tuple[Any, ...]:
        return self.size, _plain.to_integers(self.paths), self.softplus, self.merge

    def tensors(self) -> list[Tensor | None]:
        pixels, scans = self.size[0] * self.size[1], len(self.paths)
        kind = {"dtype": torch.float64}
        shape = self.batch, pixels
        return [
            torch.randn(*shape, self.inputs, self.dim, **kind),
            None if self.rank else torch.rand(*shape, scans, self.dim, **kind),
            torch.randn(*shape, self.slots or scans, self.rank + 2 * self.state, **kind),
            torch.randn(scans, self.dim, self.rank, **kind) if self.rank else None,
            torch.randn(scans, self.dim, **kind) if self.bias else None,
            -2 * torch.rand(scans, self.dim, self.state, **kind),
            torch.randn(scans, self.dim, **kind) if self.D else None,
        ]


CASES = {
    "one step": Case((1, 1), batch=2),
    "cross": Case((2, 3), CROSS, dim=5),
    "a chunk and one": Case((1, 33), state=3),
    "both ways, an input each": Case((1, 12), BIDIRECTIONAL, inputs=2),
    "given, no bias": Case((1, 7), ROT90[:1] * 2, state=3, rank=0, inputs=2, bias=False, merge=False, batch=2),
    "given as it is, no D": Case((2, 4), ROT90, rank=0, D=False, bias=False, softplus=False),
    "turned": Case((3, 4), ROT90, state=2),
    "sub-grids, odd": Case((3, 5), ATROUS, slots=1, state=2),
    "sub-grids of one pixel": Case((1, 1), ATROUS, slots=1),
    "sub-grids, an input each, not added": Case((2, 3), ATROUS, inputs=4, merge=False),
    "high rank, one projection": Case((2, 3), BIDIRECTIONAL, rank=20, slots=1),
    "two blocks of channels": Case((1, 3), dim=70, batch=2),
}

SLOW = {
    "a chunk less one": Case((1, 31), BIDIRECTIONAL, inputs=2),
    "long": Case((10, 10), CROSS[1:2], state=16, dim=5),
    "state 64": Case((2, 3), state=64),
    "sub-grids, 16 states": Case((7, 9), ATROUS, state=16, slots=1, rank=12),
    "cross, 16 states, two images": Case((5, 7), CROSS, state=16, inputs=4, batch=2),
}


def single(tensors: list[Tensor | None], dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def run(implementation: Any, case: Case, tensors: list[Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    y, states = implementation.forward(*tensors, *case.options, True)
    grads = implementation.backward(grad.to(y.dtype), *tensors, states, *case.options)
    for name, tensor, gradient in zip(NAMES, tensors, grads, strict=True):
        assert (tensor is None) == (gradient is None), name
    found = {f"grad_{name}": gradient for name, gradient in zip(NAMES, grads, strict=True) if gradient is not None}
    return {"y": y, "states": states, **found}


def make_grad(case: Case) -> Tensor:
    pixels = case.size[0] * case.size[1]
    shape = (case.batch, pixels, case.dim) if case.merge else (case.batch, len(case.paths), case.dim, pixels)
    return torch.randn(shape, dtype=torch.float64)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, right in want.items():
        assert got[name].shape == right.shape, name
        assert got[name].isfinite().all(), name
        error = float((got[name].double() - right).norm())
        assert error <= tolerance * max(float(right.norm()), 0.1), f"{name} is off by {error:.1e}"


def check(case: Case) -> None:
    tensors, grad = case.tensors(), make_grad(case)
    assert_close(run(_triton, case, single(tensors), grad), run(_plain, case, tensors, grad), 2e-6)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name: str) -> None:
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_equals_the_definition_where_it_takes_long(name: str) -> None:
    check(SLOW[name])


@pytest.mark.parametrize("case", [Case((1, 66)), Case((5, 9), ATROUS[2:3], slots=1)], ids=["chunks", "leaves"])
def test_segments_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "segments_of", lambda programs, chunks, multiprocessors: min(3, chunks))
    check(case)


def test_small_batches_alone_are_cut_into_segments() -> None:
    assert _triton.segments_of(programs=1, chunks=98, multiprocessors=132) == 56  # no shorter than they are many
    assert _triton.segments_of(programs=128, chunks=98, multiprocessors=132) == 8
    assert _triton.segments_of(programs=1, chunks=1, multiprocessors=132) == 1
    assert _triton.segments_of(programs=400, chunks=98, multiprocessors=132) == 1  # twice the work for half the steps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Maps of half precision, parameters of float32: what is exact in both is summed in float32, over all scans."""
    case = Case((2, 2), CROSS, state=2)
    rounded, grad = single(case.tensors(), dtype), make_grad(case).to(dtype)
    mixed = [tensor if i < 4 or tensor is None else tensor.float() for i, tensor in enumerate(rounded)]
    got = run(_triton, case, mixed, grad)
    assert got["y"].dtype == dtype
    assert_close(got, run(_plain, case, single(rounded, torch.float64), grad.double()), torch.finfo(dtype).eps)


def test_any_strides_and_the_same_bits_each_time() -> None:
    case = Case((1, 9), BIDIRECTIONAL, rank=0, state=2, inputs=2, merge=False)
    tensors, grad = single(case.tensors()), make_grad(case).float()
    usual = run(_triton, case, tensors, grad)
    time_last = [None if t is None else t.transpose(1, -1).contiguous().transpose(1, -1) for t in tensors]
    spread = grad.transpose(2, 3).contiguous().transpose(2, 3)
    for again in (run(_triton, case, tensors, grad), run(_triton, case, time_last, spread)):
        assert all(torch.equal(usual[name], again[name]) for name in usual)


def test_offsets_of_huge_maps_are_64_bits_wide() -> None:
    """Three pixels, 2^30 elements apart; the memory between them is never touched."""
    case = Case((1, 3))
    tensors, grad = single(case.tensors()), make_grad(case).float()
    x = tensors[0]
    assert x is not None
    apart = torch.empty(2**32 + 8, dtype=torch.int8).view(torch.float16).as_strided((1, 3, 1, 3), (0, 2**30, 3, 1))
    apart.copy_(x)
    got = run(_triton, case, [apart, *tensors[1:]], grad)
    exact = [tensor.double() if tensor is not None else None for tensor in [apart.contiguous(), *tensors[1:]]]
    assert_close(got, run(_plain, case, exact, grad.double()), 1e-3)


def test_an_empty_batch() -> None:
    case = Case((2, 2), BIDIRECTIONAL, batch=0)
    found = run(_triton, case, single(case.tensors()), make_grad(case).float())
    assert found["y"].shape == (0, 4, 3)
    assert not found["grad_A"].any() and not found["grad_dt_weight"].any()
