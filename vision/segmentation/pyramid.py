"""Maps of four sizes out of a backbone whose maps all have one.

H. Bao et al.: BEiT: BERT Pre-Training of Image Transformers, ICLR 2022, https://arxiv.org/abs/2106.08254, whose
segmentation code Vim's is made from (https://github.com/hustvl/Vim, seg/backbone/vim.py): of four blocks' outputs the
first is enlarged four times and the second twice by transposed convolutions, the third stays, the last is pooled.
Parameter names are Vim's, where the four belong to the backbone; mmsegmentation's Feature2Pyramid has the same parts.

Unusual: pooling rounds up, so that a map of one position stays one. At the published sizes nothing is left over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .features import LEVELS

FINEST = 4
"""Pixels per position that the first map comes closest to, along each axis."""


class FeaturePyramid(nn.Module):
    """Four maps [B, C_i, H, W], or one to make all of, to maps whose sides are halved from one to the next.

    Args:
        reduction: pixels of the picture per position of the maps: 16 gives strides 4, 8, 16 and 32, 14 the powers of
            two nearest to it, 3.5 to 28.
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
    """What doubles the sides of a map so many times, or halves them."""
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
