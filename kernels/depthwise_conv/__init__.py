"""Depth-wise convolution with large or dilated kernels, and large kernel attention (LKA), the gating unit of VAN.

    out[b, c, y, x] = bias[c] + sum_{i, j} weight[c, i, j] x[b, c, y + (i - K // 2) d, x + (j - K // 2) d]
    lka(x) = x * conv1x1(depthwise7x7, d = 3 (depthwise5x5(x)))

Papers: Ding et al., "Scaling Up Your Kernels to 31x31" (CVPR 2022, arXiv 2203.06717); Guo et al., "Visual Attention
Network" (arXiv 2202.09741).
"""

from ._functional import depthwise_conv2d, large_kernel_attention

__all__ = ["depthwise_conv2d", "large_kernel_attention"]
