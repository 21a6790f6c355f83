"""`python train.py` from the command line, in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DIGITS = ("data=digits", "model=test_convnext", "data.limit=320", "train.batch_size=16", "train.progress=false")


def _command(repository: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(repository / "train.py"), *arguments]


def test_a_mistake_is_one_line_and_exit_code_2(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        _command(repository, "optim.lrr=1"), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == "error: optim.lrr=1: there is no key optim.lrr; did you mean optim.lr?\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive  # tests/faults/test_signals.py has signals of all kinds, with smaller runs
def test_ctrl_c_then_resume_last(repository: Path, tmp_path: Path) -> None:
    """An interrupted and resumed run writes the same metrics.csv as an uninterrupted one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = (*DIGITS, "train.epochs=4", "augment.mixup=0.2")
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    process = subprocess.Popen(
        _command(repository, *arguments, "train.save_every=1"), cwd=tmp_path, stdout=log, stderr=log, env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    finally:
        process.kill()
        log.close()
    text = (tmp_path / "log").read_text()
    assert code == 130, text
    assert "stopped by SIGINT" in text and "Traceback" not in text

    for extra in (("resume=last",), (*arguments, "out=whole")):
        done = subprocess.run(
            _command(repository, *extra), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    [resumed] = tmp_path.glob("runs/*/metrics.csv")
    assert resumed.read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert resumed.parent.name.endswith("-test_convnext-digits")


@pytest.mark.slow
def test_two_processes_train_together(repository: Path, tmp_path: Path) -> None:
    """Under DDP with gloo, each process sees half of an epoch, and test pictures are counted once."""
    import json

    arguments = (*DIGITS, "train.epochs=2", "train.devices=2", "train.strategy=ddp", "train.accelerator=cpu", "out=run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        _command(repository, *arguments), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    # 299 test pictures: an accuracy over padded shards would not be a multiple of 1 / 299.
    assert (results["test"]["accuracy"] * 299) % 1 == pytest.approx(0, abs=1e-3) or (
        results["test"]["accuracy"] * 299
    ) % 1 == pytest.approx(1, abs=1e-3)
