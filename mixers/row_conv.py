"""Position-wise layers that treat a channels_last map as a matrix of rows, which is faster on the CPU."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import wants_plain_ops


class RowConv2d(nn.Conv2d):
    """Apply a 1 x 1 convolution; on the CPU as a matrix product over the positions of a channels_last map."""

    def forward(self, input: Tensor) -> Tensor:  # named as in torch.nn.Conv2d
        if torch.jit.is_scripting() or input.device.type != "cpu" or wants_plain_ops():
            return F.conv2d(input, self.weight, self.bias)
        else:
            return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


register_notrace_module(RowConv2d)  # not as a decorator, which would hide the class's type


@register_notrace_module
class RowGELU(nn.GELU):
    """Apply GELU to a channels_last map [B, C, H, W] as a contiguous view, which enables PyTorch's fast CPU kernel."""

    def forward(self, input: Tensor) -> Tensor:  # named as in torch.nn.GELU
        return F.gelu(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
