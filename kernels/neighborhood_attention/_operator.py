"""Register `mixerzoo::neighborhood_attention` with its backward operator, and choose the implementation of each.

Both always take three spatial axes, [batch, Z, Y, X, heads, head_dim]; fewer axes are padded with leading axes of 1.
"""

import torch
from torch import Tensor

from .. import _runtime
from . import _native, _plain
from ._geometry import Window, Windows


def _windows(kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool]) -> Windows:
    """Return one `Window` per axis from the operator's flat arguments."""
    return tuple(Window(*axis) for axis in zip(kernel_size, stride, dilation, is_causal, strict=True))


def _use_triton(query: Tensor) -> bool:
    if not _runtime.runs_triton(query):
        return False
    from . import _triton  # imported on use: importing Triton is slow, and not every platform has it

    return _triton.supports(query)


def _use_native(query: Tensor) -> bool:
    return query.dtype != torch.float64 and query.device.type == "cpu" and _native.is_available()


@torch.library.custom_op("mixerzoo::neighborhood_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    windows = _windows(kernel_size, stride, dilation, is_causal)
    if _use_triton(query):
        from . import _triton

        return _triton.forward(query, key, value, rpb, windows, scale)
    if _use_native(query):
        q, k, v = (tensor.float() for tensor in (query, key, value))
        table = None if rpb is None else rpb.float()
        out, lse = _native.forward(q, k, v, table, kernel_size, stride, dilation, is_causal, scale)
        return out.to(query.dtype), lse
    return _plain.forward_by_image(query, key, value, rpb, windows, scale)


@_forward.register_fake
def _(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale):
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=dtype)


@torch.library.custom_op("mixerzoo::neighborhood_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and rpb (empty if there is none)."""
    windows = _windows(kernel_size, stride, dilation, is_causal)
    if _use_triton(query):
        from . import _triton

        grads = _triton.backward(grad_out, query, key, value, rpb, lse, delta, windows, scale)
    elif _use_native(query):
        g, q, k, v = (tensor.float() for tensor in (grad_out, query, key, value))
        table = None if rpb is None else rpb.float()
        geometry = (kernel_size, stride, dilation, is_causal, scale)
        grads = _native.backward(g, q, k, v, table, lse.float(), delta.float(), *geometry)
    else:
        grads = _plain.backward_by_image(grad_out, query, key, value, rpb, lse, delta, windows, scale)
    grad_query, grad_key, grad_value = (grad.to(query.dtype) for grad in grads[:3])
    grad_rpb = query.new_empty(0) if rpb is None or grads[3] is None else grads[3].to(rpb.dtype)
    return grad_query, grad_key, grad_value, grad_rpb


@_backward.register_fake
def _(grad_out, query, key, value, rpb, lse, delta, kernel_size, stride, dilation, is_causal, scale):
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    return (*grads, query.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape))


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, rpb, *ctx.geometry = inputs
    ctx.save_for_backward(query, key, value, rpb, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    query, key, value, rpb, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    delta = (out.to(lse.dtype) * grad_out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    *grads, grad_rpb = torch.ops.mixerzoo.neighborhood_attention_backward(
        grad_out, query, key, value, rpb, lse, delta, *ctx.geometry
    )
    return *grads, None if rpb is None else grad_rpb, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
