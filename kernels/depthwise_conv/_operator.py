"""The custom operator `mixerzoo::depthwise_conv2d`, its backward, and which implementation each takes."""

import torch
from torch import Tensor

from . import _native, _plain


def _use_native(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.device.type == "cpu" and _native.is_available()


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: list[int]) -> Tensor:
    pair = (dilation[0], dilation[1])
    if _use_native(x):
        weight = _plain.crop(weight, (x.shape[2], x.shape[3]), pair)
        single = None if bias is None else bias.float()
        return _native.forward(x.float(), weight.float(), single, pair, _plain.memory_format(x)).to(x.dtype)
    return _plain.forward(x, weight, bias, pair)


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, dilation: list[int]) -> Tensor:
    pair = (dilation[0], dilation[1])
    if _use_native(x):
        return _native.weight_grad(grad.float(), x.float(), weight, pair).to(weight.dtype)
    return _plain.weight_grad(grad, x, weight, pair)


@torch.library.custom_op("mixerzoo::depthwise_conv2d", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: list[int]) -> Tensor:
    return _run(x, weight, bias, dilation)


@_forward.register_fake
def _(x, weight, bias, dilation):
    return torch.empty_like(x, memory_format=_plain.memory_format(x))


@torch.library.custom_op("mixerzoo::depthwise_conv2d_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: list[int], needs_input: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; empty where not needed."""
    grad_x = _run(grad, weight.flip(2, 3), None, dilation) if needs_input else x.new_empty(0)
    grad_weight = _weight_grad(grad, x, weight, dilation) if needs_weight else weight.new_empty(0)
    return grad_x, grad_weight


@_backward.register_fake
def _(grad, x, weight, dilation, needs_input, needs_weight):
    grad_x = torch.empty_like(grad, memory_format=_plain.memory_format(grad)) if needs_input else x.new_empty(0)
    return grad_x, weight.new_empty(weight.shape if needs_weight else 0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_x, grad_weight = torch.ops.mixerzoo.depthwise_conv2d_backward(
        grad, x, weight, ctx.dilation, needs_x, needs_weight
    )
    grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
