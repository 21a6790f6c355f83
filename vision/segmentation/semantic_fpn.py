"""Semantic FPN: a feature pyramid whose levels are convolved, upsampled to the finest one and summed.

A. Kirillov et al.: Panoptic Feature Pyramid Networks, CVPR 2019, https://arxiv.org/abs/1901.02446, on the pyramid of
T.-Y. Lin et al.: Feature Pyramid Networks for Object Detection, CVPR 2017, https://arxiv.org/abs/1612.03144; FPN and
FPNHead of https://github.com/open-mmlab/mmsegmentation, with their parameter names: the pyramid is a `neck`.

Unusual: the pyramid upsamples by nearest neighbour, the head bilinearly. A doubled level that has become larger than
the first, because sizes were rounded up, is resized to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import ConvNormAct  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn import functional as F

from ._head import DecodeHead, resize


class _Conv(nn.Module):
    """A plain convolution, wrapped to have its name in the published pyramids."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """Maps features [B, C_i, H_i, W_i], finest first, to [B, channels, H_i, W_i], without norms and activations."""

    def __init__(self, in_channels: Sequence[int], *, channels: int = 256) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_Conv(width, channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList(_Conv(channels, channels, 3) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if len(maps) != len(self.lateral_convs):
            raise ValueError(f"the pyramid was built for {len(self.lateral_convs)} feature maps; got {len(maps)}")
        levels = [lateral(level) for lateral, level in zip(self.lateral_convs, maps, strict=True)]
        for finer in range(len(levels) - 2, -1, -1):
            size = levels[finer].shape[-2:]
            levels[finer] = levels[finer] + F.interpolate(levels[finer + 1], size=size, mode="nearest")
        return [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=True)]


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return resize(x, [2 * x.shape[2], 2 * x.shape[3]])


class SemanticFPN(DecodeHead):
    """Maps features [B, C_i, H_i, W_i], finest first, to logits [B, num_classes, H_0, W_0].

    Args:
        octaves: the binary logarithm of each map's stride relative to the first, and so the number of doublings.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        octaves: Sequence[int] = (0, 1, 2, 3),
        channels: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_channels, num_classes, channels=channels, dropout=dropout)
        if len(octaves) != len(in_channels):
            raise ValueError(f"octaves needs one entry a map, {len(in_channels)}; got {tuple(octaves)}")
        self.scale_heads = nn.ModuleList()
        for width, doublings in zip(in_channels, octaves, strict=True):
            layers: list[nn.Module] = [ConvNormAct(width, channels, 3)]
            for doubling in range(doublings):
                layers += [_Double()] if doubling == 0 else [ConvNormAct(channels, channels, 3), _Double()]
            self.scale_heads.append(nn.Sequential(*layers))
        self.reset_parameters()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        self.check(maps)
        first, *rest = (head(level) for head, level in zip(self.scale_heads, maps, strict=True))
        for level in rest:
            first = first + resize(level, first.shape[-2:])
        return self.classify(first)
