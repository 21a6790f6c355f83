"""Runs from end to end in this process: their files, how they stop, and that resuming changes nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.vision.summary import summarize
from mixerzoo.vision.training import report as report_module
from mixerzoo.vision.training import results as results_module
from mixerzoo.vision.training import run as run_module
from mixerzoo.vision.training.callbacks import EpochTable, read_table
from mixerzoo.vision.training.checkpoints import AtomicCheckpointIO, load_checkpoint, write_atomically
from mixerzoo.vision.training.cli import main
from mixerzoo.vision.training.distillation import Objective
from mixerzoo.vision.training.finite import NonFiniteLossError
from mixerzoo.vision.training.run import run
from mixerzoo.vision.training.settings import load
from mixerzoo.vision.training.signals import Interrupted
from mixerzoo.vision.training.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

DIGITS = ("data=digits", "model=test_convnext", "data.limit=160", "train.batch_size=32", "train.progress=false")
"""A run with five steps per epoch of a model that trains in a second."""


@pytest.fixture
def configs(repository: Path) -> Path:
    return repository / "configs"


def _run(configs: Path, *arguments: str) -> dict[str, Any]:
    return run(load([*DIGITS, *arguments], configs))


def _png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5_000


def test_a_run_leaves_all_its_results(configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main([*DIGITS, "train.epochs=2", "augment.mixup=0.2", f"out={folder}"], configs=configs) == 0
    assert f"everything is in {folder}" in capsys.readouterr().out
    assert all(_png(folder / f"{name}.png") for name in ("batch", "curves", "confusion", "predictions"))
    assert list((folder / "tensorboard").glob("events.*"))
    assert load([f"resume={folder}"], configs).train.epochs == 2

    rows = read_table(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == [0, 1]
    assert all({"train/loss", "train/lr", "val/loss", "val/accuracy", "val/mean_accuracy"} <= set(row) for row in rows)
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["test"]["accuracy"] <= 1 and len(results["test_by_class"]) == 10
    assert results["parameters"] == 207_010 and results["gmacs"] > 0
    assert results["data"] == "digits from scikit-learn" and results["model"] == "test_convnext"
    assert results["best_epoch"] == 1 + max(range(2), key=lambda epoch: rows[epoch]["val/accuracy"])
    best = rows[results["best_epoch"] - 1]["val/accuracy"]
    assert (results["metric"], results["validation"]) == ("accuracy", pytest.approx(best))
    assert "207,010" in (folder / "summary.txt").read_text()

    for name in ("best", "last"):
        checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["mixerzoo"]["model"] == "test_convnext"
        assert checkpoint["mixerzoo"]["classes"] == list("0123456789")
        assert any(key.startswith("model.stages") for key in checkpoint["state_dict"])
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_the_best_checkpoint_is_the_one_that_is_tested(configs: Path, tmp_path: Path, no_pictures: None) -> None:
    """Its weights, loaded into a model of timm, reach the accuracy in results.json."""
    import timm
    from mixerzoo.vision.data.loading import Request

    results = _run(configs, "train.epochs=2", f"out={tmp_path / 'run'}")
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    weights = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items() if "model." in key}
    model = timm.create_model("test_convnext", in_chans=1, num_classes=10)
    model.load_state_dict(weights)
    test = run_module.load_data(load([*DIGITS], configs)).test
    images, labels = test.__getitems__(Request(list(range(len(test))), 0))
    accuracy = (model.eval()(images).argmax(1) == labels).double().mean()
    assert results["test"]["accuracy"] == pytest.approx(float(accuracy), abs=1e-6)


def test_segmentation_runs_from_the_same_command(configs: Path, tmp_path: Path) -> None:
    arguments = [
        *("recipe=segmentation", "model=test_convnext", "data.scenes=12", "data.size=48", "train.batch_size=4"),
        *("train.epochs=1", "train.progress=false", "head.channels=16", f"out={tmp_path / 'run'}"),
        "data.download=false",
    ]
    results = run(load(arguments, configs))
    assert 0 <= results["test"]["mean_iou"] <= 1 and results["test_by_class"][0]["class"] == "ground"
    assert all(_png(tmp_path / "run" / f"{name}.png") for name in ("batch", "curves", "confusion", "predictions"))
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    head = checkpoint["mixerzoo"]["head"]
    assert (head["name"], head["channels"], head["dropout"]) == ("semantic_fpn", 16, 0.0)


@pytest.mark.parametrize(
    "more", [("train.batch_size=8",), ("augment.sizes={0: 48}", "augment.repeats=2", "augment.mixup=0.4")]
)
def test_the_drawn_batch_is_the_first_that_the_model_sees(
    more: tuple[str, ...], configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, seen = [], []
    monkeypatch.setattr(results_module.pictures, "draw_batch", lambda path, images, *_: drawn.append(images))
    monkeypatch.setattr(results_module, "_draw_results", lambda *_: None)
    monkeypatch.setattr(report_module, "write_report", lambda *_: None)
    ask = Objective._ask_student
    monkeypatch.setattr(
        Objective, "_ask_student", lambda self, images: (seen.append(images.clone()), ask(self, images))[1]
    )
    _run(configs, "train.epochs=1", "train.limit_batches=1", "augment.erasing=0.5", *more, f"out={tmp_path / 'run'}")
    [shown] = drawn
    assert torch.equal(shown, seen[0][:32]) and shown.shape[-1] == (48 if len(more) > 1 else 32)


@pytest.mark.parametrize("recipe", ["classification", "segmentation"])
def test_small_recipes_run_as_they_are_shipped(
    recipe: str, configs: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of each stage with the model of the recipe, on digits if Fashion-MNIST is missing."""
    dry = [
        "train.limit_batches=2",
        "train.epochs=1",
        "train.batch_size=4",
        "data.download=false",
        "train.progress=false",
    ]
    results = run(load([f"recipe={recipe}", *dry, f"out={tmp_path / 'run'}"], configs))
    assert results["epochs"] == 1


class _Stop:
    """Sends a signal to this process when a training step begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, epoch: int, batch: int, number: int = signal.SIGINT) -> None:
        original = Task.on_train_batch_start

        def on_train_batch_start(task: Task, data: Any, batch_idx: int) -> None:
            original(task, data, batch_idx)
            if (task.current_epoch, batch_idx) == (epoch, batch):
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Task, "on_train_batch_start", on_train_batch_start)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[tuple[str, ...], Path]:
    """Return a function that gives the folder of the uninterrupted run with these arguments, cached."""
    return {}


RANDOM = ("train.epochs=3", "augment.mixup=0.3", "augment.erasing=0.3", "model.kwargs.drop_path_rate=0.2")


@pytest.mark.parametrize(
    ("epoch", "batch", "extra"),
    [
        (0, 4, ()),  # the last step of an epoch: its validation is still to come
        (1, 1, ()),
        *(pytest.param(*place, (), marks=pytest.mark.exhaustive) for place in ((0, 0), (0, 2), (2, 4))),
        pytest.param(1, 1, ("train.accumulate=2",), marks=pytest.mark.exhaustive),  # tests/faults kills such runs
    ],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    epoch: int,
    batch: int,
    extra: tuple[str, ...],
    configs: Path,
    uninterrupted: dict[tuple[str, ...], Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    no_pictures: None,
) -> None:
    """All weights and the losses of every epoch are equal bit for bit, with augmentation, mixup and drop path."""
    if extra not in uninterrupted:
        whole = uninterrupted[extra] = tmp_path_factory.mktemp("whole") / "run"
        _run(configs, *RANDOM, *extra, f"out={whole}")
    whole, parts = uninterrupted[extra], tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        _Stop(patch, epoch=epoch, batch=batch)
        with pytest.raises(Interrupted, match=f"stopped by SIGINT; go on with resume={parts}"):
            _run(configs, *RANDOM, *extra, f"out={parts}")
    stopped = load_checkpoint(parts / "checkpoints" / "last.ckpt")
    steps = 3 if extra else 5
    assert stopped["global_step"] == steps * epoch + (batch + 1 + (1 if extra else 0)) // (2 if extra else 1)

    run(load([f"resume={parts}"], configs))
    assert (parts / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    one, two = (load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, parts))
    assert one["global_step"] == two["global_step"] == 3 * steps
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, parts)]
    assert results[0]["test"] == results[1]["test"]


def test_sigterm_has_its_own_exit_code(
    configs: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Stop(monkeypatch, epoch=0, batch=1, number=signal.SIGTERM)
    assert main([*DIGITS, f"out={tmp_path / 'run'}"], configs=configs) == 143


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    configs: Path,
    tmp_path: Path,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = Task.training_step

    def training_step(task: Task, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        if task.current_epoch == 1:
            images = images * float("nan")
        return original(task, (images, labels), batch_idx)

    monkeypatch.setattr(Task, "training_step", training_step)
    assert main([*DIGITS, f"out={tmp_path / 'run'}"], configs=configs) == 1
    assert "error: the loss is nan at epoch 1, batch 0" in capsys.readouterr().err
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 5
    assert all(value.isfinite().all() for key, value in checkpoint["state_dict"].items() if key.startswith("model."))
    with pytest.raises(NonFiniteLossError):
        run(load([f"resume={tmp_path / 'run'}"], configs))


def test_a_folder_with_results_is_not_overwritten(configs: Path, tmp_path: Path, no_pictures: None) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    assert main([*DIGITS, f"out={tmp_path}"], configs=configs) == 2
    _run(configs, "train.limit_batches=1", "train.epochs=1", f"out={tmp_path}", "overwrite=true")
    assert (tmp_path / "notes.txt").read_text() == "keep me" and (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=convnext_atoo"], "no such model; did you mean convnext_atto"),
        (["model.kwargs.colour=3"], "model.name=test_convnext cannot be made with"),
        (["model.checkpoint=nowhere.pth"], "there is no such file"),
        (["data.size=3"], "try a larger data.size, or a stem that shrinks less"),
        (
            ["data.source=digitz"],
            "mask_folder, cityscapes, voc, camvid, colin27, mni_tissue; did you mean digits?",
        ),
        (["data.source=image_folder"], "data.root=None: there is no such folder"),
        (["train.batch_size=1000"], "use train.batch_size=160 or less"),
        (["augment.mixup=0.2", "train.batch_size=5"], "train.batch_size=5 must be even"),
        (["train.total_batch=48"], "train.total_batch=48 is not a multiple of the 32 pictures"),
        (["data=fashion_scenes", "augment.mixup=0.2", "data.download=false"], "set both to 0 for segmentation"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    arguments: list[str],
    message: str,
    configs: Path,
    tmp_path: Path,
    no_pictures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*DIGITS, f"out={tmp_path / 'run'}", *arguments], configs=configs) == 2
    assert message in capsys.readouterr().err


def test_weights_of_a_file_are_the_start(configs: Path, tmp_path: Path, no_pictures: None) -> None:
    import timm

    source = timm.create_model("test_convnext", in_chans=1, num_classes=10)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    config = load([*DIGITS, f"model.checkpoint={tmp_path / 'weights.pth'}"], configs)
    model = run_module.build_model(config, run_module.load_data(config))
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("head.fc")}
    assert len(body) > 50
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in body.items())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"step": torch.tensor(1)}, path)

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    writer.remove_checkpoint(path)
    assert not path.exists()


def test_the_table_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    table = EpochTable(tmp_path / "metrics.csv")
    for epoch in range(3):
        table.log_metrics({"val/loss": 1 / (epoch + 3), "epoch": epoch, "loss": 7.0}, step=epoch)
    table.log_metrics({"loss": 1.0, "epoch": 2}, step=3)
    resumed = EpochTable(tmp_path / "metrics.csv", resume=True)
    resumed.log_metrics({"val/loss": 0.5, "epoch": 1}, step=1)
    assert read_table(tmp_path / "metrics.csv") == [{"epoch": 0.0, "val/loss": 1 / 3}, {"epoch": 1.0, "val/loss": 0.5}]


def test_multiply_adds_count_the_attention_operator() -> None:
    """The count for 3 x 3 attention is computed by hand: projections, and keys and values of 6 x 6 windows."""
    from mixerzoo.mixers import NeighborhoodAttention2d

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = NeighborhoodAttention2d(8, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x.permute(0, 2, 3, 1))

    summary = summarize(Net(), (8, 6, 6))
    tokens = 36
    assert summary.macs == tokens * (8 * 24 + 8 * 8) + tokens * 9 * (8 + 8)
    assert summary.rows == (("attn", "NeighborhoodAttention2d", summary.parameters, summary.macs),)
    assert summarize(Net(), (8, 6, 6)).macs == summary.macs


def test_multiply_adds_count_the_convolution_operators() -> None:
    """A convolution with 7 x 7 taps and dilation 3 is counted, and the three of large kernel attention."""
    from mixerzoo.kernels.depthwise_conv import depthwise_conv2d, large_kernel_attention

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.w5 = torch.randn(8, 1, 7, 7), torch.randn(8, 1, 5, 5)
            self.w1 = torch.randn(8, 8, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = depthwise_conv2d(x, self.wide, dilation=3)
            return large_kernel_attention(x, self.w5, self.wide, self.w1)

    assert summarize(Net(), (8, 6, 10)).macs == 8 * 60 * 49 + 8 * 60 * (25 + 49 + 8)


def test_multiply_adds_count_the_scan_operator() -> None:
    """The scan runs over four sub-grids of 3 x 2 positions, with state 5 and delta rank 3 in each of 8 channels."""
    from mixerzoo.kernels.cross_scan import ATROUS
    from mixerzoo.kernels.selective_scan import selective_scan_2d

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            projected = torch.randn(*x.shape[:3], 3 + 2 * 5)
            weight, bias, A = torch.randn(4, 8, 3), torch.randn(4, 8), -torch.rand(4, 8, 5)
            return selective_scan_2d(x, projected, weight, bias, A, paths=ATROUS)

    assert summarize(Net(), (5, 3, 8)).macs == 4 * 6 * 8 * (3 + 4 * 5)


def test_multiply_adds_count_gated_linear_attention() -> None:
    """Each entry of the 3 x 5 states of two heads costs three multiply-adds per token and direction."""
    from mixerzoo.kernels.gated_linear_attention import bidirectional_gated_linear_attention, gated_linear_attention

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, value = torch.randn(1, 12, 2, 3), torch.randn(1, 12, 2, 5)
            value = gated_linear_attention(query, query, value, -query.abs())
            return bidirectional_gated_linear_attention(query, query, value, -query.abs(), -query.abs())

    assert summarize(Net(), (1, 1, 1)).macs == (1 + 2) * 12 * 2 * 3 * 5 * 3


@pytest.mark.parametrize(("count", "named"), [(5, "0 1 2 3 4 ignored"), (150, "0 3 149 ignored")])
def test_a_legend_of_many_classes_names_those_that_are_seen(
    count: int, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure
    from mixerzoo.vision.training import pictures

    seen: list[str] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: seen.extend(t.get_text() for t in figure.legends[0].get_texts())
    )
    masks = torch.tensor([0, 3, 255, min(149, count - 1)]).view(2, 2)
    classes = [str(index) for index in range(count)]
    pictures.draw_masks(tmp_path / "x.png", [torch.zeros(3, 2, 2)], {"truth": [masks]}, classes, (0.5,) * 3, (0.5,) * 3)
    assert " ".join(seen) == named
