"""Unusable run folders are reported before training, and results of other runs are never overwritten."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.vision.training import run
from mixerzoo.vision.training.callbacks import Curves, EpochTable, read_table
from mixerzoo.vision.training.checkpoints import AtomicCheckpointIO, SaveError, load_best, load_checkpoint
from mixerzoo.vision.training.cli import main
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.failures import TrainingError
from mixerzoo.vision.training.folder import make_folder
from mixerzoo.vision.training.settings import ConfigError
from warm import Finished

# A folder that cannot be written


def _config(out: Path, **how: Any) -> Config:
    config = Config(out=str(out))
    for name, value in how.items():
        setattr(config, name, value)
    return config


def test_a_file_in_the_way_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"exists already|cannot be written"):
                make_folder(_config(out, overwrite=overwrite))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_permission_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the permission error is simulated."""

    def refuse(dir: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("mixerzoo.vision.training.folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written: .*Permission denied"):
        make_folder(_config(tmp_path / "run"))


def test_a_read_only_file_system_is_an_error_before_training() -> None:
    with pytest.raises(ConfigError, match="out=/proc/run cannot be written"):
        make_folder(_config(Path("/proc/run")))


@pytest.mark.parametrize("resume", [None, "auto"])
def test_existing_results_are_kept_unless_overwrite_is_given(resume: str | None, tmp_path: Path) -> None:
    for name in ("notes.txt", "results.json", "config.yaml"):
        (tmp_path / name).write_text("old")
    with pytest.raises(ConfigError, match="exists already; choose another, or overwrite=true, or resume="):
        make_folder(_config(tmp_path, resume=resume))
    assert (tmp_path / "results.json").read_text() == "old"
    make_folder(_config(tmp_path, overwrite=True, resume=resume))
    assert (tmp_path / "notes.txt").read_text() == "old" and not (tmp_path / "results.json").exists()


def test_resume_auto_begins_where_a_run_ended_before_its_first_checkpoint(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "config.yaml").write_text("seed: 0")
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match="exists already"):
            make_folder(_config(tmp_path / name))
        make_folder(_config(tmp_path / name, resume="auto"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        make_folder(_config(tmp_path / "mine", resume="auto"))


def test_a_new_run_is_not_mixed_with_an_old_one(tmp_path: Path) -> None:
    """overwrite=true deletes every file that a run writes, of all its processes, and nothing else."""
    old = ("metrics.csv", "error.txt", "error-1.txt", "nonfinite.json", "nonfinite-12.json", "batch.png", "summary.txt")
    old = (*old, "curves.png", "curves.svg", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
    old = (*old, "tensorboard/events.out.tfevents.17.host.4.0")
    mine = ("notes.txt", "error-notes.txt", "tensorboard/notes.txt", "checkpoints/mine.ckpt")
    for name in (*old, *mine):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    make_folder(_config(tmp_path, overwrite=True))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(mine)


def test_curves_of_a_run_that_began_are_not_mixed_with_those_of_its_next_start(tmp_path: Path) -> None:
    for name in ("config.yaml", "tensorboard/events.out.tfevents.17.host.4.0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    make_folder(_config(tmp_path, resume="auto"))
    assert not list((tmp_path / "tensorboard").iterdir())


# A full disk


def limit_all_files(size: int) -> None:
    """In the process of the run: let no file grow beyond this size, as on a disk that is full from the start."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_start_is_an_error_before_training(
    tiny: tuple[str, ...], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    """Empty and small files can still be written there."""
    done = run_train(*tiny, f"out={tmp_path / 'run'}", prepare=limit_all_files, prepare_with={"size": 100_000})
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1] == f"error: out={tmp_path / 'run'} cannot be written: [Errno 27] File too large"


@pytest.mark.parametrize("saved", [False, True])
def test_a_disk_that_fills_up_is_one_line_wherever_it_is_noticed(
    saved: bool, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for the trial but not for the run: the error comes from any of the files, here summary.txt."""

    def full(folder: Path, *_: Any) -> None:
        if saved:
            AtomicCheckpointIO().save_checkpoint({}, folder / "checkpoints" / "last.ckpt")
        raise OSError(28, "No space left on device", str(folder / "summary.txt"))

    monkeypatch.setattr(run, "describe_run", full)
    settings = ("data=digits", "data.limit=64", "model=test_convnext", "train.batch_size=16", "train.progress=false")
    assert main([*settings, f"out={tmp_path}"], configs=repository / "configs") == 1
    err = capsys.readouterr().err
    advice = "Make room and go on with resume=" if saved else "There is nothing to resume yet: make room"
    assert f"error: {tmp_path}/summary.txt could not be written (No space left on device). {advice}" in err
    assert "Traceback" not in err and not (tmp_path / "error.txt").exists()


def test_a_first_checkpoint_that_cannot_be_written_promises_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, best = (tmp_path / "run" / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    with monkeypatch.context() as patch:
        _Full(patch, 0)
        for path in (last, best):
            with pytest.raises(SaveError, match=r"on device\). There is nothing to resume yet: make room and start"):
                AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, last)
    _Full(monkeypatch, 0)
    with pytest.raises(
        SaveError, match=r"best.ckpt could not be written \(.*\). Make room and go on with resume=.*run$"
    ):
        AtomicCheckpointIO().save_checkpoint({"step": 1}, best)


class _Full:
    """A simulated disk with this many free bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        import builtins

        original = builtins.open

        def opened(path: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            file = original(path, mode, *arguments, **more)
            if mode == "wb" and "unfinished" in str(path):
                write = file.write
                left = room

                def limited(data: Any) -> int:
                    nonlocal left
                    left -= len(data)
                    if left < 0:
                        raise OSError(28, "No space left on device")
                    return write(data)

                return _Writer(file, limited)
            return file

        monkeypatch.setattr(builtins, "open", opened)


class _Writer:
    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 30, 5_000, 40_000])
def test_full_disk_keeps_the_old_checkpoint(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "weights": torch.randn(20_000)}, path)
    _Full(monkeypatch, room)
    with pytest.raises(SaveError, match=r"last\.ckpt could not be written \(No space left on device\).*resume="):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.randn(20_000)}, path)
    AtomicCheckpointIO(on_error="continue").save_checkpoint({"step": 2, "weights": torch.randn(20_000)}, path)
    assert "training goes on without it" in caplog.text
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_ends_no_run_at_a_table_or_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that cannot be written are written later, and TensorBoard's values are also in metrics.csv."""
    table = EpochTable(tmp_path / "metrics.csv")
    table.log_metrics({"val/loss": 0.5, "epoch": 0})
    with monkeypatch.context() as full:
        _Full(full, 0)
        table.log_metrics({"val/loss": 0.25, "epoch": 1})
        assert len(read_table(tmp_path / "metrics.csv")) == 1
    table.log_metrics({"val/loss": 0.125, "epoch": 2})
    assert [row["val/loss"] for row in read_table(tmp_path / "metrics.csv")] == [0.5, 0.25, 0.125]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    curves = Curves(tmp_path, name="", version="tensorboard")
    monkeypatch.setattr(curves.experiment, "add_scalar", fail)
    curves.log_metrics({"val/loss": 0.5}, 0)
    assert "metrics.csv could not be written" in caplog.text and "TensorBoard's file could not" in caplog.text


def test_a_run_that_never_could_save_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"training is done, but .*best\.ckpt is missing: there is nothing to test"):
        load_best(tmp_path / "best.ckpt")


def limit_files(size: int, after: int) -> None:
    """In the process of the run: limit the size of files from this save on."""
    original = AtomicCheckpointIO.save_checkpoint
    saves = 0

    def save_checkpoint(*arguments: Any, **more: Any) -> None:
        nonlocal saves
        saves += 1
        if saves > after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        original(*arguments, **more)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    AtomicCheckpointIO.save_checkpoint = save_checkpoint


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_stops_or_goes_on_as_it_was_told(
    tiny: tuple[str, ...], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    command = (*tiny, "train.epochs=3", "train.save_every=2")
    fault: dict[str, Any] = {"prepare": limit_files, "prepare_with": {"size": 50_000, "after": 3}}
    stopped = run_train(*command, f"out={tmp_path / 'a'}", **fault)
    assert stopped.code == 1 and "Traceback" not in stopped.err
    assert "could not be written (File too large); the checkpoint before it is untouched. Make room" in stopped.err
    folder = tmp_path / "a" / "checkpoints"
    assert load_checkpoint(folder / "last.ckpt")["global_step"] == 4
    assert sorted(os.listdir(folder)) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert run_train(*command, f"out={tmp_path / 'a'}", "resume=auto").code == 0

    done = run_train(*command, f"out={tmp_path / 'b'}", "train.save_errors=continue", **fault)
    assert done.code == 0 and "training goes on without it" in done.err
    assert (tmp_path / "b" / "results.json").exists()
    assert (tmp_path / "b" / "metrics.csv").read_text() == (tmp_path / "a" / "metrics.csv").read_text()
