"""Large kernel attention from band filters: LSKA, and its sparse decomposition with kernel selection (SDLSKA, CKS).

    LSKA(x)   = x * conv1(d_v(d_h(b_v(b_h(x)))))       bands 1 x n, n x 1, then dilated bands 1 x m, m x 1
    SDLSKA(x) = x * conv1(CKS(s, d_h(s), d_v(s)))      with s = n x n, all depth-wise; conv1 is 1 x 1
    CKS(maps) = sum over the maps of map * c * p       c: sigmoid per channel, p: sigmoid per position

Papers: Lau et al., "Large Separable Kernel Attention" (ESWA 2024, arXiv 2309.01439), whose parameter names LSKA has;
"BEVANet" (ICIP 2025, arXiv 2508.07300), which SDLSKA and CKS are from. Code: github.com/maomao0819/BEVANet (MIT).

What is unusual:
* As in `LargeKernelAttention`, the gate is unbounded, so the output is quadratic in the input.
* A kernel of k x k is decomposed into an n and a dilated m that cover at least k; a table lists them (`BANDS`).
* CKS has a global receptive field: its channel gates come from the global average. They pass through 3 x 3 filters, of
  which a 1 x 1 map only uses the centre tap, and through batch norm and ReLU before the sigmoid. So a channel's gate is
  between 1/2 and 1, and training needs at least two images per batch.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .depthwise_conv import DepthwiseConv2d
from .row_conv import RowConv2d, RowGELU

BANDS = {7: (3, 3, 2), 11: (3, 5, 2), 23: (5, 7, 3), 35: (5, 11, 3), 41: (5, 13, 3), 53: (5, 17, 3)}
"""Side of the kernel -> side of the first convolution, taps of the dilated bands, their dilation."""


def _bands(dim: int, kernel_size: int) -> tuple[int, int, int]:
    if dim < 1:
        raise ValueError(f"dim must be at least 1; got {dim}")
    if kernel_size not in BANDS:
        raise ValueError(f"kernel_size must be one of {sorted(BANDS)}; got {kernel_size}")
    return BANDS[kernel_size]


def _check_map(x: Tensor, dim: int) -> None:
    if x.dim() != 4 or x.shape[1] != dim:
        raise ValueError(f"needed [B, {dim}, H, W]; got shape {list(x.shape)}")


@register_notrace_module
class LSKA(nn.Module):
    """Apply large separable kernel attention to [B, C, H, W]; the memory format is preserved.

    Args:
        kernel_size: side of the square kernel that the bands approximate, one of `BANDS`.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 35,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        side, taps, dilation = _bands(dim, kernel_size)
        self.dim, self.kernel_size = dim, kernel_size
        self.conv0h = DepthwiseConv2d(dim, (1, side), device=device, dtype=dtype)
        self.conv0v = DepthwiseConv2d(dim, (side, 1), device=device, dtype=dtype)
        self.conv_spatial_h = DepthwiseConv2d(dim, (1, taps), dilation=dilation, device=device, dtype=dtype)
        self.conv_spatial_v = DepthwiseConv2d(dim, (taps, 1), dilation=dilation, device=device, dtype=dtype)
        self.conv1 = RowConv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_map(x, self.dim)
        bands = self.conv_spatial_v(self.conv_spatial_h(self.conv0v(self.conv0h(x))))
        return x * self.conv1(bands)

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={self.kernel_size}"


@register_notrace_module
class CKS(nn.Module):
    """Apply comprehensive kernel selection: sum three maps [B, C, H, W], weighted per channel and per position.

    Args:
        hidden_dim: bottleneck channels; None for C / 16, at least 32.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1; got {dim}")
        self.dim = dim
        hidden = hidden_dim or max(dim // 16, 32)

        def layers(inward: int, outward: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inward, outward, 1, device=device, dtype=dtype),
                DepthwiseConv2d(outward, 3, device=device, dtype=dtype),
                nn.BatchNorm2d(outward, device=device, dtype=dtype),
                nn.ReLU(inplace=True),
            )

        self.reduce = layers(dim, hidden)
        self.expand = nn.ModuleList([layers(hidden, dim) for _ in range(3)])
        self.squeeze = nn.Conv2d(2, 3, 7, padding=3, device=device, dtype=dtype)

    def forward(self, square: Tensor, horizontal: Tensor, vertical: Tensor) -> Tensor:
        _check_map(square, self.dim)
        if horizontal.shape != square.shape or vertical.shape != square.shape:
            raise ValueError(
                "needed three maps of one shape; got "
                f"{list(square.shape)}, {list(horizontal.shape)} and {list(vertical.shape)}"
            )
        total = square + horizontal + vertical
        pooled = self.reduce(total.mean((2, 3), keepdim=True))
        extremes = torch.cat([total.mean(1, keepdim=True), total.amax(1, keepdim=True)], 1)
        at_square, at_horizontal, at_vertical = self.squeeze(extremes).sigmoid().chunk(3, 1)
        gates = [expand(pooled).sigmoid() for expand in self.expand]
        chosen = square * gates[0] * at_square
        chosen = torch.addcmul(chosen, horizontal * gates[1], at_horizontal)
        return torch.addcmul(chosen, vertical * gates[2], at_vertical)

    def extra_repr(self) -> str:
        return f"{self.dim}"


@register_notrace_module
class SDLSKA(nn.Module):
    """Apply sparsely decomposed large separable kernel attention to [B, C, H, W]; the memory format is preserved.

    Args:
        kernel_size: side of the square kernel that the convolutions approximate, one of `BANDS`.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 35,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        side, taps, dilation = _bands(dim, kernel_size)
        self.dim, self.kernel_size = dim, kernel_size
        self.conv0 = DepthwiseConv2d(dim, side, device=device, dtype=dtype)
        self.conv_spatial_h = DepthwiseConv2d(dim, (1, taps), dilation=dilation, device=device, dtype=dtype)
        self.conv_spatial_v = DepthwiseConv2d(dim, (taps, 1), dilation=dilation, device=device, dtype=dtype)
        self.select = CKS(dim, device=device, dtype=dtype)
        self.conv1 = RowConv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_map(x, self.dim)
        square = self.conv0(x)
        return x * self.conv1(self.select(square, self.conv_spatial_h(square), self.conv_spatial_v(square)))

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={self.kernel_size}"


class GatedProjections(nn.Module):
    """Apply a gate between two 1 x 1 convolutions, with a residual connection around them; [B, C, H, W]."""

    def __init__(
        self,
        dim: int,
        gate: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj_1 = RowConv2d(dim, dim, 1, device=device, dtype=dtype)
        self.act = RowGELU()
        self.spatial_gating_unit = gate
        self.proj_2 = RowConv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(self.act(self.proj_1(x))))
