"""`Segmenter`: a feature backbone and a head, and nothing between them but sizes.

Unusual: no multiple of 32 is asked of the picture. Heads take sizes from the maps they get, and the logits are
brought to the size of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from .fpn import FPNHead


class Segmenter(nn.Module):
    """`backbone` is what timm makes with features_only=True (NCHW maps); `head` turns its maps into logits."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, num_classes, H, W]."""
        logits = self.head(self.backbone(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)

    def no_weight_decay(self) -> set[str]:
        """What the backbone spares from weight decay, under the names it has here (timm's optimisers ask)."""
        spared: Callable[[], Any] | None = getattr(self.backbone, "no_weight_decay", None)
        inner = getattr(self.backbone, "model", None)
        if spared is None and inner is not None and hasattr(inner, "no_weight_decay"):
            return {f"backbone.model.{name}" for name in inner.no_weight_decay()}
        return {f"backbone.{name}" for name in spared()} if spared is not None else set()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int, int]]:
        """The layer of a parameter, for layer decay (timm's optimisers ask): the backbone's own, then the head."""
        inner = getattr(self.backbone, "model", None)
        matcher: Callable[..., Any] | None = getattr(inner, "group_matcher", None)
        if inner is None or matcher is None:
            raise ValueError(
                f"{type(inner or self.backbone).__name__} does not tell the layers of its features apart (timm's "
                "group_matcher)"
            )
        prefix = "backbone.model."
        layers: dict[str, int] = group_parameters(inner, matcher(coarse=coarse), reverse=True)  # pyright: ignore
        return lambda name: (0, layers[name[len(prefix) :]]) if name.startswith(prefix) else (1, 0)


def build_segmenter(name: str, num_classes: int, *, head: Mapping[str, Any], **model_kwargs: Any) -> Segmenter:
    """A timm backbone under a pyramid head; `head` holds the arguments of `FPNHead`."""
    backbone = timm.create_model(name, features_only=True, **model_kwargs)
    return Segmenter(backbone, FPNHead(feature_channels(backbone), num_classes, **head))


def feature_channels(backbone: nn.Module) -> Sequence[int]:
    """Channels of the maps that a features_only backbone returns."""
    info: Any = getattr(backbone, "feature_info", None)
    if info is None:
        raise ValueError(f"{type(backbone).__name__} has no feature_info; make it with features_only=True")
    return info.channels()
