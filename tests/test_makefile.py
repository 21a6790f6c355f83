"""`make bench` with a Python that only notes what it is asked to run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def bench(repository: Path, folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """The exit status, what was run, and what was said; the benchmark of HiLo misses."""
    python, log = folder / "python", folder / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$1" in *hilo*) exit 1;; esac\n')
    python.chmod(0o755)
    stamp = folder / "installed"
    stamp.touch()  # newer than all that an install depends on
    command = ["make", "-C", str(repository), "bench", f"BIN={folder}", f"STAMP={stamp}", *arguments]
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS"}  # of the `make test` that may be running this
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return result.returncode, log.read_text().splitlines(), result.stderr


def test_every_benchmark_runs_once_and_a_miss_is_told_at_the_end(repository: Path, tmp_path: Path) -> None:
    status, ran, said = bench(repository, tmp_path, "ARGS=--threads 2")
    files = {f"benchmarks/{file.name} --threads 2" for file in (repository / "benchmarks").glob("bench_*.py")}
    assert len(ran) == len(files) and set(ran) == files
    assert ran[-1].startswith("benchmarks/bench_backbones.py"), "the longest at the end"
    assert status == 2 and "missed: hilo\n" in said


def test_one_benchmark_by_name(repository: Path, tmp_path: Path) -> None:
    assert bench(repository, tmp_path, "BENCH=depthwise_conv") == (0, ["benchmarks/bench_depthwise_conv.py"], "")
