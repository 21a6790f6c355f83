"""Linear layers followed by a batch norm, which `timm.utils.reparameterize_model` fuses into one layer.

What is unusual: `fuse()` preserves dtype, device, `requires_grad` and training mode. With the running statistics, the
fused layer equals the two layers in evaluation mode up to rounding, and it trains and exports like any layer.
"""

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .depthwise_conv import DepthwiseConv2d
from .dilated_reparam import fold_norm, statistics_of
from .row_conv import RowConv2d


@torch.no_grad()
def _folded(layer: Any, norm: Any) -> dict[str, nn.Parameter]:
    """Return weight and bias of the layer with the norm folded in."""
    old = layer.weight
    weight, bias = fold_norm(old, None, *statistics_of(norm))
    return {
        "weight": nn.Parameter(weight.to(old.dtype), old.requires_grad),
        "bias": nn.Parameter(bias.to(old.dtype), old.requires_grad),
    }


class ConvNorm(nn.Module):
    """Apply a bias-free convolution, padded by half its kernel, and a batch norm; [B, C, H, W] in any memory format.

    Args:
        kernel_size: odd.
        depthwise: one filter per channel; `dim` and `out_dim` must be equal.
        norm_weight: initial weight of the norm.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        depthwise: bool = False,
        norm_weight: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0 or (depthwise and dim != out_dim):
            raise ValueError(
                f"kernel_size must be odd, and a depth-wise convolution keep its channels; got kernel_size "
                f"{kernel_size}, dim {dim} and out_dim {out_dim}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_weight = norm_weight
        if depthwise and stride == 1:
            self.conv: nn.Conv2d = DepthwiseConv2d(dim, kernel_size, bias=False, **dd)
        elif kernel_size == 1 and stride == 1:
            self.conv = RowConv2d(dim, out_dim, 1, bias=False, **dd)
        else:
            groups, padding = dim if depthwise else 1, kernel_size // 2
            self.conv = nn.Conv2d(
                dim, out_dim, kernel_size, stride=stride, padding=padding, groups=groups, bias=False, **dd
            )
        self.norm = nn.BatchNorm2d(out_dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the norm's weight; the layers initialise themselves."""
        nn.init.constant_(self.norm.weight, self.norm_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> nn.Conv2d:
        """Return one convolution of the same kind with the norm folded in."""
        fused = self.conv
        for name, parameter in _folded(self.conv, self.norm).items():
            setattr(fused, name, parameter)
        return fused


class LinearNorm(nn.Module):
    """Apply a bias-free linear layer and a batch norm of its outputs; [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def fuse(self) -> nn.Linear:
        """Return one linear layer with the norm folded in."""
        fused = self.linear
        for name, parameter in _folded(self.linear, self.norm).items():
            setattr(fused, name, parameter)
        return fused


for _module in (ConvNorm, LinearNorm):  # not as a decorator, which would hide the classes' types
    register_notrace_module(_module)
