"""Tools of the benchmarks: timing in turns, memory of one call, a description of the machine, tables, and LKA by
PyTorch's convolutions, the baseline of two benchmarks.

    from _harness import describe_machine, lka_chain, markdown_table, peak_memory, time_calls

Methods take turns within each round, so that a disturbance affects all of them alike, and the median over rounds is
reported. Memory is the growth of the resident peak (VmHWM) during one call, in a process forked for that call.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from mixerzoo.kernels import _native
from mixerzoo.vision._machine import cpu_name
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], object]


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def time_rounds(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    least_seconds: float = 0.0,
    around: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, list[float]]:
    """Measure the seconds of each call in each round; short calls repeat within a turn until `least_seconds` pass.

    `around(name)` is entered for each turn and is not timed.
    """
    repeats = {}
    for name, call in calls.items():
        with around(name):
            call()
            repeats[name] = max(1, math.ceil(least_seconds / _seconds(call, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            with around(name):
                seconds[name].append(_seconds(call, repeats[name]))
    return seconds


def time_calls(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    least_seconds: float = 0.0,
    around: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, float]:
    """Return the median seconds of each call over the rounds of `time_rounds`."""
    times = time_rounds(calls, rounds=rounds, least_seconds=least_seconds, around=around)
    return {name: statistics.median(values) for name, values in times.items()}


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the speedup of ours as the median over rounds, which cancels what slows down a whole round."""
    return statistics.median(other / own for own, other in zip(ours, theirs, strict=True))


def resident(field: str) -> int:
    """Return the resident bytes of this process: `VmRSS` now, or `VmHWM` at the peak since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024


def forget_peak() -> int:
    """Release free memory, reset the resident peak, and return the bytes that are resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the next call would reuse what earlier ones left in the heap
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def _measure_memory(connection: Connection, build: Callable[[], Call | None]) -> None:
    call = build()
    if call is None:
        return connection.send(None)
    call()  # what stays (compiled code, cached geometry, thread stacks) is not counted
    before = forget_peak()
    result = call()
    connection.send(resident("VmHWM") - before)
    del result


def peak_memory(name: str, build: Callable[[], Call | None]) -> int | None:
    """Return the bytes by which one call of `build()` raises the resident peak, or None if `build` returns None.

    It forks, so it must be called before this process has started any thread.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(sender, build))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{name} died while its memory was measured") from None
    finally:
        process.join()


def describe_machine(threads: int, *more: str) -> str:
    """Describe the processor, threads, versions, `more` facts and the date in one line."""
    facts = [
        f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {threads} threads",
        f"torch {torch.__version__}, Python {platform.python_version()}",
        *more,
        str(datetime.date.today()),
    ]
    return "; ".join(facts)


def describe_native() -> str:
    """Name the build of the native kernels that this process has loaded."""
    library = _native.library() if _native.is_available() else None
    return f"native kernels: {Path(library._name).name.split('.')[0] if library else 'none'}"


def lka_chain(
    x: Tensor, w5: Tensor, w7d3: Tensor, w1: Tensor, b5: Tensor | None, b7d3: Tensor | None, b1: Tensor | None
) -> Tensor:
    """Compute large kernel attention by PyTorch's convolutions, in the memory format of `x`, without the copy of `x` in
    the authors' code."""
    channels = x.shape[1]
    middle = F.conv2d(x, w5, b5, padding=2, groups=channels)
    return x * F.conv2d(F.conv2d(middle, w7d3, b7d3, padding=9, dilation=3, groups=channels), w1, b1)


def digits(value: float, count: int = 3) -> str:
    """Format a number with `count` significant digits and without an exponent: 1240, 5.61, 0.586."""
    rounded = float(f"{value:.{count}g}")
    return f"{rounded:.0f}" if abs(rounded) >= 10**count else f"{rounded:.{count}g}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
