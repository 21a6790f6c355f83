"""Measures time and memory of whole models against the picture's side, where linear and quadratic mixers diverge.

    python benchmarks/bench_resolution.py --threads 2

One forward pass of one picture in float32, without gradient, with fresh weights, from 224 to 2048 pixels. Each model
has a process of its own for each size, so that its memory, the growth of the resident peak during the pass, is its own.
Once a pass takes longer than `--limit` seconds the model's larger sizes are left out, and the table says so.

Beside our models stands timm's DeiT-S, whose attention sees the whole picture. The slope of a line in a plot of two
logarithmic axes is the power: 2 for what is linear in the number of pixels, 4 for what is quadratic.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mixerzoo.vision  # noqa: F401  registers the models
import timm
import torch
from _harness import describe_machine, describe_native, digits, forget_peak, markdown_table, resident

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODELS = ("vim_tiny", "vmamba_tiny_s1l8", "vig_tiny", "nat_tiny", "van_b1", "litv2_s", "deit_small_patch16_224")
QUADRATIC = "deit_small_patch16_224"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#343a40")
SIZES = (224, 320, 448, 640, 896, 1280, 1792, 2048)
SHORT = 0.5  # seconds; a shorter pass is run again, and the least counts


class Point(NamedTuple):
    model: str
    size: int
    seconds: float
    bytes: int


def work(connection: Connection, model: str, size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    arguments = {"dynamic_img_size": True} if model.startswith("deit") else {}
    network = timm.create_model(model, **arguments).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))  # what is loaded or built once
        before, start = forget_peak(), time.perf_counter()
        network(x)
        seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
        for _ in range(2 if seconds < SHORT else 0):
            start = time.perf_counter()
            network(x)
            seconds = min(seconds, time.perf_counter() - start)
    connection.send((seconds, peak))


def measure(model: str, size: int, threads: int) -> Point | None:
    """Measure in a forked process, before this one starts any thread; return None if it dies, usually out of memory."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, model, size, threads))
    process.start()
    sender.close()
    try:
        return Point(model, size, *receiver.recv())
    except EOFError:
        return None
    finally:
        process.join()


def measure_all(models: Sequence[str], sizes: Sequence[int], limit: float, threads: int) -> Iterator[Point]:
    for model in models:
        for size in sizes:
            point = measure(model, size, threads)
            if point is not None:
                yield point
            if point is None or point.seconds > limit:
                break


def find_power(points: Sequence[Point], field: str) -> float:
    """Return the slope of the last two points on logarithmic axes, the exponent of the side."""
    before, last = points[-2:]
    return math.log(getattr(last, field) / getattr(before, field)) / math.log(last.size / before.size)


def write_table(points: Sequence[Point], models: Sequence[str], sizes: Sequence[int], field: str) -> Iterator[str]:
    scale, precision = (1, 2) if field == "seconds" else (1e-6, 3)
    rows = []
    for model in models:
        own = [point for point in points if point.model == model]
        values = {point.size: digits(getattr(point, field) * scale, precision) for point in own}
        power = f"{find_power(own, field):.1f}" if len(own) > 1 else "-"
        rows.append([model, *(values.get(size, "too slow") for size in sizes), power])
    return markdown_table(["", *(f"{size} px" for size in sizes), "power of the side at the end"], rows)


def draw(points: Sequence[Point], models: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    sizes = sorted({point.size for point in points})
    figure = Figure(figsize=(11.0, 5.0), layout="constrained", facecolor="white")
    for axes, field, label in zip(
        figure.subplots(1, 2), ("seconds", "bytes"), ("seconds a picture", "peak memory, MB"), strict=True
    ):
        scale = 1 if field == "seconds" else 1e-6
        for model, colour in zip(models, COLOURS, strict=False):
            own = [point for point in points if point.model == model]
            style = {"linestyle": "--", "marker": "s"} if model == QUADRATIC else {"linestyle": "-", "marker": "o"}
            values = [getattr(point, field) * scale for point in own]
            axes.plot([point.size for point in own], values, color=colour, label=model, markersize=4, **style)
        _guide(axes, sizes, [point for point in points if point.model == QUADRATIC], field, scale)
        axes.set(xscale="log", yscale="log", xlabel="side of the picture, pixels", title=label)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("One picture, forward, on a CPU: linear mixers keep their slope, global attention steepens")
    figure.savefig(path, dpi=110)


def _guide(axes: Axes, sizes: Sequence[int], own: Sequence[Point], field: str, scale: float) -> None:
    """Draw reference lines of slope 2 and 4 from the quadratic model's first point."""
    if not own:
        return
    start = getattr(own[0], field) * scale
    top = max(getattr(point, field) for point in own) * scale
    for power, name in ((2, "linear in pixels"), (4, "quadratic")):
        values = [start * 0.5 * (size / sizes[0]) ** power for size in sizes]
        shown = [(size, value) for size, value in zip(sizes, values, strict=True) if value <= 2 * top]
        axes.plot(*zip(*shown, strict=True), color="#adb5bd", linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(name, shown[-1], fontsize=8, color="#868e96", ha="right", va="bottom")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument(
        "--limit", type=float, default=20.0, help="seconds of a pass after which no larger one is tried"
    )
    parser.add_argument("--markdown", type=Path, default=Path("docs/benchmark_resolution.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/resolution.png"))
    arguments = parser.parse_args()
    start = time.monotonic()
    points = list(measure_all(arguments.models, arguments.sizes, arguments.limit, arguments.threads))
    machine = describe_machine(arguments.threads, f"timm {timm.__version__}", describe_native())
    link = os.path.relpath(arguments.picture, arguments.markdown.parent)
    picture = f"![Time and memory of each model over the side of the picture, in logarithmic axes]({link})"
    text = ["# Time and memory against resolution", "", picture, ""]
    text += [f"{machine}; {(time.monotonic() - start) / 60:.1f} minutes. float32, one picture, forward, no gradient."]
    text += [f"“Too slow”: a smaller picture took more than {arguments.limit:g} s, or the memory did not suffice."]
    for field, title in (("seconds", "Seconds a picture"), ("bytes", "Peak memory of a pass, MB, without weights")):
        text += ["", f"## {title}", "", *write_table(points, arguments.models, arguments.sizes, field)]
    print("\n".join(text))
    arguments.markdown.write_text("\n".join(text) + "\n")
    draw(points, arguments.models, arguments.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
