"""The public functions of `mixerzoo.kernels.depthwise_conv`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _runtime
from . import _operator, _plain


def _check(x: Tensor, **named: Tensor | None) -> None:
    """Raise unless `x` is a floating-point map and every named tensor has its device and dtype."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be [batch, channels, height, width], floating-point; got shape {tuple(x.shape)}, {x.dtype}"
        )
    for name, tensor in named.items():
        if tensor is None or (tensor.dtype is x.dtype and tensor.device == x.device):
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one to the other's device")
        if tensor.dtype != x.dtype and not _runtime.is_autocast(x):
            raise ValueError(f"{name} is {tensor.dtype} and x {x.dtype}; convert one, or use torch.autocast")


def _check_filters(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    channels = x.shape[1]
    if weight.ndim != 4 or weight.shape[:2] != (channels, 1) or not all(side % 2 for side in weight.shape[2:]):
        raise ValueError(
            f"weight must be [{channels}, 1, rows, columns] with odd sides, one filter for each channel of x; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}], one value for each channel of x; got {tuple(bias.shape)}")


def _dilation_pair(dilation: int | tuple[int, int]) -> _plain.Pair:
    steps = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    if len(steps) != 2 or not all(isinstance(step, int) and step >= 1 for step in steps):
        raise ValueError(f"dilation must be at least 1; got {dilation}, needed an integer or (rows, columns)")
    return steps[0], steps[1]


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int | tuple[int, int] = 1
) -> Tensor:
    """Convolve each channel with its own filter, with stride 1 and zero padding that preserves the map size.

    The result is differentiable once, because its backward pass is itself a custom operator.

    Args:
        x: [B, C, H, W], in any memory format. The result has the memory format of `x`; it is contiguous if `x` is
            neither contiguous nor channels_last.
        weight: [C, 1, rows, columns], odd sides from 1; made for 3 to 53.
        bias: [C].
        dilation: distance between taps, one number or (rows, columns).

    Raises:
        ValueError: if shapes, devices or dtypes are inconsistent, a side is even, or a dilation is below 1.
    """
    pair = (1, 1) if dilation == 1 else _dilation_pair(dilation)
    _check(x, weight=weight, bias=bias)
    _check_filters(x, weight, bias)
    if _runtime.wants_plain_ops():
        return _plain.direct(x, weight, bias, pair)
    if pair == (1, 1) and weight.shape[2] * weight.shape[3] <= 9:  # PyTorch's own kernel is the fastest here
        return _plain.direct(x, weight, bias, pair).contiguous(memory_format=_plain.memory_format(x))
    x = _runtime.as_autocast_wants(x)
    if _runtime.needs_operator(x, weight, bias):
        return torch.ops.mixerzoo.depthwise_conv2d(x, weight, bias, list(pair))
    return _operator.convolve(x, weight, bias, pair)


def large_kernel_attention(
    x: Tensor,
    w5: Tensor,
    w7d3: Tensor,
    w1: Tensor,
    b5: Tensor | None = None,
    b7d3: Tensor | None = None,
    b1: Tensor | None = None,
) -> Tensor:
    """Return x * conv1(conv7(conv5(x))), the gate of VAN: depth-wise 5 x 5, depth-wise 7 x 7 dilated by 3, then 1 x 1.

    The result is differentiable once. Two maps are saved for the backward pass; the chain of PyTorch operators saves
    five.

    Args:
        x: [B, C, H, W], in any memory format; the result has the same format.
        w5, w7d3, w1: [C, 1, 5, 5], [C, 1, 7, 7], [C, C, 1, 1].
        b5, b7d3, b1: the biases, [C] each.

    Raises:
        ValueError: if shapes, devices or dtypes are inconsistent.
    """
    _check(x, w5=w5, w7d3=w7d3, w1=w1, b5=b5, b7d3=b7d3, b1=b1)
    for weight, bias, side in ((w5, b5, 5), (w7d3, b7d3, 7)):
        _check_filters(x, weight, bias)
        if weight.shape[2:] != (side, side):
            raise ValueError(f"needed a {side} x {side} filter for each channel; got weight {tuple(weight.shape)}")
    channels = x.shape[1]
    if w1.shape != (channels, channels, 1, 1) or (b1 is not None and b1.shape != (channels,)):
        shapes = tuple(w1.shape), None if b1 is None else tuple(b1.shape)
        raise ValueError(f"w1 must be [{channels}, {channels}, 1, 1] and b1 [{channels}] or None; got {shapes}")
    if _runtime.wants_plain_ops():
        spatial = _plain.direct(_plain.direct(x, w5, b5, (1, 1)), w7d3, b7d3, (3, 3))
        return x * F.conv2d(spatial, w1, b1)
    x = _runtime.as_autocast_wants(x)
    if _runtime.needs_operator(x, w5, w7d3, w1, b5, b7d3, b1):
        return torch.ops.mixerzoo.large_kernel_attention(x, w5, w7d3, w1, b5, b7d3, b1)[0]
    return _operator.attend(x, w5, w7d3, w1, b5, b7d3, b1)[0]
