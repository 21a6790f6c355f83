"""Compute depth-wise convolution with PyTorch operators: directly in either memory format, or dilated ones as dense.

The lattice rewrite: a convolution with dilation d never mixes positions whose row or column indices differ modulo d.
The map therefore decomposes into d * d interleaved lattices, and on each of them the convolution is dense: gather the
lattices into the batch, convolve, scatter back. The sums are equal term by term. The two copies of the map pay off
because no library has a fast path for dilated depth-wise convolutions.
"""

import functools
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]
Method = Literal["direct", "channels_last", "lattice"]


def same_padding(weight: Tensor, dilation: Pair) -> Pair:
    """Return the zero padding of each side that preserves the map size."""
    return dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2)


def direct(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair) -> Tensor:
    """Define the convolution by one PyTorch call: [B, C, H, W] to [B, C, H, W], any dtype, device or symbolic size."""
    return F.conv2d(x, weight, bias, padding=same_padding(weight, dilation), dilation=dilation, groups=weight.shape[0])


def crop(weight: Tensor, size: Pair, dilation: Pair) -> Tensor:
    """Drop the taps of `weight` that fall outside a map of `size` from every position."""
    reach = (size[0] - 1) // dilation[0], (size[1] - 1) // dilation[1]
    cut = max(weight.shape[2] // 2 - reach[0], 0), max(weight.shape[3] // 2 - reach[1], 0)
    if cut == (0, 0):
        return weight
    return weight[:, :, cut[0] : weight.shape[2] - cut[0], cut[1] : weight.shape[3] - cut[1]]


def _lattice_rows(batch: int, size: Pair, dilation: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the flat map row of each lattice position (one past the end: padding), and the inverse mapping."""
    (height, width), (d_y, d_x) = size, dilation
    rows, columns = (height + d_y - 1) // d_y, (width + d_x - 1) // d_x

    def count(n: int, axes_after: int) -> Tensor:
        return torch.arange(n, device=device).view(-1, *[1] * axes_after)

    image = count(batch, 2)
    y = count(d_y, 4) + d_y * count(rows, 1)  # [d_y, d_x, batch, rows, columns]
    x = count(d_x, 3) + d_x * count(columns, 0)
    gather = torch.where((y < height) & (x < width), (image * height + y) * width + x, batch * height * width)

    y, x = count(height, 1), count(width, 0)  # [batch, height, width]
    lattice = (y % d_y * d_x + x % d_x) * batch + image
    scatter = (lattice * rows + y // d_y) * columns + x // d_x
    return gather.flatten(), scatter.flatten()


_remembered_rows = functools.lru_cache(maxsize=16)(_lattice_rows)


def _rows_of(shape: torch.Size, dilation: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    batch, _, height, width = shape
    is_static = all(isinstance(size, int) for size in shape)  # while exporting, sizes may be symbols
    return (_remembered_rows if is_static else _lattice_rows)(batch, (height, width), dilation, device)


def to_lattices(x: Tensor, dilation: Pair) -> Tensor:
    """Rearrange [B, C, H, W] to [d_y * d_x * B, C, ceil(H / d_y), ceil(W / d_x)], channels_last."""
    batch, channels, height, width = x.shape
    gather, _ = _rows_of(x.shape, dilation, x.device)
    rows = F.pad(x.permute(0, 2, 3, 1).reshape(-1, channels), (0, 0, 0, 1))
    d_y, d_x = dilation
    shape = (d_y * d_x * batch, (height + d_y - 1) // d_y, (width + d_x - 1) // d_x, channels)
    return rows.index_select(0, gather).view(shape).permute(0, 3, 1, 2)


def from_lattices(x: Tensor, shape: torch.Size, dilation: Pair) -> Tensor:
    """Invert `to_lattices` for a map of the given shape, channels_last."""
    batch, channels, height, width = shape
    _, scatter = _rows_of(shape, dilation, x.device)
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, scatter)
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def lattice(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair) -> Tensor:
    """Compute the sums of `direct` by dense convolutions on the lattices, channels_last."""
    lattices = direct(to_lattices(x, dilation), weight, bias, (1, 1))
    return from_lattices(lattices, x.shape, dilation)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return channels_last if the channels of `x` [B, C, H, W], possibly a slice, are adjacent, else contiguous."""
    is_last = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def choose(weight: Tensor, dilation: Pair) -> Method:
    """Return the fastest of the three methods on CPUs; `benchmarks/bench_depthwise_conv.py --rule` remeasures the rule.

    oneDNN has no fast path for dilation, and for tall kernels only one for channels_last.
    """
    taps = weight.shape[2] * weight.shape[3]
    if max(dilation) > 2 or (max(dilation) == 2 and taps > 25):
        return "lattice"
    return "channels_last" if taps > 81 else "direct"


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair, method: Method) -> Tensor:
    """Convolve [B, C, H, W] by `method`, which also determines the memory format of the result."""
    if method == "lattice":
        return lattice(x, weight, bias, dilation)
    if method == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return direct(x, weight, bias, dilation)


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, dilation: Pair, method: Method) -> Tensor:
    """Return the gradient of `weight` [C, 1, rows, columns], computed by `method`."""
    if method == "lattice":
        grad, x, dilation = to_lattices(grad, dilation), to_lattices(x, dilation), (1, 1)
    elif method == "channels_last":
        grad, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad, x))
    padding, channels = list(same_padding(weight, dilation)), weight.shape[0]
    _, result, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, list(dilation), False, [0, 0], channels, [False, True, False]
    )
    return result
