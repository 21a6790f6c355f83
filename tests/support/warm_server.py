"""A process that has imported everything once and forks a child for each run: a run takes a second instead of six.

Started by `warm.py`, spoken to in lines of JSON over its own standard input and output. Each child leads a process
group of its own, has the files it was told for output, and is reaped here, whatever happens to it. Forking is safe
because this process never computes: it has one thread, which is checked before every fork.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    _import_everything()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            reply = _start(request)
            children.add(reply["pid"])
        else:
            reply = _wait(request["pid"], request["timeout"])
            children.discard(request["pid"])
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    for pid in children:
        _kill_group(pid)
    os._exit(0)  # tearing everything down again takes seconds


def _import_everything() -> None:
    import matplotlib.figure  # noqa: F401
    import mixerzoo.vision.training.run  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torch.utils.tensorboard

    torch.set_num_threads(1)


def _start(request: dict[str, Any]) -> dict[str, Any]:
    others = {task for task in os.listdir("/proc/self/task") if task != str(os.getpid())}
    names = {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in others}
    if names - {"jemalloc_bg_thd"}:  # pyarrow's allocator expects forks
        raise RuntimeError(f"the server has other threads, so that forking it is not safe: {names}")
    pid = os.fork()
    if pid == 0:
        _become(request)
    return {"pid": pid}


def _become(request: dict[str, Any]) -> None:
    """The child: it never returns."""
    code = 70
    try:
        os.setsid()
        for name, number in (("/dev/null", 0), (request["stdout"], 1), (request["stderr"], 2)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.chdir(request["cwd"])
        for name, value in request["env"].items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        if not request["pictures"]:
            _without_pictures()
        if request["prepare"]:
            path, name, arguments = request["prepare"]
            getattr(_load(path), name)(**arguments)
        sys.argv = request["argv"]
        run = runpy.run_path if request["argv"][0].endswith(".py") else runpy.run_module
        run(request["argv"][0], run_name="__main__")
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _without_pictures() -> None:
    from mixerzoo.vision.training import journal, report, results

    for module, name in ((results, "_draw_batch"), (results, "_draw_results"), (report, "write_report")):
        setattr(module, name, lambda *_, **__: None)
    journal._commit = lambda *_: None  # asks git


def _load(path: str) -> Any:
    """The test file that holds the function which prepares the fault."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _wait(pid: int, timeout: float) -> dict[str, Any]:
    """The exit code as a shell gives it, negative for a signal as in subprocess; None after a timeout."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            orphans = _group_size(pid)
            _kill_group(pid)
            return {"code": os.waitstatus_to_exitcode(status), "orphans": orphans}
        time.sleep(0.01)
    _kill_group(pid)
    os.waitpid(pid, 0)
    return {"code": None, "orphans": 0}


def _group_size(group: int) -> int:
    size = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            size += int(fields[2]) == group and fields[0] != "Z"
    return size


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main()
