"""Stop a run on SIGINT, SIGTERM or SIGUSR1 (Ctrl-C, a scheduler, Slurm before the time limit) with a checkpoint.

The first signal is remembered, and the run saves and stops after the current step or evaluation. The exit code is 130
for SIGINT and 143 for SIGTERM, as in a shell. SIGUSR1 (`#SBATCH --signal=USR1@120`) requeues the Slurm job, with exit
code 0; outside of Slurm nothing would restart the run, and the exit code is 138.

Unusual: Lightning's own handlers exit without saving, for SIGTERM with exit code 0, and are installed after `fit` has
begun, over existing ones. The handlers of this module are therefore installed a second time after that.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(BaseException):
    """Training was stopped by a signal. Not an `Exception`, so that code that catches all errors does not continue."""

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        """`checkpoint` is the file that was saved, or None if a second signal stopped the run at once."""
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name}; go on with resume={checkpoint.parent.parent}"
            if checkpoint is not None
            else f"stopped at once by a second {name}; the steps since the last checkpoint are lost"
        )
        self.number, self.checkpoint = number, checkpoint


class SignalWatch:
    """A context manager whose handlers remember the first signal; a second SIGINT stops the run at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():  # only the main thread can set signal handlers
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self.watch()
        return self

    def watch(self) -> None:
        """Install the handlers, replacing those of others."""
        for number in self._before:
            signal.signal(number, self._remember)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise Interrupted(number, None)
        self.received = self.received or number


def exit_code(stop: Interrupted, *, first: bool) -> int:
    """Return the exit code of a stopped process; after SIGUSR1 the `first` process of a run requeues the Slurm job."""
    if stop.number != signal.SIGUSR1:
        return 128 + stop.number
    job = slurm_job()
    if job is None:
        _log.warning("warning: SIGUSR1 asks for a restart, but this is no job of Slurm: nothing starts the run again")
        return 128 + stop.number
    return 0 if not first or requeue(job) else 128 + stop.number


def slurm_job() -> str | None:
    """Return the id of the Slurm job that this process belongs to, or None."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue(job: str) -> bool:
    """Ask Slurm to requeue the job, whose command continues by `resume=auto`; return whether it accepted."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("warning: job %s could not be queued again: %s", job, error)
        return False
    if done.returncode:
        _log.warning("warning: job %s could not be queued again: %s", job, done.stderr.strip() or done.returncode)
    return done.returncode == 0
