"""The moving average of the weights: its definition, its use, and that it is never confused with the raw weights."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from mixerzoo.vision._loading import load_model
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.training.callbacks import read_table
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.config import Config, EmaConfig, TrainConfig
from mixerzoo.vision.training.ema import AveragedWeights, make_average
from mixerzoo.vision.training.finite import StepGuard
from mixerzoo.vision.training.plan import Plan
from mixerzoo.vision.training.run import load_data, run
from mixerzoo.vision.training.settings import ConfigError, load
from mixerzoo.vision.training.tasks import Task
from torch import Tensor, nn
from torchmetrics import Metric

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

DIGITS = ("data=digits", "model=test_convnext", "data.limit=64", "train.batch_size=16", "train.progress=false")


class Expected:
    """Compute the average by its definition in float64 from the weights after each step."""

    def __init__(self, decay: float, *, warmup: bool, every: int, start_step: int) -> None:
        self.decay, self.warmup, self.every, self.start_step = decay, warmup, every, start_step
        self.values: dict[str, Tensor] = {}

    def update(self, state: dict[str, Tensor], step: int) -> None:
        passed = step - self.start_step
        if passed > 0 and passed % self.every:
            return
        updates = passed // self.every
        decay = 0.0
        if updates > 1:
            decay = min(self.decay, 1 - (1 + updates - 1) ** (-2 / 3)) if self.warmup else self.decay
        for name, value in state.items():
            old = self.values.get(name, value.double())
            averaged = decay * old + (1 - decay) * value.double()
            self.values[name] = averaged if value.is_floating_point() else value.clone()


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize(("every", "start_step"), [(1, 0), (3, 0), (2, 5)])
def test_the_average_is_its_definition(warmup: bool, every: int, start_step: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    how: dict[str, Any] = {"decay": 0.8, "warmup": warmup, "every": every, "start_step": start_step}
    average = AveragedWeights(model, StepGuard(), **how)
    expected = Expected(how.pop("decay"), **how)
    for step in range(1, 14):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3))  # moves the statistics
        average.update(model, step)
        expected.update({name: value.clone() for name, value in model.state_dict().items()}, step)
        if step >= every:  # before that it is what the network began with
            for name, value in average.module.state_dict().items():
                torch.testing.assert_close(value.double(), expected.values[name].double(), atol=1e-5, rtol=1e-5)


def test_it_is_small_and_can_be_sent_to_another_process(repository: Path) -> None:
    """Only the network of the task is copied, not its metrics, and the copy has no references to the original."""
    config = load([*DIGITS, "ema.decay=0.99"], repository / "configs")
    splits = load_data(config)
    network = timm.create_model("test_convnext", in_chans=1, num_classes=10)
    task = Task(network, config, splits, plan=Plan(2, 4, 1, 16, 1))
    assert task.average is not None and not any(name.startswith("average") for name, _ in task.named_modules())
    modules = list(task.average.average.modules())
    assert not any(isinstance(module, (Metric, pl.LightningModule)) for module in modules)
    assert not any(parameter.requires_grad for parameter in task.average.average.parameters())
    again = pickle.loads(pickle.dumps(task.average))
    assert all(
        torch.equal(one, two)
        for one, two in zip(again.module.state_dict().values(), task.average.module.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("ema", "train", "message"),
    [
        (EmaConfig(warmup=True), TrainConfig(), "give ema.decay"),
        (EmaConfig(decay=0.9), TrainConfig(devices=2, strategy="fsdp"), "needs whole weights"),
    ],
)
def test_settings_that_contradict_are_refused(ema: EmaConfig, train: TrainConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_average(nn.Linear(1, 1), Config(ema=ema, train=train), Plan(1, 1, 1, 1, 1.0), StepGuard())


class Follow(pl.Callback):
    """A callback that computes the reference average beside the one under test, step by step."""

    def __init__(self, expected: Expected) -> None:
        self.expected, self.step = expected, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.expected.update({name: value.clone() for name, value in pl_module.model.state_dict().items()}, self.step)
        for name, value in pl_module.average.module.state_dict().items():
            torch.testing.assert_close(value.double(), self.expected.values[name].double(), atol=1e-6, rtol=1e-5)


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Expected], Follow]:
    def install(expected: Expected) -> Follow:
        callback, original = Follow(expected), Task.configure_callbacks
        monkeypatch.setattr(Task, "configure_callbacks", lambda task: [*original(task), callback])
        return callback

    return install


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "extra",
    [
        ("train.precision=bf16-mixed", "train.accumulate=2"),
        pytest.param(("model.kwargs.drop_path_rate=0.3", "augment.mixup=0.3"), marks=SLOW),
        pytest.param(("optim.freeze=[stem.*]", 'optim.freeze_epochs={"stages.0.*": 1}'), marks=SLOW),
        pytest.param(("train.compile=true",), marks=pytest.mark.exhaustive),
        pytest.param(("distill.teacher=test_convnext2",), marks=SLOW),
        pytest.param(("optim.clip_grad=0.1", "augment.mixup=0.3", "train.channels_last=true"), marks=SLOW),
    ],
    ids=lambda extra: extra[0].split("=")[0],
)
def test_it_goes_with_everything_else(
    extra: tuple[str, ...], follow: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average is also what is validated, saved as state_dict, tested and exported."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: original(module, backend="eager"))
    if "distill.teacher=test_convnext2" in extra:
        teacher = timm.create_model("test_convnext2", in_chans=1, num_classes=10)
        torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
        extra = (*extra, f"distill.checkpoint={tmp_path / 'teacher.pth'}")
    callback = follow(Expected(0.8, warmup=True, every=1, start_step=1))
    folder = tmp_path / "run"
    first = 0.5 if "train.accumulate=2" in extra else 0.25  # one step
    ema = ("ema.decay=0.8", "ema.warmup=true", f"ema.start_epoch={first}")
    config = load([*DIGITS, *ema, *extra, "train.epochs=2", f"out={folder}"], repository / "configs")
    found = run(config)
    assert callback.step == (4 if "train.accumulate=2" in extra else 8)

    best = load_checkpoint(folder / "checkpoints" / "best.ckpt")
    last = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    for name, value in last["raw_weights"].items():
        averaged = last["state_dict"][f"model.{name}"]
        torch.testing.assert_close(averaged.double(), callback.expected.values[name].double(), atol=1e-6, rtol=1e-5)
        assert name.startswith("stem") or not torch.equal(value, averaged)  # the stem is frozen in one case
    model = load_model("test_convnext", checkpoint=folder / "checkpoints" / "best.ckpt")
    splits = load_data(config)
    for split, expected in (
        (splits.test, found["test"]["accuracy"]),
        (splits.val, read_table(folder / "metrics.csv")[best["epoch"]]["val/accuracy"]),
    ):
        images, labels = split.__getitems__(Request(list(range(len(split))), 0))
        with torch.no_grad():
            accuracy = float((model(images).argmax(1) == labels).double().mean())
        assert accuracy == pytest.approx(expected, abs=0.02 if "bf16" in str(extra) else 1e-6)


@pytest.mark.slow
def test_evit_is_validated_at_its_own_rates(follow: Any, repository: Path, tmp_path: Path) -> None:
    callback = follow(Expected(0.8, warmup=False, every=1, start_step=0))
    rates: list[Any] = []

    class Watch(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            rates.append([part.keep_rate for part in pl_module.average.module.reducers if hasattr(part, "keep_rate")])

    with pytest.MonkeyPatch.context() as patch:
        original = Task.configure_callbacks
        patch.setattr(Task, "configure_callbacks", lambda task: [*original(task), Watch()])
        name = next(name for name in timm.list_models("*evit*") if timm.get_pretrained_cfg(name) is not None)
        small = ("model.kwargs.depth=4", "model.kwargs.embed_dim=32", "model.kwargs.num_heads=2")
        arguments = [*DIGITS, f"model={name}", *small, "data.size=32", "reduction.shrink_epochs=1", "ema.decay=0.8"]
        run(load([*arguments, "train.epochs=2", f"out={tmp_path / 'run'}"], repository / "configs"))
    assert callback.step == 8 and len(rates) == 2 and rates[0] == rates[1] and len(rates[0]) > 0
    assert all(rate < 1 for rate in rates[0])


class SaveAtTheEnd(pl.Callback):
    """A callback that saves on an exception, as Lightning's OnExceptionCheckpoint does, and keeps the weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.raw = {name: value.clone() for name, value in pl_module.model.state_dict().items()}
        self.average = {name: value.clone() for name, value in pl_module.average.module.state_dict().items()}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    "error", [ValueError("broken"), pytest.param(KeyboardInterrupt(), marks=SLOW)], ids=["exception", "ctrl-c"]
)
def test_an_exception_inside_validation_leaves_both_in_their_slots(
    error: BaseException, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = SaveAtTheEnd(tmp_path / "at_the_end.ckpt")
    original, step = Task.configure_callbacks, Task.validation_step

    def validation_step(task: Task, batch: Any, batch_idx: int) -> None:
        step(task, batch, batch_idx)
        if task.current_epoch == 1 and batch_idx == 1:
            raise error

    monkeypatch.setattr(Task, "configure_callbacks", lambda task: [*original(task), save])
    monkeypatch.setattr(Task, "validation_step", validation_step)
    arguments = [*DIGITS, "ema.decay=0.9", "train.epochs=2", f"out={tmp_path / 'run'}"]
    with pytest.raises((ValueError, SystemExit)):
        run(load(arguments, repository / "configs"))
    saved = load_checkpoint(save.path)
    assert any(not torch.equal(save.raw[name], save.average[name]) for name in save.raw)
    for name, value in save.raw.items():
        assert torch.equal(saved["raw_weights"][name], value)
        assert torch.equal(saved["state_dict"][f"model.{name}"], save.average[name])
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4
