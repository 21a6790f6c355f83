"""Benchmarks models side by side on this machine: pictures per second, latency and memory.

    python -m mixerzoo.vision.benchmark nat_mini van_b1 convnext_tiny --batch-size 32
    python -m mixerzoo.vision.benchmark 'vmamba*' --train --amp --precision bfloat16 --csv results.csv

Models take turns within each round, so that a disturbance of the machine affects all of them alike, and the median over
rounds is reported; `spread` is the difference between the slowest and the fastest round. Latency is measured with
single pictures. A batch that does not fit into memory is halved until it does. Works for any timm model.

Unusual:
* Memory is that of the weights plus the peak growth during a step: allocated memory on a GPU, resident memory on Linux.
  A training step includes gradients and the state of AdamW. On other systems the column is empty.
* Linux overcommits memory and may kill the process before an allocation fails: a batch far too large for the CPU is
  then not halved.
* All models of one call are loaded at once, so the weights of the others limit the largest batch of each.
* The CSV file has the columns of timm's benchmark.py, followed by ours for latency and memory; `infer_macts`, which
  needs fvcore, is missing. timm trains with SGD and synchronises after every step; here AdamW, and after each turn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import datetime
import fnmatch
import gc
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.models import get_model_input_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from ._loading import KeyValue, OneLineParser, load_model
from ._machine import cpu_name
from ._messages import did_you_mean, one_line
from .summary import summarize

Pass = Literal["infer", "train"]
Precision = Literal["float32", "bfloat16", "float16"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """The conditions under which all models of one call are measured."""

    device: torch.device
    batch_size: int = 32
    input_size: tuple[int, int] | None = None
    precision: Precision = "float32"
    amp: bool = False
    """Weights stay float32 and autocast computes in `precision`; without it, weights and pictures are converted."""
    channels_last: bool = False
    compile: bool = False
    rounds: int = 5
    seconds: float = 1.0
    """Length of one model's turn in one round."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.amp else getattr(torch, self.precision)

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.precision))

    def images(self, batch: int, channels: int, height: int, width: int) -> Tensor:
        images = torch.randn(batch, channels, height, width, device=self.device, dtype=self.dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


@dataclass
class Result:
    """Measurements of one model in one pass: `steps` in seconds, one per round, and `latencies` of single pictures."""

    model: str
    kind: Pass
    parameters: int
    macs: int
    size: tuple[int, int]
    batch: int
    memory: int | None
    steps: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    @property
    def samples_per_sec(self) -> float:
        return self.batch / self.step

    @property
    def spread(self) -> float:
        return (max(self.steps) - min(self.steps)) / self.step

    def latency(self, share: float) -> float | None:
        """Return the quantile `share` of the latencies in seconds, None if there are none."""
        if not self.latencies:
            return None
        return sorted(self.latencies)[min(len(self.latencies) - 1, math.ceil(share * len(self.latencies)) - 1)]


class Bench:
    """A model in one pass with the largest batch, up to the requested one, that fits into memory."""

    def __init__(self, name: str, model: nn.Module, kind: Pass, setting: Setting) -> None:
        self.model, self.kind, self.setting = model, kind, setting
        channels, *size = get_model_input_config(model)["input_size"]
        height, width = setting.input_size or size
        self.shape = (channels, height, width)
        self.optimizer: Any = create_optimizer_v2(model, opt="adamw", lr=1e-6) if kind == "train" else None
        self.enter()
        self.images = self._fit(name)
        macs = count_macs(model, self.shape) if kind == "infer" else 0
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.result = Result(name, kind, parameters, macs, (height, width), len(self.images), self._memory())

    def enter(self) -> None:
        """Set the mode of the pass. To be called before each turn, since both passes share the model."""
        self.model.train(self.kind == "train")

    def step(self, images: Tensor | None = None) -> None:
        images = self.images if images is None else images
        if self.optimizer is None:
            with torch.no_grad(), self.setting.computing():
                self.model(images)
            return
        self.optimizer.zero_grad()
        with self.setting.computing():
            out = self.model(images)
            out = out[0] if isinstance(out, (tuple, list)) else out  # distilled and pruned models give more
            target = torch.zeros(len(out), dtype=torch.long, device=out.device)
            loss = F.cross_entropy(out.float(), target)
        loss.backward()
        self.optimizer.step()

    def _fit(self, name: str) -> Tensor:
        batch = self.setting.batch_size
        while True:
            try:
                images = self.setting.images(batch, *self.shape)
                for _ in range(2):  # in the second step the optimizer's state exists and autotuning is done
                    self.step(images)
                synchronize(self.setting.device)
                return images
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if batch == 1:
                    raise ValueError(f"{name} does not fit into memory even at batch 1; try --input-size") from None
            # After `except`, where the error no longer references the tensors of the failed step.
            images = None
            self._free()
            _log.warning("%s: memory ended at batch %d (%s); trying %d", name, batch, self.kind, batch // 2)
            batch //= 2

    def _free(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            self.optimizer.state.clear()
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()

    def _memory(self) -> int | None:
        """Return the bytes of weights and of the peak growth in two steps; the second has AdamW's state."""
        self._free()
        before = forget_peak(self.setting.device)
        if before is None:
            return None
        for _ in range(1 if self.optimizer is None else 2):
            self.step()
        synchronize(self.setting.device)
        grown = (peak(self.setting.device) or before) - before
        weights = [*self.model.parameters(), *self.model.buffers()]
        return grown + sum(tensor.numel() * tensor.element_size() for tensor in weights)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on a GPU or on the CPU, whose allocator raises a plain RuntimeError."""
    said = str(error).lower()
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in said for word in words)
    )


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Count multiply-adds for one picture, on the meta device."""
    with torch.device("meta"):
        return summarize(copy.deepcopy(model).float().to("meta"), shape).macs


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def forget_peak(device: torch.device) -> int | None:
    """Reset the memory peak; return the bytes in use, or None if the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the next step would reuse what earlier ones left in the heap
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS") if device.type == "cpu" else None
    except (AttributeError, OSError):  # not Linux, or not allowed
        return None


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024


def measure(benches: Sequence[Bench], setting: Setting) -> list[Result]:
    """Measure all benches in turns."""
    for _ in range(setting.rounds):
        for bench in benches:
            bench.enter()
            bench.step()
            bench.result.steps.append(_seconds(bench.step, setting))
            if bench.kind == "infer":
                bench.result.latencies += _latencies(bench, setting)
    return [bench.result for bench in benches]


def _seconds(call: Callable[[], None], setting: Setting) -> float:
    """Return the mean seconds of as many calls as fit into a turn, at least three, synchronising once."""

    def took(repeats: int) -> float:
        synchronize(setting.device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(setting.device)
        return time.perf_counter() - start

    repeats = max(3, math.ceil(setting.seconds / took(1)))
    return took(repeats) / repeats


def _latencies(bench: Bench, setting: Setting) -> list[float]:
    """Time single pictures for half a turn, at least ten, synchronising after each."""
    image = setting.images(1, *bench.shape)
    bench.step(image)
    synchronize(setting.device)
    taken: list[float] = []
    end = time.perf_counter() + setting.seconds / 2
    while len(taken) < 10 or time.perf_counter() < end:
        start = time.perf_counter()
        bench.step(image)
        synchronize(setting.device)
        taken.append(time.perf_counter() - start)
    return taken


HEADER = ("model", "pass", "params (M)", "GMACs", "size", "batch", "pictures/s", "spread", "ms a step", "latency, ms")
HEADER += ("95 %, ms", "memory, MB")


def table(results: Sequence[Result]) -> str:
    lines = [HEADER, *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cells(result: Result) -> tuple[str, ...]:
    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{1e3 * seconds:.4g}"

    return (
        result.model,
        result.kind,
        f"{result.parameters / 1e6:.1f}",
        f"{result.macs / 1e9:.2f}" if result.macs else "",
        "x".join(map(str, dict.fromkeys(result.size))),
        str(result.batch),
        f"{result.samples_per_sec:.4g}",
        f"{100 * result.spread:.0f} %",
        ms(result.step),
        ms(result.latency(0.5)),
        ms(result.latency(0.95)),
        "" if result.memory is None else f"{result.memory / 1e6:.0f}",
    )


COLUMNS = (
    "model",
    *(f"infer_{name}" for name in ("samples_per_sec", "step_time", "batch_size", "img_size", "gmacs")),
    *(f"train_{name}" for name in ("samples_per_sec", "step_time", "batch_size", "img_size")),
    "param_count",
    *("infer_latency", "infer_latency_p95", "infer_memory", "train_memory"),  # ours
)


def _columns(result: Result) -> dict[str, float | int | str]:
    """Return the CSV columns of a result, in milliseconds, millions of parameters, GMACs and megabytes."""
    values = {
        "samples_per_sec": round(result.samples_per_sec, 2),
        "step_time": round(1e3 * result.step, 3),
        "batch_size": result.batch,
        "img_size": result.size[-1],
        "gmacs": _round(result.macs, 1e-9) if result.kind == "infer" else None,
        "latency": _round(result.latency(0.5), 1e3),
        "latency_p95": _round(result.latency(0.95), 1e3),
        "memory": _round(result.memory, 1e-6),
    }
    columns = {f"{result.kind}_{name}": value for name, value in values.items() if value is not None}
    return {"model": result.model, "param_count": round(result.parameters / 1e6, 2), **columns}


def _round(value: float | None, factor: float) -> float | None:
    return None if value is None else round(factor * value, 3)


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write a row per model, fastest first, as timm's benchmark.py does."""
    lines: dict[str, dict[str, float | int | str]] = {}
    for result in sorted(results, key=lambda result: -result.samples_per_sec):
        lines.setdefault(result.model, {}).update(_columns(result))
    with open(path, "w", newline="") as file:
        known = [name for name in COLUMNS if any(name in line for line in lines.values())]
        writer = csv.DictWriter(file, known, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())


def describe_machine(setting: Setting) -> str:
    if setting.device.type == "cuda":
        where = torch.cuda.get_device_name(setting.device)
    else:
        where = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    ways = [f"{'autocast to ' * setting.amp}{setting.precision}"]
    ways += [name for name in ("channels_last", "compile") if getattr(setting, name)]
    return f"{where}; torch {torch.__version__}; {', '.join(ways)}; {datetime.date.today()}"


def find_models(words: Sequence[str]) -> list[str]:
    """Return the timm models that names and shell patterns match, each once."""
    found: list[str] = []
    for word in words:
        names = fnmatch.filter(timm.list_models(), word) if set(word) & set("*?[") else [word]
        if not names or not timm.is_model(names[0].partition(".")[0]):
            raise ValueError(f"no model matches {word!r}{did_you_mean(word, timm.list_models(), most=3, cutoff=0.6)}")
        found += names
    return list(dict.fromkeys(found))


def parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m mixerzoo.vision.benchmark", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="timm names, or shell patterns such as 'nat_*'")
    add("--train", action="store_true", help="also time training steps: forward, backward, AdamW")
    add("--batch-size", type=_positive, default=32, metavar="N", help="default %(default)s; halved when memory ends")
    add("--input-size", type=_positive, nargs="+", metavar="PIXELS", help="side, or height and width; default: its own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--precision", choices=get_args(Precision), default="float32", help="of weights and pictures")
    add("--amp", action="store_true", help="leave weights in float32 and compute in --precision by autocast")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true", help="torch.compile each model; takes minutes before the first number")
    add("--threads", type=_positive, metavar="N", help="of the processor; default: as torch chooses")
    add("--rounds", type=_positive, default=5, metavar="N", help="in which models take turns, default %(default)s")
    add("--seconds", type=float, default=1.0, metavar="S", help="of one turn, default %(default)s")
    add("--csv", type=Path, metavar="FILE", help="write the results in the columns of timm's benchmark.py")
    add("--model-kwargs", nargs="+", action=KeyValue, default={}, metavar="KEY=VALUE", help="of all models: r=16")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"needs a whole number from 1, got {text!r}")
    return int(text)


def make_setting(arguments: argparse.Namespace) -> Setting:
    try:
        device = torch.device(arguments.device)
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {arguments.device} cannot be used: {one_line(error)}") from error
    size = arguments.input_size
    if size is not None and len(size) > 2:
        raise ValueError(f"--input-size takes one or two numbers, got {len(size)}")
    if arguments.amp and arguments.precision == "float32":
        raise ValueError("--amp needs --precision bfloat16 or float16 to compute in")
    if arguments.csv is not None and not arguments.csv.absolute().parent.is_dir():
        raise ValueError(f"--csv {arguments.csv}: there is no folder {arguments.csv.parent}")
    return Setting(
        device=device,
        batch_size=arguments.batch_size,
        input_size=None if size is None else (size[0], size[-1]),
        precision=arguments.precision,
        amp=arguments.amp,
        channels_last=arguments.channels_last,
        compile=arguments.compile,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )


def prepare(name: str, setting: Setting, kinds: Sequence[Pass], **model_kwargs: Any) -> list[Bench]:
    """Build a model with random weights, which are as fast as trained ones, and prepare each pass with its batch."""
    model = load_model(name, image_size=setting.input_size, **model_kwargs)
    model = model.to(setting.device, setting.dtype)
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if setting.compile:
        model.compile(dynamic=False)  # one graph for each batch, or the second shape would make all of them slower
    return [Bench(name, model, kind, setting) for kind in kinds]


def _run_cli(arguments: argparse.Namespace) -> bool:
    """Measure the models and print the table; return whether all could be measured. Failures are logged."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    setting, whole = make_setting(arguments), True
    kinds: list[Pass] = ["infer", "train"] if arguments.train else ["infer"]
    benches: list[Bench] = []
    for name in find_models(arguments.models):
        _log.info("%s", name)
        try:
            benches += prepare(name, setting, kinds, **arguments.model_kwargs)
        except Exception as error:  # a model may refuse this size, precision or compiler in many ways
            _log.error("%s is left out: %s", name, one_line(error))
            whole = False
    results = measure(benches, setting)
    if results:
        print(f"{describe_machine(setting)}\n\n{table(results)}")
        if arguments.csv is not None:
            write_csv(results, arguments.csv)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0, all models measured; 1, some failed; 2, wrong arguments."""
    logging.basicConfig(format="benchmark: %(message)s", level=logging.INFO)
    try:
        return 0 if _run_cli(parser().parse_args(argv)) else 1
    except (OSError, ValueError) as error:
        print(f"benchmark: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
