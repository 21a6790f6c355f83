"""SegFormer's head: a linear layer per map, upsampling to the finest map, and a linear layer that fuses them.

E. Xie et al.: SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers, NeurIPS 2021,
https://arxiv.org/abs/2105.15203; SegformerHead of https://github.com/open-mmlab/mmsegmentation, with its parameter
names.

Unusual: as in mmsegmentation, the linear layers of the maps have norms and activations; in the authors' code
(https://github.com/NVlabs/SegFormer) they have neither, and the maps are concatenated coarsest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import ConvNormAct  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from ._head import DecodeHead, resize


class SegFormerHead(DecodeHead):
    """Maps features [B, C_i, H_i, W_i], finest first, to logits [B, num_classes, H_0, W_0]."""

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, channels: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__(in_channels, num_classes, channels=channels, dropout=dropout)
        self.convs = nn.ModuleList(ConvNormAct(width, channels, 1) for width in in_channels)
        self.fusion_conv = ConvNormAct(len(in_channels) * channels, channels, 1)
        self.reset_parameters()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        self.check(maps)
        levels = [conv(level) for conv, level in zip(self.convs, maps, strict=True)]
        size = levels[0].shape[-2:]
        return self.classify(self.fusion_conv(torch.cat([levels[0], *(resize(x, size) for x in levels[1:])], 1)))
