"""The base class of the decode heads: checks of the feature maps, initialisation, dropout and the pixel classifier.

Parameter names are those of mmsegmentation (https://github.com/open-mmlab/mmsegmentation), where the published weights
come from. Its synchronised batch norms are plain ones here, with the same parameters; Lightning can synchronise them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import ConvNormAct  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn import functional as F


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize bilinearly to (height, width), with `align_corners=False`, as in all published models."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


class DecodeHead(nn.Module):
    """The base class of the decode heads.

    Args:
        in_channels: channels of the feature maps, finest first.
        channels: channels of the map that is classified.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, channels: int, dropout: float) -> None:
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def reset_parameters(self) -> None:
        """Initialise as mmsegmentation does: Kaiming by fan-out for convolutions, near zero for the classifier."""
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                weight: Any = module.conv.weight
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # pyright: ignore[reportArgumentType]

    def check(self, maps: Sequence[Tensor]) -> None:
        """Raise a ValueError if the maps do not have the channels that the head was built for."""
        channels = tuple(level.shape[1] for level in maps)
        if channels != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} was built for {len(self.in_channels)} feature maps of {self.in_channels} "
                f"channels; got {len(maps)} of {channels}; build it with the channels of this backbone"
            )

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))
