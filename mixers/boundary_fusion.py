"""Boundary guided adaptive fusion (BGAF): favour details at boundaries and context elsewhere, and add both.

    p, i = f_p(details), f_i(context)
    out  = f(e * p + (1 - e) * i + p + i)        e = sigmoid(boundary)

Paper: "BEVANet" (ICIP 2025, arXiv 2508.07300), after the Bag of PIDNet (CVPR 2023, arXiv 2206.02066). Code:
github.com/maomao0819/BEVANet (MIT).

What is unusual: each f is batch norm, ReLU, 3 x 3 convolution, in this order. The boundary has one map per channel; it
is not the boundary image that the auxiliary head predicts.
"""

import torch
from torch import Tensor, nn

from .pyramid_pooling import norm_act_conv


class BGAF(nn.Module):
    """Fuse details, context and boundary, [B, C, H, W] each, into [B, C, H, W]."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1; got {dim}")
        self.dim = dim
        self.conv_p = norm_act_conv(dim, dim, 3, device=device, dtype=dtype)
        self.conv_i = norm_act_conv(dim, dim, 3, device=device, dtype=dtype)
        self.out = norm_act_conv(dim, dim, 3, device=device, dtype=dtype)

    def forward(self, details: Tensor, context: Tensor, boundary: Tensor) -> Tensor:
        if details.dim() != 4 or details.shape[1] != self.dim:
            raise ValueError(f"needed [B, {self.dim}, H, W]; got shape {list(details.shape)}")
        if context.shape != details.shape or boundary.shape != details.shape:
            raise ValueError(
                "needed three maps of one shape; got "
                f"{list(details.shape)}, {list(context.shape)} and {list(boundary.shape)}"
            )
        p, i = self.conv_p(details), self.conv_i(context)
        edge = boundary.sigmoid()
        return self.out(edge * p + (1 - edge) * i + (p + i))

    def extra_repr(self) -> str:
        return f"{self.dim}"
