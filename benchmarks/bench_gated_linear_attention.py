"""Benchmarks bidirectional gated linear attention on the CPU against attention and the token-by-token recurrence.

    python benchmarks/bench_gated_linear_attention.py --threads 2 --markdown table.md --picture growth.png

ViG-T's heads (3 of 32 channels, values of 64) over the tokens of maps from 14 x 14 to 128 x 128, one image: time and
growth of the resident peak of one call, forward and with the backward pass. Attention is
`F.scaled_dot_product_attention` with 3 heads of 64 throughout, DeiT-T's: for narrower queries than values PyTorch has
no fused kernel on the CPU. The recurrence is its definition, a few operators a
token. Either stops where a run would take minutes (`LONGEST`).

Before anything is timed, ours is compared with the recurrence, gradients included; if they differ, the run ends. It
ends with status 1 if the time a token at the most tokens is more than `ALLOWED_GROWTH` times that at 1024 tokens, since
the cost is to be linear.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from _harness import Call, describe_machine, digits, markdown_table, peak_memory, time_calls
from mixerzoo.kernels.gated_linear_attention import bidirectional_gated_linear_attention
from torch import Tensor
from torch.nn import functional as F

TOKENS = (196, 784, 1024, 3136, 4096, 16384)
HEADS, HEAD_DIM, VALUE_DIM = 3, 32, 64
LONGEST = {("recurrence", "forward"): 1024, ("recurrence", "forward + backward"): 784}
LONGEST[("attention", "forward + backward")] = 4096
COMPARED = 100
TOLERANCE = 1e-5  # of the norm
ALLOWED_GROWTH = 1.5
NAMES = ("gated linear attention", "attention", "recurrence")
PASSES = ("forward", "forward + backward")

Function = Callable[[list[Tensor]], Tensor]


def make_inputs(tokens: int, name: str = NAMES[0]) -> list[Tensor]:
    """Make query, key, value, and the log gates of both directions as in an untrained ViG; none for attention."""
    if name == "attention":
        return [torch.randn(1, tokens, HEADS, VALUE_DIM) for _ in range(3)]
    query, key, *gates = (torch.randn(1, tokens, HEADS, HEAD_DIM) for _ in range(4))
    value = torch.randn(1, tokens, HEADS, VALUE_DIM)
    return [query, key, value, *(F.logsigmoid(gate) / 16 for gate in gates)]


def ours(inputs: list[Tensor]) -> Tensor:
    return bidirectional_gated_linear_attention(*inputs)


def attention(inputs: list[Tensor]) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in inputs)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def recurrence(inputs: list[Tensor]) -> Tensor:
    query, key, value, *gates = inputs
    total = torch.zeros_like(value)
    for log_gate, order in zip(gates, (1, -1), strict=True):
        state, outs = query.new_zeros(1, HEADS, HEAD_DIM, VALUE_DIM), []
        for t in range(query.shape[1])[::order]:
            state = log_gate[:, t].exp().unsqueeze(-1) * state + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
            outs.append((query[:, t].unsqueeze(-2) @ state).squeeze(-2))
        total = total + torch.stack(outs[::order], 1)
    return total * HEAD_DIM**-0.5 / 2


FUNCTIONS: dict[str, Function] = dict(zip(NAMES, (ours, attention, recurrence), strict=True))


def call_of(function: Function, inputs: list[Tensor], which: str) -> Call:
    """Return one pass of a method over its own inputs."""
    if which == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(leaves).sum(), leaves)


def require_right_results() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(COMPARED)]
    fed = torch.randn_like(inputs[2])
    results = [[out := f(inputs), *torch.autograd.grad(out, inputs, fed)] for f in (ours, recurrence)]
    for got, want in zip(*results, strict=True):
        error = ((got - want).norm() / want.norm()).item()
        if not error <= TOLERANCE:
            raise SystemExit(f"ours is off by {error:.1e} of the norm, more than {TOLERANCE:.0e}; nothing is reported")


class Result(NamedTuple):
    """A measurement of one method, pass and number of tokens: seconds and bytes."""

    seconds: float
    memory: int


Results = dict[tuple[str, str, int], Result]


def measure(rounds: int, threads: int) -> Results:
    """Measure all methods; memory comes first, since its processes must be forked before any thread starts."""
    memory: dict[tuple[str, str, int], int] = {}
    cases = [
        (name, which, tokens)
        for which in PASSES
        for tokens in TOKENS
        for name in NAMES
        if tokens <= LONGEST.get((name, which), TOKENS[-1])
    ]
    for name, which, tokens in cases:
        grown = peak_memory(name, lambda n=name, w=which, t=tokens: call_of(FUNCTIONS[n], make_inputs(t, n), w))
        assert grown is not None
        memory[name, which, tokens] = grown
    torch.set_num_threads(threads)
    require_right_results()
    results: Results = {}
    for which in PASSES:
        for tokens in TOKENS:
            names = [name for name, w, t in cases if (w, t) == (which, tokens)]
            calls = {name: call_of(FUNCTIONS[name], make_inputs(tokens, name), which) for name in names}
            for name, seconds in time_calls(calls, rounds=rounds, least_seconds=0.02).items():
                results[name, which, tokens] = Result(seconds, memory[name, which, tokens])
    return results


def rows(results: Results, which: str) -> Iterator[list[str]]:
    for tokens in TOKENS:
        found = [results.get((name, which, tokens)) for name in NAMES]
        base = found[0]
        assert base is not None
        cells = [f"**{digits(base.seconds * 1e3)}**"]
        cells += [
            "" if r is None else f"{digits(r.seconds * 1e3)} ({digits(r.seconds / base.seconds, 2)}x)"
            for r in found[1:]
        ]
        yield [str(tokens), *cells, *("" if r is None else f"{r.memory / 2**20:.1f}" for r in found)]


def report(results: Results, rounds: int, threads: int) -> Iterator[str]:
    """Yield the lines of the tables."""
    yield f"{describe_machine(threads)}. float32, one image, median of {rounds} rounds taken in turns."
    header = ["tokens", *(f"{name}, ms" for name in NAMES), *(f"{name}, MiB" for name in NAMES)]
    for which in PASSES:
        yield f"\n{which[0].upper()}{which[1:]}:\n"
        yield from markdown_table(header, rows(results, which))


def draw(results: Results, file: Path) -> None:
    """Plot time and memory over tokens on logarithmic axes, where a linear cost has slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), sharex=True, layout="constrained")
    colours = dict(zip(NAMES, ("tab:blue", "tab:orange", "tab:gray"), strict=True))
    for column, which in enumerate(PASSES):
        for row, (unit, value) in enumerate(
            (("ms", lambda r: r.seconds * 1e3), ("MiB", lambda r: max(r.memory, 2**16) / 2**20))
        ):
            axis = axes[row, column]
            for name in NAMES:
                at = [tokens for tokens in TOKENS if (name, which, tokens) in results]
                values = [value(results[name, which, tokens]) for tokens in at]
                axis.loglog(at, values, marker="o", color=colours[name], label=name)
            first = value(results[NAMES[0], which, TOKENS[0]])
            line = [first * tokens / TOKENS[0] for tokens in TOKENS]
            axis.loglog(TOKENS, line, color="black", linestyle=":", linewidth=1, label="linear")
            axis.set_ylabel(unit)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(which)
        axes[1, column].set_xticks(TOKENS, [str(tokens) for tokens in TOKENS], rotation=45)
        axes[1, column].minorticks_off()
        axes[1, column].set_xlabel("tokens")
    axes[0, 0].legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def growth(results: Results, which: str) -> float:
    """Return the time per token at the most tokens, relative to that at about a thousand."""
    middle = min(TOKENS, key=lambda tokens: abs(tokens - 1024))
    most, base = (results[NAMES[0], which, tokens].seconds / tokens for tokens in (TOKENS[-1], middle))
    return most / base


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--picture", type=Path, help="draw time and memory over the number of tokens")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # until the forks of the memory measurements are done
    results = measure(arguments.rounds, arguments.threads)
    text = "\n".join(report(results, arguments.rounds, arguments.threads)) + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.picture:
        draw(results, arguments.picture)
    missed = [which for which in PASSES if growth(results, which) > ALLOWED_GROWTH]
    for which in missed:
        print(
            f"missed: {which} takes {growth(results, which):.2f} times as long a token at {TOKENS[-1]} tokens as at "
            f"1024, more than {ALLOWED_GROWTH}",
            file=sys.stderr,
        )
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
