"""What the decode heads share: counting their maps, convolutions as published, dropout and the classifier of positions.

Parameter names are those of mmsegmentation (https://github.com/open-mmlab/mmsegmentation), where the published weights
come from. Its synchronised batch norms are plain ones here: the names and numbers are the same, and Lightning can make
them synchronised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import ConvNormAct  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn import functional as F


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """To (height, width), bilinearly and with `align_corners=False`, which is what all of the families publish."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


class DecodeHead(nn.Module):
    """The base of the heads: `in_channels` of the maps it takes, finest first, and `channels` of what it classifies."""

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, channels: int, dropout: float) -> None:
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def reset_parameters(self) -> None:
        """As mmsegmentation begins: He's initialisation by the size of the output, a classifier close to zero."""
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                weight: Any = module.conv.weight
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # pyright: ignore[reportArgumentType]

    def check(self, maps: Sequence[Tensor]) -> None:
        """Refuse maps that are not those of the backbone that the head was built for."""
        channels = tuple(level.shape[1] for level in maps)
        if channels != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} was built for {len(self.in_channels)} feature maps of {self.in_channels} "
                f"channels; got {len(maps)} of {channels}; build it with the channels of this backbone"
            )

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))
