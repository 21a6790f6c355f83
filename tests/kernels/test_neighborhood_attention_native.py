"""The compiled CPU kernel of neighborhood attention against dense float64 attention, whose mask is built key by key."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from mixerzoo.kernels.neighborhood_attention import _native
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not _native.is_available(), reason="no compiled kernel: installed without a C++ compiler"
)


class Case(NamedTuple):
    batch: int
    size: tuple[int, int, int]
    heads: int
    dim: int
    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    is_causal: tuple[bool, bool, bool] = (False, False, False)
    with_rpb: bool = True

    @property
    def geometry(self) -> tuple[tuple, tuple, tuple, tuple]:
        return self.kernel_size, self.stride, self.dilation, self.is_causal


CASES = {
    "one point": Case(1, (1, 1, 1), 1, 1, (1, 1, 1)),
    "one key each": Case(2, (1, 5, 7), 3, 3, (1, 1, 1)),
    "stage of nat": Case(1, (1, 14, 14), 3, 32, (1, 7, 7)),
    "whole map": Case(2, (1, 7, 7), 3, 32, (1, 7, 7)),
    "primes": Case(1, (1, 13, 23), 1, 33, (1, 5, 7)),
    "lattices of unequal size": Case(1, (1, 17, 23), 3, 20, (1, 3, 5), dilation=(1, 4, 3)),
    "dilation up to the border": Case(1, (1, 21, 14), 1, 8, (1, 7, 7), dilation=(1, 3, 2)),
    "even windows": Case(1, (1, 11, 18), 1, 64, (1, 4, 8), with_rpb=False),
    "even windows with a table": Case(1, (1, 11, 18), 2, 8, (1, 4, 8)),
    "stride": Case(1, (1, 16, 19), 1, 8, (1, 5, 7), stride=(1, 3, 4)),
    "blocked": Case(1, (1, 15, 17), 1, 20, (1, 5, 5), stride=(1, 5, 5)),
    "causal": Case(1, (1, 12, 17), 3, 20, (1, 5, 7), is_causal=(False, True, True)),
    "causal with stride": Case(1, (1, 12, 19), 1, 8, (1, 5, 7), stride=(1, 2, 7), is_causal=(False, False, True)),
    "volume": Case(
        2, (4, 6, 9), 1, 20, (3, 4, 5), stride=(1, 2, 3), dilation=(1, 1, 1), is_causal=(True, False, False)
    ),
    "dilated volume": Case(1, (6, 7, 11), 3, 3, (3, 2, 5), dilation=(2, 3, 2), is_causal=(False, True, False)),
    "sequence": Case(2, (1, 1, 97), 3, 33, (1, 1, 13), dilation=(1, 1, 5), is_causal=(False, False, True)),
    "long sequence": Case(1, (1, 1, 700), 1, 8, (1, 1, 301), stride=(1, 1, 50)),
    "large window": Case(1, (1, 66, 65), 1, 3, (1, 64, 63)),
}


def keys_of(query: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """Positions that the query at this position sees, from the definition."""
    lattice, point = query % dilation, query // dilation
    points = len(range(lattice, length, dilation))
    first_of_group = point - point % stride
    if causal:
        lead = min(first_of_group + stride - 1, points - 1)
        seen = [t for t in range(lead - kernel + 1, point + 1) if t >= 0]
    else:
        lead = min(first_of_group + stride // 2, points - 1)
        start = min(max(lead - kernel // 2, 0), points - kernel)
        seen = list(range(start, start + kernel))
    return [lattice + dilation * t for t in seen]


def mask_and_steps(case: Case) -> tuple[Tensor, Tensor]:
    """Over all pairs of tokens: may the query see the key, and where in the flattened table the pair finds its bias."""
    mask, index = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)
    for length, kernel, *rest in zip(case.size, *case.geometry, strict=True):
        seen = torch.zeros(length, length, dtype=torch.bool)
        step = torch.zeros(length, length, dtype=torch.long)
        for query in range(length):
            for key in keys_of(query, length, kernel, *rest):
                seen[query, key] = True
                step[query, key] = kernel - 1 + (key - query) // rest[1]
        mask = (mask[:, None, :, None] & seen[None, :, None, :]).flatten(2).flatten(0, 1)
        index = (index[:, None, :, None] * (2 * kernel - 1) + step[None, :, None, :]).flatten(2).flatten(0, 1)
    return mask, index


def dense_attention(
    case: Case, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    mask, index = mask_and_steps(case)
    q, k, v = (t.flatten(1, 3).transpose(1, 2) for t in (q, k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if rpb is not None:
        scores = scores + rpb.flatten(1)[:, index]
    scores = scores.masked_fill(~mask, float("-inf"))
    out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, case.size), lse.transpose(1, 2).unflatten(1, case.size)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    rpb: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor


def make_inputs(case: Case) -> Inputs:
    """q, k and v are views of one fused projection, as the modules pass them."""
    q, k, v = torch.randn(case.batch, *case.size, 3, case.heads, case.dim).unbind(4)
    rpb = torch.randn(case.heads, *(2 * kernel - 1 for kernel in case.kernel_size)) if case.with_rpb else None
    return Inputs(q, k, v, rpb, torch.randn(q.shape), torch.randn(q.shape[:-1]))


def run_native(case: Case, inputs: Inputs, scale: float) -> dict[str, Tensor]:
    q, k, v, rpb, grad_out, grad_lse = inputs
    out, lse = _native.forward(q, k, v, rpb, *case.geometry, scale)
    delta = (out * grad_out).sum(-1) - grad_lse
    dq, dk, dv, drpb = _native.backward(grad_out, q, k, v, rpb, lse, delta, *case.geometry, scale)
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return results if drpb is None else results | {"drpb": drpb}


def run_dense(case: Case, inputs: Inputs, scale: float) -> dict[str, Tensor]:
    leaves = [tensor.double().requires_grad_() for tensor in inputs[:4] if tensor is not None]
    out, lse = dense_attention(case, *leaves, *[None] * (4 - len(leaves)), scale)
    grads = torch.autograd.grad([out, lse], leaves, [inputs.grad_out.double(), inputs.grad_lse.double()])
    return dict(zip(["out", "lse", "dq", "dk", "dv", "drpb"], [out, lse, *grads], strict=False))


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, right in expected.items():
        error = (results[name] - right).abs()
        assert not error.isnan().any(), f"{name} has NaN"
        assert error.norm() <= 2e-6 * right.norm() + 1e-7, f"{name} is off by {error.norm():.1e} of {right.norm():.1e}"
        assert error.max() <= 1e-5 * right.abs().max() + 1e-7, f"one {name} is off by {error.max():.1e}"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, so that an element which the kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str, instructions: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    scale = 0.3 * case.dim**-0.25
    assert_same(run_native(case, inputs, scale), run_dense(case, inputs, scale))


@pytest.mark.parametrize("seed", range(40))
def test_random_geometry_equals_dense_attention(seed: int) -> None:
    rng = random.Random(seed)
    rank = rng.randint(1, 3)
    axes = []
    for axis in range(3):
        length = rng.randint(1, {1: 150, 2: 18, 3: 8}[rank]) if axis >= 3 - rank else 1
        dilation = rng.randint(1, min(4, length))
        kernel = rng.randint(1, length // dilation)
        axes.append((length, kernel, rng.randint(1, kernel), dilation, axis >= 3 - rank and rng.random() < 0.3))
    size, *geometry = zip(*axes, strict=True)
    dim = rng.choice([1, 3, 8, 20, 32, 33, 64, 72])
    case = Case(rng.randint(1, 2), size, rng.choice([1, 3]), dim, *geometry, with_rpb=rng.random() < 0.6)
    inputs = make_inputs(case)
    assert_same(run_native(case, inputs, dim**-0.5), run_dense(case, inputs, dim**-0.5))


def test_any_layout() -> None:
    case = CASES["primes"]
    inputs = make_inputs(case)
    strange = Inputs(
        inputs.q.transpose(-1, -2).contiguous().transpose(-1, -2),
        inputs.k[:, :, ::2].repeat_interleave(2, 2)[:, :, : case.size[1]],
        inputs.v[:, :, :1].expand_as(inputs.v),
        inputs.rpb.transpose(1, 3).contiguous().transpose(1, 3),
        inputs.grad_out[..., :1].expand_as(inputs.q),
        inputs.grad_lse.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert_same(run_native(case, strange, 0.2), run_dense(case, strange, 0.2))


def test_empty_batch() -> None:
    case = CASES["primes"]._replace(batch=0)
    results = run_native(case, make_inputs(case), 0.2)
    assert results["out"].shape == results["dk"].shape == (0, *case.size, case.heads, case.dim)
    assert not results["drpb"].any()


@pytest.mark.parametrize("name", ["stage of nat", "lattices of unequal size", "dilated volume", "long sequence"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    case = CASES[name]._replace(batch=3)
    inputs = make_inputs(case)
    alone = run_native(case, inputs, 0.2)
    try:
        for threads in (2, 2, 3, 5):
            torch.set_num_threads(threads)
            together = run_native(case, inputs, 0.2)
            for key, value in alone.items():
                assert torch.equal(value, together[key]), f"{key} differs with {threads} threads"
    finally:
        torch.set_num_threads(1)


def test_nan_reaches_exactly_the_queries_that_see_it() -> None:
    case = CASES["lattices of unequal size"]
    token = 9 * case.size[2] + 11
    mask, _ = mask_and_steps(case)
    sees = mask[:, token].view(case.size)
    for poisoned in ("k", "v"):
        inputs = make_inputs(case)
        getattr(inputs, poisoned).flatten(1, 3)[:, token] = float("nan")
        results = run_native(case, inputs, 0.2)
        for name in ("out", "dq"):
            touched = results[name].isnan().any(-1)
            assert torch.equal(touched, sees[None, ..., None].expand_as(touched)), f"NaN in {poisoned}, seen in {name}"


def test_nan_in_a_query_reaches_exactly_its_keys() -> None:
    case = CASES["lattices of unequal size"]
    token = 9 * case.size[2] + 11
    mask, _ = mask_and_steps(case)
    inputs = make_inputs(case)
    inputs.q.flatten(1, 3)[:, token] = float("nan")
    results = run_native(case, inputs, 0.2)
    for name in ("dk", "dv"):
        touched = results[name].isnan().any(-1)
        assert torch.equal(touched, mask[token].view(case.size)[None, ..., None].expand_as(touched)), name


def test_minus_infinity_in_the_table_hides_keys() -> None:
    case = CASES["stage of nat"]
    inputs = make_inputs(case)
    inputs.rpb[:, :, :, 8] = float("-inf")
    scale = 0.2
    expected = run_dense(case, inputs, scale)
    assert_same(run_native(case, inputs, scale), expected)


def test_large_scores_do_not_overflow() -> None:
    case = CASES["stage of nat"]
    inputs = make_inputs(case)
    results, expected = (run(case, inputs, 60.0) for run in (run_native, run_dense))
    torch.testing.assert_close(results["lse"].double(), expected["lse"], rtol=2e-6, atol=0)
    torch.testing.assert_close(results["out"].double(), expected["out"], rtol=0, atol=2e-3)  # scores near 1000


def test_refuses_windows_that_do_not_fit() -> None:
    q = torch.randn(1, 1, 6, 6, 1, 8)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation <= length; got lengths \[1, 6, 6\]"):
        _native.forward(q, q, q, None, (1, 3, 7), (1, 1, 1), (1, 1, 1), (False,) * 3, 1.0)
    with pytest.raises(ValueError, match="stride <= kernel_size"):
        _native.forward(q, q, q, None, (1, 3, 3), (1, 4, 1), (1, 1, 1), (False,) * 3, 1.0)
