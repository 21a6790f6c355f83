"""Build timm's optimizer and learning rate schedule from the settings.

Unusual: the learning rate (`optim.lr_scale`) and the epoch in which training begins (`optim.freeze_epochs`) can depend
on parameter names. LITv2 trains its offset convolutions at a hundredth of the learning rate; DynamicViT does the same
for its backbone, and only after five epochs of training the predictors. timm's parameter groups for layer decay and
weight decay are made first and then split, so that all settings combine: a group stores its factor as `lr_scale`, by
which timm's schedulers multiply every learning rate, and its delay as `freeze_epochs`. Layer decay may count several
blocks as one layer (`optim.layer_blocks`): the recipes of ConvNeXt and UniRepLKNet count three blocks of a stage as
one.
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
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn

from .._messages import did_you_mean
from .config import Config, OptimConfig, ScheduleConfig
from .plan import Plan
from .settings import ConfigError

SCHEDULES = ("constant", "cosine", "poly", "step", "tanh", "wsd")
"""timm's schedules that work here. Of the others, plateau is updated only once per epoch, multistep needs milestones
and rsqrt a time scale, for which there are no settings, and none would ignore the warm-up."""


def check_names(config: Config) -> None:
    """Raise a `ConfigError` for an unknown `optim.name` or `schedule.name`, before data and model are built."""
    name, schedule = config.optim.name, config.schedule.name
    prefix = "lookahead_" if name.lower().startswith("lookahead_") else ""  # timm accepts it before any optimizer
    known = [f"{prefix}{known}" for known in list_optimizers()]
    if name.lower() not in known:
        raise ConfigError(f"optim.name={name}: timm has no such optimizer{did_you_mean(name, known)}")
    if schedule not in SCHEDULES:
        hint = did_you_mean(schedule, SCHEDULES)
        raise ConfigError(f"schedule.name={schedule}: choose one of {', '.join(SCHEDULES)}{hint}")


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
    """Return a schedule over all steps of the plan, including the warm-up and the cool-down."""
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
    assert scheduler is not None  # as for "none", which check_names refuses
    return scheduler


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the entries of each parameter group that come from the settings; optimizers keep counters in others."""
    names = ("lr", "initial_lr", "weight_decay", "lr_scale", "freeze_epochs")
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def apply_settings(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Write what `group_settings` returned for a new optimizer into one whose state was loaded from a checkpoint.

    A loaded state contains the settings of the run that saved it, which would win over those that the run has now.
    """
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Turn off the gradients of the parameters whose names match these shell patterns; no group will contain them."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        for name in _match("optim.freeze", pattern, parameters):
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"optim.freeze={list(patterns)} leaves no parameter that could learn")


def hold_back(optimizer: torch.optim.Optimizer, step: int, steps_per_epoch: int) -> None:
    """Set the learning rate of the groups whose `freeze_epochs` have not passed yet to 0 for this step.

    Their gradients are still computed and the optimizer updates its moments, so that training begins without a jump.
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
    """Return timm's parameter groups, split by `lr_scale` and `freeze_epochs`.

    The keys of both, and `no_decay`, are shell patterns of parameter names, such as `*.conv_offset.*`; a pattern that
    matches no name is an error. The factors of all patterns that match a name are multiplied; for `freeze_epochs` the
    last matching pattern takes precedence. `no_decay` adds to the parameters that the model excludes from weight decay.
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
    """An adapter for timm's layer decay in which `blocks` consecutive blocks of a stage count as one layer.

    It has the two methods of a model that timm calls. Stem, head and, in a `Segmenter`, everything outside the backbone
    are grouped as timm does it.
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
    """Clip gradients in place with timm. Adaptive clipping skips the classifier, as in its paper."""
    heads = classifiers(model) if mode == "agc" else []
    skipped = {parameter for head in heads for parameter in head.parameters()}
    dispatch_clip_grad([p for p in model.parameters() if p not in skipped], value, mode=mode)


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the final layers of a timm classifier (two in a distilled one), or [] for other models."""
    layers: Any = getattr(model, "get_classifier", lambda: ())()
    return list(layers) if isinstance(layers, (tuple, list, nn.ModuleList)) else [layers]


def _by_name(
    key: str, values: Mapping[str, float], parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, float]]:
    """Yield each parameter name that a pattern in `values` matches, with the value of the pattern, in their order."""
    for pattern, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{key}: {pattern}: {value:g}; needs a finite number, at least 0")
        for name in _match(key, pattern, parameters):
            yield name, value


def _match(key: str, pattern: str, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    matched = fnmatch.filter(parameters, pattern)
    if not matched:
        raise ConfigError(
            f"{key}: no parameter is called {pattern}{did_you_mean(pattern, parameters)}; "
            "shell patterns match the whole name, as *.bias does"
        )
    return matched


def _split(
    group: dict[str, Any], factors: Mapping[nn.Parameter, float], delays: Mapping[nn.Parameter, float]
) -> list[dict[str, Any]]:
    """Split a group into one group per distinct (factor, delay) of its parameters."""
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
