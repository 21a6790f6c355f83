"""Optimization in real runs: learning rates by step and group, clipped gradients, and growing picture sizes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import pytest
import pytorch_lightning as pl
import timm
import torch
from mixerzoo.vision.data.module import ZooData
from mixerzoo.vision.data.splits import Splits
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.training.build import build_model
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.config import Config, DistillConfig
from mixerzoo.vision.training.distillation import make_teacher
from mixerzoo.vision.training.optimization import clip_gradients, parameter_groups
from mixerzoo.vision.training.plan import Plan, make_plan
from mixerzoo.vision.training.run import load_data, run
from mixerzoo.vision.training.settings import ConfigError, load
from mixerzoo.vision.training.signals import Interrupted
from mixerzoo.vision.training.tasks import Task
from timm.scheduler import CosineLRScheduler
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

DIGITS = ("data=digits", "model=test_convnext", "data.limit=96", "train.batch_size=16", "train.progress=false")
"""A run with six batches per epoch."""

Load = Callable[..., Config]


@pytest.fixture
def settings(repository: Path) -> Load:
    return lambda *arguments: load([*DIGITS, "schedule.warmup_epochs=0", *arguments], repository / "configs")


class _Record(pl.Callback):
    """A callback that records the learning rates at each step and the picture sizes of training and validation."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.training: list[tuple[int, int]] = []
        self.validation: set[int] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.training.append((trainer.current_epoch, batch[0].shape[-1]))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.validation.add(batch[0].shape[-1])


def _fit(config: Config) -> tuple[Task, _Record, Plan]:
    """Train as `run` does, without a run folder."""
    splits = load_data(config)
    plan = make_plan(config, len(splits.train))
    task = Task(build_model(config, splits), config, splits, plan=plan)
    record = _Record()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=plan.epochs,
        accumulate_grad_batches=plan.accumulate,
        gradient_clip_val=config.optim.clip_grad,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ZooData(splits, batch_size=config.train.batch_size, sizes=config.augment.sizes)
    trainer.fit(task, data)
    return task, record, plan


@pytest.mark.parametrize("prefix", [False, True])
def test_rates_are_those_of_a_loop_written_by_hand(prefix: bool, settings: Load) -> None:
    """timm's scheduler is updated once per optimizer step, also for the shorter last step of an epoch; each group has
    its factor of that learning rate, from the warm-up to the cool-down."""
    config = settings(
        *("train.epochs=5", "train.accumulate=4", "optim.layer_decay=0.5", "optim.lr=1e-3", "schedule.min_lr=1e-5"),
        *("schedule.warmup_epochs=1.5", "schedule.cooldown_epochs=1", f"schedule.warmup_prefix={str(prefix).lower()}"),
    )
    task, record, plan = _fit(config)
    assert (plan.steps_per_epoch, len(record.rates)) == (2, 10)

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=8 - 3 * prefix,
        lr_min=1e-5,
        warmup_t=3,
        warmup_lr_init=1e-6,
        warmup_prefix=prefix,
        t_in_epochs=False,
    )
    expected, updates = [], 0
    for _ in range(5):
        for batch in range(6):
            if (batch + 1) % 4 == 0 or batch == 5:
                expected.append(optimizer.param_groups[0]["lr"])
                updates += 1
                scheduler.step_update(updates)
    assert expected[0] == 1e-6 and expected[-2:] == [1e-5, 1e-5]
    assert (expected[3] == 1e-3) == prefix  # otherwise the cosine has fallen underneath

    groups = task.trainer.optimizers[0].param_groups
    scales = [group["lr_scale"] for group in groups]
    assert len(set(scales)) > 4 and max(scales) == 1
    for rates, rate in zip(record.rates, expected, strict=True):
        assert rates == pytest.approx([scale * rate for scale in scales], rel=1e-12)


def test_pictures_grow_in_training_alone(settings: Load) -> None:
    _, record, _ = _fit(settings("train.epochs=3", "data.size=32", "augment.sizes={1: 48, 2: 64}"))
    assert record.training == [(epoch, size) for epoch, size in enumerate((32, 48, 64)) for _ in range(6)]
    assert record.validation == {32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["augment.sizes={3: 64}"], "augment.sizes: 3: 64 needs an epoch from 0 to 2, of 3"),
        (["augment.sizes={0: 0}"], "a size of at least 1"),
        (["augment.mix_off_epochs=1"], "there is nothing to turn off"),
    ],
)
def test_sizes_and_mixing_that_cannot_be_are_refused(arguments: list[str], message: str, settings: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(settings("train.epochs=3", *arguments), 96)
    assert message in str(caught.value)


def test_every_size_is_tried_before_training(settings: Load, tmp_path: Path) -> None:
    """A ViT for one size is rejected for others, and so is such a teacher; the message names the setting."""
    small = ("model.kwargs.img_size=32", "model.kwargs.depth=1")
    config = settings("model=deit_tiny_patch16_224", *small, "augment.sizes={0: 48}")
    with pytest.raises(ConfigError) as caught:
        build_model(config, load_data(config))
    assert "cannot take pictures of 48 x 48" in str(caught.value) and "augment.sizes" in str(caught.value)
    weights = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, in_chans=1, num_classes=10).state_dict()
    torch.save(weights, tmp_path / "teacher.pth")
    distill = DistillConfig(teacher="deit_tiny_patch16_224", checkpoint=str(tmp_path / "teacher.pth"))
    distill.kwargs = {"depth": 1, "in_chans": 1, "img_size": 32}
    with pytest.raises(ConfigError, match="cannot take pictures of 1 x 48 x 48"):
        make_teacher(distill, load_data(config), config.augment.sizes.values())


def test_the_last_epochs_go_without_mixing(settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("train.epochs=3", "augment.mixup=0.8", "augment.label_smoothing=0.1", "augment.mix_off_epochs=1")
    blended: dict[int, list[bool]] = {}
    original = Task._laid_out

    def watch(task: Task, batch: Any) -> Any:
        images, targets = original(task, batch)
        if task.training and task.mix is not None and not hasattr(task.mix, "watched"):
            mix = task.mix

            class Watched:
                watched, mixup_enabled = True, True

                def __call__(self, images: Any, targets: Any) -> Any:
                    mix.mixup_enabled = self.mixup_enabled
                    before = images.clone()
                    images, targets = mix(images, targets)
                    assert targets.shape == (16, 10)
                    blended.setdefault(task.current_epoch, []).append(not torch.equal(images, before))
                    return images, targets

            task.mix = Watched()  # pyright: ignore[reportAttributeAccessIssue]
        return images, targets

    monkeypatch.setattr(Task, "_laid_out", watch)
    _fit(config)
    assert all(blended[0]) and all(blended[1]) and blended[2] == [False] * 6


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_gradients_are_clipped_in_three_ways(mode: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_convnext", num_classes=5)
    before, after = {}, {}
    for name, parameter in model.named_parameters():
        parameter.grad = after[name] = torch.randn_like(parameter)
        before[name] = parameter.grad.clone()
    clip_gradients(model, 0.01, mode)
    if mode == "norm":
        total = torch.cat([gradient.flatten() for gradient in before.values()]).norm()
        for name, gradient in after.items():
            torch.testing.assert_close(gradient, before[name] * (0.01 / total), rtol=1e-4, atol=0)
    elif mode == "value":
        assert all(torch.equal(after[name], before[name].clamp(-0.01, 0.01)) for name in after)
    else:
        untouched = {name for name in after if torch.equal(after[name], before[name])}
        assert untouched == {name for name, _ in model.named_parameters() if name.startswith("head.fc.")}
        weight = model.stem[0].weight.detach().flatten(1)
        limit = 0.01 * weight.norm(dim=1).clamp(min=1e-3)
        torch.testing.assert_close(after["stem.0.weight"].flatten(1).norm(dim=1), limit)


def test_the_run_clips_in_the_way_that_is_asked_for(settings: Load) -> None:
    """One step of SGD with Nesterov momentum moves no weight by more than 1.9 times the clipped gradient."""
    arguments = ("train.epochs=1", "data.limit=16", "optim.name=sgd", "optim.lr=1", "optim.weight_decay=0")
    config = settings(*arguments, "optim.clip_grad=1e-4", "optim.clip_mode=value")
    torch.manual_seed(0)
    start = {name: value.clone() for name, value in build_model(config, load_data(config)).named_parameters()}
    torch.manual_seed(0)
    task, _, _ = _fit(config)
    moved = max(float((value - start[name]).abs().max()) for name, value in task.model.named_parameters())
    assert moved == pytest.approx(1.9e-4, rel=1e-2)


def test_more_can_be_spared_from_weight_decay() -> None:
    model = timm.create_model("test_convnext")
    plain, spared = (
        _decays(model, parameter_groups(model, weight_decay=0.1, layer_decay=layer_decay, lr_scale={}, no_decay=names))
        for layer_decay, names in ((None, []), (0.5, ["*.conv_dw.weight"]))
    )
    assert {name for name in plain if plain[name] and not spared[name]} == {
        name for name in plain if name.endswith("conv_dw.weight")
    }
    with pytest.raises(ConfigError, match=r"optim.no_decay: no parameter is called \*\.rpb"):
        parameter_groups(model, weight_decay=0.1, layer_decay=None, lr_scale={}, no_decay=["*.rpb"])


def _decays(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["weight_decay"] for group in groups for p in group["params"]}


def _scales(model: nn.Module, **arguments: Any) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, lr_scale={}, **arguments)
    return {names[p]: group["lr_scale"] for group in groups for p in group["params"]}


def _segmenter(name: str, **kwargs: Any) -> nn.Module:
    return build_segmenter(name, 5, head={"name": "upernet", "channels": 8}, **kwargs)


def test_layers_of_a_backbone_are_the_same_under_a_head() -> None:
    """The groups are equal except for the final norm and the classifier, which a segmenter does not have."""
    small = {"depths": (1, 2, 3, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 1), "kernel_size": 3}
    for blocks in (1, 2, 99):
        layers: dict[str, Any] = {"layer_decay": 0.5, "layer_blocks": blocks}
        alone = _scales(timm.create_model("nat_mini", out_norms=True, **small), **layers)
        under = _scales(_segmenter("nat_mini", **small), **layers)
        prefix = "backbone.model."
        backbone = {name[len(prefix) :]: scale for name, scale in under.items() if name.startswith(prefix)}
        assert backbone == {name: alone[name] for name in backbone} and len(set(backbone.values())) > 4
        assert {scale for name, scale in under.items() if not name.startswith("backbone.")} == {1.0}
    assert len(set(alone.values())) == 6  # stem, four stages, head


def test_a_backbone_that_hides_its_layers_has_one_rate() -> None:
    with pytest.raises(ConfigError, match=r"optim.layer_decay: EfficientNetFeatures .*; set it to null"):
        parameter_groups(_segmenter("test_efficientnet"), weight_decay=0, layer_decay=0.9, lr_scale={})


def test_layers_of_timms_own_pyramids_are_known_under_a_head() -> None:
    alone = _scales(timm.create_model("test_convnext"), layer_decay=0.5)
    under = _scales(_segmenter("test_convnext"), layer_decay=0.5)
    prefix = "backbone.model."
    backbone = {name[len(prefix) :]: scale for name, scale in under.items() if name.startswith(prefix)}
    assert backbone and backbone == {name: alone[name] for name in backbone} and len(set(backbone.values())) > 4


def test_a_new_head_begins_smaller(settings: Load) -> None:
    splits = load_data(settings())
    heads = []
    for scale in (1.0, 0.001):
        torch.manual_seed(0)
        model: Any = build_model(settings(f"model.head_init_scale={scale}"), splits)
        heads.append(model.head.fc.weight)
    torch.testing.assert_close(heads[1], heads[0] * 0.001)


def test_a_head_that_is_not_new_is_not_made_smaller(settings: Load, tmp_path: Path) -> None:
    splits = load_data(settings())
    torch.save(timm.create_model("test_convnext", num_classes=1000).state_dict(), tmp_path / "weights.pth")
    config = settings("model.head_init_scale=0.001", f"model.checkpoint={tmp_path / 'weights.pth'}", "data.size=32")
    build_model(config, splits)  # ten classes, so the head is new
    thousand = SimpleNamespace(classes=tuple(map(str, range(1000))), size=32, channels=3, dense=False)
    with pytest.raises(ConfigError, match="the weights bring theirs, of 1000 classes too; set it to 1"):
        build_model(config, _as_splits(thousand))
    thousand.dense = True
    with pytest.raises(ConfigError, match="of a classifier's head; set it to 1 for segmentation"):
        build_model(settings("model.head_init_scale=0.001"), _as_splits(thousand))


def _as_splits(facts: Any) -> Splits:
    return facts


MIXED = (
    "train.epochs=2",
    "data.held_out=0.02",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "ema.decay=0.9",
    "optim.clip_grad=1.0",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "argument", ["train.precision=bf16-mixed", "train.accumulate=2", "train.channels_last=true", "optim.clip_mode=agc"]
)
def test_what_makes_training_faster_goes_with_averages_and_mixing(
    argument: str, settings: Load, tmp_path: Path, no_pictures: None
) -> None:
    result = run(settings(*MIXED, argument, f"out={tmp_path / 'run'}"))
    assert 0 <= result["test"]["accuracy"] <= 1
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.exhaustive
def test_compiled_training_goes_with_averages_and_mixing(settings: Load, tmp_path: Path, no_pictures: None) -> None:
    small = ("model=test_vit", "model.kwargs.depth=1", "model.kwargs.img_size=32", "train.epochs=1")
    result = run(settings(*MIXED, *small, "train.compile=true", f"out={tmp_path / 'run'}"))
    assert 0 <= result["test"]["accuracy"] <= 1


@pytest.mark.slow
def test_a_run_of_growing_pictures_resumes_exactly(
    settings: Load, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    """The run stops in the epoch of the middle size; mixup ends early, and EMA and repeated augmentation are on."""
    arguments = (*MIXED, "train.epochs=3", "augment.sizes={1: 48, 2: 64}", "augment.mix_off_epochs=1")
    arguments += ("augment.repeats=3", "optim.layer_decay=0.7", "schedule.warmup_prefix=true")
    run(settings(*arguments, f"out={tmp_path / 'whole'}"))
    original = Task.on_train_batch_start

    def stop(task: Task, batch: Any, batch_idx: int) -> None:
        original(task, batch, batch_idx)
        if (task.current_epoch, batch_idx) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Task, "on_train_batch_start", stop)
        run(settings(*arguments, f"out={tmp_path / 'parts'}"))
    run(load([f"resume={tmp_path / 'parts'}"], repository / "configs"))
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "parts"))
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert all(torch.equal(value, parts["raw_weights"][name]) for name, value in whole["raw_weights"].items())
