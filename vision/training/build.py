"""From settings to a model that has answered once: errors come before the first step and name the setting to change."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import backbones as backbones  # registers the models
from .._loading import load_model, read_checkpoint
from ..data.splits import Splits
from ..segmentation import FPNHead, Segmenter
from ..segmentation.segmenter import feature_channels
from .config import Config
from .settings import ConfigError

_log = logging.getLogger(__name__)


def build_model(config: Config, splits: Splits) -> nn.Module:
    """The classifier, or the backbone under its segmentation head, tried on an empty picture."""
    check_name(config.model.name)
    arguments = _model_arguments(config, splits)
    try:
        if splits.dense:
            backbone = timm.create_model(config.model.name, features_only=True, **arguments)
            head = FPNHead(
                feature_channels(backbone),
                len(splits.classes),
                channels=config.head.channels,
                dropout=config.head.dropout,
            )
            model: nn.Module = Segmenter(backbone, head)
        else:
            model = timm.create_model(config.model.name, num_classes=len(splits.classes), **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        raise ConfigError(f"model.name={config.model.name} cannot be made with {arguments}: {error}") from error
    if config.model.start_from is not None:
        _start_from(model, config, splits)
    _try(model, config, splits)
    return model


def _start_from(model: nn.Module, config: Config, splits: Splits) -> None:
    """Copies another model's weights. All of them must have a place here, except those of a classifier of other size;
    what has no counterpart there (predictors, say) stays as it is made."""
    source = str(config.model.start_from)
    key = f"model.start_from={source}"
    if splits.dense or config.model.pretrained or config.model.checkpoint is not None:
        where = "segmentation" if splits.dense else "a model that has model.pretrained or model.checkpoint"
        raise ConfigError(f"{key}: not for {where}; set it to null")
    try:
        if Path(source).is_file():
            state = read_checkpoint(Path(source))[0]
        else:
            size = (splits.size, splits.size)
            donor = load_model(source, pretrained=True, image_size=size, in_chans=splits.channels)
            state = donor.state_dict()
    except ValueError as error:
        raise ConfigError(f"{key}: {error}; a file that exists, or a timm model, is needed") from error
    own = model.state_dict()
    heads = _classifiers(model)
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    homeless = sorted(name for name in state.keys() - fitting.keys() if not name.startswith(heads))
    if homeless:
        raise ConfigError(
            f"{key}: {len(homeless)} of its tensors have no counterpart in {config.model.name}, such as {homeless[0]}"
        )
    model.load_state_dict(own | fitting)
    fresh = [name for name in own if name not in fitting]
    _log.info("start: %d tensors of %s; %d are new%s", len(fitting), source, len(fresh), _some(fresh))


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


def check_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"model.name={name}: timm and mixerzoo have no such model{hint}")


def _model_arguments(config: Config, splits: Splits) -> dict[str, Any]:
    arguments: dict[str, Any] = {"in_chans": splits.channels, "pretrained": config.model.pretrained}
    if config.model.checkpoint is not None:
        if not Path(config.model.checkpoint).is_file():
            raise ConfigError(f"model.checkpoint={config.model.checkpoint}: there is no such file")
        # timm's road for published weights: it converts their names and leaves out a head of another size.
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": config.model.checkpoint}}
    defaults = timm.get_pretrained_cfg(config.model.name)
    if defaults is not None and defaults.fixed_input_size:
        arguments["img_size"] = splits.size
    return arguments | config.model.kwargs


@torch.no_grad()
def _try(model: nn.Module, config: Config, splits: Splits) -> None:
    size = splits.size
    was_training = model.training
    try:
        output = model.eval()(torch.zeros(1, splits.channels, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{config.model.name} cannot take pictures of {size} x {size} ({error}); try a larger data.size, or a stem "
            f"that shrinks less (model.kwargs.stem_stride=1 for mixerzoo's hierarchical models)"
        ) from error
    expected = (1, len(splits.classes), *((size, size) if splits.dense else ()))
    if tuple(output.shape) != expected:
        raise ConfigError(f"{config.model.name} answers with shape {tuple(output.shape)}, but {expected} is needed")
    model.train(was_training)
