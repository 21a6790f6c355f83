"""Benchmarks vision transformers with reduced tokens on the CPU against the same transformers with all tokens.

    python benchmarks/bench_token_reduction.py --threads 2 --compile --markdown table.md
    python benchmarks/bench_token_reduction.py --quick

One forward pass in float32 without gradient at 224 pixels, fresh weights, batch 8 and batch 1. The first table holds
methods at several rates on one set of weights, timm's unmodified `vit_small_patch16_224`, which attends by PyTorch's
fused attention. The second holds other models of the family, each beside its dense counterpart in timm. Models take
turns in each round; how many times as fast one is, is the median of the rounds' ratios.

Unusual: all rows of the first table share the parameters of one model (`reduce_tokens`). Before anything is timed, each
method at a rate that reduces nothing is compared with that model, and each compiled one with itself not compiled; one
that differs ends the run. A run ends with status 1 if a method is not as many times as fast as the project promises
(`REQUIRED`). Memory is the growth of the resident peak during a pass, in a process forked for it alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import timm
import torch
from _harness import describe_machine, describe_native, digits, markdown_table, median_ratio, peak_memory, time_rounds
from mixerzoo.vision.backbones._token_reduction import ReductionMethod, reduce_tokens
from mixerzoo.vision.backbones.dynamicvit import DynamicViT
from mixerzoo.vision.backbones.evit import EViT
from mixerzoo.vision.backbones.tome import ToMe
from mixerzoo.vision.summary import summarize
from torch import Tensor, nn

DENSE = "vit_small_patch16_224"
METHODS: dict[str, ReductionMethod] = {
    "ToMe, r = 8": ToMe(8),
    "ToMe, r = 13": ToMe(13),
    "ToMe, r = 13, attention not proportional": ToMe(13, prop_attn=False),
    "ToMe, r = 16": ToMe(16),
    "EViT, 0.9": EViT(0.9),
    "EViT, 0.7": EViT(0.7),
    "EViT, 0.7, without fused token": EViT(0.7, fuse_token=False),
    "EViT, 0.5": EViT(0.5),
    "DynamicViT, 0.9": DynamicViT(0.9),
    "DynamicViT, 0.7": DynamicViT(0.7),
    "DynamicViT, 0.5": DynamicViT(0.5),
}
NOTHING: tuple[ReductionMethod, ...] = (ToMe(0), EViT(1.0), DynamicViT(1.0))
COMPILED = ("ToMe, r = 13", "EViT, 0.7")
COMPILED_BATCH = 8
COUNTERPARTS = {
    "spatten_deit_small_patch16_224": DENSE,
    "eet_vit_small": DENSE,
    "lookupvit_small_patch16_224": DENSE,
    "dynamicvit_convnext_tiny": "convnext_tiny",
    "dynamicvit_swin_tiny": "swin_tiny_patch4_window7_224",
    "stvitr_swin_small": "swin_small_patch4_window7_224",
}
# Times as fast as the dense model not compiled, by batch.
REQUIRED = {
    ("ToMe, r = 13", 8): 1.64,
    ("EViT, 0.7", 8): 1.43,
    ("DynamicViT, 0.7", 8): 1.51,
    ("ToMe, r = 13, compiled", 8): 1.75,
    ("EViT, 0.7, compiled", 8): 1.55,
    ("DynamicViT, 0.7", 1): 1.0,
}
TOLERANCE = 1e-4  # of the largest logit
COMPILED_TOLERANCE = 1e-2  # another order of sums can merge another one of two pairs that are equally alike
PICTURE = (3, 224, 224)
LEAST_SECONDS = 0.2  # of one turn

Build = Callable[[], nn.Module]


def dense(name: str = DENSE) -> nn.Module:
    """Build a timm model with fixed weights."""
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def reduced(method: ReductionMethod, model: Any = None) -> nn.Module:
    torch.manual_seed(1)  # of what a method adds
    return reduce_tokens(dense() if model is None else model, method).eval()


def require_equal(what: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    error = ((got - want).abs().max() / want.abs().max()).item()
    if not error <= tolerance:
        raise SystemExit(f"{what} is off by {error:.1e} of the largest, more than {tolerance:.0e}; nothing is reported")


@torch.no_grad()
def check(model: nn.Module) -> None:
    """Compare every method, set to reduce nothing, with `model`."""
    x = torch.randn(2, *PICTURE)
    want = model(x)
    for method in NOTHING:
        require_equal(f"{method} of {DENSE}", reduced(method, model)(x), want)


def calls_of(models: Mapping[str, nn.Module], batch: int) -> dict[str, Callable[[], Tensor]]:
    x = torch.randn(batch, *PICTURE)

    def call(model: nn.Module) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with torch.no_grad():
                return model(x)

        return forward

    return {name: call(model) for name, model in models.items()}


def compiled_models(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Compile the dense model and those of `COMPILED`, call each once, and compare it with its eager form."""
    x = torch.randn(COMPILED_BATCH, *PICTURE)
    compiled: dict[str, nn.Module] = {}
    for name in (DENSE, *COMPILED):
        compiled[f"{name}, compiled"] = model = torch.compile(models[name], dynamic=False)  # type: ignore[assignment]
        with torch.no_grad():
            require_equal(f"{name}, compiled,", model(x), models[name](x), COMPILED_TOLERANCE)
    return compiled


def measure_memory(builds: Mapping[str, Build], batches: Sequence[int], threads: int) -> dict[tuple[str, int], int]:
    """Measure the peak bytes of a pass per model and batch. It forks, so it must precede this process's first
    thread."""

    def prepare(build: Build, batch: int) -> Callable[[], Callable[[], Tensor]]:
        def prepared() -> Callable[[], Tensor]:
            torch.set_num_threads(threads)
            return calls_of({"": build()}, batch)[""]

        return prepared

    return {
        (name, batch): peak_memory(f"{name} at batch {batch}", prepare(build, batch)) or 0
        for name, build in builds.items()
        for batch in batches
    }


def count_gmacs(builds: Mapping[str, Build]) -> dict[str, float]:
    """Count the GMACs of each model for one picture, on the meta device."""
    counted = {}
    for name, build in builds.items():
        with torch.device("meta"):
            counted[name] = summarize(build(), PICTURE).macs / 1e9
    return counted


def gain(name: str, against: str, gmacs: Mapping[str, float]) -> str:
    """Format the GMACs of a model and their ratio to those of `against`."""
    plain = name.removesuffix(", compiled")
    ratio = "" if plain == against else f" ({gmacs[against] / gmacs[plain]:.2f}x fewer)"
    return f"{digits(gmacs[plain])}{ratio}"


def measure(
    models: Mapping[str, nn.Module], against: Mapping[str, str], batch: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return each model's median seconds and its speedup over the model that `against` names."""
    times = time_rounds(calls_of(models, batch), rounds=rounds, least_seconds=LEAST_SECONDS)
    speedups = {name: median_ratio(seconds, times[against[name]]) for name, seconds in times.items()}
    return {name: statistics.median(seconds) for name, seconds in times.items()}, speedups


def list_missed(speedups: Mapping[str, float], against: Mapping[str, str], batch: int) -> list[str]:
    """Return a line for each requirement of `REQUIRED` at this batch that is not met."""
    return [
        f"{name} at batch {batch} is {speedup:.2f} times as fast as {against[name]}, not {REQUIRED[name, batch]}"
        for name, speedup in speedups.items()
        if speedup < REQUIRED.get((name, batch), 0.0)
    ]


def write_table(
    models: Mapping[int, Mapping[str, nn.Module]],
    builds: Mapping[str, Build],
    memory: Mapping[tuple[str, int], int],
    rounds: int,
    missed: list[str],
) -> Iterator[str]:
    """Yield a row per model with four columns per batch; the models of each batch take turns."""
    gmacs, width = count_gmacs(builds), 1 + 4 * len(models)
    cells: dict[str, list[str]] = {}
    for number, (batch, together) in enumerate(models.items()):
        against = {name: COUNTERPARTS.get(name, name if name in COUNTERPARTS.values() else DENSE) for name in together}
        medians, speedups = measure(together, against, batch, rounds)
        missed += list_missed(speedups, against, batch)
        for name, seconds in medians.items():
            row = cells.setdefault(name, [gain(name, against[name], gmacs), *["-"] * 4 * number])
            row += [f"{seconds * 1e3:.0f}", digits(batch / seconds), f"**{speedups[name]:.2f}**"]
            row.append(f"{memory[name, batch] / 1e6:.0f}" if (name, batch) in memory else "-")
    columns = [f"{what}, batch {batch}" for batch in models for what in ("ms", "images/s", "times as fast", "MB")]
    return markdown_table(
        ["", "GMACs", *columns], ([name, *row, *["-"] * (width - len(row))] for name, row in cells.items())
    )


def report(arguments: argparse.Namespace, missed: list[str]) -> Iterator[str]:
    """Yield the lines of the tables. Memory is measured first, by forks before this process starts any thread."""
    start, batches, rounds = time.monotonic(), arguments.batch, arguments.rounds
    methods: dict[str, Build] = {DENSE: dense}
    methods |= {name: lambda method=method: reduced(method) for name, method in METHODS.items()}
    names = dict.fromkeys(name for pair in COUNTERPARTS.items() for name in reversed(pair))
    families: dict[str, Build] = {name: lambda name=name: dense(name) for name in names if not arguments.quick}
    memory = measure_memory({**methods, **families}, batches, arguments.threads)
    torch.set_num_threads(arguments.threads)
    model = dense()
    check(model)
    models = {DENSE: model} | {name: reduced(method, model) for name, method in METHODS.items()}
    compiled = compiled_models(models) if arguments.compile else {}
    turns = {batch: {**models, **(compiled if batch == COMPILED_BATCH else {})} for batch in batches}
    lines = [*write_table(turns, methods, memory, rounds, missed)]
    if families:
        models = {name: build() for name, build in families.items()}
        lines += ["", "Other models of the family, each beside its dense counterpart in timm, not compiled:", ""]
        lines += write_table(dict.fromkeys(batches, models), families, memory, rounds, missed)
    machine = describe_machine(arguments.threads, f"timm {timm.__version__}", describe_native())
    minutes = (time.monotonic() - start) / 60
    yield f"float32, no gradient, median of {rounds} rounds in turns. {machine}; {minutes:.0f} minutes."
    yield from ["", f"Methods on one `{DENSE}`; “times as fast” is against its first row, not compiled:", "", *lines]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="+", default=[COMPILED_BATCH, 1])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help=f"also {' and '.join(COMPILED)} compiled, minutes each")
    parser.add_argument("--quick", action="store_true", help="the methods only, five rounds")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    arguments.rounds = 5 if arguments.quick else arguments.rounds
    return arguments


def main() -> int:
    arguments = parse_arguments()
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
