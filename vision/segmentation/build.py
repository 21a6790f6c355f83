"""`build_segmenter`: builds a segmenter from the names of a timm backbone and a head, and loads its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .._messages import did_you_mean
from ._head import DecodeHead
from .bevanet import build_bevanet
from .fcn_head import FCNHead
from .features import feature_info, is_isotropic, make_features
from .published import backbone_kwargs, upernet_width
from .pyramid import FeaturePyramid
from .segformer import SegFormerHead
from .segmenter import Segmenter
from .semantic_fpn import FPN, SemanticFPN
from .smp import SmpSegmenter, build_smp
from .upernet import UPerNet
from .weights import load_segmenter, read_segmenter

HEADS = ("upernet", "semantic_fpn", "segformer", "bevanet")
SMP = "smp:"


@dataclass(frozen=True)
class HeadOptions:
    """The options of a segmenter's heads; None stands for the published value."""

    name: str
    channels: int | None = None
    neck_channels: int | None = None
    """Width of Semantic FPN's pyramid: 256 in the published models, by default twice `channels`."""
    dropout: float = 0.1
    auxiliary: bool | None = None
    """Whether an auxiliary head is trained on the second to last map, as in the published UPerNet."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the decode head's class."""


def build_segmenter(
    name: str,
    num_classes: int,
    *,
    head: Mapping[str, Any],
    checkpoint: str | Path | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Build a segmenter on a timm backbone, configured as for its published segmenters (published.py).

    Args:
        head: the fields of `HeadOptions`; the name is "upernet", "semantic_fpn", "segformer", "bevanet", or "smp:" and
            the name of an architecture of segmentation_models_pytorch.
        checkpoint: initial weights: a whole segmenter, published or ours, or a backbone alone.
        model_kwargs: arguments of the backbone.
    """
    options = _read(head)
    if num_classes < 1:
        raise ValueError(f"a segmenter needs classes; got num_classes={num_classes}")
    if options.name == "bevanet":  # its head takes two branches of the backbone, not feature maps
        if options.dropout not in (0, HeadOptions.dropout):
            raise ValueError(f"the head bevanet has no dropout; got {options.dropout:g}; leave it out, or give 0")
        widths = {"channels": options.channels, "neck_channels": options.neck_channels, **options.kwargs}
        auxiliary = options.auxiliary is not False
        return build_bevanet(name, num_classes, auxiliary=auxiliary, checkpoint=checkpoint, **widths, **model_kwargs)
    arguments = backbone_kwargs(name, model_kwargs) | model_kwargs
    state = None if checkpoint is None else read_segmenter(checkpoint)
    if state is not None:
        arguments["pretrained"] = False
    elif checkpoint is not None:
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(checkpoint)}}
    if options.name.startswith(SMP):
        model: nn.Module = _around(name, arguments, options, num_classes)
    else:
        model = _assemble(name, make_features(name, arguments), options, num_classes)
    if state is not None:
        load_segmenter(model, state, source=str(checkpoint))
    return model


def _read(head: Mapping[str, Any]) -> HeadOptions:
    if not isinstance(head, Mapping):
        raise ValueError(f"a head is described as in head={{'name': 'upernet'}}; got {head!r}")
    try:
        options = HeadOptions(**head)
    except TypeError as error:
        raise ValueError(f"a head has {', '.join(HeadOptions.__dataclass_fields__)}; got {dict(head)}") from error
    for name in ("channels", "neck_channels"):
        width = getattr(options, name)
        if width is not None and width < 1:
            raise ValueError(f"head.{name} is a width, at least 1, or None for the published one; got {width}")
    if options.name not in HEADS and not str(options.name).startswith(SMP):
        hint = did_you_mean(str(options.name), HEADS, cutoff=0.4) or "."
        raise ValueError(f"no head is called {options.name!r}{hint} There are {', '.join(HEADS)} and smp:ARCHITECTURE")
    return options


def _around(name: str, arguments: Mapping[str, Any], options: HeadOptions, num_classes: int) -> SmpSegmenter:
    foreign = [key for key in ("channels", "neck_channels", "auxiliary") if getattr(options, key)]
    if foreign:
        raise ValueError(f"head.{foreign[0]} is of our own heads; give {options.name} its own arguments in head.kwargs")
    architecture = options.name.removeprefix(SMP)
    return build_smp(
        architecture, name, num_classes, dropout=options.dropout, kwargs=options.kwargs, model_kwargs=arguments
    )


def _assemble(name: str, backbone: nn.Module, options: HeadOptions, num_classes: int) -> Segmenter:
    info: Any = feature_info(backbone)
    channels, reductions = info.channels(), info.reduction()
    necks: list[nn.Module] = []
    if is_isotropic(info.info):
        pyramid = FeaturePyramid(channels, reduction=reductions[0])
        channels, reductions = pyramid.out_channels, pyramid.reductions
        necks.append(pyramid)
    settings = {**({} if options.channels is None else {"channels": options.channels}), "dropout": options.dropout}
    settings |= options.kwargs
    decode_head: DecodeHead
    if options.name == "upernet":
        decode_head = UPerNet(channels, num_classes, **{"channels": upernet_width(name, channels), **settings})
    elif options.name == "segformer":
        decode_head = SegFormerHead(channels, num_classes, **settings)
    else:
        width = options.neck_channels or 2 * settings.get("channels", 128)
        necks.append(FPN(channels, channels=width))
        octaves = [round(math.log2(reduction / reductions[0])) for reduction in reductions]
        decode_head = SemanticFPN([width] * len(channels), num_classes, octaves=octaves, **settings)
    auxiliary = None
    if options.name == "upernet" if options.auxiliary is None else options.auxiliary:
        if len(decode_head.in_channels) < 2:
            raise ValueError(
                "the auxiliary head is for the last map but one, but there is one map; set auxiliary=False"
            )
        auxiliary = FCNHead(decode_head.in_channels[-2], num_classes, dropout=options.dropout)
    neck = nn.Sequential(*necks) if len(necks) > 1 else next(iter(necks), None)
    return Segmenter(backbone, decode_head, auxiliary, neck=neck)
