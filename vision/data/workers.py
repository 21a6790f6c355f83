"""Supervises the processes that load data: a dead or hanging worker becomes an error that states the cause.

Unusual:

* PyTorch raises a dead worker's error from its signal handler, at any line of the main process, even in the middle of a
  training step. Here the error is raised when the next batch is requested.
* With a timeout, PyTorch notices a dead worker only by that signal. Here exit codes are checked too.
* Workers survive Ctrl-C and a SIGTERM to the whole process group, so that the main process can finish its step and save
  a checkpoint.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_GRACE = 60  # seconds that a worker survives SIGTERM, in case the main process is gone

_LAST_BREATH = 0.5  # seconds to wait for the exit code after a connection broke

_CAUSES = {
    "SIGKILL": "memory ran out, most likely: try fewer data.workers or a smaller train.batch_size",
    "SIGBUS": "shared memory ran out, most likely: enlarge /dev/shm (docker run --shm-size=8g), or fewer data.workers",
    "SIGSEGV": "a library it uses crashed, as when reading a damaged file",
    "SIGTERM": "something outside ended it",
}


class WorkerError(RuntimeError):
    """Raised if a process that loads data is dead or hangs."""


def outlive_the_step(_: int) -> None:
    """Make a new worker survive SIGINT, and SIGTERM for a while. This is PyTorch's `worker_init_fn`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))


class Crew:
    """Iterates over PyTorch's loader iterator and watches the processes that it started, until `dismiss`."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        before = multiprocessing.active_children()
        self._batches: Iterator[Any] | None = start()
        self.processes = [child for child in multiprocessing.active_children() if child not in before]
        self._waiting = self._hangs = False
        self._previous: Any = None
        if self.processes and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGCHLD, self._on_child)
        atexit.register(self.dismiss)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        assert self._batches is not None
        self._waiting = True
        try:
            self._check()
            return next(self._batches)
        except (RuntimeError, EOFError, OSError) as error:
            failure = self._explain(error)
            if failure is None:
                raise
        finally:
            self._waiting = False
        raise failure  # outside `except`, so that it references neither the first error nor PyTorch's iterator

    def dismiss(self) -> None:
        """End the processes and wait for them, so that no zombies remain."""
        atexit.unregister(self.dismiss)
        if self._hangs:
            self._kill()
        self._batches = None  # PyTorch shuts its processes down when the last reference is gone
        self._kill()
        if self._previous is not None and signal.getsignal(signal.SIGCHLD) == self._on_child:
            signal.signal(signal.SIGCHLD, self._previous)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()  # they only read, so nothing is lost; a hanging one reacts to nothing else
        for process in self.processes:
            process.join()
        self.processes = []

    def _explain(self, error: Exception) -> WorkerError | None:
        if str(error).startswith("DataLoader timed out"):
            self._hangs = True
            seconds = float(str(error).split("after ")[-1].split(" ")[0])
            return WorkerError(f"no data came for {seconds:g} s (data.timeout): workers hang, as a file system may")
        # A batch is read from the memory of its worker: the connection may break before the process has ended.
        deadline = time.monotonic() + (0 if isinstance(error, RuntimeError) else _LAST_BREATH)
        while True:
            try:
                self._check()
            except WorkerError as death:
                return WorkerError(str(death))
            if time.monotonic() >= deadline:
                break
            time.sleep(0.01)
        gone = str(error).startswith("DataLoader worker")  # with exit code 0, in the middle of its work
        return WorkerError(str(error).splitlines()[0]) if gone else None

    def _check(self) -> None:
        for process in self.processes:
            code = process.exitcode
            if code is None or code == 0:  # PyTorch ends them with 0 once the last batch is there
                continue
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            cause = f" ({_CAUSES[name]})" if name in _CAUSES else ""
            raise WorkerError(f"a worker that loads data, process {process.pid}, ended with {name}{cause}")

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._check()
        if callable(self._previous):
            with contextlib.nullcontext() if self._waiting else contextlib.suppress(RuntimeError):
                self._previous(number, frame)
