"""How a run is stopped from outside: by Ctrl-C, by a scheduler, or by Slurm shortly before the time is up.

The first signal is remembered; after the step, or after the evaluation, that is being computed the run is saved and
ends. SIGINT ends with 130 and SIGTERM with 143, as a shell counts them. SIGUSR1 (`#SBATCH --signal=USR1@120`) puts the
job back into Slurm's queue and ends with 0; outside of Slurm nothing would start the run again, and the code is 138.

Unusual: Lightning's own handling ends the process with nothing saved, and for SIGTERM with the exit code of a success;
and it is put in place after `fit` has begun, over whatever was there. So ours is put in place again after that.
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
    """Training stopped because of a signal. No `Exception`: whoever catches all errors must not go on after this."""

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        """`checkpoint` holds everything; None: it was not waited for."""
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name}; go on with resume={checkpoint.parent.parent}"
            if checkpoint is not None
            else f"stopped at once by a second {name}; the steps since the last checkpoint are lost"
        )
        self.number, self.checkpoint = number, checkpoint


class SignalWatch:
    """Remembers the first signal instead of acting on it; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():  # signals can be caught nowhere else
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self.watch()
        return self

    def watch(self) -> None:
        """Puts the handlers in place, over those of others."""
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
    """What the process ends with. `first`: it is the one of the run's processes that may ask Slurm for a restart."""
    if stop.number != signal.SIGUSR1:
        return 128 + stop.number
    job = slurm_job()
    if job is None:
        _log.warning("warning: SIGUSR1 asks for a restart, but this is no job of Slurm: nothing starts the run again")
        return 128 + stop.number
    return 0 if not first or requeue(job) else 128 + stop.number


def slurm_job() -> str | None:
    """The name by which Slurm knows this job, if it is one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue(job: str) -> bool:
    """Asks Slurm to start the job again, whose command goes on by `resume=auto`; whether it will."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("warning: job %s could not be queued again: %s", job, error)
        return False
    if done.returncode:
        _log.warning("warning: job %s could not be queued again: %s", job, done.stderr.strip() or done.returncode)
    return done.returncode == 0
