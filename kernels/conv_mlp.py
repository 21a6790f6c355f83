"""Apply an MLP with a depth-wise convolution inside, as in PVT v2, VAN and LITv2.

    y = fc2(gelu(depthwise(fc1(x))))

Paper: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer" (CVMJ 2022, arXiv 2106.13797).

What is unusual: inference on the CPU never materialises the whole hidden map, which is four to eight times as large as
`x`. Neither the convolution nor GELU mixes channels, so a few images and hidden channels at a time, few enough to stay
in the cache, are computed, convolved and accumulated into the result. Writing and reading the whole map, and having the
operating system clear its pages, can take longer than the arithmetic. Only the order of summation differs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._runtime import wants_plain_ops
from .depthwise_conv import _native, _plain

PART = 384 * 1024
"""Elements of one part of the hidden map: 1.5 MiB, which fits the second-level caches of a few cores."""

GRAIN = 32
"""Channels of a part are a multiple of this."""

SMALL_MAP = 400
"""Number of positions up to which a map counts as small for `_depthwise`."""


def conv_mlp_reference(x: Tensor, w1: Tensor, b1: Tensor, w_dw: Tensor, b_dw: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Define the result of `conv_mlp`; the arguments are those of `conv_mlp`."""
    hidden = F.linear(x, w1, b1).permute(0, 3, 1, 2)
    hidden = _plain.direct(hidden, w_dw, b_dw, (1, 1))
    return F.linear(F.gelu(hidden.permute(0, 2, 3, 1)), w2, b2)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve a channels_last map [B, C, H, W]; on small maps, avoid oneDNN's call overhead, which would dominate."""
    if x.shape[2] * x.shape[3] <= SMALL_MAP and _native.is_available():
        return _native.forward(x, weight, bias, (1, 1), torch.channels_last)
    return _plain.direct(x, weight, bias, (1, 1))


def _by_parts(x: Tensor, w1: Tensor, b1: Tensor, w_dw: Tensor, b_dw: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Compute `conv_mlp` in parts for a float32 map on the CPU, without gradients."""
    batch, height, width, _ = x.shape
    hidden = w1.shape[0]
    images = max(1, PART // (height * width * hidden))
    largest = max(1, PART // (images * height * width) // GRAIN) * GRAIN
    parts = -(-hidden // largest)
    channels = -(-hidden // (parts * GRAIN)) * GRAIN  # equal parts, up to the grain
    out = x.new_empty(batch, height, width, w2.shape[0])
    for first in range(0, batch, images):
        image_part, result = x[first : first + images], out[first : first + images].flatten(0, 2)
        for start in range(0, hidden, channels):
            part = slice(start, start + channels)
            h = _depthwise(F.linear(image_part, w1[part], b1[part]).permute(0, 3, 1, 2), w_dw[part], b_dw[part])
            h = torch.ops.aten.gelu_(h.permute(0, 2, 3, 1)).flatten(0, 2)
            if start == 0:
                torch.addmm(b2, h, w2[:, part].t(), out=result)
            else:
                result.addmm_(h, w2[:, part].t())
    return out


def goes_by_parts(x: Tensor) -> bool:
    """Return whether `conv_mlp` avoids materialising the whole hidden map of `x` [B, H, W, C].

    A small map is then a single part.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or wants_plain_ops():
        return False
    return not torch.is_autocast_enabled("cpu") and x.numel() > 0


def conv_mlp(x: Tensor, w1: Tensor, b1: Tensor, w_dw: Tensor, b_dw: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Return `fc2(gelu(depthwise(fc1(x))))`, with exact GELU and zero padding that preserves the map size.

    Args:
        x: [B, H, W, C].
        w1, b1: [hidden, C] and [hidden].
        w_dw, b_dw: [hidden, 1, rows, columns], odd sides, and [hidden].
        w2, b2: [C', hidden] and [C'].

    Returns:
        [B, H, W, C'].

    Raises:
        ValueError: if the shapes are inconsistent.
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
