"""Derive epochs, steps, accumulation and learning rate from the settings and the size of the training set.

Published recipes state a total batch size, and segmentation recipes a number of optimizer steps. The number of
accumulated batches, of epochs, and the scaled learning rate then depend on the machine and the data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.loading import EpochBatches
from .config import Config
from .settings import ConfigError


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run.

    `batch` is the number of pictures in an optimizer step on all devices, `lr_factor` the factor of all learning rates.
    """

    epochs: int
    steps_per_epoch: int
    accumulate: int
    batch: int
    lr_factor: float


def make_plan(config: Config, pictures: int) -> Plan:
    """Return the plan for a training set of this size; raise a `ConfigError` if settings contradict each other."""
    accumulate = _accumulate(config)
    steps = _steps_per_epoch(config, pictures, accumulate)
    epochs = _epochs(config, steps)
    batch = config.train.batch_size * config.train.processes * accumulate
    _check_schedule(config, epochs)
    _check_augmentation(config, epochs)
    lr_factor = batch / config.optim.lr_for_batch if config.optim.lr_for_batch is not None else 1.0
    return Plan(epochs, steps, accumulate, batch, lr_factor)


def _accumulate(config: Config) -> int:
    train = config.train
    if train.total_batch is None:
        return train.accumulate
    if train.accumulate != 1:
        raise ConfigError(
            f"train.total_batch={train.total_batch} settles how many batches are accumulated, but "
            f"train.accumulate={train.accumulate} is given too; set train.accumulate=1 or train.total_batch=null"
        )
    at_once = train.batch_size * train.processes
    if train.total_batch % at_once:
        nodes = f" of train.nodes={train.nodes}" if train.nodes > 1 else ""
        raise ConfigError(
            f"train.total_batch={train.total_batch} is not a multiple of the {at_once} pictures of train.batch_size="
            f"{train.batch_size} on train.devices={train.devices}{nodes}; change one of them, or set "
            "train.total_batch=null"
        )
    return train.total_batch // at_once


def _steps_per_epoch(config: Config, pictures: int, accumulate: int) -> int:
    train = config.train
    batches = EpochBatches(pictures, train.batch_size, seed=config.seed, training=True, world_size=train.processes)
    return math.ceil(min(len(batches), train.limit_batches or len(batches)) / accumulate)


def _epochs(config: Config, steps_per_epoch: int) -> int:
    train = config.train
    if (train.epochs is None) == (train.steps is None):
        raise ConfigError(
            f"train.epochs={_written(train.epochs)} and train.steps={_written(train.steps)}: "
            "give one of them a value and set the other to null"
        )
    return train.epochs or math.ceil((train.steps or 0) / steps_per_epoch)


def _check_schedule(config: Config, epochs: int) -> None:
    schedule = config.schedule
    if schedule.warmup_epochs + schedule.cooldown_epochs >= epochs:
        raise ConfigError(
            f"schedule.warmup_epochs={schedule.warmup_epochs:g} and schedule.cooldown_epochs="
            f"{schedule.cooldown_epochs} leave nothing of {epochs} epoch{'s' * (epochs > 1)}; train longer or make "
            "them shorter, as with schedule.warmup_epochs=0"
        )
    if (schedule.name == "poly") != (schedule.power is not None):
        raise ConfigError(
            f"schedule.name={schedule.name} with schedule.power={_written(schedule.power)}: the poly schedule needs a "
            "power, such as schedule.power=0.9, and no other has one"
        )
    if (schedule.name == "step") != (schedule.decay_epochs is not None):
        raise ConfigError(
            f"schedule.name={schedule.name} with schedule.decay_epochs={_written(schedule.decay_epochs)}: the step "
            "schedule needs the epochs between its falls, such as schedule.decay_epochs=30, and no other has them"
        )
    if schedule.decay_rate is not None and schedule.name != "step":
        raise ConfigError(
            f"schedule.name={schedule.name} with schedule.decay_rate={schedule.decay_rate:g}: that is of the step "
            "schedule; set it to null"
        )
    if config.optim.lr < schedule.min_lr:
        raise ConfigError(f"schedule.min_lr={schedule.min_lr:g} is above optim.lr={config.optim.lr:g}")


def _check_augmentation(config: Config, epochs: int) -> None:
    augment = config.augment
    for epoch, size in augment.sizes.items():
        if not 0 <= epoch < epochs or size < 1:
            raise ConfigError(
                f"augment.sizes: {epoch}: {size} needs an epoch from 0 to {epochs - 1}, of {epochs}, and a size of at "
                "least 1"
            )
    if augment.mix_off_epochs and not (augment.mixup or augment.cutmix):
        raise ConfigError(
            f"augment.mix_off_epochs={augment.mix_off_epochs}: there is nothing to turn off; give augment.mixup or "
            "augment.cutmix, or leave it at 0"
        )


def _written(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"
