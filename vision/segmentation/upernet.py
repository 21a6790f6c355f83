"""UPerNet: pyramid pooling of the coarsest map, and a feature pyramid whose levels are concatenated at the finest.

T. Xiao et al.: Unified Perceptual Parsing for Scene Understanding, ECCV 2018, https://arxiv.org/abs/1807.10221, with
the pooling of H. Zhao et al.: Pyramid Scene Parsing Network, CVPR 2017, https://arxiv.org/abs/1612.01105; UPerHead of
https://github.com/open-mmlab/mmsegmentation, with its parameter names.

Unusual:

* Adaptive pooling cannot be exported with free sizes. During export it is computed as products with averaging matrices
  that are made from the sizes.
* One pooling scale leaves a single position, over which batch norm cannot normalise a single picture: training needs
  batches of at least two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import ConvNormAct  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels._runtime import is_exporting
from ._head import DecodeHead, resize


def averaging_matrix(parts: int, length: int, like: Tensor) -> Tensor:
    """Return [parts, length], whose product with `length` values is their adaptive average pooling.

    Part i covers [floor(i * length / parts), ceil((i + 1) * length / parts)).
    """
    part = torch.arange(parts, device=like.device).unsqueeze(1)
    place = torch.arange(length, device=like.device)
    begin, end = part * length // parts, ((part + 1) * length + parts - 1) // parts
    inside = (place >= begin) & (place < end)
    return inside.to(like.dtype) / (end - begin).to(like.dtype)


class AdaptivePool(nn.Module):
    """Adaptive average pooling of [B, C, H, W] to [B, C, size, size] that can be exported with free sizes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not is_exporting():
            return F.adaptive_avg_pool2d(x, self.size)
        if self.size == 1:
            return x.mean((2, 3), keepdim=True)
        rows, columns = (averaging_matrix(self.size, length, x) for length in x.shape[-2:])
        return rows @ x @ columns.T


class UPerNet(DecodeHead):
    """Maps features [B, C_i, H_i, W_i], finest first, to logits [B, num_classes, H_0, W_0].

    Args:
        pool_scales: output sizes of the pooling of the coarsest map, along each axis.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        dropout: float = 0.1,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__(in_channels, num_classes, channels=channels, dropout=dropout)
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AdaptivePool(scale), ConvNormAct(coarsest, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvNormAct(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNormAct(len(in_channels) * channels, channels, 3)
        self.reset_parameters()

    def _pool(self, x: Tensor) -> Tensor:
        """Fuse the coarsest map with its poolings of all scales."""
        if self.training and x.shape[0] == 1:
            raise ValueError(
                "UPerNet pools a picture to a single position, whose batch norm takes at least 2 pictures in training; "
                "got a batch of 1; use a larger one, or eval()"
            )
        pooled = [resize(branch(x), x.shape[-2:]) for branch in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        self.check(maps)
        levels = [lateral(level) for lateral, level in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self._pool(maps[-1]))
        for finer in range(len(levels) - 2, -1, -1):
            levels[finer] = levels[finer] + resize(levels[finer + 1], levels[finer].shape[-2:])
        levels[:-1] = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        size = levels[0].shape[-2:]
        joined = torch.cat([levels[0], *(resize(level, size) for level in levels[1:])], 1)
        return self.classify(self.fpn_bottleneck(joined))
