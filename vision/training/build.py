"""Build the model from the settings and run it once, so that errors come before training and name the setting."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import backbones as backbones  # registers the models
from .._checksum import refuse_damage
from .._loading import built_for_one_size, load_model, no_model, no_weights, weights_overlay
from .._messages import did_you_mean, one_line
from .._published import require_published
from .._reading import read_checkpoint
from ..data.splits import Splits
from ..segmentation import build_segmenter
from .config import Config
from .optimization import check_names, classifiers
from .settings import ConfigError

_log = logging.getLogger(__name__)


def build_model(config: Config, splits: Splits) -> nn.Module:
    """Return the classifier or segmenter of the settings, checked with a forward pass at every size of training."""
    arguments = _model_arguments(config, splits)
    try:
        if config.model.pretrained:
            require_published(config.model.name)
        if splits.dense:
            model: nn.Module = _build_dense(config, splits, arguments)
        else:
            model = timm.create_model(config.model.name, num_classes=len(splits.classes), **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, KeyError) as error:
        given = {name: value for name, value in arguments.items() if name != "pretrained_cfg_overlay"}
        source = config.model.start_from or config.model.checkpoint
        weights = f" and the weights of {source}" if source else ""
        words = f"cannot be made with {given}{weights}: {one_line(error)}"
        raise ConfigError(f"model.name={config.model.name} {words}") from error
    except OSError as error:
        raise ConfigError(f"model.pretrained=true: {no_weights(config.model.name, error)}") from error
    if config.model.start_from is not None and not splits.dense:
        _check_start(model, config, arguments["pretrained_cfg_overlay"]["state_dict"])
    if config.model.head_init_scale != 1:
        _scale_head(model, config, splits, loaded=bool(arguments["pretrained"]))
    _try(model, config, splits)
    return model


def _build_dense(config: Config, splits: Splits, arguments: dict[str, Any]) -> nn.Module:
    """Build a segmenter. Its checkpoint does not go through timm's loader: it may hold a whole segmenter."""
    checkpoint = config.model.checkpoint
    if checkpoint is not None:
        of_timm = ("pretrained", "pretrained_cfg_overlay")
        arguments = {name: value for name, value in arguments.items() if name not in of_timm}
    head = dataclasses.asdict(config.head)
    return build_segmenter(config.model.name, len(splits.classes), head=head, checkpoint=checkpoint, **arguments)


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Has the model, or the backbone under its head, recompute activations in the backward pass instead of keeping
    them (T. Chen et al.: Training Deep Nets with Sublinear Memory Cost, 2016). `name` is for messages.
    """
    backbone: Any = next((part for part in model.modules() if hasattr(part, "set_grad_checkpointing")), None)
    try:
        if backbone is None:
            raise NotImplementedError("it has no set_grad_checkpointing")
        backbone.set_grad_checkpointing(True)
    except (AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"train.grad_checkpointing=true: {name} cannot recompute activations ({error}); set it to false"
        ) from error


@torch.no_grad()
def _scale_head(model: nn.Module, config: Config, splits: Splits, *, loaded: bool) -> None:
    """Scale the initial weights of a new classifier: ConvNeXt's fine-tuning starts with one close to zero."""
    key = f"model.head_init_scale={config.model.head_init_scale:g}"
    if splits.dense:
        raise ConfigError(f"{key} is of a classifier's head; set it to 1 for segmentation")
    published: Any = getattr(model, "pretrained_cfg", None) or {}
    if loaded and published.get("num_classes") == len(splits.classes):
        raise ConfigError(
            f"{key} is of a new head, but the weights bring theirs, of {len(splits.classes)} classes too; set it to 1"
        )
    for head in classifiers(model):
        for parameter in head.parameters():
            parameter.mul_(config.model.head_init_scale)


def _other_weights(config: Config, splits: Splits, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which timm loads another model's weights through this model's checkpoint filter."""
    model = config.model
    if model.pretrained or model.checkpoint is not None:
        raise ConfigError(
            f"model.start_from={model.start_from}: model.pretrained and model.checkpoint name weights too; give one"
        )
    source = str(model.start_from)
    try:
        if Path(source).is_file():
            state, facts = read_checkpoint(Path(source))
        else:
            size = (splits.size, splits.size)
            donor = load_model(source, pretrained=True, image_size=size, in_chans=splits.channels)
            state, facts = donor.state_dict(), {}
        overlay = weights_overlay(model.name, state, facts, None, arguments)
    except ValueError as error:
        raise ConfigError(f"model.start_from={source}: {error}; a file, or a timm model, is needed") from error
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _check_start(model: nn.Module, config: Config, state: Mapping[str, Any]) -> None:
    """Raise if weights of `start_from` have no counterpart: timm ignores them silently for its own models."""
    own = model.state_dict()
    key = f"model.start_from={config.model.start_from}"
    if not type(model).__module__.startswith("mixerzoo."):
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        names = cfg.get("classifier") or ()
        heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
        if homeless := sorted(name for name in state.keys() - own.keys() if not name.startswith(heads)):
            raise ConfigError(
                f"{key}: {len(homeless)} of its tensors have no counterpart in {config.model.name}, as {homeless[0]}"
            )
    _log.info("start: weights of %s%s", config.model.start_from, _some([name for name in own if name not in state]))


def _some(names: list[str]) -> str:
    return f"; new or renamed: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else ""


def check_before_data(config: Config) -> None:
    """Raise a `ConfigError` for models, optimizers and schedules that do not exist, and for missing files of weights.

    All of this can be known before data is read, which may take minutes.
    """
    model, distill = config.model, config.distill
    for key, name in (("model.name", model.name), ("distill.teacher", distill.teacher)):
        if name is not None and not timm.is_model(name):
            hint = did_you_mean(name, timm.list_models(), most=3, cutoff=0.6)
            raise ConfigError(f"{key}={name}: timm and mixerzoo have no such model{hint}")
    start = model.start_from
    if start is not None and not Path(start).is_file() and not timm.is_model(start):
        raise ConfigError(f"model.start_from={start}: {no_model(start)}; a file, or a timm model, is needed")
    teaches = distill.teacher is not None
    for key, file in (
        ("model.checkpoint", model.checkpoint),
        ("distill.checkpoint", distill.checkpoint if teaches else None),
    ):
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"{key}={file}: there is no such file")
    check_names(config)


def _model_arguments(config: Config, splits: Splits) -> dict[str, Any]:
    arguments: dict[str, Any] = {"in_chans": splits.channels, "pretrained": config.model.pretrained}
    if config.model.checkpoint is not None:
        refuse_damage(Path(config.model.checkpoint))
        # timm's loader for published weights converts their names and skips a head with other classes.
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": config.model.checkpoint}}
    if built_for_one_size(config.model.name):
        arguments["img_size"] = splits.size
    arguments |= config.model.kwargs
    return arguments | (_other_weights(config, splits, arguments) if config.model.start_from is not None else {})


def _try(model: nn.Module, config: Config, splits: Splits) -> None:
    """Run the model on an empty picture at the size of evaluation and at every size of training."""
    for size in sorted({splits.size, *config.augment.sizes.values()}):
        _try_size(model, config, splits, size)


@torch.no_grad()
def _try_size(model: nn.Module, config: Config, splits: Splits, size: int) -> None:
    was_training = model.training
    try:
        output = model.eval()(torch.zeros(1, splits.channels, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{config.model.name} cannot take pictures of {size} x {size} ({error}); try a larger "
            f"{'data.size' if size == splits.size else 'size in augment.sizes'}, or a stem that shrinks less "
            f"(model.kwargs.stem_stride=1 for mixerzoo's hierarchical models)"
        ) from error
    expected = (1, len(splits.classes), *((size, size) if splits.dense else ()))
    if tuple(output.shape) != expected:
        raise ConfigError(f"{config.model.name} answers with shape {tuple(output.shape)}, but {expected} is needed")
    model.train(was_training)
