"""Register `mixerzoo::depthwise_conv2d` and `mixerzoo::large_kernel_attention` with their backward operators, and
choose the implementation of each.

Large kernel attention saves two maps for its backward pass, its input and the output of the second convolution, while
the chain of PyTorch operators saves five; the others are recomputed.

Why its two Triton kernels exist, and when they run (no GPU has timed them yet):
* The 1 x 1 product with the gate in its epilogue reads and writes three maps where the chain moves five. That count is
  exact for channels_last maps in half precision, so there the kernel runs unless it was measured to be slower.
* Both depth-wise convolutions in one launch save a launch and one read of the intermediate map. But Triton reloads the
  map for each of the 25 + 49 taps, which takes more instructions than a convolution with a sliding window. Instruction
  and memory counts therefore do not favour this kernel: it runs only if it was measured to be faster. `_choice.py`
  defines when measurements happen.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _runtime
from . import _choice, _native, _plain
from ._plain import Pair


def _uses_native(x: Tensor) -> bool:
    is_interpreted = _runtime.INTERPRET and _runtime.runs_triton(x)
    return x.device.type == "cpu" and x.dtype != torch.float64 and _native.is_available() and not is_interpreted


def _methods(x: Tensor, weight: Tensor, dilation: Pair) -> list[str]:
    """Return the candidate implementations if the compiled CPU kernel is not used, the default first."""
    triton = ["triton"] if _runtime.runs_triton(x) else []
    if x.device.type != "cpu":
        return ["direct", *(["lattice"] if max(dilation) > 1 else []), *triton]
    return triton or [_plain.choose(weight, dilation)]


def _key(kind: str, x: Tensor, weight: Tensor, dilation: Pair) -> tuple[object, ...]:
    return kind, x.shape, x.dtype, x.device, _plain.memory_format(x), weight.shape, dilation


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair) -> Tensor:
    """Convolve in the dtype and memory format of `x`, regardless of those of the filters."""
    layout = _plain.memory_format(x)
    weight = _plain.crop(weight, (x.shape[2], x.shape[3]), dilation).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if _uses_native(x):  # decided first: the code below takes as long as the convolution of a small map
        offset = None if bias is None else bias.float()
        return _native.forward(x.float(), weight.float(), offset, dilation, layout).to(x.dtype)

    def run(method: Any) -> Tensor:
        if method == "triton":
            from . import _triton  # imported on use: importing Triton is slow, and not every platform has it

            return _triton.forward(x, weight, bias, dilation)
        return _plain.forward(x, weight, bias, dilation, method)

    out = _choice.run_fastest(_key("forward", x, weight, dilation), _methods(x, weight, dilation), run)
    return out.contiguous(memory_format=layout)


def _input_grad(grad: Tensor, weight: Tensor, dilation: Pair) -> Tensor:
    return _convolve(grad, weight.flip(2, 3), None, dilation)


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, dilation: Pair) -> Tensor:
    cropped = _plain.crop(weight, (x.shape[2], x.shape[3]), dilation).to(x.dtype)

    def run(method: Any) -> Tensor:
        if method == "triton":
            from . import _triton

            return _triton.weight_grad(grad, x, cropped, dilation)
        return _plain.weight_grad(grad, x, cropped, dilation, method)

    if _uses_native(x):
        result = _native.weight_grad(grad.float(), x.float(), cropped, dilation)
    else:
        result = _choice.run_fastest(_key("weight_grad", x, weight, dilation), _methods(x, cropped, dilation), run)
    rows, columns = ((whole - part) // 2 for whole, part in zip(weight.shape[2:], cropped.shape[2:], strict=True))
    return F.pad(result, (columns, columns, rows, rows)).to(weight.dtype).contiguous()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair) -> Tensor:
    """Implement the operator `depthwise_conv2d`."""
    if not torch.is_autocast_enabled(x.device.type):
        return _convolve(x, weight, bias, dilation)
    with torch.autocast(x.device.type, enabled=False):
        return _convolve(x, weight, bias, dilation)


@torch.library.custom_op("mixerzoo::depthwise_conv2d", mutates_args=())
def _depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: list[int]) -> Tensor:
    return convolve(x, weight, bias, (dilation[0], dilation[1]))


@_depthwise_conv2d.register_fake
def _(x, weight, bias, dilation):
    return torch.empty_like(x, memory_format=_plain.memory_format(x))


@torch.library.custom_op("mixerzoo::depthwise_conv2d_backward", mutates_args=())
def _depthwise_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: list[int], needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, empty tensors where not needed."""
    pair = (dilation[0], dilation[1])
    grad_x = _input_grad(grad, weight, pair) if needs_x else x.new_empty(0)
    grad_weight = _weight_grad(grad, x, weight, pair) if needs_weight else weight.new_empty(0)
    return grad_x, grad_weight


@_depthwise_conv2d_backward.register_fake
def _(grad, x, weight, dilation, needs_x, needs_weight):
    grad_x = torch.empty_like(grad, memory_format=_plain.memory_format(grad)) if needs_x else x.new_empty(0)
    return grad_x, weight.new_empty(weight.shape if needs_weight else 0)


def _save_convolution(ctx, inputs, output) -> None:
    x, weight, _, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_convolution(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_x, grad_weight = torch.ops.mixerzoo.depthwise_conv2d_backward(
        grad, x, weight, ctx.dilation, needs_x, needs_weight
    )
    grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias, None


_depthwise_conv2d.register_autograd(_differentiate_convolution, setup_context=_save_convolution)


def _spatial(x: Tensor, w5: Tensor, w7d3: Tensor, b5: Tensor | None, b7d3: Tensor | None) -> Tensor:
    """Apply both depth-wise convolutions, in one launch only if that was measured to be faster."""
    if x.device.type == "cpu" and not _runtime.INTERPRET:
        return _convolve(_convolve(x, w5, b5, (1, 1)), w7d3, b7d3, (3, 3))

    def run(method: str) -> Tensor:
        if method == "one launch":
            from . import _triton

            return _triton.lka_spatial(x, w5, w7d3, b5, b7d3).contiguous(memory_format=_plain.memory_format(x))
        return _convolve(_convolve(x, w5, b5, (1, 1)), w7d3, b7d3, (3, 3))

    methods = ["two calls"]
    if _runtime.runs_triton(x):
        methods = ["one launch"] if x.device.type == "cpu" else ["two calls", "one launch"]
    return _choice.run_fastest(_key("lka", x, w7d3, (3, 3)), methods, run)


def _gated(x: Tensor, spatial: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """Return x * conv1x1(spatial)."""

    def run(method: str) -> Tensor:
        if method == "kernel":
            from . import _triton

            return _triton.lka_gate(x, spatial, w1, b1)
        if x.device.type == "cpu" and layout == torch.channels_last:  # a matrix product is faster here
            return F.linear(spatial.permute(0, 2, 3, 1), w1.flatten(1), b1).permute(0, 3, 1, 2).mul_(x)
        return F.conv2d(spatial, w1, b1).mul_(x)

    layout = _plain.memory_format(x)
    methods = ["chain"]
    if _runtime.runs_triton(x):
        is_read_without_copy = layout == torch.channels_last and x.element_size() == 2
        methods = ["kernel", "chain"] if is_read_without_copy or x.device.type == "cpu" else ["chain", "kernel"]
    return _choice.run_fastest(_key("gate", x, w1, (1, 1)), methods, run).contiguous(memory_format=layout)


def attend(
    x: Tensor, w5: Tensor, w7d3: Tensor, w1: Tensor, b5: Tensor | None, b7d3: Tensor | None, b1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Implement the operator `large_kernel_attention`."""
    with torch.autocast(x.device.type, enabled=False):
        spatial = _spatial(x, w5, w7d3, b5, b7d3)
        return _gated(x, spatial, w1.to(x.dtype), None if b1 is None else b1.to(x.dtype)), spatial


@torch.library.custom_op("mixerzoo::large_kernel_attention", mutates_args=())
def _large_kernel_attention(
    x: Tensor, w5: Tensor, w7d3: Tensor, w1: Tensor, b5: Tensor | None, b7d3: Tensor | None, b1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the result, and the input of the 1 x 1 convolution for the backward pass."""
    return attend(x, w5, w7d3, w1, b5, b7d3, b1)


@_large_kernel_attention.register_fake
def _(x, w5, w7d3, w1, b5, b7d3, b1):
    layout = _plain.memory_format(x)
    return torch.empty_like(x, memory_format=layout), torch.empty_like(x, memory_format=layout)


@torch.library.custom_op("mixerzoo::large_kernel_attention_backward", mutates_args=())
def _large_kernel_attention_backward(
    grad: Tensor,
    grad_spatial: Tensor | None,
    spatial: Tensor,
    x: Tensor,
    w5: Tensor,
    w7d3: Tensor,
    w1: Tensor,
    b5: Tensor | None,
    b1: Tensor | None,
    needs_weights: bool,
) -> list[Tensor]:
    """Return the gradients of x, w5, w7d3, w1 and the three biases, or of x alone unless `needs_weights`."""
    weight, bias = w1.to(x.dtype), None if b1 is None else b1.to(x.dtype)
    grad_gate = grad * x
    grad_x = grad * F.conv2d(spatial, weight, bias)
    outer, grad_w1, grad_b1 = torch.ops.aten.convolution_backward(
        grad_gate, spatial, weight, [w1.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [True, needs_weights, needs_weights],
    )  # fmt: skip
    if grad_spatial is not None:
        outer = outer + grad_spatial
    inner = _input_grad(outer, w7d3, (3, 3))
    grad_x += _input_grad(inner, w5, (1, 1))
    grad_x = grad_x.contiguous(memory_format=_plain.memory_format(x))
    if not needs_weights:
        return [grad_x]
    middle = _convolve(x, w5, b5, (1, 1))
    grad_w7d3, grad_w5 = _weight_grad(outer, middle, w7d3, (3, 3)), _weight_grad(inner, x, w5, (1, 1))
    grads = [grad_w1.to(w1.dtype), inner.sum((0, 2, 3)), outer.sum((0, 2, 3)), grad_b1]
    return [grad_x, grad_w5, grad_w7d3, *grads]


@_large_kernel_attention_backward.register_fake
def _(grad, grad_spatial, spatial, x, w5, w7d3, w1, b5, b1, needs_weights):
    grad_x = torch.empty_like(x, memory_format=_plain.memory_format(x))
    if not needs_weights:
        return [grad_x]
    return [grad_x, *(torch.empty_like(w) for w in (w5, w7d3, w1)), *(x.new_empty(x.shape[1]) for _ in range(3))]


def _save_attention(ctx, inputs, output) -> None:
    x, w5, w7d3, w1, b5, _, b1 = inputs
    ctx.save_for_backward(x, w5, w7d3, w1, b5, b1, output[1])
    ctx.set_materialize_grads(False)


def _differentiate_attention(ctx, grad, grad_spatial):
    x, w5, w7d3, w1, b5, b1, spatial = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(x)
    needs = ctx.needs_input_grad
    grads = torch.ops.mixerzoo.large_kernel_attention_backward(
        grad, grad_spatial, spatial, x, w5, w7d3, w1, b5, b1, any(needs[1:])
    )
    return tuple(grads[i] if needed else None for i, needed in enumerate(needs))


_large_kernel_attention.register_autograd(_differentiate_attention, setup_context=_save_attention)
