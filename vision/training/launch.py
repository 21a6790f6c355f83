"""Start and supervise the processes of a run on one machine, and find the rank of this process.

Unusual: Lightning can start the processes itself, but then rank 0 is their parent. It is killed with SIGKILL soon after
another process exits for any reason, so that the exit code of an orderly stop is random, and a signal from a scheduler
reaches only one process. Here the parent only supervises the others:

* A process that dies ends the run within seconds and its last lines of output are shown, also where the others would
  wait for it in a collective for half an hour (NCCL).
* SIGINT, SIGTERM and SIGUSR1 are forwarded. The processes run in sessions of their own, so that Ctrl-C in a terminal
  reaches each of them once.
* If the parent itself is killed, the others notice and exit (`end_with_parent`).

On several machines torchrun or Slurm start the processes. This file does not import Lightning, so that the parent
starts fast.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import IO, Any

import torch

from .config import TrainConfig
from .settings import ConfigError

PARENT_VARIABLE = "MIXERZOO_LAUNCHED_BY"
"""Environment variable with the parent's process id, in processes that `launch` or a sweep has started."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_GRACE = 5.0  # seconds that the other processes have to exit after one has failed
_ORDERLY_GRACE = 120.0  # seconds after one has stopped on a signal: another may still write the checkpoint
_LAST_LINES = 20  # of the output of a failed process, which are shown


def started_by() -> str | None:
    """Return who started this process as one of several, "launch" (ours), "torchrun" or "slurm", or None."""
    if PARENT_VARIABLE in os.environ and "RANK" in os.environ:
        return "launch"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # Only srun sets this one. A batch script also sees most of Slurm's other variables, but is a single process.
    return "slurm" if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 else None


def rank() -> int:
    """Return the global rank of this process. Rank 0 writes the files and the messages."""
    if started_by() == "slurm":
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def is_first() -> bool:
    return rank() == 0


def check_processes(train: TrainConfig, out: str | None) -> None:
    """Raise a `ConfigError` if the settings do not match the processes that were started, or the machine."""
    starter, count = started_by(), train.processes
    asked = f"train.devices={train.devices} on train.nodes={train.nodes}"
    if starter is None:
        if train.nodes > 1:
            raise ConfigError(
                f"train.nodes={train.nodes}: one command cannot start processes on other machines; start it on each "
                "with torchrun, or with srun (docs/distributed.md)"
            )
    elif starter != "launch":
        size = int(os.environ["WORLD_SIZE" if starter == "torchrun" else "SLURM_STEP_NUM_TASKS"])
        if size != count:
            raise ConfigError(
                f"{starter} started {size} processes, but {asked} makes {count}; give train.devices= (of each machine) "
                "and train.nodes= to match"
            )
        if out is None:
            raise ConfigError(f"started by {starter}, a run needs a folder that all processes know: give out=…")
    if train.strategy != "auto" and count == 1 and starter is None:
        raise ConfigError(f"train.strategy={train.strategy} is for several processes; give train.devices=2 or more")
    if train.accelerator in ("gpu", "cuda") and train.devices > torch.cuda.device_count():
        raise ConfigError(f"{asked}, but this machine has {torch.cuda.device_count()} GPUs")


def launch(command: Sequence[str], count: int, say: Callable[[str], None]) -> int:
    """Run `command` in `count` processes until all have exited; return the exit code of the run."""
    with tempfile.TemporaryDirectory(prefix="mixerzoo-") as folder:
        logs: list[IO[bytes]] = []
        with Forwarding() as signals:
            processes = signals.processes
            try:
                for rank, environment in enumerate(_environments(count)):
                    # Only rank 0 writes to the terminal; the output of the others is shown if they fail.
                    log = open(os.path.join(folder, str(rank)), "w+b")  # noqa: SIM115
                    logs.append(log)
                    own: dict[str, Any] = {} if rank == 0 else {"stdout": log, "stderr": log}
                    processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **own))
                signals.release()
                failed = _wait(processes)
                codes = [process.poll() for process in processes]
            finally:
                for process in processes:
                    if process.poll() is None:
                        process.kill()
                        process.wait()
        try:
            return 0 if failed is None else _verdict(failed, codes, logs, say)
        finally:
            for log in logs:
                log.close()


class Forwarding:
    """A context manager that forwards signals to `processes` and remembers the first signal in `received`.

    Signals are held back until `release`, so that those processes that are being started receive them, too.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[Any]] = []
        self.received: int | None = None
        self._held: list[int] | None = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Forwarding:
        if threading.current_thread() is threading.main_thread():  # only the main thread can set signal handlers
            self._before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def release(self) -> None:
        """Forward the signals that came while processes were started, and all that follow at once."""
        held, self._held = self._held, None
        for number in held or ():
            self._send(number)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        if self._held is None:
            self._send(number)
        else:
            self._held.append(number)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def end_with_parent() -> None:
    """Watch the parent in a background thread and exit soon after it is gone; do nothing without `PARENT_VARIABLE`."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or os.getppid() != int(parent):
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)  # the main thread may be inside a collective, where no exception can interrupt it

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _environments(count: int) -> list[dict[str, str]]:
    """Return the environment of each process, with the variables that torch.distributed and Lightning read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "NODE_RANK": "0",
        PARENT_VARIABLE: str(os.getpid()),
    }
    threads = (
        {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1))}
    )
    return [{**os.environ, **shared, **threads, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _wait(processes: Sequence[subprocess.Popen[Any]]) -> int | None:
    """Wait until all processes exit, or for a grace period after a failure; return the rank that failed first."""
    failed: int | None = None
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            grace = _ORDERLY_GRACE if (codes[failed] or 0) > 128 else _GRACE
            deadline = time.monotonic() + grace
        if None not in codes or time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


def _verdict(failed: int, codes: Sequence[int | None], logs: Sequence[IO[bytes]], say: Callable[[str], None]) -> int:
    """Show why rank `failed`, the first with an exit code other than 0, has failed; return the run's exit code.

    `codes` holds the exit codes of the processes that exited by themselves, and None for the others.
    """
    code = codes[failed] or 1
    if code > 1 and codes[0] == code:
        return code  # rank 0 has stopped for the same reason and has reported it
    outputs: dict[str, list[int]] = {}
    for number, log in enumerate(logs):
        if number > 0 and codes[number]:
            log.seek(0)
            text = "\n".join(log.read().decode(errors="replace").rstrip().splitlines()[-_LAST_LINES:])
            outputs.setdefault(text, []).append(number)
    for text, numbers in outputs.items():
        for line in text.splitlines():
            say(f"  process {', '.join(map(str, numbers))}: {line}")
    how = f"ended with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    hint = " (too little memory?)" if code == -signal.SIGKILL else ""
    say(f"error: process {failed} of {len(codes)} {how}{hint}; the others were stopped")
    return code if code in (2, 130, 143) else 1


def python() -> list[str]:
    """Return the start of a command that runs cli.py; the folder of configs and the arguments must be appended."""
    return [sys.executable, "-m", f"{__package__}.cli"]
