"""A feature pyramid head.

T.-Y. Lin et al.: Feature Pyramid Networks for Object Detection, CVPR 2017, https://arxiv.org/abs/1612.03144, and the
segmentation branch of A. Kirillov et al.: Panoptic Feature Pyramid Networks, CVPR 2019,
https://arxiv.org/abs/1901.02446.

Unusual: the levels are brought to the finest one at once and added, without the branch's repeated
convolve-and-double steps, which cost most of its time and add nothing for pyramids of four levels. It is a plain
head to build on; parameter names of published checkpoints are not claimed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FPNHead(nn.Module):
    """Maps [B, C_i, H_i, W_i], finest first, to logits [B, num_classes, H_0, W_0]."""

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, channels: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.smooth = nn.ModuleList(_conv_norm_act(channels) for _ in in_channels)
        self.fuse = _conv_norm_act(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        if len(features) != len(self.laterals):
            raise ValueError(f"the head was built for {len(self.laterals)} feature maps; got {len(features)}")
        maps = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        for finer in range(len(maps) - 2, -1, -1):
            maps[finer] = maps[finer] + F.interpolate(maps[finer + 1], size=maps[finer].shape[-2:], mode="nearest")
        size = maps[0].shape[-2:]
        levels = [
            F.interpolate(smooth(level), size=size, mode="bilinear", align_corners=False)
            for smooth, level in zip(self.smooth, maps, strict=True)
        ]
        return self.classify(self.dropout(self.fuse(torch.stack(levels).sum(0))))


def _conv_norm_act(channels: int) -> nn.Sequential:
    # Group norm: segmentation batches are small, and batch statistics of a few pictures are noise.
    groups = next(count for count in (8, 4, 2, 1) if channels % count == 0)
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels), nn.ReLU(inplace=True)
    )
