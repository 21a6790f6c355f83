"""Benchmarks neighborhood attention on the CPU against methods without a kernel, at the four stages of nat_tiny.

    python benchmarks/bench_neighborhood_attention.py --markdown table.md

Methods: `na2d` as a user gets it; `na2d` in plain PyTorch, as where no compiler was at install; dense attention under a
mask (PyTorch's fused kernel; the bias is ready before a forward pass is timed, and is built from its table where the
table is trained); gathering each query's keys; and compiled FlexAttention, which has no backward pass on the CPU.

Every method is first compared with the float64 reference, output and gradients; one that differs ends the run. Time and
memory are taken as `_harness.py` says.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from _harness import describe_machine, describe_native, digits, markdown_table, peak_memory, time_calls
from mixerzoo.kernels.neighborhood_attention import _native, na2d, neighborhood_attention_reference
from mixerzoo.kernels.neighborhood_attention._geometry import Window
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

KERNEL_SIZE = 7
HEAD_DIM = 32
STAGES = [(56, 2), (28, 4), (14, 8), (7, 16)]  # side of the map, heads
TOLERANCE = 1e-5  # of the norm
FLEX_BLOCK = 64  # the best of 32, 64 and 128 at 56 x 56


class Problem(NamedTuple):
    side: int
    heads: int
    batch: int
    with_rpb: bool

    @property
    def name(self) -> str:
        return f"{self.side}x{self.side}, {self.heads} heads, batch {self.batch}"


class Inputs(NamedTuple):
    """Inputs of a pass: q, k, v [batch, side, side, heads, dim] are views of one projection, as in the module."""

    q: Tensor
    k: Tensor
    v: Tensor
    rpb: Tensor | None
    grad: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self[:4] if tensor is not None]


Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def make_inputs(problem: Problem, *, trained: bool) -> Inputs:
    side, heads = problem.side, problem.heads
    q, k, v = torch.randn(problem.batch, side, side, 3, heads, HEAD_DIM).unbind(3)
    rpb = torch.randn(heads, 2 * KERNEL_SIZE - 1, 2 * KERNEL_SIZE - 1) if problem.with_rpb else None
    for tensor in (q, k, v, rpb):
        if tensor is not None:
            tensor.requires_grad_(trained)
    return Inputs(q, k, v, rpb, torch.randn(q.shape))


def neighbors(side: int) -> tuple[Tensor, Tensor]:
    """Return each token's keys and the index of each pair in the flattened bias table, both [tokens, keys]."""
    position = torch.arange(side)
    axis = (position - KERNEL_SIZE // 2).clamp(0, side - KERNEL_SIZE)[:, None] + torch.arange(KERNEL_SIZE)
    step = axis - position[:, None] + KERNEL_SIZE - 1
    keys = axis[:, None, :, None] * side + axis[None, :, None, :]
    table = step[:, None, :, None] * (2 * KERNEL_SIZE - 1) + step[None, :, None, :]
    return keys.reshape(side * side, -1), table.reshape(side * side, -1)


def make_ours(problem: Problem, inputs: Inputs, *, trained: bool) -> Attention:
    return lambda q, k, v, rpb: na2d(q, k, v, KERNEL_SIZE, rpb=rpb)


def make_gather(problem: Problem, inputs: Inputs, *, trained: bool) -> Attention:
    keys, table = neighbors(problem.side)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        shape = q.shape
        q, k, v = (tensor.flatten(1, 2) for tensor in (q, k, v))
        scores = torch.einsum("bnhd,bnkhd->bhnk", q * HEAD_DIM**-0.5, k[:, keys])
        if rpb is not None:
            scores = scores + rpb.flatten(1)[:, table]
        return torch.einsum("bhnk,bnkhd->bnhd", scores.softmax(-1), v[:, keys]).view(shape)

    return attend


def make_dense(problem: Problem, inputs: Inputs, *, trained: bool) -> Attention:
    keys, table = neighbors(problem.side)
    tokens = len(keys)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool).scatter_(1, keys, True)
    index = torch.zeros(tokens, tokens, dtype=torch.long).scatter_(1, keys, table)
    outside = torch.zeros(tokens, tokens).masked_fill(~seen, -math.inf)

    def build_mask(rpb: Tensor | None) -> Tensor:
        return seen if rpb is None else rpb.flatten(1)[:, index] + outside

    ready = None if trained else build_mask(inputs.rpb)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        shape = q.shape
        q, k, v = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (q, k, v))
        mask = build_mask(rpb) if ready is None else ready
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(shape)

    return attend


def make_flex(problem: Problem, inputs: Inputs, *, trained: bool) -> Attention | None:
    if trained:
        return None
    side, last = problem.side, problem.side - KERNEL_SIZE
    row_width = 2 * KERNEL_SIZE - 1

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = key // side - (query // side - KERNEL_SIZE // 2).clamp(0, last)
        right = key % side - (query % side - KERNEL_SIZE // 2).clamp(0, last)
        return (down >= 0) & (down < KERNEL_SIZE) & (right >= 0) & (right < KERNEL_SIZE)

    biases = None if inputs.rpb is None else inputs.rpb.flatten(1)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = (key // side - query // side + KERNEL_SIZE - 1).clamp(0, row_width - 1)
        right = (key % side - query % side + KERNEL_SIZE - 1).clamp(0, row_width - 1)
        return score + biases[h, down * row_width + right]

    blocks = create_block_mask(sees, None, None, side**2, side**2, device="cpu", BLOCK_SIZE=FLEX_BLOCK)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        shape = q.shape
        q, k, v = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (q, k, v))
        out = compiled(q, k, v, score_mod=None if rpb is None else add_bias, block_mask=blocks)
        return out.transpose(1, 2).reshape(shape)

    return attend


METHODS = {"na2d": make_ours, "na2d, PyTorch": make_ours, "dense": make_dense, "gather": make_gather, "flex": make_flex}


def without_native(method: str) -> contextlib.AbstractContextManager:
    return (
        mock.patch.object(_native, "is_available", lambda: False) if "PyTorch" in method else contextlib.nullcontext()
    )


def make_call(method: str, problem: Problem, inputs: Inputs, *, trained: bool) -> Callable[[], list[Tensor]] | None:
    """Return one forward pass, or forward and backward, or None if the method does not support it."""
    attend = METHODS[method](problem, inputs, trained=trained)
    if attend is None:
        return None

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [attend(*inputs[:4])]

    def forward_backward() -> list[Tensor]:
        out = attend(*inputs[:4])
        return [out, *torch.autograd.grad(out, inputs.leaves, inputs.grad)]

    return forward_backward if trained else forward


def check(methods: list[str], problem: Problem) -> None:
    """Compare every method with the float64 reference on one image; raise if one differs."""
    problem = problem._replace(batch=1)
    for trained in (False, True):
        inputs = make_inputs(problem, trained=trained)
        windows = [Window(KERNEL_SIZE, 1, 1, False)] * 2
        doubles = [tensor.detach().double().requires_grad_(trained) for tensor in inputs.leaves]
        out, _ = neighborhood_attention_reference(
            *doubles[:3], doubles[3] if problem.with_rpb else None, windows, HEAD_DIM**-0.5
        )
        expected = [out, *torch.autograd.grad(out, doubles, inputs.grad.double())] if trained else [out]
        for method in methods:
            with without_native(method):
                call = make_call(method, problem, inputs, trained=trained)
                results = [] if call is None else call()
            for name, result, right in zip(["output", "dq", "dk", "dv", "drpb"], results, expected, strict=False):
                error = ((result - right).norm() / right.norm()).item()
                if not error <= TOLERANCE:
                    raise SystemExit(
                        f"{method} is wrong at {problem.name}: its {name} is off by {error:.1e} of the norm, more than "
                        f"{TOLERANCE:.0e}; nothing is reported"
                    )


def memory_of(method: str, problem: Problem, *, trained: bool) -> int | None:
    """Return the peak bytes of one call of the method, or None if it does not support the problem."""

    def build() -> Callable[[], list[Tensor]] | None:
        call = make_call(method, problem, make_inputs(problem, trained=trained), trained=trained)
        if call is None:
            return None

        def run() -> list[Tensor]:
            with without_native(method):
                return call()

        return run

    return peak_memory(f"{method} at {problem.name}", build)


def write_table(results: list[dict], methods: list[str], unit: str, factor: float) -> Iterator[str]:
    """Format a row per problem and pass, with each method's value and its ratio to `na2d`."""
    rows = []
    for row in results:
        own = row["values"]["na2d"]
        side, heads, batch, bias = (row[key] for key in ("side", "heads", "batch", "with_rpb"))
        passes = "forward + backward" if row["trained"] else "forward"
        cells = [f"{side}x{side}, {heads} heads", str(batch), "yes" if bias else "no", passes]
        for method in methods:
            value = row["values"].get(method)
            if value is None:
                cells.append("-")
            elif method == "na2d":
                cells.append(f"**{digits(value * factor)}**")
            else:
                cells.append(f"{digits(value * factor)} ({digits(value / own, 2)}x)" if own else digits(value * factor))
        rows.append(cells)
    return markdown_table(["map", "batch", "bias", "pass", *(f"{method}, {unit}" for method in methods)], rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least-ms", type=float, default=5, help="least time of one turn of one method")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    methods = ["na2d", *(method for method in args.methods if method != "na2d")]
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    stages = [STAGES[stage - 1] for stage in args.stages]
    problems = [Problem(*stage, batch, rpb) for rpb in (True, False) for stage in stages for batch in args.batch]
    cases = list(itertools.product(problems, (False, True)))

    def results(values: list[dict]) -> list[dict]:
        return [
            problem._asdict() | {"trained": trained, "values": v}
            for (problem, trained), v in zip(cases, values, strict=True)
        ]

    memory = results(
        [{method: memory_of(method, problem, trained=trained) for method in methods} for problem, trained in cases]
    )
    seconds = []
    for problem, trained in cases:
        torch._dynamo.reset()  # or FlexAttention would stop compiling after a few shapes
        if not trained and problem.batch == args.batch[0]:
            check(methods, problem)
        inputs = make_inputs(problem, trained=trained)
        calls = {method: make_call(method, problem, inputs, trained=trained) for method in methods}
        calls = {method: call for method, call in calls.items() if call is not None}
        seconds.append(time_calls(calls, rounds=args.rounds, least_seconds=args.least_ms / 1e3, around=without_native))
    times = results(seconds)

    machine = describe_machine(args.threads, describe_native())
    text = [
        f"Window {KERNEL_SIZE}x{KERNEL_SIZE}, head_dim {HEAD_DIM}, float32. {machine}.",
        "",
        "Median time of a call:",
        "",
    ]
    text += [*write_table(times, methods, "ms", 1e3), "", "Memory that a call takes at its peak:", ""]
    text += [*write_table(memory, methods, "MB", 1e-6)]
    print("\n".join(text))
    if args.markdown:
        args.markdown.write_text("\n".join(text) + "\n")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "seconds": times, "bytes": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
