"""The processes of a run or of a sweep, forked instead of started: without the seconds that imports take.

`prepare=fork_processes` of a test file that imports it, as `warm.py` calls it in the process that then runs train.py.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any


class Forked:
    """What of `subprocess.Popen` the launcher and sweeps use, for commands `python -m MODULE arguments…`."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], start_new_session: bool, **outputs: Any
    ) -> None:
        assert command[1] == "-m" and start_new_session
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(command, env, outputs)
        if folder := os.environ.get("FORKED_PIDS"):
            with open(os.path.join(folder, env.get("RANK", "run")), "w") as file:
                file.write(str(self.pid))

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _become(command: Sequence[str], env: Mapping[str, str], outputs: Mapping[str, Any]) -> None:
    """The child: it never returns."""
    code = 70
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for name, number in (("stdout", 1), ("stderr", 2)):
            if name in outputs:
                os.dup2(outputs[name].fileno(), number)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = list(command[2:])
        for name in [name for name in sys.modules if name == command[2]]:
            del sys.modules[name]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_processes() -> None:
    """Every process that the launcher or a sweep starts from now on; others start processes as ever."""
    from mixerzoo.vision.training import launch, sweep

    for module in (launch, sweep):
        module.subprocess = SimpleNamespace(Popen=Forked)  # pyright: ignore[reportAttributeAccessIssue]
