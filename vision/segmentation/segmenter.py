"""`Segmenter`: a feature backbone with an optional neck, a decode head and an optional auxiliary head.

Unusual:

* The sides of the picture need not be multiples of 32. Heads take sizes from their input maps, and logits are resized
  to the size of the picture.
* The parts have mmsegmentation's names (`backbone`, `neck`, `decode_head`, `auxiliary_head`), so that published weights
  can be loaded (weights.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ._head import resize
from .features import layers_of, spared_of


class SegmenterOutput(NamedTuple):
    """The output of a segmenter with several heads in training, at the picture's size."""

    logits: Tensor
    """Logits [B, num_classes, H, W] of the decode head, which is used in evaluation."""
    auxiliary: tuple[Tensor, ...] = ()
    """Logits [B, num_classes, H, W] of heads that are used in training alone."""
    boundary: Tensor | None = None
    """Logits [B, 1, H, W] of a pixel lying on a boundary between classes."""


class Segmenter(nn.Module):
    """A backbone and heads that map pictures of any size to logits of the same size.

    Args:
        backbone: a timm model with features_only=True and NCHW maps.
        decode_head: maps the feature maps to logits.
        auxiliary_head: maps the second to last feature map to logits; used in training alone.
        neck: transforms the backbone's maps before the heads.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module,
        auxiliary_head: nn.Module | None = None,
        *,
        neck: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head

    def forward(self, images: Tensor) -> Tensor | SegmenterOutput:
        """Map [B, C, H, W] to logits [B, num_classes, H, W]; in training return the logits of both heads, if there are
        two."""
        maps = self.backbone(images)
        if self.neck is not None:
            maps = self.neck(maps)
        size = images.shape[-2:]
        logits = resize(self.decode_head(maps), size)
        if self.auxiliary_head is None or not self.training:
            return logits
        return SegmenterOutput(logits, (resize(self.auxiliary_head(maps[-2]), size),))

    def no_weight_decay(self) -> set[str]:
        """Return the backbone's parameters without weight decay, by their names here, for timm's optimisers."""
        return spared_of(self.backbone, "backbone")

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int, int]]:
        """Return the function from a parameter to its layer, for layer decay in timm's optimisers; the heads come
        last."""
        return layers_of(self.backbone, "backbone", coarse=coarse)
