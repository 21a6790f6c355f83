"""The plan of a run: accumulation, epochs, and learning rates by step and by parameter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mixerzoo.vision.training.optimization import SCHEDULES, make_optimizer, make_scheduler, parameter_groups
from mixerzoo.vision.training.plan import Plan, make_plan
from mixerzoo.vision.training.settings import ConfigError, load
from torch import nn

PICTURES = 1000


@pytest.fixture
def configs(repository: Path) -> Path:
    return repository / "configs"


def _plan(configs: Path, *arguments: str) -> Plan:
    return make_plan(load(["schedule.warmup_epochs=0", *arguments], configs), PICTURES)


def test_a_total_batch_settles_the_accumulation(configs: Path) -> None:
    plan = _plan(configs, "train.batch_size=32", "train.total_batch=128", "train.epochs=3")
    assert plan == Plan(epochs=3, steps_per_epoch=8, accumulate=4, batch=128, lr_factor=1.0)  # 31 batches
    assert _plan(configs, "train.batch_size=32", "train.total_batch=128", "train.devices=2").accumulate == 2
    assert _plan(configs, "train.batch_size=32", "train.accumulate=3").batch == 96
    assert _plan(configs, "train.batch_size=32", "train.limit_batches=9", "train.total_batch=64").steps_per_epoch == 5


def test_rates_follow_the_real_batch(configs: Path) -> None:
    arguments = ("train.batch_size=64", "train.accumulate=2", "optim.lr_for_batch=512", "schedule.warmup_lr=1e-6")
    assert _plan(configs, *arguments).lr_factor == 0.25
    rates = _rates(configs, *arguments, "optim.lr=4e-3", "schedule.min_lr=4e-4", "schedule.warmup_epochs=0.5")
    assert rates[0] == pytest.approx(0.25e-6) and max(rates) <= 1e-3
    assert rates[4] == pytest.approx(_cosine(4 / 24, 1e-3, 1e-4)) and rates[-1] == pytest.approx(1e-4)


def test_steps_become_whole_epochs(configs: Path) -> None:
    arguments = ("train.epochs=null", "train.batch_size=100")
    assert [_plan(configs, *arguments, f"train.steps={steps}").epochs for steps in (1, 10, 11, 40)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.total_batch=100", "train.batch_size=32"], "not a multiple of the 32 pictures of train.batch_size=32"),
        (["train.total_batch=64", "train.batch_size=32", "train.accumulate=2"], "but train.accumulate=2 is given too"),
        (["train.steps=10"], "train.epochs=3 and train.steps=10: give one of them a value"),
        (["train.epochs=null"], "train.epochs=null and train.steps=null: give one of them a value"),
        (["train.epochs=2", "schedule.warmup_epochs=1", "schedule.cooldown_epochs=1"], "leave nothing of 2 epochs"),
        (["train.epochs=1", "schedule.warmup_epochs=1"], "schedule.warmup_epochs=0"),
        (["schedule.name=poly"], "schedule.name=poly with schedule.power=null: the poly schedule needs a power"),
        (["schedule.power=0.9"], "schedule.name=cosine with schedule.power=0.9"),
        (["schedule.name=step"], "schedule.name=step with schedule.decay_epochs=null: the step schedule needs the"),
        (["schedule.decay_epochs=2"], "schedule.name=cosine with schedule.decay_epochs=2"),
        (["schedule.decay_rate=0.5"], "schedule.name=cosine with schedule.decay_rate=0.5"),
        (["optim.lr=1e-5", "schedule.min_lr=1e-4"], "schedule.min_lr=0.0001 is above optim.lr=1e-05"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments: list[str], message: str, configs: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _plan(configs, *arguments)
    assert message in str(caught.value)


def _rates(configs: Path, *arguments: str) -> list[float]:
    """Return the learning rate of each step of a run on `PICTURES` pictures, and the one after the last."""
    config = load([*arguments], configs)
    plan = make_plan(config, PICTURES)
    optimizer = make_optimizer(nn.Linear(2, 2), config.optim, plan)
    scheduler = make_scheduler(optimizer, config.schedule, plan)
    rates = []
    for step in range(plan.epochs * plan.steps_per_epoch + 1):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def _cosine(share: float, high: float, low: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


FOUR_EPOCHS = ("train.batch_size=250", "train.epochs=4", "optim.lr=1e-3", "schedule.warmup_epochs=0")


def test_the_cooldown_is_the_end_of_the_epochs(configs: Path) -> None:
    rates = _rates(configs, *FOUR_EPOCHS, "schedule.min_lr=1e-5", "schedule.cooldown_epochs=1")
    assert rates[:12] == pytest.approx([_cosine(step / 12, 1e-3, 1e-5) for step in range(12)])
    assert rates[12:] == pytest.approx([1e-5] * 5)


def test_poly_has_the_power_that_is_asked_for(configs: Path) -> None:
    for power in (0.9, 1.0):
        rates = _rates(configs, *FOUR_EPOCHS, "schedule.name=poly", f"schedule.power={power}")
        assert rates == pytest.approx([1e-3 * (1 - step / 16) ** power for step in range(16)] + [0.0])


def test_steps_fall_as_often_and_as_far_as_is_asked_for(configs: Path) -> None:
    step = (*FOUR_EPOCHS, "schedule.name=step")
    rates = _rates(configs, *step, "schedule.decay_epochs=2")
    assert rates == pytest.approx([1e-3] * 8 + [1e-4] * 8 + [1e-5])
    rates = _rates(configs, *step, "schedule.decay_epochs=1.5", "schedule.decay_rate=0.5")
    assert rates == pytest.approx([1e-3] * 6 + [5e-4] * 6 + [2.5e-4] * 5)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_moves_within_an_epoch_and_warms_up(name: str, configs: Path) -> None:
    needed = {"poly": ["schedule.power=0.9"], "step": ["schedule.decay_epochs=1.25"]}.get(name, [])
    warm = (*FOUR_EPOCHS, "schedule.warmup_epochs=1", "schedule.warmup_lr=0")
    rates = _rates(configs, *warm, f"schedule.name={name}", *needed)
    assert rates[:4] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3], rel=1e-3)
    falls = [step for step in range(4, 16) if rates[step + 1] < rates[step]]
    assert any((step + 1) % 4 for step in falls) == (name != "constant") and max(rates) <= 1e-3
    assert name in ("constant", "step") or rates[-1] < 0.02e-3


class _Net(nn.Module):
    """A network with two layers, a head and timm's group matcher, which layer decay needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.conv_offset = nn.Linear(3, 3)
        self.spared = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Linear(3, 2)

    def no_weight_decay(self) -> set[str]:
        return {"spared"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv_offset|^spared", "blocks": r"^layers\.(\d+)"}


def _settings_by_name(model: nn.Module, **arguments: Any) -> dict[str, tuple[float, float]]:
    """Return (lr_scale, weight_decay) of every parameter; each must be in exactly one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, **{"weight_decay": 0.1, "layer_decay": None, "lr_scale": {}, **arguments})
    found = [
        (names[p], (group.get("lr_scale", 1.0), group["weight_decay"])) for group in groups for p in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


def test_factors_by_name_leave_weight_decay_as_it_is() -> None:
    plain = _settings_by_name(_Net())
    assert plain["layers.0.weight"] == (1, 0.1) and plain["layers.0.bias"] == plain["spared"] == (1, 0)
    scaled = _settings_by_name(_Net(), lr_scale={"conv_offset.*": 0.01, "*.bias": 0.5})
    assert scaled["conv_offset.weight"] == (0.01, 0.1)
    assert scaled["conv_offset.bias"] == (0.005, 0)  # both patterns match
    assert scaled["head.bias"] == (0.5, 0) and scaled["head.weight"] == (1, 0.1) and scaled["spared"] == (1, 0)


def test_factors_by_name_multiply_layer_decay() -> None:
    decayed = _settings_by_name(_Net(), layer_decay=0.5)
    assert decayed["head.weight"] == (1, 0.1) and decayed["layers.1.weight"] == (0.5, 0.1)
    both = _settings_by_name(_Net(), layer_decay=0.5, lr_scale={"conv_offset.weight": 0.01, "layers.0.*": 3.0})
    stem = decayed["conv_offset.bias"][0]
    assert both["conv_offset.weight"] == pytest.approx((stem * 0.01, 0.1))
    assert both["conv_offset.bias"] == (stem, 0) and both["layers.0.bias"] == (3 * decayed["layers.0.bias"][0], 0)
    assert both["layers.1.weight"] == decayed["layers.1.weight"] and both["head.bias"] == decayed["head.bias"]


def test_factors_reach_every_rate_of_the_schedule(configs: Path) -> None:
    arguments = ['optim.lr_scale={"conv_offset.weight": 0.01}', "schedule.warmup_epochs=1", "train.batch_size=250"]
    config = load(arguments, configs)
    plan = make_plan(config, PICTURES)
    model = _Net()
    optimizer = make_optimizer(model, config.optim, plan)
    scheduler = make_scheduler(optimizer, config.schedule, plan)
    [slow] = [group for group in optimizer.param_groups if any(p is model.conv_offset.weight for p in group["params"])]
    [fast] = [group for group in optimizer.param_groups if any(p is model.head.weight for p in group["params"])]
    for step in range(plan.epochs * plan.steps_per_epoch + 1):
        assert slow["lr"] == pytest.approx(0.01 * fast["lr"]), step  # also before the first step
        scheduler.step_update(step)


def test_without_factors_the_groups_are_those_of_timm() -> None:
    from timm.optim import create_optimizer_v2

    model = timm.create_model("test_convnext")
    for layer_decay in (None, 0.7):
        theirs = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=layer_decay).param_groups
        ours = parameter_groups(model, weight_decay=0.1, layer_decay=layer_decay, lr_scale={})
        assert [len(group["params"]) for group in ours] == [len(group["params"]) for group in theirs]
        for one, two in zip(ours, theirs, strict=True):
            assert all(p is q for p, q in zip(one["params"], two["params"], strict=True))
            assert (one["weight_decay"], one.get("lr_scale")) == (two["weight_decay"], two.get("lr_scale"))


@pytest.mark.parametrize(
    ("lr_scale", "message"),
    [
        ({"conv_ofset.weight": 0.01}, "no parameter is called conv_ofset.weight; did you mean conv_offset.weight?"),
        ({"*": -1.0}, "needs a finite number, at least 0"),
        ({"*": math.nan}, "needs a finite number, at least 0"),
    ],
)
def test_factors_that_mean_nothing_are_refused(lr_scale: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _settings_by_name(_Net(), lr_scale=lr_scale)
    assert message in str(caught.value)
