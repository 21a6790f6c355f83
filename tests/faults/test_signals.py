"""Signals: the checkpoint that they leave and the exit code that the scheduler sees."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.signals import Interrupted, SignalWatch, exit_code
from mixerzoo.vision.training.tasks import Task
from warm import Finished


def test_usr1_puts_the_job_back_into_the_queue(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Interrupted(signal.SIGUSR1, Path("run/checkpoints/last.ckpt"))
    assert exit_code(stop, first=True) == 138 and not scontrol.exists()  # no job
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert exit_code(stop, first=False) == 0 and not scontrol.exists()  # the first process asks
    assert exit_code(stop, first=True) == 0
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert exit_code(stop, first=True) == 0
    assert scontrol.read_text() == "requeue 12\nrequeue 12_3\n"


def test_a_job_that_cannot_be_queued_again_does_not_end_with_0(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop = Interrupted(signal.SIGUSR1, Path("run/checkpoints/last.ckpt"))
    monkeypatch.setenv("SLURM_JOB_ID", "13")  # our scontrol fails for it
    assert exit_code(stop, first=True) == 138
    monkeypatch.setenv("PATH", "/nowhere")
    assert exit_code(stop, first=True) == 138
    assert "job 13 could not be queued again: 1" in caplog.text and "scontrol" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_counts_and_handlers_are_given_back(number: int) -> None:
    before = signal.getsignal(number)
    with SignalWatch() as watch:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.received == number
    assert signal.getsignal(number) is before


def send(place: str, count: int, numbers: list[int]) -> None:
    """In the process of the run: send it a signal when it reaches the place for the `count`th time."""
    left = count
    method = getattr(Task, place)

    def signalled(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        if left == 0:
            for number in numbers:
                os.kill(os.getpid(), number)
        left -= 1
        return method(*arguments, **more)

    setattr(Task, place, signalled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count", "number", "code", "step"),
    [
        ("training_step", 5, signal.SIGTERM, 143, 6),
        ("training_step", 0, signal.SIGINT, 130, 2),  # the first batch of two to a step
        ("training_step", 3, signal.SIGTERM, 143, 4),  # the last of an epoch, whose validation comes first
        ("training_step", 6, signal.SIGUSR1, 138, 8),
        ("validation_step", 1, signal.SIGTERM, 143, 4),
        ("test_step", 1, signal.SIGINT, 130, 12),
    ],
)
def test_a_signal_saves_and_stops_within_a_step(
    place: str,
    count: int,
    number: int,
    code: int,
    step: int,
    tiny: tuple[str, ...],
    run_train: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    """`step` is the number of batches done when it stops; with two batches per step it stops at an even one."""
    extra = ("train.accumulate=2",) if count in (0, 6) and place == "training_step" else ()
    fault = {"place": place, "count": count, "numbers": [number]}
    run = tmp_path / "run"
    done = run_train(*tiny, *extra, "train.epochs=3", f"out={run}", prepare=send, prepare_with=fault)
    assert done.code == code, done.err
    assert f"stopped by {signal.Signals(number).name}; go on with resume={run}" in done.err
    assert "Traceback" not in done.err and done.orphans == 0
    saved = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == (step // 2 if extra else step)
    assert not (run / "results.json").exists()


@pytest.mark.slow
def test_usr1_under_slurm_ends_with_0_and_the_same_command_goes_on(
    scontrol: Path, tiny: tuple[str, ...], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    command = (*tiny, "train.epochs=2", f"out={tmp_path / 'run'}", "resume=auto")
    env = {"SLURM_JOB_ID": "12", "PATH": os.environ["PATH"]}
    fault = {"place": "training_step", "count": 1, "numbers": [signal.SIGUSR1]}
    done = run_train(*command, env=env, prepare=send, prepare_with=fault)
    assert done.code == 0 and scontrol.read_text() == "requeue 12\n", done.err
    again = run_train(*command, env=env)
    assert again.code == 0 and (tmp_path / "run" / "results.json").exists()
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("place", ["training_step", "validation_step"])
def test_a_second_ctrl_c_stops_at_once(
    place: str, tiny: tuple[str, ...], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    """Nothing more is saved, and the last checkpoint stays intact."""
    fault = {"place": place, "count": 2, "numbers": [signal.SIGINT, signal.SIGINT]}
    run = tmp_path / "run"
    done = run_train(*tiny, "train.save_every=1", "train.epochs=2", f"out={run}", prepare=send, prepare_with=fault)
    assert done.code == 130 and "stopped at once by a second SIGINT" in done.err, done.err
    saved = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == (2 if place == "training_step" else 3)  # the epoch's last follows its validation
