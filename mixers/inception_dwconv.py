"""Inception depth-wise convolution: small square, row and column filters on a few channels each, the rest unchanged.

Paper: Yu et al., "InceptionNeXt: When Inception Meets ConvNeXt" (CVPR 2024, arXiv 2303.16900); code
github.com/sail-sg/inceptionnext. The models are timm's (`inception_next_tiny` and others); this module is their mixer
with the same parameter names, so weights can be exchanged.

What is unusual: the channels are ordered identity, square, row, column, and a branch has the integer part of `dim *
branch_ratio` channels. `dilation` applies to the square and both bands.
"""

import torch
from torch import Tensor, nn

from .depthwise_conv import DepthwiseConv2d


class InceptionDWConv(nn.Module):
    """Apply square, row and column depth-wise convolutions to parts of the channels of [B, C, H, W], any memory format.

    Args:
        square_kernel_size: side of the square filters, odd.
        band_kernel_size: length of the row and column filters, odd.
        branch_ratio: fraction of the channels in each of the three branches, above 0 and at most 1 / 3.
        dilation: distance between the taps of all filters.
    """

    def __init__(
        self,
        dim: int,
        *,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = int(dim * branch_ratio)
        if width < 1 or 3 * width > dim:
            raise ValueError(
                f"three branches of dim * branch_ratio channels need 1 to dim // 3 = {dim // 3} channels each; "
                f"got dim {dim} and branch_ratio {branch_ratio}, which give {width}"
            )

        def branch(kernel_size: int | tuple[int, int], steps: int | tuple[int, int]) -> DepthwiseConv2d:
            return DepthwiseConv2d(width, kernel_size, dilation=steps, device=device, dtype=dtype)

        self.dwconv_hw = branch(square_kernel_size, dilation)
        self.dwconv_w = branch((1, band_kernel_size), (1, dilation))
        self.dwconv_h = branch((band_kernel_size, 1), (dilation, 1))
        self.dim, self.split_sizes = dim, [dim - 3 * width, width, width, width]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"needed [B, {self.dim} channels, H, W]; got shape {list(x.shape)}")
        rest, square, row, column = x.split(self.split_sizes, dim=1)
        return torch.cat([rest, self.dwconv_hw(square), self.dwconv_w(row), self.dwconv_h(column)], dim=1)
