"""Layers that treat each position alone, of channels_last maps as the rows that those are: faster on a CPU."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import wants_plain_ops


class RowConv2d(nn.Conv2d):
    """A 1 x 1 convolution; on the CPU a product with the rows of a channels_last map, which is the faster there."""

    def forward(self, input: Tensor) -> Tensor:  # named as in torch.nn.Conv2d
        if torch.jit.is_scripting() or input.device.type != "cpu" or wants_plain_ops():
            return F.conv2d(input, self.weight, self.bias)
        else:
            return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


register_notrace_module(RowConv2d)  # not as a decorator, whose type would hide the class


@register_notrace_module
class RowGELU(nn.GELU):
    """GELU of a channels_last map [B, C, H, W] as the rows that it is in memory: contiguous, which PyTorch asks of a
    tensor before it takes its faster kernel on the CPU."""

    def forward(self, input: Tensor) -> Tensor:  # named as in torch.nn.GELU
        return F.gelu(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
