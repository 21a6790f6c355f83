"""A depth-wise convolution module: a `torch.nn.Conv2d` that runs this library's kernel.

Parameters, their initialisation and the state dict are those of `torch.nn.Conv2d(dim, dim, ..., groups=dim)`, so the
two can load each other's weights.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.depthwise_conv import depthwise_conv2d


def odd_sides(kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) of a filter with a centre; raise ValueError for even sides."""
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else (kernel_size[0], kernel_size[1])
    if any(side < 1 or side % 2 == 0 for side in sides):
        raise ValueError(f"kernel_size must be odd and at least 1, so that a filter has a centre; got {kernel_size}")
    return sides


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: list[int]) -> Tensor:
    """Call `depthwise_conv2d`; in TorchScript, PyTorch's own convolution, so that saved files load without mixerzoo."""
    if torch.jit.is_scripting():
        padding = [dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2)]
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])
    else:
        return depthwise_conv2d(x, weight, bias, dilation=(dilation[0], dilation[1]))


class DepthwiseConv2d(nn.Conv2d):
    """Convolve each channel with its own filter, with stride 1 and size-preserving zero padding.

    Takes and returns [B, C, H, W] in any memory format.

    Args:
        kernel_size: odd, one number or (rows, columns).
        dilation: one number or (rows, columns).
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | tuple[int, int],
        *,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sides = odd_sides(kernel_size)
        steps = (dilation, dilation) if isinstance(dilation, int) else (dilation[0], dilation[1])
        if min(steps) < 1:
            raise ValueError(f"dilation must be at least 1; got {dilation}")
        padding = (steps[0] * (sides[0] // 2), steps[1] * (sides[1] // 2))
        super().__init__(
            dim, dim, sides, padding=padding, dilation=steps, groups=dim, bias=bias, device=device, dtype=dtype
        )

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> "DepthwiseConv2d":
        """Return a module with the given filter [C, 1, rows, columns] and bias [C], with dilation 1."""
        sides = (weight.shape[2], weight.shape[3])
        conv = cls(weight.shape[0], sides, bias=bias is not None, device="meta")
        conv.weight = nn.Parameter(weight)
        if bias is not None:
            conv.bias = nn.Parameter(bias)
        return conv

    def forward(self, input: Tensor) -> Tensor:  # named as in torch.nn.Conv2d
        return convolve(input, self.weight, self.bias, [self.dilation[0], self.dilation[1]])


register_notrace_module(DepthwiseConv2d)  # not as a decorator, which would hide the class's type
