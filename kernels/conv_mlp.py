"""An MLP with a depth-wise convolution inside, as PVT v2, VAN and LITv2 have it.

    y = fc2(gelu(depthwise(fc1(x))))

Paper: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer" (CVMJ 2022, arXiv 2106.13797).

What is unusual: evaluated on the CPU, the hidden map, four to eight times as large as `x`, never is there as a whole.
Neither the convolution nor GELU mixes channels. So some images and some hidden channels at a time are made, convolved
and added to the result, few enough to stay in the cache. Writing and reading the whole map, and having the system clear
its pages, can take longer than the arithmetic. The sums are the same in another order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._runtime import wants_plain_ops
from .depthwise_conv import _native, _plain

PART = 384 * 1024
"""Numbers of a part of the hidden map: 1.5 MiB, which the second-level caches of a few cores hold."""

GRAIN = 32
"""Parts are multiples of so many channels."""

SMALL_MAP = 400
"""Positions."""


def conv_mlp_reference(x: Tensor, w1: Tensor, b1: Tensor, w_dw: Tensor, b_dw: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The definition; arguments as those of `conv_mlp`."""
    hidden = F.linear(x, w1, b1).permute(0, 3, 1, 2)
    hidden = _plain.direct(hidden, w_dw, b_dw, (1, 1))
    return F.linear(F.gelu(hidden.permute(0, 2, 3, 1)), w2, b2)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of a channels_last map [B, C, H, W]; on small ones a call of oneDNN takes longer than the convolution."""
    if x.shape[2] * x.shape[3] <= SMALL_MAP and _native.is_available():
        return _native.forward(x, weight, bias, (1, 1), torch.channels_last)
    return _plain.direct(x, weight, bias, (1, 1))


def _by_parts(x: Tensor, w1: Tensor, b1: Tensor, w_dw: Tensor, b_dw: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The same for a float32 map on the CPU, without gradients."""
    batch, height, width, _ = x.shape
    hidden = w1.shape[0]
    images = max(1, PART // (height * width * hidden))
    most = max(1, PART // (images * height * width) // GRAIN) * GRAIN
    parts = -(-hidden // most)
    channels = -(-hidden // (parts * GRAIN)) * GRAIN  # alike, as far as the grain allows
    out = x.new_empty(batch, height, width, w2.shape[0])
    for first in range(0, batch, images):
        some, result = x[first : first + images], out[first : first + images].flatten(0, 2)
        for start in range(0, hidden, channels):
            part = slice(start, start + channels)
            h = _depthwise(F.linear(some, w1[part], b1[part]).permute(0, 3, 1, 2), w_dw[part], b_dw[part])
            h = torch.ops.aten.gelu_(h.permute(0, 2, 3, 1)).flatten(0, 2)
            if start == 0:
                torch.addmm(b2, h, w2[:, part].t(), out=result)
            else:
                result.addmm_(h, w2[:, part].t())
    return out


def goes_by_parts(x: Tensor) -> bool:
    """Whether `conv_mlp` of `x` [B, H, W, C] avoids the whole hidden map; a small one is a single part."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or wants_plain_ops():
        return False
    return not torch.is_autocast_enabled("cpu") and x.numel() > 0


def conv_mlp(x: Tensor, w1: Tensor, b1: Tensor, w_dw: Tensor, b_dw: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """`fc2(gelu(depthwise(fc1(x))))`, with exact GELU and zero padding that keeps the size of the map.

    Args:
        x: [B, H, W, C].
        w1, b1: [hidden, C] and [hidden].
        w_dw, b_dw: [hidden, 1, rows, columns], odd sides, and [hidden].
        w2, b2: [C', hidden] and [C'].

    Returns:
        [B, H, W, C'].

    Raises:
        ValueError: for shapes that do not belong together.
    """
    hidden = w1.shape[0]
    fits = x.ndim == 4 and w1.shape[1:] == x.shape[3:] and w_dw.shape[:2] == (hidden, 1) and w2.shape[1] == hidden
    if not fits or not all(side % 2 for side in w_dw.shape[2:]):
        shapes = [tuple(tensor.shape) for tensor in (x, w1, w_dw, w2)]
        raise ValueError(
            "x must be [B, H, W, C], w1 [hidden, C], w_dw [hidden, 1, rows, columns] with odd sides and "
            f"w2 [C', hidden]; got {shapes}"
        )
    if goes_by_parts(x):
        return _by_parts(x, w1, b1, w_dw, b_dw, w2, b2)
    return conv_mlp_reference(x, w1, b1, w_dw, b_dw, w2, b2)
