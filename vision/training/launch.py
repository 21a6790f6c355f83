"""The processes of a run: which one this is, and on one machine how they are started, watched and ended together.

Unusual: Lightning can start its processes itself, but then the first of them is the parent. It is killed with SIGKILL
soon after another one ends in whatever way, so that the exit code of an orderly stop is a matter of luck, and a
scheduler's signal reaches one process of many. Here the parent does nothing but look after the others:

* A process that dies ends the run within seconds, with its last words, also where the others would wait for it in a
  collective for half an hour (NCCL).
* SIGINT, SIGTERM and SIGUSR1 are passed on. The processes have a session of their own, so that Ctrl-C in a terminal
  reaches each of them once.
* If the parent itself is killed, the others notice (`end_with_parent`).

On several machines torchrun or Slurm start the processes, and are asked here. Nothing in this file needs Lightning: the
parent should be there at once.
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
"""In the environment of a process that was started here: the process id of its parent."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_GRACE = 5.0  # seconds for the others to end by themselves after one has failed
_ORDERLY_GRACE = 120.0  # the same after one has stopped as it was told: another may still write the checkpoint
_LAST_WORDS = 20  # lines


def started_by() -> str | None:
    """Who started this process as one of several: "launch" (ours), "torchrun" or "slurm"; None: it stands alone."""
    if PARENT_VARIABLE in os.environ and "RANK" in os.environ:
        return "launch"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # Set by srun alone: a batch script sees most of the other variables too, but is one process.
    return "slurm" if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 else None


def rank() -> int:
    """The number of this process among all of the run; 0 has the say."""
    if started_by() == "slurm":
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def is_first() -> bool:
    return rank() == 0


def check_processes(train: TrainConfig, out: str | None) -> None:
    """Refuses settings that do not fit the processes that were started, or the machine."""
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
    """Runs `command` in `count` processes until all have ended; returns the exit code of the whole."""
    with tempfile.TemporaryDirectory(prefix="mixerzoo-") as folder:
        processes: list[subprocess.Popen[Any]] = []
        logs: list[IO[bytes]] = []
        with Forwarding(processes):
            try:
                for rank, environment in enumerate(_environments(count)):
                    # What the first says is shown; what the others say would be the same, unless they fail.
                    log = open(os.path.join(folder, str(rank)), "w+b")  # noqa: SIM115
                    logs.append(log)
                    own: dict[str, Any] = {} if rank == 0 else {"stdout": log, "stderr": log}
                    processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **own))
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
    """While it is entered, signals to this process go to `processes` instead, and the first is remembered."""

    def __init__(self, processes: Sequence[subprocess.Popen[Any]]) -> None:
        self.processes = processes
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Forwarding:
        if threading.current_thread() is threading.main_thread():  # signals can be caught nowhere else
            self._before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def end_with_parent() -> None:
    """In a process of `launch`: ends it soon after its parent has gone, which nothing else would tell it."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or os.getppid() != int(parent):
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)  # another thread may be inside a collective, where an exception would not reach it

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _environments(count: int) -> list[dict[str, str]]:
    """The variables by which torch.distributed and Lightning know a process, for each of them."""
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
    """Until all have ended: the first that did so with anything but 0, if any. The others are not waited for long."""
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
    """The exit code of a run in which process `failed` was the first to end with something else than 0.

    `codes`: those of the processes that ended by themselves.
    """
    code = codes[failed] or 1
    if code > 1 and codes[0] == code:
        return code  # all of them stopped for the same reason, and the first has said which
    words: dict[str, list[int]] = {}
    for number, log in enumerate(logs):
        if number > 0 and codes[number]:
            log.seek(0)
            text = "\n".join(log.read().decode(errors="replace").rstrip().splitlines()[-_LAST_WORDS:])
            words.setdefault(text, []).append(number)
    for text, numbers in words.items():
        for line in text.splitlines():
            say(f"  process {', '.join(map(str, numbers))}: {line}")
    how = f"ended with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    hint = " (too little memory?)" if code == -signal.SIGKILL else ""
    say(f"error: process {failed} of {len(codes)} {how}{hint}; the others were stopped")
    return code if code in (2, 130, 143) else 1


def python() -> list[str]:
    """The start of a command line that runs this program again, with the folder of configs and arguments to follow."""
    return [sys.executable, "-m", f"{__package__}.cli"]
