"""Optimiser and learning-rate schedule from the settings, both made by timm.

Unusual: rates can differ by parameter name (`optim.lr_scale`), and so can the epoch in which learning begins
(`optim.freeze_epochs`). LITv2's offset convolutions learn a hundred times slower than the rest; DynamicViT's backbone
too, and only once its predictors have had five epochs. timm's groups for layer decay and weight decay are made first
and then split, so that all of it works together: a group carries its factor as `lr_scale`, which timm's schedulers
multiply into every rate they set, and its delay as `freeze_epochs`. A layer of layer decay may be several blocks
(`optim.layer_blocks`): ConvNeXt's recipe, and UniRepLKNet's after it, counts three blocks of a stage as one.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from timm.models import group_parameters
from timm.optim import (
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn

from .config import OptimConfig, ScheduleConfig
from .plan import Plan
from .settings import ConfigError, nearest


def make_optimizer(model: nn.Module, optim: OptimConfig, plan: Plan) -> torch.optim.Optimizer:
    groups = parameter_groups(
        model,
        weight_decay=optim.weight_decay,
        no_decay=optim.no_decay,
        layer_decay=optim.layer_decay,
        layer_blocks=optim.layer_blocks,
        lr_scale=optim.lr_scale,
        freeze_epochs=optim.freeze_epochs,
    )
    return create_optimizer_v2(groups, optim.name, lr=optim.lr * plan.lr_factor)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, plan: Plan) -> Scheduler:
    """A schedule over all steps of the plan: cool-down and warm-up are parts of it, not additions."""
    extra: dict[str, Any] = {
        "decay_epochs": schedule.decay_epochs,
        "decay_rate": schedule.decay_rate if schedule.power is None else schedule.power,  # timm's name for both
    }
    extra = {name: value for name, value in extra.items() if value is not None}
    before = schedule.warmup_epochs if schedule.warmup_prefix else 0
    scheduler, _ = create_scheduler_v2(
        optimizer,
        schedule.name,
        num_epochs=plan.epochs - schedule.cooldown_epochs - before,  # pyright: ignore[reportArgumentType]  # the same
        cooldown_epochs=schedule.cooldown_epochs,
        warmup_epochs=schedule.warmup_epochs,  # pyright: ignore[reportArgumentType]  # fractions work
        warmup_lr=schedule.warmup_lr * plan.lr_factor,
        warmup_prefix=schedule.warmup_prefix,
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
    no_decay: Sequence[str] = (),
    layer_blocks: int = 1,
) -> list[dict[str, Any]]:
    """timm's groups, split by what `lr_scale` and `freeze_epochs` say: shell patterns of names, as `*.conv_offset.*`.

    `no_decay` adds to what the model itself spares from weight decay. The factors of all patterns that match a name
    are multiplied; of `freeze_epochs` the last pattern that matches counts. A pattern that matches none is an error.
    """
    parameters = dict(model.named_parameters())
    spared = set(getattr(model, "no_weight_decay", set)())
    for pattern in no_decay:
        spared.update(_match("optim.no_decay", pattern, parameters))
    if layer_decay is not None:
        layers: Any = _Layers(model, layer_blocks)
        groups = param_groups_layer_decay(
            layers, weight_decay=weight_decay, layer_decay=layer_decay, no_weight_decay_list=spared
        )
    else:
        groups = param_groups_weight_decay(model, weight_decay=weight_decay, no_weight_decay_list=spared)
    factors = dict.fromkeys(parameters.values(), 1.0)
    for name, factor in _by_name("optim.lr_scale", lr_scale, parameters):
        factors[parameters[name]] *= factor
    delays = dict.fromkeys(parameters.values(), 0.0)
    for name, epochs in _by_name("optim.freeze_epochs", freeze_epochs or {}, parameters):
        delays[parameters[name]] = epochs
    return [part for group in groups for part in _split(group, factors, delays)]


class _Layers:
    """A model as timm's layer decay sees it: its parameters, and the layer that each belongs to, from the input on.

    timm counts a block as a layer. Here `blocks` consecutive ones of a stage are one; stem, head and, in a
    `Segmenter`, everything that is not backbone are as with timm.
    """

    def __init__(self, model: nn.Module, blocks: int) -> None:
        self.model = model
        matcher: Callable[..., Any] | None = getattr(model, "group_matcher", None)
        if matcher is None:
            raise ConfigError(
                f"optim.layer_decay: {type(model).__name__} has no group_matcher (timm's); set it to null"
            )
        try:
            fine = cast("dict[str, int]", group_parameters(model, matcher(coarse=False), reverse=True))
            stages = cast("dict[str, int]", group_parameters(model, matcher(coarse=True), reverse=True))
        except ValueError as error:
            raise ConfigError(f"optim.layer_decay: {error}; set it to null") from error
        first = {stage: min(fine[name] for name in fine if stages[name] == stage) for stage in set(stages.values())}
        self._places = {name: (stages[name], (layer - first[stages[name]]) // blocks) for name, layer in fine.items()}

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int, int]]:
        return lambda name: self._places[name]


def clip_gradients(model: nn.Module, value: float, mode: str) -> None:
    """timm's clipping, in place. Adaptive clipping leaves the classifier alone, as its authors do."""
    heads = classifiers(model) if mode == "agc" else []
    left_alone = {parameter for head in heads for parameter in head.parameters()}
    dispatch_clip_grad([p for p in model.parameters() if p not in left_alone], value, mode=mode)


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The last layers of a timm classifier: distilled ones have two. None of a model that is no classifier."""
    found: Any = getattr(model, "get_classifier", lambda: ())()
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]


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
