"""The auxiliary head: one convolution and a classifier on a single map.

J. Long, E. Shelhamer, T. Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015,
https://arxiv.org/abs/1411.4038; FCNHead of https://github.com/open-mmlab/mmsegmentation with one convolution and
without a skip connection, as in UPerNet's published models, on the map of stride 16. It is trained beside the decode
head and not run in evaluation.
"""

from __future__ import annotations

from timm.layers import ConvNormAct  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from ._head import DecodeHead


class FCNHead(DecodeHead):
    """Maps [B, in_channels, H, W] to logits [B, num_classes, H, W] by a 3 x 3 convolution and the classifier."""

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__([in_channels], num_classes, channels=channels, dropout=dropout)
        self.convs = nn.Sequential(ConvNormAct(in_channels, channels, 3))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        self.check([x])
        return self.classify(self.convs(x))
