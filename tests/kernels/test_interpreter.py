"""Canaries for the mended parts of Triton's interpreter (conftest.py): they say when a new Triton changes them."""

import os

import pytest
import torch

pytest.importorskip("triton")
os.environ["TRITON_INTERPRET"] = "1"  # for the decorator below only
try:
    import triton
    import triton.language as tl

    @triton.jit
    def _product_kernel(p_a, p_b, p_out, N: tl.constexpr):
        o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        a, b = tl.load(p_a + o), tl.load(p_b + o)
        tl.store(p_out + o, tl.dot(a, b) + tl.sum((a + b).to(tl.float32), 1)[:, None])

    @triton.jit
    def _cast_kernel(p_x, p_out, N: tl.constexpr):
        o = tl.arange(0, N)
        tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))

    @triton.jit
    def _decay(a, b, next_a, next_b):
        return a * next_a, next_a * b + next_b

    @triton.jit
    def _recurrence_kernel(p_a, p_b, p_out, N: tl.constexpr, REVERSE: tl.constexpr):
        o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        _, b_out = tl.associative_scan((tl.load(p_a + o), tl.load(p_b + o)), 0, _decay, reverse=REVERSE)
        tl.store(p_out + o, b_out)
finally:
    del os.environ["TRITON_INTERPRET"]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_and_sums_are_right_in_every_dtype(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16).to(dtype).unbind(0)
    out = torch.empty(16, 16)
    _product_kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float() + (a + b).float().sum(1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.xfail(strict=True, reason="Triton's interpreter computes bfloat16 as raw integers; mended in conftest.py")
def test_bfloat16_is_still_wrong_without_the_mending() -> None:
    a, b = torch.randn(2, 16, 16).bfloat16().unbind(0)
    out = torch.empty(16, 16)
    _product_kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float() + (a + b).float().sum(1, keepdim=True), rtol=1e-2, atol=1e-2)


def test_casts_to_bfloat16_round(triton_interpreter: None) -> None:
    x = torch.randn(256)
    out = torch.empty(256, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, 256)
    assert torch.equal(out, x.bfloat16())


@pytest.mark.xfail(strict=True, reason="Triton's interpreter cuts bfloat16 off; mended in conftest.py")
def test_casts_to_bfloat16_are_still_cut_off_without_the_mending() -> None:
    test_casts_to_bfloat16_round(None)


@pytest.mark.parametrize("is_mended", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_run_along_their_axis(is_mended: bool, reverse: bool, request: pytest.FixtureRequest) -> None:
    """By rows, as conftest.py has it, and by elements, as Triton: the first must stay the same as the second."""
    if is_mended:
        request.getfixturevalue("triton_interpreter")
    a, b = torch.rand(2, 8, 8).unbind(0)
    out, want, state = torch.empty(8, 8), torch.empty(8, 8), torch.zeros(8)
    _recurrence_kernel[(1,)](a, b, out, 8, reverse)
    for t in reversed(range(8)) if reverse else range(8):
        state = a[t] * state + b[t]
        want[t] = state
    torch.testing.assert_close(out, want)
