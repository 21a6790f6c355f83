"""`Segmenter`: a feature backbone and heads, and nothing between them but sizes.

Unusual:

* No multiple of 32 is asked of the picture. Heads take sizes from the maps they get, and the logits are brought to the
  size of the picture.
* The parts have mmsegmentation's names (`backbone`, `neck`, `decode_head`, `auxiliary_head`), so that the weights of
  published models fit (weights.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ._head import resize
from .features import layers_of, spared_of


class SegmenterOutput(NamedTuple):
    """What a segmenter of several heads says in training, all at the picture's size."""

    logits: Tensor
    """[B, num_classes, H, W], of the head that answers in evaluation."""
    auxiliary: tuple[Tensor, ...] = ()
    """The same of heads that only learn beside it."""
    boundary: Tensor | None = None
    """[B, 1, H, W], how likely a pixel lies where classes meet, as a logit."""


class Segmenter(nn.Module):
    """`backbone` is what timm makes with features_only=True (NCHW maps); `neck` makes other maps of its maps, of which
    `decode_head` makes logits. `auxiliary_head` sees the last map but one, in training."""

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
        """[B, C, H, W] to logits [B, num_classes, H, W]; in training with an auxiliary head, both heads' logits."""
        maps = self.backbone(images)
        if self.neck is not None:
            maps = self.neck(maps)
        size = images.shape[-2:]
        logits = resize(self.decode_head(maps), size)
        if self.auxiliary_head is None or not self.training:
            return logits
        return SegmenterOutput(logits, (resize(self.auxiliary_head(maps[-2]), size),))

    def no_weight_decay(self) -> set[str]:
        """What the backbone spares from weight decay, under the names it has here (timm's optimisers ask)."""
        return spared_of(self.backbone, "backbone")

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int, int]]:
        """The layer of a parameter, for layer decay (timm's optimisers ask): the backbone's own, then the head."""
        return layers_of(self.backbone, "backbone", coarse=coarse)
