"""`Segmenter`: a feature backbone and heads, and nothing between them but sizes.

Unusual:

* No multiple of 32 is asked of the picture. Heads take sizes from the maps they get, and the logits are brought to the
  size of the picture.
* The parts have mmsegmentation's names (`backbone`, `neck`, `decode_head`, `auxiliary_head`), so that the weights of
  published models fit (published.py).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
from timm.models import group_parameters
from torch import Tensor, nn

from ._head import DecodeHead, resize
from .fcn_head import FCNHead
from .segformer import SegFormerHead
from .semantic_fpn import FPN, SemanticFPN
from .upernet import UPerNet


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


@dataclass(frozen=True)
class HeadOptions:
    """What `build_segmenter` is told of the heads; None is the published value."""

    name: str
    channels: int | None = None
    neck_channels: int | None = None
    """Of Semantic FPN's pyramid: 256 in the published models, twice `channels` if those are given."""
    dropout: float = 0.1
    auxiliary: bool | None = None
    """Whether a further head learns on the last map but one; published with UPerNet."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the decode head."""


HEADS = ("upernet", "semantic_fpn", "segformer")


def build_segmenter(name: str, num_classes: int, *, head: Mapping[str, Any], **model_kwargs: Any) -> Segmenter:
    """A timm backbone under the heads that `head` tells of (`HeadOptions`)."""
    options = _read(head)
    backbone = timm.create_model(name, features_only=True, **model_kwargs)
    channels, reductions = feature_channels(backbone), feature_reductions(backbone)
    neck, decode_head = _decoder(options, channels, reductions, num_classes)
    auxiliary = None
    if options.name == "upernet" if options.auxiliary is None else options.auxiliary:
        auxiliary = FCNHead(decode_head.in_channels[-2], num_classes, dropout=options.dropout)
    return Segmenter(backbone, decode_head, auxiliary, neck=neck)


def _read(head: Mapping[str, Any]) -> HeadOptions:
    try:
        options = HeadOptions(**head)
    except TypeError as error:
        raise ValueError(f"a head has {', '.join(HeadOptions.__dataclass_fields__)}; got {dict(head)}") from error
    if options.name not in HEADS:
        near = difflib.get_close_matches(options.name, HEADS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no head is called {options.name!r}{hint} There are {', '.join(HEADS)}")
    return options


def _decoder(
    options: HeadOptions, channels: Sequence[int], reductions: Sequence[int], num_classes: int
) -> tuple[nn.Module | None, DecodeHead]:
    """The neck, if the head has one, and the head."""
    arguments = {**({} if options.channels is None else {"channels": options.channels}), "dropout": options.dropout}
    arguments |= options.kwargs
    if options.name == "upernet":
        return None, UPerNet(channels, num_classes, **arguments)
    if options.name == "segformer":
        return None, SegFormerHead(channels, num_classes, **arguments)
    width = options.neck_channels or 2 * arguments.get("channels", 128)
    octaves = [round(math.log2(reduction / reductions[0])) for reduction in reductions]
    neck = FPN(channels, channels=width)
    return neck, SemanticFPN([width] * len(channels), num_classes, octaves=octaves, **arguments)


def feature_channels(backbone: nn.Module) -> Sequence[int]:
    """Channels of the maps that a features_only backbone returns."""
    return _info(backbone).channels()


def feature_reductions(backbone: nn.Module) -> Sequence[int]:
    """Pixels of the picture per position of those maps, along each axis."""
    return _info(backbone).reduction()


def _info(backbone: nn.Module) -> Any:
    info: Any = getattr(backbone, "feature_info", None)
    if info is None:
        raise ValueError(f"{type(backbone).__name__} has no feature_info; make it with features_only=True")
    return info
