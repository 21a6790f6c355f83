"""Large kernel attention (LKA), the gate of VAN, on maps.

    y = x * conv1(conv_spatial(conv0(x)))       5 x 5, then 7 x 7 with dilation 3, both depth-wise, then 1 x 1

Paper: Guo et al., "Visual Attention Network" (CVMJ 2023, arXiv 2202.09741). Parameters have the names of the authors'
code (github.com/Visual-Attention-Network/VAN-Classification, Apache-2.0): `conv0`, `conv_spatial`, `conv1`.

What is unusual:
* There is no softmax, no sigmoid and no head: the gate is unbounded and the output quadratic in the input. With filters
  of unit gain, float16 overflows (65504) for inputs of standard deviation 72 or more; internal sums are float32, and
  bfloat16 has the range of float32. A network must keep its maps below that: VAN does so by layer scales of 1e-2, and a
  newly initialised van_b3 overflows float16 for layer scales of 0.1 or more.
* The convolutions together have a receptive field of 23 x 23 positions; the paper counts 21 x 21, the decomposition of
  one large kernel.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..kernels.depthwise_conv import large_kernel_attention
from .depthwise_conv import DepthwiseConv2d


@register_notrace_module
class LargeKernelAttention(nn.Module):
    """Multiply a map [B, C, H, W] by its large-kernel gate; the memory format is preserved."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1; got {dim}")
        self.dim = dim
        self.conv0 = DepthwiseConv2d(dim, 5, device=device, dtype=dtype)
        self.conv_spatial = DepthwiseConv2d(dim, 7, dilation=3, device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"needed [B, {self.dim}, H, W]; got shape {list(x.shape)}")
        if torch.jit.is_scripting():
            return x * self.conv1(self.conv_spatial(self.conv0(x)))
        else:
            weights = (self.conv0.weight, self.conv_spatial.weight, self.conv1.weight)
            return large_kernel_attention(x, *weights, self.conv0.bias, self.conv_spatial.bias, self.conv1.bias)

    def extra_repr(self) -> str:
        return f"{self.dim}"
