"""Losses and gradients that are NaN or infinite: nothing of them gets into the weights, and the pictures are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from forked import fork_processes
from mixerzoo.vision.data.loading import EpochBatches
from mixerzoo.vision.data.module import ZooData
from mixerzoo.vision.training.callbacks import read_table
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.cli import main
from mixerzoo.vision.training.finite import NonFiniteLossError
from mixerzoo.vision.training.run import run
from mixerzoo.vision.training.settings import load
from mixerzoo.vision.training.tasks import Task
from warm import Finished

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

DIGITS = ("data=digits", "model=test_convnext", "data.limit=64", "train.batch_size=16", "train.progress=false")
"""Four steps an epoch."""


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`spoil(value, at={batches}, what="loss" | "gradient")`: makes the losses, or a gradient, of batches `value`."""

    def install(value: float, at: set[int], what: str = "loss") -> None:
        original = Task.training_step
        count = -1

        def training_step(task: Task, batch: Any, batch_idx: int) -> torch.Tensor:
            nonlocal count
            count += 1
            loss = original(task, batch, batch_idx)
            if count not in at:
                return loss
            if what == "loss":
                return loss * value
            loss.register_hook(lambda gradient: gradient * value)
            return loss

        monkeypatch.setattr(Task, "training_step", training_step)

    return install


def _finite(checkpoint: dict[str, Any]) -> bool:
    states = [checkpoint["state_dict"], *(s for s in checkpoint["optimizer_states"][0]["state"].values())]
    return all(value.isfinite().all() for state in states for value in state.values() if torch.is_tensor(value))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (float("nan"), "loss"),
        pytest.param(float("inf"), "loss", marks=pytest.mark.slow),
        pytest.param(float("nan"), "gradient", marks=pytest.mark.slow),
    ],
)
def test_training_stops_before_the_weights_change(
    value: float, what: str, spoil: Any, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(value, {5}, what)
    folder = tmp_path / "run"
    arguments = [*DIGITS, "train.epochs=2", "train.save_every=1", f"out={folder}"]
    assert main(arguments, configs=repository / "configs") == 1
    error = capsys.readouterr().err
    found = f"the loss is {value}" if what == "loss" else "a gradient is not finite"
    assert f"{found} at epoch 1, batch 1" in error
    assert f"{folder / 'nonfinite.json'} lists the pictures" in error
    last = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 5 and _finite(last)

    [event] = json.loads((folder / "nonfinite.json").read_text())
    [batch] = event["batches"]
    expected = list(EpochBatches(64, 16, seed=0, training=True)._requests(1, 0))[1].indices
    assert (event["epoch"], batch["batch"], batch["pictures"]) == (1, 1, expected)


def test_a_skipped_step_changes_nothing(spoil: Any, repository: Path, tmp_path: Path) -> None:
    """Not the weights, the average, the optimiser or the statistics of batch norm: only the schedule goes on."""
    states = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            parts = {**pl_module.model.state_dict(), **_named("average", pl_module.average.module.state_dict())}
            for index, state in enumerate(trainer.optimizers[0].state.values()):
                parts |= _named(f"optimiser{index}", state)
            states.append({name: value.clone() for name, value in parts.items()})

    spoil(float("nan"), {2, 3})
    arguments = (*DIGITS, "model=mobilenetv3_small_050", "ema.decay=0.9", "train.skip_nonfinite=2", "train.epochs=2")
    config = load([*arguments, "data.limit=64", f"out={tmp_path / 'run'}"], repository / "configs")
    with pytest.MonkeyPatch.context() as patch:
        original = Task.configure_callbacks
        patch.setattr(Task, "configure_callbacks", lambda task: [*original(task), Record()])
        run(config)
    assert len(states) == 8 and any("running_mean" in name for name in states[0])
    for step in (2, 3):
        assert all(torch.equal(states[1][name], states[step][name]) for name in states[1])
    assert not torch.equal(states[3]["conv_stem.weight"], states[4]["conv_stem.weight"])
    assert len(json.loads((tmp_path / "run" / "nonfinite.json").read_text())) == 2
    rows = read_table(tmp_path / "run" / "metrics.csv")
    assert [row["train/skipped"] for row in rows] == [2, 0]
    assert all(torch.isfinite(torch.tensor(row["train/loss"])) for row in rows)


def _named(prefix: str, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in values.items() if torch.is_tensor(value)}


@pytest.mark.slow
def test_more_in_a_row_than_allowed_stops(spoil: Any, repository: Path, tmp_path: Path) -> None:
    spoil(float("inf"), {1, 3, 4, 5})
    arguments = [*DIGITS, "train.epochs=2", "train.skip_nonfinite=2", f"out={tmp_path / 'run'}"]
    with pytest.raises(NonFiniteLossError, match=r"at epoch 1, batch 1; .*train\.skip_nonfinite=5"):
        run(load(arguments, repository / "configs"))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "lion", "adafactor", "nadamw", "adopt", "muon", "lars"])
def test_optimisers_pass_over_a_step_without_gradients(optimizer: str) -> None:
    """On which skipping stands: nothing changes, be it the first step or a later one."""
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimiser: Any = create_optimizer_v2(model, opt=optimizer, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        before = [parameter.clone() for parameter in model.parameters()]
        optimiser.zero_grad(set_to_none=True)
        optimiser.step()
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        for _ in range(2):
            model(torch.randn(2, 4)).square().sum().backward()
            optimiser.step()
        assert not torch.equal(before[0], model[0].weight)


def test_pictures_of_a_batch_are_those_that_were_read(repository: Path) -> None:
    """The numbers that are written down are those that the data set was asked for."""
    from types import SimpleNamespace

    from mixerzoo.vision.training.finite import _pictures
    from mixerzoo.vision.training.run import load_data

    splits = load_data(load([*DIGITS], repository / "configs"))
    asked: list[list[int]] = []
    original = splits.train.__getitems__
    splits.train.__class__.__getitems__, restore = (
        lambda self, request: (asked.append(request.indices), original(request))[1],
        splits.train.__class__.__getitems__,
    )
    try:
        loader = ZooData(splits, batch_size=16).train_dataloader()
        loader.batches.set_epoch(3)
        list(loader)
    finally:
        splits.train.__class__.__getitems__ = restore
    trainer: Any = SimpleNamespace(train_dataloader=loader, current_epoch=3)
    assert [_pictures(trainer, index) for index in range(4)] == asked


def spoil_one(rank: int, batch: int) -> None:
    """In the run's process: of two, the one of this rank has a loss that is NaN in its batch of this number."""
    fork_processes()
    original = Task.training_step
    count = -1

    def training_step(task: Task, *arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        loss = original(task, *arguments)
        return loss * float("nan") if (task.global_rank, count) == (rank, batch) else loss

    Task.training_step = training_step


@pytest.mark.slow
def test_two_processes_decide_together(
    tiny: tuple[str, ...], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    two = (*tiny, "train.devices=2", "train.accelerator=cpu", "train.batch_size=8", "train.epochs=2")
    two = (*two, "train.save_every=1")
    fault: dict[str, Any] = {"prepare": spoil_one, "prepare_with": {"rank": 1, "batch": 2}}
    stopped = run_train(*two, f"out={tmp_path / 'a'}", **fault)
    assert stopped.code == 1 and "(the loss of another process, or a gradient)" in stopped.err, stopped.err
    last = load_checkpoint(tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 2 and _finite(last)
    own, other = (json.loads((tmp_path / "a" / f"nonfinite{rank}.json").read_text()) for rank in ("", "-1"))
    assert (own[0]["batches"][0]["loss"], other[0]["batches"][0]["loss"]) != ("nan", "nan")
    assert other[0]["batches"][0]["loss"] == "nan"
    assert not set(own[0]["batches"][0]["pictures"]) & set(other[0]["batches"][0]["pictures"])

    went_on = run_train(*two, "train.skip_nonfinite=1", f"out={tmp_path / 'b'}", **fault)
    assert went_on.code == 0, went_on.err
    assert _finite(load_checkpoint(tmp_path / "b" / "checkpoints" / "last.ckpt"))
    assert [row["train/skipped"] for row in read_table(tmp_path / "b" / "metrics.csv")] == [1, 0]
