"""Deep large kernel pyramid pooling (DLKPPM): combine a map with four pooled versions of it and large-kernel attention.

    y0 = f0(x)
    y1 = p1(up(f1(5 x 5 means, stride 2)) + y0)      y3 = p3(y0 + scale * attention(norm(y0)) + y2)
    y2 = p2(up(f2(9 x 9 means, stride 4)) + y1)      y4 = p4(up(f4(2 x 2 means of quarters)) + y3)
                                                     y5 = p5(mean of all: f5 + y4)
    out = compress([y0 … y5]) + shortcut(x)          attention: LSKA 35 x 35 between two projections

Paper: "BEVANet" (ICIP 2025, arXiv 2508.07300), after DDRNet's DAPPM (arXiv 2101.06085). Code:
github.com/maomao0819/BEVANet (MIT).

What is unusual:
* Each f, p, compress and shortcut is batch norm, ReLU, convolution, in this order.
* Averages near the border include the zero padding. The quarters overlap by one line if a side is odd, as in
  torch.nn.AdaptiveAvgPool2d; they are slices, so that exported programs accept any size.
* The global average passes through batch norm, so training needs at least two images per batch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .row_conv import RowConv2d
from .separable_kernel_attention import LSKA, GatedProjections


def norm_act_conv(
    in_dim: int,
    out_dim: int,
    kernel_size: int,
    *,
    dilation: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Return batch norm, ReLU and a bias-free convolution that preserves the map size."""
    if kernel_size == 1:
        conv: nn.Conv2d = RowConv2d(in_dim, out_dim, 1, bias=False, device=device, dtype=dtype)
    else:
        padding = dilation * (kernel_size // 2)
        conv = nn.Conv2d(
            *(in_dim, out_dim, kernel_size),
            padding=padding,
            dilation=dilation,
            bias=False,
            device=device,
            dtype=dtype,
        )
    return nn.Sequential(nn.BatchNorm2d(in_dim, device=device, dtype=dtype), nn.ReLU(inplace=True), conv)


def pool_quarters(x: Tensor) -> Tensor:
    """Average each quarter of a map, [B, C, H, W] to [B, C, 2, 2], as adaptive average pooling does."""
    height, width = x.shape[2], x.shape[3]
    upper, lower = x[:, :, : (height + 1) // 2], x[:, :, height // 2 :]
    left, right = (width + 1) // 2, width // 2
    quarters = [upper[:, :, :, :left], upper[:, :, :, right:], lower[:, :, :, :left], lower[:, :, :, right:]]
    return torch.stack([quarter.mean((2, 3)) for quarter in quarters], 2).unflatten(2, (2, 2))


class DLKPPM(nn.Module):
    """Apply DLKPPM to a map of any size, [B, in_dim, H, W] to [B, out_dim, H, W].

    Args:
        branch_dim: channels of each of the six branches.
        init_values: initial scale of the attention.
    """

    def __init__(
        self,
        in_dim: int,
        branch_dim: int,
        out_dim: int,
        *,
        kernel_size: int = 35,
        init_values: float = 1e-2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_dim, branch_dim, out_dim) < 1:
            raise ValueError(f"channels must be at least 1; got {in_dim}, {branch_dim} and {out_dim}")
        self.in_dim, self.init_values = in_dim, init_values
        self.full = norm_act_conv(in_dim, branch_dim, 1, device=device, dtype=dtype)
        self.pooled = nn.ModuleList(
            [norm_act_conv(in_dim, branch_dim, 1, device=device, dtype=dtype) for _ in range(4)]
        )
        self.norm = nn.BatchNorm2d(branch_dim, device=device, dtype=dtype)
        gate = LSKA(branch_dim, kernel_size, device=device, dtype=dtype)
        self.attention = GatedProjections(branch_dim, gate, device=device, dtype=dtype)
        self.layer_scale = nn.Parameter(torch.empty(branch_dim, device=device, dtype=dtype))
        self.process = nn.ModuleList(
            [
                norm_act_conv(branch_dim, branch_dim, 3, dilation=dilation, device=device, dtype=dtype)
                for dilation in (2, 2, 1, 1, 1)
            ]
        )
        self.compress = norm_act_conv(6 * branch_dim, out_dim, 1, device=device, dtype=dtype)
        self.shortcut = norm_act_conv(in_dim, out_dim, 1, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the layer scale; the layers initialise themselves."""
        nn.init.constant_(self.layer_scale, self.init_values)

    def _coarser(self, x: Tensor) -> list[Tensor]:
        """Return the four pooled maps, upsampled to [B, branch_dim, H, W]; the global average stays 1 x 1."""
        maps = [
            F.avg_pool2d(x, 5, stride=2, padding=2),
            F.avg_pool2d(x, 9, stride=4, padding=4),
            pool_quarters(x),
            x.mean((2, 3), keepdim=True),
        ]
        size = [x.shape[2], x.shape[3]]
        coarser: list[Tensor] = []
        for i, project in enumerate(self.pooled):
            y = project(maps[i])
            coarser.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False) if i < 3 else y)
        return coarser

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_dim:
            raise ValueError(f"needed [B, {self.in_dim}, H, W]; got shape {list(x.shape)}")
        full = self.full(x)
        attended = torch.addcmul(full, self.attention(self.norm(full)), self.layer_scale.view(-1, 1, 1))
        coarser = self._coarser(x)
        added = [coarser[0], coarser[1], attended, coarser[2], coarser[3]]
        branches = [full]
        for i, process in enumerate(self.process):
            branches.append(process(added[i] + branches[-1]))
        return self.compress(torch.cat(branches, 1)) + self.shortcut(x)
