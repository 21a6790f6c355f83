"""Optimiser and learning-rate schedule from the settings, both made by timm.

Unusual: rates can differ by parameter name (`optim.lr_scale`), and so can the epoch in which learning begins
(`optim.freeze_epochs`). LITv2's offset convolutions learn a hundred times slower than the rest; DynamicViT's backbone
too, and only once its predictors have had five epochs. timm's groups for layer decay and weight decay are made first
and then split, so that all of it works together: a group carries its factor as `lr_scale`, which timm's schedulers
multiply into every rate they set, and its delay as `freeze_epochs`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from .config import OptimConfig, ScheduleConfig
from .plan import Plan
from .settings import ConfigError, nearest


def make_optimizer(model: nn.Module, optim: OptimConfig, plan: Plan) -> torch.optim.Optimizer:
    groups = parameter_groups(
        model,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        lr_scale=optim.lr_scale,
        freeze_epochs=optim.freeze_epochs,
    )
    return create_optimizer_v2(groups, optim.name, lr=optim.lr * plan.lr_factor)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, plan: Plan) -> Scheduler:
    """A schedule over all steps of the plan: the cool-down is the end of it, not an addition."""
    extra: dict[str, Any] = (
        {"decay_rate": schedule.power} if schedule.power is not None else {}
    )  # timm's name for a poly's power
    scheduler, _ = create_scheduler_v2(
        optimizer,
        schedule.name,
        num_epochs=plan.epochs - schedule.cooldown_epochs,
        cooldown_epochs=schedule.cooldown_epochs,
        warmup_epochs=schedule.warmup_epochs,  # pyright: ignore[reportArgumentType]  # fractions work
        warmup_lr=schedule.warmup_lr * plan.lr_factor,
        min_lr=schedule.min_lr * plan.lr_factor,
        step_on_epochs=False,
        updates_per_epoch=plan.steps_per_epoch,
        **extra,
    )
    if scheduler is None:
        raise ConfigError(
            f"schedule.name={schedule.name} is no schedule; schedule.name=constant keeps the rate as it is"
        )
    return scheduler


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters of these names (shell patterns) out of training: without gradient, in no group."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        for name in _match("optim.freeze", pattern, parameters):
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"optim.freeze={list(patterns)} leaves no parameter that could learn")


def hold_back(optimizer: torch.optim.Optimizer, step: int, steps_per_epoch: int) -> None:
    """Sets the rate of the groups to 0 whose `freeze_epochs` have not passed before this step; the others keep theirs.

    Gradients are still computed and an optimiser gathers their moments, so that learning begins without a jump.
    """
    for group in optimizer.param_groups:
        if step < group.get("freeze_epochs", 0.0) * steps_per_epoch:
            group["lr"] = 0.0


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None,
    lr_scale: Mapping[str, float],
    freeze_epochs: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """timm's groups, split by what `lr_scale` and `freeze_epochs` say: shell patterns of names, as `*.conv_offset.*`.

    The factors of all patterns that match a name are multiplied; of `freeze_epochs` the last pattern that matches
    counts. A pattern that matches none is an error.
    """
    no_weight_decay = getattr(model, "no_weight_decay", set)()
    if layer_decay is not None:
        groups = param_groups_layer_decay(
            model, weight_decay=weight_decay, layer_decay=layer_decay, no_weight_decay_list=no_weight_decay
        )
    else:
        groups = param_groups_weight_decay(model, weight_decay=weight_decay, no_weight_decay_list=no_weight_decay)
    parameters = dict(model.named_parameters())
    factors = dict.fromkeys(parameters.values(), 1.0)
    for name, factor in _by_name("optim.lr_scale", lr_scale, parameters):
        factors[parameters[name]] *= factor
    delays = dict.fromkeys(parameters.values(), 0.0)
    for name, epochs in _by_name("optim.freeze_epochs", freeze_epochs or {}, parameters):
        delays[parameters[name]] = epochs
    return [part for group in groups for part in _split(group, factors, delays)]


def _by_name(
    key: str, values: Mapping[str, float], parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, float]]:
    """Each name that a pattern of `values` matches, and the pattern's value, in the order of the patterns."""
    for pattern, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{key}: {pattern}: {value:g}; needs a finite number, at least 0")
        for name in _match(key, pattern, parameters):
            yield name, value


def _match(key: str, pattern: str, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    matched = fnmatch.filter(parameters, pattern)
    if not matched:
        raise ConfigError(
            f"{key}: no parameter is called {pattern}{nearest(pattern, set(parameters))}; "
            "shell patterns match the whole name, as *.bias does"
        )
    return matched


def _split(
    group: dict[str, Any], factors: Mapping[nn.Parameter, float], delays: Mapping[nn.Parameter, float]
) -> list[dict[str, Any]]:
    """One group for each factor and delay that its parameters have; where these change nothing the group stays."""
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in group["params"]:
        members.setdefault((factors[parameter], delays[parameter]), []).append(parameter)
    if members.keys() == {(1.0, 0.0)}:
        return [group]
    return [
        {
            **group,
            "params": part,
            "lr_scale": group.get("lr_scale", 1.0) * factor,
            **({"freeze_epochs": epochs} if epochs else {}),
        }
        for (factor, epochs), part in members.items()
    ]
