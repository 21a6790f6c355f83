"""The public functions of `mixerzoo.kernels.depthwise_conv`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _runtime
from . import _operator, _plain  # noqa: F401  (registers the operators)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: _plain.Pair) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, channels, height, width]; got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if weight.ndim != 4 or weight.shape[:2] != (channels, 1) or not all(side % 2 for side in weight.shape[2:]):
        raise ValueError(
            f"weight must be [{channels}, 1, rows, columns] with odd sides, one filter for each channel of x; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}], one value for each channel of x; got {tuple(bias.shape)}")
    if min(dilation) < 1:
        raise ValueError(f"dilation must be at least 1; got {dilation}")


def _as_autocast_wants(x: Tensor) -> Tensor:
    """`x` in the data type in which PyTorch's own convolutions would take it."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int | tuple[int, int] = 1
) -> Tensor:
    """Convolve each channel with its own filter; stride 1, zero padding that keeps the size of the map.

    Args:
        x: [B, C, H, W], in any memory format; the result has the same.
        weight: [C, 1, rows, columns], odd sides from 1; made for 3 to 53.
        bias: [C].
        dilation: distance between taps, one number or (rows, columns).

    Raises:
        ValueError: for shapes that do not belong together, even sides, or a dilation below 1.
    """
    pair = (dilation, dilation) if isinstance(dilation, int) else (dilation[0], dilation[1])
    _check(x, weight, bias, pair)
    is_small = pair == (1, 1) and weight.shape[2] * weight.shape[3] <= 9  # nothing beats PyTorch's own there
    if is_small or _runtime.wants_plain_ops():
        return _plain.direct(x, weight, bias, pair)
    return torch.ops.mixerzoo.depthwise_conv2d(_as_autocast_wants(x), weight, bias, list(pair))


def large_kernel_attention(
    x: Tensor,
    w5: Tensor,
    w7d3: Tensor,
    w1: Tensor,
    b5: Tensor | None = None,
    b7d3: Tensor | None = None,
    b1: Tensor | None = None,
) -> Tensor:
    """x * conv1(conv7(conv5(x))), the gate of VAN: 5 x 5, then 7 x 7 with dilation 3, both depth-wise, then 1 x 1.

    Keeps two maps for the backward; the chain of PyTorch's operators keeps five.

    Args:
        x: [B, C, H, W], in any memory format; the result has the same.
        w5, w7d3, w1: [C, 1, 5, 5], [C, 1, 7, 7], [C, C, 1, 1].
        b5, b7d3, b1: their biases, [C] each.

    Raises:
        ValueError: for shapes that do not belong together.
    """
    for weight, bias, side in ((w5, b5, 5), (w7d3, b7d3, 7)):
        _check(x, weight, bias, (1, 1))
        if weight.shape[2:] != (side, side):
            raise ValueError(f"needed a {side} x {side} filter for each channel; got weight {tuple(weight.shape)}")
    channels = x.shape[1]
    if w1.shape != (channels, channels, 1, 1) or (b1 is not None and b1.shape != (channels,)):
        shapes = tuple(w1.shape), None if b1 is None else tuple(b1.shape)
        raise ValueError(f"w1 must be [{channels}, {channels}, 1, 1] and b1 [{channels}] or None; got {shapes}")
    if _runtime.wants_plain_ops():
        spatial = _plain.direct(_plain.direct(x, w5, b5, (1, 1)), w7d3, b7d3, (3, 3))
        return x * F.conv2d(spatial, w1, b1)
    return torch.ops.mixerzoo.large_kernel_attention(_as_autocast_wants(x), w5, w7d3, w1, b5, b7d3, b1)[0]
