"""A feature pyramid of four scales for a backbone whose maps all have one size.

H. Bao et al.: BEiT: BERT Pre-Training of Image Transformers, ICLR 2022, https://arxiv.org/abs/2106.08254, whose
segmentation code Vim's is based on (https://github.com/hustvl/Vim, seg/backbone/vim.py): the outputs of four blocks
are upsampled 4 and 2 times by transposed convolutions, kept, and max-pooled, in this order.
Parameter names are Vim's, where the four belong to the backbone; mmsegmentation's Feature2Pyramid has the same parts.

Unusual: pooling rounds up, so that a map of one position remains one. Published sizes divide evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .features import LEVELS

FINEST = 4
"""Target stride of the first map."""


class FeaturePyramid(nn.Module):
    """Rescales four maps [B, C_i, H, W] of one size, or copies of one map, to a pyramid with strides doubling.

    Args:
        reduction: stride of the input maps. 16 gives strides 4, 8, 16 and 32; 14 gives 3.5, 7, 14 and 28.
    """

    def __init__(self, in_channels: Sequence[int], *, reduction: int) -> None:
        super().__init__()
        if len(in_channels) not in (1, LEVELS):
            raise ValueError(
                f"the pyramid takes {LEVELS} maps or 1, got {len(in_channels)}; choose the blocks by out_indices"
            )
        self.in_channels = tuple(in_channels)
        self.out_channels = self.in_channels if len(in_channels) == LEVELS else self.in_channels * LEVELS
        doublings = round(math.log2(reduction / FINEST))
        self.reductions = tuple(reduction * 2.0 ** (i - doublings) for i in range(LEVELS))
        for i, dim in enumerate(self.out_channels):
            self.add_module(f"fpn{i + 1}", _rescale(dim, doublings - i))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if len(maps) != len(self.in_channels):
            raise ValueError(f"the pyramid was built for {len(self.in_channels)} feature maps; got {len(maps)}")
        maps = maps if len(maps) == LEVELS else [maps[0]] * LEVELS
        return [self.get_submodule(f"fpn{i + 1}")(level) for i, level in enumerate(maps)]


def _rescale(dim: int, doublings: int) -> nn.Module:
    """Make the module that doubles the sides of a map `doublings` times, or halves them if negative."""
    if doublings == 0:
        return nn.Identity()
    if doublings < 0:
        return nn.MaxPool2d(2**-doublings, ceil_mode=True)
    layers: list[nn.Module] = []
    for doubling in range(doublings):
        if doubling:
            layers += [nn.BatchNorm2d(dim), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim, 2, stride=2))
    return nn.Sequential(*layers)
