"""Optimiser and learning-rate schedule from the settings, both made by timm.

Unusual: rates can differ by parameter name (`optim.lr_scale`). LITv2's offset convolutions learn a hundred times slower
than the rest. timm's groups for layer decay and weight decay are made first and then split, so that the three work
together: a group carries its factor as `lr_scale`, which timm's schedulers multiply into every rate they set.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
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
        model, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay, lr_scale=optim.lr_scale
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


def parameter_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float | None, lr_scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """timm's groups, split by the factors of `lr_scale`: shell patterns of parameter names, such as `*.conv_offset.*`.

    The factors of all patterns that match a name are multiplied. A pattern that matches none is an error.
    """
    no_weight_decay = getattr(model, "no_weight_decay", set)()
    if layer_decay is not None:
        groups = param_groups_layer_decay(
            model, weight_decay=weight_decay, layer_decay=layer_decay, no_weight_decay_list=no_weight_decay
        )
    else:
        groups = param_groups_weight_decay(model, weight_decay=weight_decay, no_weight_decay_list=no_weight_decay)
    factors = _factors(model, lr_scale)
    return [part for group in groups for part in _split(group, factors)]


def _factors(model: nn.Module, lr_scale: Mapping[str, float]) -> dict[nn.Parameter, float]:
    parameters = dict(model.named_parameters())
    factors = dict.fromkeys(parameters.values(), 1.0)
    for pattern, factor in lr_scale.items():
        if not math.isfinite(factor) or factor < 0:
            raise ConfigError(f"optim.lr_scale: {pattern}: {factor:g}; needs a finite number, at least 0")
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            raise ConfigError(
                f"optim.lr_scale: no parameter is called {pattern}{nearest(pattern, set(parameters))}; "
                "shell patterns match the whole name, as *.bias does"
            )
        for name in matched:
            factors[parameters[name]] *= factor
    return factors


def _split(group: dict[str, Any], factors: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """One group for each factor that its parameters have; a lone factor of one leaves the group as it is."""
    by_factor: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        by_factor.setdefault(factors[parameter], []).append(parameter)
    if by_factor.keys() == {1.0}:
        return [group]
    return [
        {**group, "params": members, "lr_scale": group.get("lr_scale", 1.0) * factor}
        for factor, members in by_factor.items()
    ]
