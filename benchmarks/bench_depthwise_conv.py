"""Benchmarks depth-wise convolution against PyTorch's in both memory formats, and LKA against its chain, on the CPU.

    python benchmarks/bench_depthwise_conv.py --markdown table.md
    python benchmarks/bench_depthwise_conv.py --rule       # is the choice among PyTorch's ways still the best one?

Methods: `torch.nn.functional.conv2d` on contiguous and on channels_last maps; `depthwise_conv2d` on both as a user gets
it; and "no compiler", `depthwise_conv2d` in plain PyTorch as where nothing was compiled at install. Each method gets
the map in its own format, and returns it so. Every method is first compared with PyTorch's convolution in float64; one
that differs ends the run. A run ends with status 1 if `depthwise_conv2d` missed what the project promises of it: at
VAN's stages `LEAST_SPEEDUP` times the best direct call, and nowhere slower than that or than the same format's call.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from _harness import describe_machine, lka_chain, markdown_table, time_calls
from mixerzoo.kernels.depthwise_conv import _native, _plain, depthwise_conv2d, large_kernel_attention
from torch import Tensor
from torch.nn import functional as F

VAN_STAGES = [(32, 56), (64, 28), (160, 14), (256, 7), (64, 56), (128, 28), (320, 14), (512, 7)]  # b0, then b1 to b3
DENSE_STAGES = [(64, 56), (128, 28), (320, 14)]
DENSE_KERNELS = range(3, 32, 2)
BANDS = [(1, 11), (11, 1)]
DILATED = [(5, 2), (7, 2), (9, 2), (13, 2), (3, 3), (5, 3), (7, 3)]
LARGE_MAP = (32, 128, 5)  # channels, side, kernel
TRAINED = [(5, 1), (7, 3), (13, 1)]
LEAST_SPEEDUP = 4.0  # of the dilated 7 x 7 at VAN's stages
TIE = 1.05  # closer than this, neither of two methods is slower than the other
RULE_LOSS = 1.3  # the rule may miss the best method by this factor before it is called wrong
TOLERANCE = 3e-6  # of the largest value

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Problem(NamedTuple):
    channels: int
    side: int
    kernel: tuple[int, int]
    dilation: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        dilated = f", dilation {self.dilation}" if self.dilation > 1 else ""
        kernel = f"kernel {self.kernel[0]}x{self.kernel[1]}"
        return f"{self.side}x{self.side}x{self.channels}, {kernel}{dilated}, batch {self.batch}"


def square(channels: int, side: int, kernel: int, dilation: int = 1, batch: int = 1) -> Problem:
    return Problem(channels, side, (kernel, kernel), dilation, batch)


Method = Callable[[Tensor, Tensor, Tensor], Tensor]


def conv2d(problem: Problem) -> Method:
    padding = tuple(side // 2 * problem.dilation for side in problem.kernel)
    return lambda x, weight, bias: F.conv2d(
        x, weight, bias, padding=padding, dilation=problem.dilation, groups=problem.channels
    )


def ours(problem: Problem) -> Method:
    return lambda x, weight, bias: depthwise_conv2d(x, weight, bias, dilation=problem.dilation)


def plain(problem: Problem, method: _plain.Method) -> Method:
    """Return one of PyTorch's methods with its result in the memory format of the map, as the operator returns it."""
    dilation = (problem.dilation, problem.dilation)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = _plain.crop(weight, (problem.side, problem.side), dilation)
        return _plain.forward(x, weight, bias, dilation, method).contiguous(memory_format=_plain.memory_format(x))

    return run


def without_native(name: str) -> contextlib.AbstractContextManager:
    is_plain = name.startswith("no compiler")
    return mock.patch.object(_native, "is_available", lambda: False) if is_plain else contextlib.nullcontext()


def make_inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(problem.batch, problem.channels, problem.side, problem.side)
    weight = torch.randn(problem.channels, 1, *problem.kernel) / math.prod(problem.kernel) ** 0.5
    return x, weight, torch.randn(problem.channels)


def measure(problem: Problem, methods: dict[str, Method], rounds: int, *, backward: bool = False) -> dict[str, float]:
    """Measure the seconds of each method in each format, by "method, format"."""
    x, weight, bias = make_inputs(problem)
    exact = conv2d(problem)(x.double(), weight.double(), bias.double())
    calls = {}
    for layout, memory_format in LAYOUTS.items():
        leaves = [x.contiguous(memory_format=memory_format), weight, bias]
        grad = torch.randn_like(leaves[0])
        for name, method in methods.items():
            label = f"{name}, {layout}"
            with torch.no_grad(), without_native(name):
                error = (method(*leaves).double() - exact).abs().max() / exact.abs().max()
            if error > TOLERANCE:
                raise SystemExit(f"{label} is off by {error:.1e} at {problem.name}")
            calls[label] = _call(method, leaves, grad if backward else None)
    return time_calls(calls, rounds=rounds, least_seconds=0.01, around=without_native)


def _call(method: Method, leaves: list[Tensor], grad: Tensor | None) -> Callable[[], object]:
    if grad is None:

        def forward() -> object:
            with torch.no_grad():
                return method(*leaves)

        return forward
    trained = [leaf.detach().requires_grad_() for leaf in leaves]
    return lambda: torch.autograd.grad(method(*trained), trained, grad)


def compare(problem: Problem, rounds: int, *, backward: bool = False) -> tuple[list[str], float, float]:
    """Return a row of the table, the speedup over the best direct call, and the least one over the same format's."""
    methods = {"conv2d": conv2d(problem), "ours": ours(problem), "no compiler": ours(problem)}
    seconds = measure(problem, methods, rounds, backward=backward)
    best = {name: min(seconds[f"{name}, {layout}"] for layout in LAYOUTS) for name in methods}
    speedup = best["conv2d"] / best["ours"]
    alike = min(seconds[f"conv2d, {layout}"] / seconds[f"ours, {layout}"] for layout in LAYOUTS)
    cells = [f"{1e3 * value:.3f}" for value in seconds.values()]
    return [problem.name, *cells, f"{speedup:.1f}"], speedup, alike


HEADER = [
    "map",
    *(f"{method}, {layout}" for layout in LAYOUTS for method in ("conv2d", "ours", "no compiler")),
    "times",
]


def section(
    title: str, problems: list[Problem], rounds: int, missed: list[str], *, least: float = 0.0, backward: bool = False
) -> Iterator[str]:
    """Yield a table in milliseconds; add what is slower than PyTorch or below `least` to `missed`."""
    yield f"\n**{title}** Milliseconds; the last column is the best direct call over the better of ours."
    yield ""
    rows = []
    for problem in problems:
        row, speedup, alike = compare(problem, rounds, backward=backward)
        if speedup < least or min(speedup, alike) * TIE < 1:
            missed.append(f"{title} {problem.name}: {speedup:.2f} times, {alike:.2f} in the same format")
        rows.append(row)
        print(" | ".join(row), file=sys.stderr, flush=True)
    yield from markdown_table(HEADER, rows)


def attention_section(batch: int, rounds: int) -> Iterator[str]:
    yield f"\n**Large kernel attention, batch {batch}.** Milliseconds, forward, then forward and backward."
    yield ""
    rows = []
    for channels, side in VAN_STAGES[:4]:
        shapes = [(channels, 1, 5, 5), (channels, 1, 7, 7), (channels, channels, 1, 1), *[(channels,)] * 3]
        weights = [torch.randn(shape) * shape[-1] ** -2 for shape in shapes]
        x = torch.randn(batch, channels, side, side)
        exact = lka_chain(x.double(), *(weight.double() for weight in weights))
        row, calls = [f"{side}x{side}x{channels}"], {}
        for backward in (False, True):
            for name, method in (("chain", lka_chain), ("ours", large_kernel_attention)):
                for layout, memory_format in LAYOUTS.items():
                    leaves = [x.contiguous(memory_format=memory_format), *weights]
                    error = (method(*leaves).double() - exact).abs().max() / exact.abs().max()
                    if error > TOLERANCE:
                        raise SystemExit(f"LKA, {name}, {layout} is off by {error:.1e}")
                    grad = torch.randn_like(x) if backward else None
                    calls[f"{name}, {layout}, {backward}"] = _call(method, leaves, grad)
        seconds = time_calls(calls, rounds=rounds, least_seconds=0.01)
        row += [f"{1e3 * value:.2f}" for value in seconds.values()]
        rows.append(row)
        print(" | ".join(row), file=sys.stderr, flush=True)
    columns = [f"{m}, {layout}{', trained' * b}" for b in (0, 1) for m in ("chain", "ours") for layout in LAYOUTS]
    yield from markdown_table(["map", *columns], rows)


def check_rule(rounds: int) -> int:
    """Print the times of the methods of `_plain` and the loss by its choice; return 1 if that is too large."""
    rows, worst = [], 1.0
    problems = [square(c, side, k) for c, side in DENSE_STAGES for k in DENSE_KERNELS]
    problems += [square(c, side, k, d) for c, side in DENSE_STAGES for k, d in DILATED]
    for problem in problems:
        names: list[_plain.Method] = ["direct", "channels_last", "lattice"]
        seconds = measure(problem, {name: plain(problem, name) for name in names}, rounds)
        weight = torch.empty(problem.channels, 1, *problem.kernel)
        dilation = (problem.dilation, problem.dilation)
        chosen = _plain.choose(_plain.crop(weight, (problem.side, problem.side), dilation), dilation)
        losses = []
        for layout in LAYOUTS:
            best = min(seconds[f"{name}, {layout}"] for name in names)
            losses.append(seconds[f"{chosen}, {layout}"] / best)
        worst = max(worst, *losses)
        cells = [f"{1e3 * value:.3f}" for value in seconds.values()]
        rows.append([problem.name, *cells, chosen, f"{max(losses):.2f}"])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    columns = [f"{name}, {layout}" for layout in LAYOUTS for name in ("direct", "channels_last", "lattice")]
    print("\n".join(markdown_table(["map", *columns, "rule", "loses"], rows)))
    print(f"\nThe rule costs at most {worst:.2f} times the best method's time.")
    return int(worst > RULE_LOSS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15, help="turns of each method; the median counts")
    parser.add_argument("--rule", action="store_true", help="measure the choice among PyTorch's ways and nothing else")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.rule:
        return check_rule(options.rounds)
    native = "compiled kernels" if _native.is_available() else "no compiled kernels"
    missed: list[str] = []
    dilated = [square(channels, side, 7, 3) for channels, side in VAN_STAGES]
    dense = [square(channels, side, k) for channels, side in DENSE_STAGES for k in DENSE_KERNELS]
    others = [Problem(channels, side, band) for channels, side in DENSE_STAGES for band in BANDS]
    others.append(square(*LARGE_MAP))
    trained = [square(channels, side, k, d, 8) for channels, side in DENSE_STAGES for k, d in TRAINED]
    lines = [
        describe_machine(options.threads, native),
        *section("7 x 7 with dilation 3 at VAN's stages.", dilated, options.rounds, missed, least=LEAST_SPEEDUP),
        *section("Dense kernels.", dense, options.rounds, missed),
        *section("Bands, and a large map.", others, options.rounds, missed),
        *section("Forward and backward.", trained, options.rounds, missed, backward=True),
        *attention_section(1, options.rounds),
        *attention_section(8, options.rounds),
    ]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
