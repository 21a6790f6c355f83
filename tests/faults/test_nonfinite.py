"""NaN or infinite losses and gradients never reach the weights, and their pictures are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from forked import fork_processes
from mixerzoo.vision.data.classification import digits, split_indices
from mixerzoo.vision.data.loading import EpochBatches
from mixerzoo.vision.data.module import ZooData
from mixerzoo.vision.data.streams import Stream, StreamBatches
from mixerzoo.vision.training.callbacks import read_table
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.cli import main
from mixerzoo.vision.training.finite import NonFiniteLossError, _pictures, _write_down
from mixerzoo.vision.training.run import load_data, run
from mixerzoo.vision.training.settings import load
from mixerzoo.vision.training.tasks import Task
from PIL import Image
from warm import Finished

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

DIGITS = ("data=digits", "model=test_convnext", "data.limit=64", "train.batch_size=16", "train.progress=false")
"""A run with four steps per epoch."""


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `spoil(value, at={batches}, what="loss" | "gradient")`, which sets the loss or a gradient of batches."""

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
    assert f"{folder / 'nonfinite.json'} lists the pictures, last.ckpt is from before that" in error
    last = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 5 and _finite(last)

    [event] = json.loads((folder / "nonfinite.json").read_text())
    [batch] = event["batches"]
    expected = list(EpochBatches(64, 16, seed=0, training=True)._requests(1, 0))[1].indices
    train: Any = load_data(load(arguments, repository / "configs")).train
    assert (event["epoch"], batch["batch"]) == (1, 1)
    pictures = torch.from_numpy(digits().train_images[batch["pictures"]])  # rows of the original data set
    assert torch.equal(pictures, train.originals[expected])


def test_a_skipped_step_changes_nothing(spoil: Any, repository: Path, tmp_path: Path) -> None:
    """Weights, average, optimizer state and batch norm statistics stay; only the schedule continues."""
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


def test_a_first_step_that_is_not_finite_promises_no_checkpoint(
    spoil: Any, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(float("nan"), {0})
    assert main([*DIGITS, "train.epochs=1", f"out={tmp_path}"], configs=repository / "configs") == 1
    error = capsys.readouterr().err
    assert "no checkpoint was saved before that. Try a lower optim.lr" in error and "last.ckpt" not in error
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_more_in_a_row_than_allowed_stops(spoil: Any, repository: Path, tmp_path: Path) -> None:
    spoil(float("inf"), {1, 3, 4, 5})
    arguments = [*DIGITS, "train.epochs=2", "train.skip_nonfinite=2", f"out={tmp_path / 'run'}"]
    with pytest.raises(NonFiniteLossError, match=r"at epoch 1, batch 1; .*train\.skip_nonfinite=5"):
        run(load(arguments, repository / "configs"))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "lion", "adafactor", "nadamw", "adopt", "muon", "lars"])
def test_optimisers_pass_over_a_step_without_gradients(optimizer: str) -> None:
    """Skipping relies on this: a step without gradients changes nothing, whether it is the first or a later one."""
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


@pytest.mark.parametrize("source", ["digits", "image_folder", "mask_folder", "fashion_scenes"])
def test_pictures_of_a_batch_are_named_as_they_were_read(source: str, repository: Path, tmp_path: Path) -> None:
    """Pictures are named by file, by row in the original data set, or by the number of a scene."""
    configs = repository / "configs"
    if source == "digits":
        own = load([*DIGITS], configs)
        wanted = {int(row) for row in split_indices(len(digits().train_images), own.data.held_out, 0, 64)[0]}
    elif source == "fashion_scenes":
        own = load(["recipe=segmentation", "data.scenes=32", "data.size=32", "data.download=false"], configs)
        wanted = set(range(32))
    else:
        files = _write_pictures(tmp_path / "pictures", masks=source == "mask_folder")
        own = load([f"data={tmp_path / 'pictures'}", "model=test_convnext", "data.size=32"], configs)
        wanted = {str(file) for file in files}
    loader = ZooData(load_data(own), batch_size=8).train_dataloader()
    trainer: Any = SimpleNamespace(train_dataloader=loader, current_epoch=3)
    named = [name for batch in range(len(loader)) for name in _pictures(trainer, batch) or ()]
    assert len(set(named)) == len(named) == 8 * len(loader) and wanted.issuperset(named)
    if source == "image_folder":
        loader.batches.set_epoch(3)
        for batch, (_, labels) in enumerate(loader):
            classes = [Path(str(name)).parent.name for name in _pictures(trainer, batch) or ()]
            assert classes == ["ab"[label] for label in labels]


def _write_pictures(root: Path, *, masks: bool) -> list[Path]:
    """Write training and validation pictures of two classes, or with masks; return the training files."""
    files = []
    for split in ("train", "val") if not masks else ("training", "validation"):
        for number in range(16):
            folder = root / "images" / split if masks else root / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{number}.png"
            Image.new("RGB", (32, 32), (number, 0, 0)).save(file)
            files += [file] if split.startswith("train") else []
            if masks:
                (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
                Image.new("L", (32, 32), number % 2).save(root / "annotations" / split / f"{number}.png")
    if masks:
        (root / "classes.txt").write_text("a\nb\n")
    return files


def test_pictures_of_a_stream_have_no_names(tmp_path: Path) -> None:
    stream = Stream(SimpleNamespace(), 64, SimpleNamespace(), classes=2, training=True)  # type: ignore[arg-type]
    batches = StreamBatches(64, 16, workers=0, seed=0, training=True)
    loader = SimpleNamespace(source=stream, batches=batches)
    trainer: Any = SimpleNamespace(
        train_dataloader=loader, current_epoch=0, global_rank=0, global_step=7, default_root_dir=tmp_path
    )
    path, named = _write_down(trainer, [(7, torch.tensor(float("nan")))])
    assert not named
    assert json.loads(path.read_text())[0]["batches"] == [{"batch": 7, "loss": "nan"}]


def spoil_one(rank: int, batch: int) -> None:
    """In the process of the run: set the loss of this rank to NaN in the batch with this number."""
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
