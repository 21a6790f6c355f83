"""The parts of training that only segmenters need: their loss, their inference, and checks of their settings.

Unusual: the validation loss is the cross entropy of every labelled pixel at the picture's own size, whatever the
training loss is. It does not depend on how pictures are batched or distributed over processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._loading import takes_one_size
from ..data.splits import Splits
from ..segmentation.inference import Inference, of_settings
from ..segmentation.losses import SegmentationLoss
from .config import Config, LossConfig
from .settings import ConfigError


def loss_parts(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the losses that `SegmentationLoss` adds to "labels", one for each further head."""
    auxiliary, boundary = (getattr(model, name, None) is not None for name in ("auxiliary_head", "boundary_head"))
    return (*(["auxiliary"] * auxiliary), *(["boundary", "boundary_labels"] * boundary))


def make_loss(model: nn.Module, config: Config, splits: Splits) -> SegmentationLoss | None:
    """Return the loss that the section `loss` describes; None for classifiers, which must not set it."""
    loss, own = config.loss, LossConfig()
    if not splits.dense:
        if changed := [name for name, value in vars(loss).items() if value != getattr(own, name)]:
            raise ConfigError(
                f"loss.{changed[0]}={getattr(loss, changed[0])} is of segmentation; {splits.origin} has a label for a "
                "picture, not for its pixels"
            )
        return None
    _check_weights(loss, loss_parts(model), len(splits.classes))
    weights = {"boundary_weight": loss.boundary_weight, "boundary_labels_weight": loss.boundary_labels_weight}
    return SegmentationLoss(
        loss.name,
        ohem_threshold=loss.ohem_threshold,
        ohem_kept=loss.ohem_kept,
        auxiliary_weight=loss.auxiliary_weight,
        class_weights=loss.class_weights,
        label_smoothing=config.augment.label_smoothing,
        **{name: weight for name, weight in weights.items() if weight is not None},
    )


def _check_weights(loss: LossConfig, parts: Sequence[str], classes: int) -> None:
    for name in ("boundary_weight", "boundary_labels_weight"):
        if getattr(loss, name) and "boundary" not in parts:
            raise ConfigError(
                f"loss.{name}={getattr(loss, name):g}, but no head of this model draws boundaries (BEVANet's does); "
                "set it to null"
            )
    usual = LossConfig().auxiliary_weight
    if loss.auxiliary_weight not in (0, usual) and "auxiliary" not in parts:
        raise ConfigError(
            f"loss.auxiliary_weight={loss.auxiliary_weight:g}, but there is no auxiliary head; give head.auxiliary="
            f"true, or leave it at {usual:g}"
        )
    if loss.class_weights and len(loss.class_weights) != classes:
        raise ConfigError(
            f"loss.class_weights has {len(loss.class_weights)} numbers, but there are {classes} classes; give one for "
            "each, or []"
        )
    if loss.class_weights and not any(loss.class_weights):
        raise ConfigError("loss.class_weights are all 0: there is nothing to learn; [] weighs all classes the same")


def make_inference(config: Config, splits: Splits) -> tuple[Inference, Inference] | None:
    """Return the inference settings of validation and of the final test; None for classifiers, which see one crop."""
    evaluate = config.evaluate
    if not splits.dense:
        own = type(evaluate)()
        if changed := [name for name, value in vars(evaluate).items() if value != getattr(own, name)]:
            raise ConfigError(
                f"evaluate.{changed[0]}={getattr(evaluate, changed[0])} is of segmentation; classifiers judge one crop"
            )
        return None
    if evaluate.mode == "whole" and (evaluate.window is not None or evaluate.stride is not None):
        name = "window" if evaluate.window is not None else "stride"
        raise ConfigError(
            f"evaluate.{name}={getattr(evaluate, name)} is of windows that slide; give evaluate.mode=slide, or null"
        )
    if evaluate.mode == "slide" and config.train.strategy == "fsdp":
        raise ConfigError(
            "evaluate.mode=slide asks the model as often as a picture has windows, but under train.strategy=fsdp all "
            "processes must ask together; take ddp, or evaluate.mode=whole"
        )
    fixed = takes_one_size(config.model.name, config.model.kwargs)
    if fixed:
        _check_fixed(config, splits)
    try:
        final = of_settings(vars(evaluate), size=splits.size, short_side=short_side(config, splits), fixed=fixed)
        return dataclasses.replace(final, scales=(1.0,), flip=False), final
    except ValueError as error:
        raise ConfigError(f"evaluate: {error}") from error


def short_side(config: Config, splits: Splits) -> int:
    """Return the shorter side of evaluated pictures at scale 1; 0 keeps their own size."""
    return splits.size if config.data.short_side is None else config.data.short_side


def _check_fixed(config: Config, splits: Splits) -> None:
    evaluate, name = config.evaluate, config.model.name
    size = splits.size
    if evaluate.mode == "slide":
        if evaluate.window not in (None, [size, size]):
            raise ConfigError(
                f"evaluate.window={evaluate.window}: {name} takes pictures of {size} x {size} alone; leave it at null"
            )
    elif config.data.short_side not in (None, size):
        raise ConfigError(
            f"data.short_side={config.data.short_side}: {name} takes pictures of {size} x {size} alone; set it to null,"
            " or evaluate.mode=slide"
        )
    elif list(evaluate.scales) != [1.0]:
        raise ConfigError(
            f"evaluate.scales={evaluate.scales}: {name} takes pictures of {size} x {size} alone; set evaluate.mode="
            "slide, or evaluate.scales=[1.0]"
        )
    elif size % evaluate.divisor:
        raise ConfigError(f"evaluate.divisor={evaluate.divisor}: {name} takes pictures of {size} x {size} alone")


@torch.no_grad()
def check_one_picture(model: nn.Module, config: Config, splits: Splits) -> None:
    """Raise if the model cannot train on one picture: batch norm over a 1 x 1 map (UPerNet's pooling) needs two."""
    if not splits.dense or config.train.batch_size > 1:
        return
    network: Any = model
    before = [buffer.clone() for buffer in network.buffers()]
    was_training = network.training
    try:
        network.train()(torch.zeros(1, splits.channels, splits.size, splits.size))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            "train.batch_size=1: the batch norm behind a pooling to one pixel has nothing to average over; take at "
            "least 2 pictures (train.accumulate does not help), or another head"
        ) from error
    finally:
        network.train(was_training)
        for buffer, value in zip(network.buffers(), before, strict=True):
            buffer.copy_(value)
