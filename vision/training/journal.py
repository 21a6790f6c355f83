"""Write env.json: for each start of a run its machine, versions and command, its warnings, and how it ended.

Unusual: a killed run cannot record that, so that the state "running" means "running or killed". Only the environment
variables named below are written, since others may hold passwords.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .._machine import cpu_name
from .checkpoints import write_text
from .signals import Interrupted

_log = logging.getLogger(__name__)

PACKAGES = (
    "mixerzoo",
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "torchmetrics",
    "omegaconf",
    "numpy",
    "triton",
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "SLURM_JOB_ID")
MOST_WARNINGS = 100


class Journal(logging.Handler):
    """A context manager around a run that records it: call `begin(folder)` as soon as the run has a folder.

    At the end of the block it records in env.json how the run ended and writes the report. If that fails too (a full
    disk), the error of the run itself is raised.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.folder: Path | None = None
        self.starts: list[dict[str, Any]] = []
        self._warnings: dict[str, int] = {}
        self._left_out = 0

    def __enter__(self) -> Journal:
        logging.getLogger("mixerzoo").addHandler(self)
        return self

    def begin(self, folder: Path, *, resumed: bool = False, metric: str = "accuracy") -> None:
        """Record the start of the run and the `metric` that selects its best checkpoint. Only rank 0 calls this."""
        self.folder = folder
        self.starts = [*(read_journal(folder) if resumed else []), describe_environment() | {"metric": metric}]
        self._write()

    def emit(self, record: logging.LogRecord) -> None:
        """Record a warning of this library's loggers; repeated messages are counted."""
        message = record.getMessage()
        if message in self._warnings or len(self._warnings) < MOST_WARNINGS:
            self._warnings[message] = self._warnings.get(message, 0) + 1
        else:
            self._left_out += 1
        with contextlib.suppress(OSError):
            self._write()

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        logging.getLogger("mixerzoo").removeHandler(self)
        if self.folder is None:
            return
        try:
            self.starts[-1] |= {"state": _state(error), "ended": _now()}
            self._write()
            if not _at_once(error):
                from .report import write_report

                write_report(self.folder)
        except Exception as problem:
            _log.warning("%s/report.html could not be written: %s", self.folder, problem)

    def _write(self) -> None:
        if self.folder is None:
            return
        self.starts[-1]["warnings"] = [
            *(text if count == 1 else f"{text} ({count} times)" for text, count in self._warnings.items()),
            *([f"and {self._left_out} more"] if self._left_out else []),
        ]
        text = json.dumps({"starts": self.starts}, indent=2, ensure_ascii=False) + "\n"
        write_text(self.folder / "env.json", text)


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, oldest first; [] if env.json is missing or damaged."""
    try:
        return list(json.loads((folder / "env.json").read_text())["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def describe_environment() -> dict[str, Any]:
    return {
        "state": "running",
        "started": _now(),
        "command": shlex.join(["python", *sys.argv]),
        "folder": os.getcwd(),
        "commit": _commit(Path.cwd()),
        "mixerzoo_commit": _commit(root) if ((root := Path(__file__).resolve().parents[2]) / ".git").exists() else None,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _state(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, Interrupted):
        name = signal.Signals(error.number).name
        return f"interrupted at once, by a second {name}" if _at_once(error) else f"interrupted by {name}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted at once, by Ctrl-C"
    return f"failed: {str(error).strip() or type(error).__name__}"


def _at_once(error: BaseException | None) -> bool:
    """Return whether a second signal demanded an immediate end, which leaves no time for a report."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, Interrupted) and error.checkpoint is None)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Return the commit that is checked out, and whether files differ from it; None outside of a git repository."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + (" with changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
