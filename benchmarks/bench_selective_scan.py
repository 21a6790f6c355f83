"""Benchmarks the selective scan on the CPU against the defining loop over time and other implementations.

    python benchmarks/bench_selective_scan.py --threads 2 --markdown table.md
    python benchmarks/bench_selective_scan.py --compile

Sequences as in Mamba and Vim, and the four scans over the maps of VMamba-T's stages, where the other methods first lay
out the sequences and at last add them up again. The others are the loop of the official reference (`_scan_loop.py`),
mambapy's parallel scan (`pip install mambapy`) where it is installed, and with `--compile` our own form in standard
operators, compiled (minutes).

Before anything is timed, every method is compared with the loop in float64, gradients too; one that differs ends the
run. Methods take turns. Memory is the growth of the resident peak during one call at `MEMORY_BATCH`, and the inputs. A
run ends with status 1 if ours is not as many times as fast as the loop as the project promises (`REQUIRED`), or needs
more memory than inputs, outputs and one state a chunk, and a tenth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from _harness import describe_machine, describe_native, digits, markdown_table, peak_memory, time_calls
from _scan_loop import Sequences, lay_out, put_back, scan_loop
from mixerzoo.kernels.cross_scan import CROSS, ScanPath
from mixerzoo.kernels.selective_scan import _plain, selective_scan, selective_scan_2d
from torch import Tensor

try:
    from mambapy.pscan import pscan
except ImportError:
    pscan = None

OURS, LOOP, PARALLEL, COMPILED = "ours", "reference loop", "mambapy pscan", "plain form, compiled"
PASSES = ("forward", "forward + backward")
SEQUENCES = ((1, 384, 3136), (1, 768, 784), (16, 384, 197), (16, 384, 1025))  # state, dim, length
MAPS = ((1, 96, 56), (1, 192, 28), (1, 384, 14), (1, 768, 7))  # state, dim, side: the stages of VMamba-T
REQUIRED = {1: (40.0, 20.0), 16: (12.0, 8.0)}  # by state: times as fast as the loop, in each pass, on sequences
MEMORY_BATCH = 8  # where a page more or less no longer counts
SLACK = 1.1
TOLERANCE = 1e-4  # of the norm, gradients too

Method = Callable[..., Tensor]


class Case(NamedTuple):
    """A sequence of `length` steps, or four scans over a map with that many rows and columns."""

    state: int
    dim: int
    length: int
    is_map: bool = False

    @property
    def name(self) -> str:
        shape = f"map {self.length}x{self.length}" if self.is_map else f"{self.length} steps"
        return f"{shape}, D {self.dim}, state {self.state}"

    def inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Make inputs with steps mostly between 0.001 and 0.1, and the initial decays of Mamba."""
        torch.manual_seed(0)
        scans, state, dim = len(CROSS) if self.is_map else 1, self.state, self.dim
        A = -torch.arange(1, state + 1).expand(scans, dim, state).float().contiguous()
        bias, D = torch.empty(scans, dim).uniform_(-7, -2), torch.randn(scans, dim)
        if not self.is_map:
            u, delta = torch.randn(2, batch, dim, self.length).unbind()
            B, C = torch.randn(2, batch, 1, state, self.length).unbind()
            return Sequences(u, delta, A[0], B, C, D[0], bias[0])
        rank, side = dim // 16, self.length
        x = torch.randn(batch, side, side, dim)
        projected = torch.randn(batch, side, side, scans, rank + 2 * state)
        return x, projected, torch.randn(scans, dim, rank) * rank**-0.5, bias, A, D

    @property
    def states(self) -> int:
        """The number of elements of the stored states, one per chunk and the last."""
        scans, steps = (len(CROSS), self.length**2) if self.is_map else (1, self.length)
        return scans * (-(-steps // _plain.CHUNK) + 1) * self.state * self.dim


def ours(*inputs: Tensor) -> Tensor:
    if len(inputs) == len(Sequences._fields):
        u, delta, A, B, C, D, bias = inputs
        y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
        assert isinstance(y, Tensor)
        return y
    return selective_scan_2d(*inputs)


def on_sequences(method: Callable[[Sequences], Tensor]) -> Method:
    """Extend a method for sequences to maps."""

    def run(*inputs: Tensor) -> Tensor:
        if len(inputs) == len(Sequences._fields):
            return method(Sequences(*inputs))
        return put_back(method(lay_out(*inputs)), (inputs[0].shape[1], inputs[0].shape[2]))

    return run


def parallel(sequences: Sequences) -> Tensor:
    """Compute the scan by mambapy's parallel scan, with the surrounding steps of its module."""
    assert pscan is not None
    decay, value, C = sequences.coefficients()
    states = pscan(decay.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous())
    y = (states * C.permute(0, 3, 1, 2)).sum(-1).transpose(1, 2)
    return y + sequences.u * sequences.D.unsqueeze(1)


def plain(sequences: Sequences) -> Tensor:
    """Compute the scan by our form in standard operators, which can be compiled."""
    u, delta, A, B, C, D, bias = sequences
    groups = B.shape[1]
    by_group = (groups, u.shape[1] // groups)
    x, delta = (tensor.unflatten(1, by_group).permute(0, 3, 1, 2) for tensor in (u, delta))
    projected = torch.cat([B, C], 2).permute(0, 3, 1, 2)
    A, D, bias = (tensor.unflatten(0, by_group) for tensor in (A, D, bias))
    size, paths = (1, u.shape[2]), (ScanPath(),) * groups
    y, _ = _plain.scan(x, delta, projected, None, bias, A, D, size, paths, True, False)
    return y.flatten(1, 2)


def make_methods(*, compiled: bool) -> dict[str, Method]:
    methods = {OURS: ours, LOOP: on_sequences(scan_loop)}
    if pscan is not None:
        methods[PARALLEL] = on_sequences(parallel)
    if compiled:
        methods[COMPILED] = on_sequences(torch.compile(plain))
    return methods


def forward(method: Method, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return method(*inputs)


def train(method: Method, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the output and the gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = method(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))


def require_equal(case: Case, methods: dict[str, Method]) -> None:
    """Compare each method's output and gradients with those of the loop in float64."""
    inputs = case.inputs()
    wanted = train(on_sequences(scan_loop), [tensor.double() for tensor in inputs])
    for name, method in methods.items():
        got = (forward(method, inputs), *train(method, inputs))
        for number, (mine, want) in enumerate(zip(got, (wanted[0], *wanted), strict=True)):
            error = ((mine.double() - want).norm() / want.norm().clamp(min=1e-30)).item()
            if not error <= TOLERANCE:
                what = "output" if number < 2 else f"gradient {number - 2}"
                raise SystemExit(f"{case.name}: the {what} of {name} is off by {error:.1e}; nothing is reported")


def measure_memory(case: Case, methods: dict[str, Method]) -> dict[str, list[int]]:
    """Measure the bytes of each method's forward pass, inputs included, and of ours with the backward pass."""

    def build(method: Method, run: Callable) -> Callable[[], object]:
        inputs = case.inputs(MEMORY_BATCH)
        return lambda: run(method, inputs)

    given = sum(tensor.nbytes for tensor in case.inputs(MEMORY_BATCH))
    bytes_of: dict[str, list[int]] = {}
    for name, method in methods.items():
        runs = (forward, train) if name == OURS else (forward,)
        grown = [peak_memory(name, lambda method=method, run=run: build(method, run)) for run in runs]
        bytes_of[name] = [given + (more or 0) for more in grown]
    return bytes_of


def allowed_memory(case: Case) -> list[float]:
    """Return the bytes that ours may take: inputs, outputs, their gradients with backward, and a state per chunk."""
    inputs = case.inputs(MEMORY_BATCH)
    given, output = sum(tensor.nbytes for tensor in inputs), inputs[0].nbytes
    return [SLACK * (n * given + (2 * n - 1) * output + 4 * MEMORY_BATCH * case.states) for n in (1, 2)]


def time_case(case: Case, methods: dict[str, Method], rounds: int) -> list[dict[str, float]]:
    """Measure the seconds of each method, by pass."""
    inputs = case.inputs()
    return [
        time_calls(
            {name: lambda method=method, run=run: run(method, inputs) for name, method in methods.items()},
            rounds=rounds,
            least_seconds=0.02,
        )
        for run in (forward, train)
    ]


def list_missed(case: Case, seconds: list[dict[str, float]], memory: dict[str, list[int]]) -> Iterator[str]:
    """Yield a line for each requirement that is not met."""
    for number, name in enumerate(PASSES):
        times, least = seconds[number][LOOP] / seconds[number][OURS], REQUIRED[case.state][number]
        if times < least and not case.is_map:
            yield f"{case.name}, {name}: {times:.1f} times as fast as the loop, not {least:g}"
        used, allowed = memory[OURS][number], allowed_memory(case)[number]
        if used > allowed:
            yield f"{case.name}, {name}: {used / 1e6:.1f} MB, not {allowed / 1e6:.1f}"


def time_row(case: Case, number: int, seconds: dict[str, float], methods: dict[str, Method]) -> list[str]:
    cells = [f"{digits(seconds[m] * 1e3)} ({seconds[m] / seconds[OURS]:.1f}x)" for m in methods if m != OURS]
    return [case.name, PASSES[number], f"**{digits(seconds[OURS] * 1e3)}**", *cells]


def memory_row(case: Case, number: int, memory: dict[str, list[int]]) -> list[str]:
    allowed = digits(allowed_memory(case)[number] / 1e6)
    return [
        case.name,
        PASSES[number],
        allowed,
        *(digits(v[number] / 1e6) if number < len(v) else "-" for v in memory.values()),
    ]


def report(arguments: argparse.Namespace, missed: list[str]) -> Iterator[str]:
    """Yield the lines of the tables."""
    cases = [Case(*shape) for shape in SEQUENCES] + [Case(*shape, is_map=True) for shape in MAPS]
    methods = make_methods(compiled=arguments.compile)
    eager = {name: method for name, method in methods.items() if name != COMPILED}
    torch.set_num_threads(1)  # memory first: it forks, before which no thread may have been started
    memory = [measure_memory(case, eager) for case in cases]
    torch.set_num_threads(arguments.threads)
    for case in cases:
        require_equal(case, methods)
    seconds = [time_case(case, methods, arguments.rounds) for case in cases]
    yield f"{describe_machine(arguments.threads, describe_native())}. float32, {arguments.rounds} rounds in turns."
    yield "\nMilliseconds at batch 1, and how many times as fast ours is:\n"
    header = ["", "pass", *(name for name in methods)]
    rows = [time_row(case, n, seconds[i][n], methods) for i, case in enumerate(cases) for n in (0, 1)]
    yield from markdown_table(header, rows)
    yield f"\nPeak memory at batch {MEMORY_BATCH}, inputs included, MB:\n"
    rows = [memory_row(case, n, memory[i]) for i, case in enumerate(cases) for n in (0, 1)]
    yield from markdown_table(["", "pass", "allowed", *eager], rows)
    for case, times, used in zip(cases, seconds, memory, strict=True):
        missed += list_missed(case, times, used)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also our plain form, compiled: minutes a shape")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    missed: list[str] = []
    text = "\n".join(report(arguments, missed)) + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
