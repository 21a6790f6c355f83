"""Register `mixerzoo::selective_scan` with its backward operator, and choose the implementation of each.

One operator serves scans over sequences and over maps; `_plain.py` documents its arguments. It saves its inputs and one
state per chunk of steps for the backward pass, never a sequence of states.
"""

from types import ModuleType

import torch
from torch import Tensor

from .. import _runtime
from . import _native, _plain


def _implementation(x: Tensor) -> ModuleType:
    if _runtime.runs_triton(x):
        from . import _triton  # imported on use: importing Triton is slow, and not every platform has it

        return _triton
    return _native if x.device.type == "cpu" and x.dtype != torch.float64 and _native.is_available() else _plain


def _single(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def scan(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    size: list[int],
    paths: list[int],
    softplus: bool,
    merge: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """Implement the operator."""
    with torch.autocast(x.device.type, enabled=False):
        implementation, tensors = _implementation(x), (x, delta, projected, dt_weight, dt_bias, A, D)
        if implementation is _native:
            tensors = tuple(map(_single, tensors))
        y, states = implementation.forward(*tensors, (size[0], size[1]), paths, softplus, merge, save_states)
        return y.to(x.dtype), states


@torch.library.custom_op("mixerzoo::selective_scan", mutates_args=())
def _selective_scan(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    size: list[int],
    paths: list[int],
    softplus: bool,
    merge: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the saved states."""
    return scan(x, delta, projected, dt_weight, dt_bias, A, D, size, paths, softplus, merge, save_states)


@_selective_scan.register_fake
def _(x, delta, projected, dt_weight, dt_bias, A, D, size, paths, softplus, merge, save_states):
    batch, pixels, _, dim = x.shape
    scans, _, state = A.shape
    y = x.new_empty((batch, pixels, dim) if merge else (batch, scans, dim, pixels))
    if not save_states:
        return y, x.new_empty(0, dtype=torch.float32)
    rows, columns = _plain.to_paths(paths)[0].grid(size[0], size[1])
    chunks = (rows * columns + _plain.CHUNK - 1) // _plain.CHUNK
    return y, x.new_empty((batch, scans, chunks + 1, state, dim), dtype=torch.float32)


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """Return `grad` in the dtype and the strides of `torch.empty_like(like)`, as the fake implementation promises."""
    if grad.dtype == like.dtype and grad.stride() == torch.empty_like(like, device="meta").stride():
        return grad
    return torch.empty_like(like).copy_(grad)


@torch.library.custom_op("mixerzoo::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad: Tensor,
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    states: Tensor,
    size: list[int],
    paths: list[int],
    softplus: bool,
    merge: bool,
) -> list[Tensor]:
    """Return the gradients of the tensors before `states` that are not None, in order."""
    inputs = (x, delta, projected, dt_weight, dt_bias, A, D)
    with torch.autocast(x.device.type, enabled=False):
        implementation, tensors = _implementation(x), (grad, *inputs)
        if implementation is _native:
            tensors = tuple(map(_single, tensors))
        grads = implementation.backward(*tensors, states, (size[0], size[1]), paths, softplus, merge)
    return [_laid_out(g, t) for g, t in zip(grads, inputs, strict=True) if t is not None]


@_selective_scan_backward.register_fake
def _(grad, x, delta, projected, dt_weight, dt_bias, A, D, states, size, paths, softplus, merge):
    return [torch.empty_like(t) for t in (x, delta, projected, dt_weight, dt_bias, A, D) if t is not None]


def _save(ctx, inputs, output) -> None:
    *tensors, size, paths, softplus, merge, save_states = inputs
    if not save_states:
        raise RuntimeError("mixerzoo::selective_scan needs save_states=True where gradients are wanted")
    ctx.save_for_backward(*tensors, output[1])
    ctx.size, ctx.paths, ctx.softplus, ctx.merge = size, paths, softplus, merge
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    *inputs, states = ctx.saved_tensors
    grads = iter(
        torch.ops.mixerzoo.selective_scan_backward(grad, *inputs, states, ctx.size, ctx.paths, ctx.softplus, ctx.merge)
    )
    return *(None if tensor is None else next(grads) for tensor in inputs), None, None, None, None, None


_selective_scan.register_autograd(_differentiate, setup_context=_save)
