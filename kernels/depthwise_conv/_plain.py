"""Depth-wise convolution by PyTorch operators: directly in either memory format, or dilated ones as dense ones.

The lattice rewrite. A convolution with dilation d never mixes positions whose row or column numbers differ modulo d.
So the map falls apart into d * d interleaved lattices, and on each of them the convolution is a dense one: gather the
lattices into the batch, convolve, scatter back. The sums are the same, term by term. It is worth two copies of the map
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
    """Zeros on each side that keep the size of the map."""
    return dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2)


def direct(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair) -> Tensor:
    """The definition, by one call of PyTorch's; [B, C, H, W] -> the same, for any dtype, device and symbolic size."""
    return F.conv2d(x, weight, bias, padding=same_padding(weight, dilation), dilation=dilation, groups=weight.shape[0])


def crop(weight: Tensor, size: Pair, dilation: Pair) -> Tensor:
    """`weight` without the taps that reach past the far border of a map of `size` from every position."""
    reach = (size[0] - 1) // dilation[0], (size[1] - 1) // dilation[1]
    cut = max(weight.shape[2] // 2 - reach[0], 0), max(weight.shape[3] // 2 - reach[1], 0)
    if cut == (0, 0):
        return weight
    return weight[:, :, cut[0] : weight.shape[2] - cut[0], cut[1] : weight.shape[3] - cut[1]]


def _lattice_rows(batch: int, size: Pair, dilation: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each position of the lattices its row in the map (one past the end: padding), and the other way round."""
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
    known = all(isinstance(size, int) for size in shape)  # while exporting, sizes may be symbols
    return (_remembered_rows if known else _lattice_rows)(batch, (height, width), dilation, device)


def to_lattices(x: Tensor, dilation: Pair) -> Tensor:
    """[B, C, H, W] to [d_y * d_x * B, C, H / d_y, W / d_x], rounded up; channels last."""
    batch, channels, height, width = x.shape
    gather, _ = _rows_of(x.shape, dilation, x.device)
    rows = F.pad(x.permute(0, 2, 3, 1).reshape(-1, channels), (0, 0, 0, 1))
    d_y, d_x = dilation
    shape = (d_y * d_x * batch, (height + d_y - 1) // d_y, (width + d_x - 1) // d_x, channels)
    return rows.index_select(0, gather).view(shape).permute(0, 3, 1, 2)


def from_lattices(x: Tensor, shape: torch.Size, dilation: Pair) -> Tensor:
    """Undoes `to_lattices` for a map of that shape; channels last."""
    batch, channels, height, width = shape
    _, scatter = _rows_of(shape, dilation, x.device)
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, scatter)
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def lattice(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair) -> Tensor:
    """The same sums as `direct`, from dense convolutions; channels last."""
    lattices = direct(to_lattices(x, dilation), weight, bias, (1, 1))
    return from_lattices(lattices, x.shape, dilation)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if the channels of `x` [B, C, H, W] are adjacent, as in a part of such a map, else contiguous."""
    is_last = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def choose(weight: Tensor, dilation: Pair) -> Method:
    """The fastest of the three on CPUs; `benchmarks/bench_depthwise_conv.py --rule` measures anew what this says.

    oneDNN has nothing for dilation, and for tall kernels only a path for channels_last.
    """
    taps = weight.shape[2] * weight.shape[3]
    if max(dilation) > 2 or (max(dilation) == 2 and taps > 25):
        return "lattice"
    return "channels_last" if taps > 81 else "direct"


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair, method: Method) -> Tensor:
    """[B, C, H, W] by that method, which also settles the memory format."""
    if method == "lattice":
        return lattice(x, weight, bias, dilation)
    if method == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return direct(x, weight, bias, dilation)


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, dilation: Pair, method: Method) -> Tensor:
    """Gradient of `weight` [C, 1, rows, columns] by that method."""
    if method == "lattice":
        grad, x, dilation = to_lattices(grad, dilation), to_lattices(x, dilation), (1, 1)
    elif method == "channels_last":
        grad, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad, x))
    padding, channels = list(same_padding(weight, dilation)), weight.shape[0]
    _, result, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, list(dilation), False, [0, 0], channels, [False, True, False]
    )
    return result
