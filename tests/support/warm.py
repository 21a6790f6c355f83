"""Runs of our commands in children of a warm process (warm_server.py), for tests of what processes do."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0


class Finished(NamedTuple):
    """`code`: as subprocess gives it, negative for a signal. `orphans`: processes that the run left behind."""

    code: int
    out: str
    err: str
    orphans: int


class Run:
    """A command that runs. Nothing of it is left after `wait`."""

    def __init__(self, server: WarmServer, pid: int, output: Path) -> None:
        self._server, self.pid, self._output = server, pid, output

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> Finished:
        """Fails if the run takes longer; it is killed then."""
        reply = self._server.ask(do="wait", pid=self.pid, timeout=timeout)
        out, err = self.text("out"), self.text("err")
        if reply["code"] is None:
            raise TimeoutError(f"not done after {timeout:g} s; output so far:\n{out}\n{err}")
        return Finished(reply["code"], out, err, reply["orphans"])

    def text(self, stream: str = "err") -> str:
        return (self._output / stream).read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        until = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"{condition} did not come true in {timeout:g} s; errors so far:\n{self.text()}")
            time.sleep(0.01)


class WarmServer:
    """Starts commands. `prepare` is a function of a test file, called with `prepare_with` in the child before them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mixerzoo-warm-")
        self._runs = 0
        single = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = os.environ | single | {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest, which closes the server
        )

    def train(self, *arguments: str, **how: Any) -> Run:
        return self.start(str(REPOSITORY / "train.py"), *arguments, **how)

    def start(
        self,
        program: str,
        *arguments: str,
        cwd: Path | str | None = None,
        env: Mapping[str, str | None] | None = None,
        prepare: Callable[..., None] | None = None,
        prepare_with: Mapping[str, Any] | None = None,
        pictures: bool = False,
    ) -> Run:
        """`program`: a file, or the name of a module, as `python -m` takes it. `env`: None unsets a variable.

        `pictures`: whether a run draws and reports what it found, which takes longer than training in these tests.
        """
        self._runs += 1
        output = Path(self._folder.name) / str(self._runs)
        output.mkdir()
        for stream in ("out", "err"):
            (output / stream).touch()
        fault = [inspect.getfile(prepare), prepare.__name__, dict(prepare_with or {})] if prepare else None
        reply = self.ask(
            do="start",
            argv=[program, *arguments],
            cwd=str(cwd or output),
            env=dict(env or {}),
            prepare=fault,
            pictures=pictures,
            stdout=str(output / "out"),
            stderr=str(output / "err"),
        )
        return Run(self, reply["pid"], output)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the warm server has ended with code {self._process.wait(5)}")
        return json.loads(reply)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._folder.cleanup()
