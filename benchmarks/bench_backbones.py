"""Benchmarks backbones on the CPU, images per second and memory, against timm's models and official implementations.

    python benchmarks/bench_backbones.py --markdown table.md
    python benchmarks/bench_backbones.py --quick

The first table holds one variant of each family and three models of timm, as a user creates them; timm's convolutional
ones also in channels_last. The second holds models of ours beside the same network in plain PyTorch: every depth-wise
convolution a call of `torch.nn.functional.conv2d`, every attention without its compiled kernel, every MLP layer by
layer; once with maps in PyTorch's default NCHW format, as the authors' code runs, and once in channels_last. The third
holds models with selective scans beside the same ones with the loop over time of their authors' reference, at batch 1.
A run ends with status 1 if a model of ours is not as many times as fast as those as the project promises (`REQUIRED`).

Each model lives in a process of its own. It is first compared with its plain version (compiled ones with themselves,
eager); one that differs ends the run. Then processes take turns within each round, so that a disturbance meets all of
them, and the median over rounds is shown. Memory is the growth of the resident peak during one forward pass, weights
and code not counted. Compiling, once for each model, size and batch, takes half of a run; `--compile-sizes` says for
which sizes it is done.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mixerzoo.vision  # noqa: F401  registers the models
import timm
import torch
from _harness import describe_machine, describe_native, digits, forget_peak, lka_chain, markdown_table, resident
from _scan_loop import scan_loop_2d
from mixerzoo.kernels import conv_mlp, depthwise_conv, selective_scan
from mixerzoo.kernels.neighborhood_attention import _native as native_attention
from mixerzoo.vision.backbones._conv_mlp import RowConv2d
from mixerzoo.vision.backbones.van import RowGELU
from torch import Tensor, nn
from torch.nn import functional as F

# Model, layout: "ours" as created; "as created" and "channels_last" of timm's; plain ones of ours.
FAMILIES = (
    "nat_mini",
    "van_b0",
    "unireplknet_a",
    "litv2_s",
    "vim_tiny",
    "vmamba_tiny_s1l8",
    "vmambav0_tiny",
    "efficientvmamba_tiny",
    "mobilemamba_b1",
    "vig_tiny",
)
PEERS = (
    ("convnext_tiny", "as created"),
    ("convnext_tiny", "channels_last"),
    ("swin_tiny_patch4_window7_224", "as created"),
    ("resnet50", "as created"),
    ("resnet50", "channels_last"),
)
WITH_PLAIN = ("van_b0", "unireplknet_a", "litv2_s")
PLAIN = ("plain, NCHW", "plain, channels_last")
LOOP = "reference scan"
WITH_LOOP = {"vim_tiny": (224, 512), "vmamba_tiny_s1l8": (224,), "vmambav0_tiny": (224,)}  # and sizes, at LOOP_BATCH
LOOP_BATCH = 1
TOLERANCE = 1e-4  # of the largest logit
LEAST_SECONDS = 0.3  # of one turn of one model
# Times as fast, eager, at any batch that is measured.
REQUIRED = {
    ("van_b0", PLAIN[0], 224): 2.0,
    ("van_b0", PLAIN[1], 224): 1.2,
    ("vmamba_tiny_s1l8", LOOP, 224): 2.0,
    ("vmambav0_tiny", LOOP, 224): 15.0,
    ("vim_tiny", LOOP, 224): 5.0,
    ("vim_tiny", LOOP, 512): 10.0,
}


class Case(NamedTuple):
    model: str
    layout: str
    size: int
    batch: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.model} ({self.layout}, {self.mode}) at {self.size} pixels, batch {self.batch}"


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int | tuple[int, int] = 1) -> Tensor:
    """Compute `depthwise_conv2d` by PyTorch's convolution."""
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    padding = [step * (side // 2) for step, side in zip(steps, weight.shape[2:], strict=True)]
    return F.conv2d(x, weight, bias, padding=padding, dilation=steps, groups=weight.shape[0])


def _modules_with(function: Callable) -> Iterator[tuple[Any, str]]:
    """Yield every loaded module of ours that refers to `function`, with its name there."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mixerzoo."):
            yield from ((module, key) for key, value in vars(module).items() if value is function)


@contextlib.contextmanager
def plain(layout: str) -> Iterator[None]:
    """Run our models in plain PyTorch; in the layout "plain, NCHW" every convolution gets an NCHW map."""
    convolve = nn.Conv2d._conv_forward
    contiguous = Tensor.contiguous

    def convolve_nchw(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(self, contiguous(x), weight, bias)

    def conv2d_nchw(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return conv2d(contiguous(x), *args, **kwargs)

    def contiguous_nchw(self: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return contiguous(self)

    is_nchw = layout == "plain, NCHW"
    with contextlib.ExitStack() as stack:
        replace = mock.patch.object
        stack.enter_context(replace(native_attention, "is_available", lambda: False))
        stack.enter_context(replace(RowGELU, "forward", nn.GELU.forward))
        stack.enter_context(replace(RowConv2d, "forward", nn.Conv2d.forward))
        for module, name in _modules_with(depthwise_conv.depthwise_conv2d):
            stack.enter_context(replace(module, name, conv2d_nchw if is_nchw else conv2d))
        for module, name in _modules_with(depthwise_conv.large_kernel_attention):
            stack.enter_context(replace(module, name, lka_chain))
        for module, name in _modules_with(conv_mlp.goes_by_parts):
            stack.enter_context(replace(module, name, lambda x: False))
        if is_nchw:
            stack.enter_context(replace(nn.Conv2d, "_conv_forward", convolve_nchw))
            stack.enter_context(replace(Tensor, "contiguous", contiguous_nchw))
        yield


@contextlib.contextmanager
def reference_scan() -> Iterator[None]:
    """Replace every selective scan over a map by the loop of the authors' reference."""
    with contextlib.ExitStack() as stack:
        for module, name in _modules_with(selective_scan.selective_scan_2d):
            stack.enter_context(mock.patch.object(module, name, scan_loop_2d))
        yield


def in_layout(layout: str) -> contextlib.AbstractContextManager:
    if layout == LOOP:
        return reference_scan()
    return plain(layout) if layout in PLAIN else contextlib.nullcontext()


def build(case: Case) -> tuple[nn.Module, Tensor]:
    """Build a model and picture with fixed seeds, so that they are equal for all layouts, with open residual
    branches."""
    torch.manual_seed(0)
    arguments = {"img_size": case.size} if case.model.startswith("swin") else {}
    model = timm.create_model(case.model, **arguments).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"(layer_scale_\d|gamma)$", name):
                parameter.fill_(0.2)  # or the initial 1e-6 would hide a mixer's error
    x = torch.randn(case.batch, 3, case.size, case.size)
    if case.layout.endswith("channels_last"):
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return model, x


def prepare(case: Case) -> Callable[[], Tensor]:
    """Return the warm forward pass of a case, after comparing its output with the plain version of the network."""
    model, x = build(case)
    run: Any = torch.compile(model) if case.mode == "compiled" else model

    def forward() -> Tensor:
        with torch.no_grad():
            return run(x)

    with in_layout(case.layout):
        got = forward()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if case.model in FAMILIES:
            stack.enter_context(plain(PLAIN[0]))
            stack.enter_context(reference_scan())
        want = model(x[:1])
    error = ((got[:1] - want).abs().max() / want.abs().max()).item()
    if not error <= TOLERANCE:
        raise SystemExit(
            f"{case.name} is wrong: its logits are off by {error:.1e} of the largest, more than {TOLERANCE:.0e}; "
            "nothing is reported"
        )
    return forward


def time_turn(forward: Callable[[], Tensor]) -> float:
    """Return the seconds of a pass. The first pass of a turn starts with caches full of other processes' data, so it
    counts only if it fills the turn alone."""
    start = time.perf_counter()
    forward()
    first = time.perf_counter() - start
    calls = math.ceil(LEAST_SECONDS / first)
    if calls == 1:
        return first
    start = time.perf_counter()
    for _ in range(calls):
        forward()
    return (time.perf_counter() - start) / calls


def work(connection: Connection, turn: Semaphore, case: Case, threads: int) -> None:
    """Run the process of one model: prepare it, then answer "time" with seconds and "memory" with bytes, until
    "end"."""
    torch.set_num_threads(threads)
    try:
        with turn:
            forward = prepare(case)
    except SystemExit as error:
        return connection.send(str(error))
    with in_layout(case.layout):
        connection.send("ready")
        while (order := connection.recv()) != "end":
            if order == "memory":
                before = forget_peak()
                forward()
                connection.send(resident("VmHWM") - before)
            else:
                connection.send(time_turn(forward))


def measure(cases: Sequence[Case], *, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Measure seconds and bytes of each case. It forks, so it must precede the first thread of this process."""
    context = multiprocessing.get_context("fork")
    turn = context.Semaphore(2 if cases[0].mode == "compiled" else 1)  # a compilation is one thread for the most part
    processes, ends = [], []
    for case in cases:
        end, other = context.Pipe()
        processes.append(context.Process(target=work, args=(other, turn, case, threads), daemon=True))
        processes[-1].start()
        other.close()
        ends.append(end)

    def ask(case: Case, end: Connection, order: str | None) -> Any:
        try:
            if order:
                end.send(order)
            return end.recv()
        except (EOFError, BrokenPipeError):
            raise SystemExit(f"the process of {case.name} died") from None

    pairs = list(zip(cases, ends, strict=True))
    for case, end in pairs:
        if (answer := ask(case, end, None)) != "ready":
            raise SystemExit(answer)
    memory = [ask(case, end, "memory") for case, end in pairs]
    seconds = [[ask(case, end, "time") for case, end in pairs] for _ in range(rounds)]
    for end, process in zip(ends, processes, strict=True):
        end.send("end")
        process.join()
    return [
        case._asdict() | {"seconds": statistics.median(times), "bytes": peak}
        for case, times, peak in zip(cases, zip(*seconds, strict=True), memory, strict=True)
    ]


def write_models(results: list[dict]) -> Iterator[str]:
    """Format images per second and megabytes, a row per model and layout, a column per size, batch and mode."""
    shown = [row for row in results if row["layout"] not in (*PLAIN, LOOP)]
    columns = list(dict.fromkeys((row["size"], row["batch"], row["mode"]) for row in shown))
    cells: dict[str, dict] = {}
    for row in shown:
        name = row["model"] + (", channels_last" if row["layout"] == "channels_last" else "")
        value = f"{digits(row['batch'] / row['seconds'])} ({row['bytes'] / 1e6:.0f} MB)"
        cells.setdefault(name, {})[row["size"], row["batch"], row["mode"]] = value
    header = ["images/s (peak memory)", *(f"{size} px, batch {batch}, {mode}" for size, batch, mode in columns)]
    return markdown_table(
        header, ([name, *(values.get(key, "-") for key in columns)] for name, values in cells.items())
    )


def write_layouts(results: list[dict]) -> Iterator[str]:
    """Format images per second of ours and of both plain layouts, with speedups, a row per model, size and batch."""
    rows = []
    eager = {
        tuple(row[key] for key in ("model", "size", "batch", "layout")): row
        for row in results
        if row["mode"] == "eager"
    }
    for model, size, batch, layout in eager:
        if layout != "ours" or (model, size, batch, PLAIN[0]) not in eager:
            continue
        own = eager[model, size, batch, "ours"]
        others = [eager[model, size, batch, layout] for layout in PLAIN]
        speeds = [f"**{digits(batch / own['seconds'])}**"]
        speeds += [f"{digits(batch / row['seconds'])} ({row['seconds'] / own['seconds']:.2f}x)" for row in others]
        rows.append([model, f"{size}", f"{batch}", *speeds, *(f"{row['bytes'] / 1e6:.0f}" for row in (own, *others))])
    header = ["model", "pixels", "batch", "ours, images/s", *(f"{layout} (ours is faster by)" for layout in PLAIN)]
    return markdown_table([*header, "ours, MB", *(f"{layout}, MB" for layout in PLAIN)], rows)


def write_scans(results: list[dict]) -> Iterator[str]:
    """Format images per second of ours and of the loop, with speedups, a row per model and size."""
    measured = {Case(*(row[key] for key in Case._fields)): row for row in results}
    rows = []
    for case, loop in measured.items():
        if case.layout != LOOP:
            continue
        own = measured[case._replace(layout="ours")]
        speeds = [case.batch / own["seconds"], case.batch / loop["seconds"]]
        cells = [f"**{digits(speeds[0])}**", f"{digits(speeds[1])} ({speeds[0] / speeds[1]:.2f}x)"]
        rows.append([case.model, f"{case.size}", *cells, *(f"{row['bytes'] / 1e6:.0f}" for row in (own, loop))])
    header = ["model", "pixels", "ours, images/s", f"{LOOP} (ours is faster by)", "ours, MB", f"{LOOP}, MB"]
    return markdown_table(header, rows)


def list_missed(results: list[dict]) -> list[str]:
    """Return a line for each speedup of `REQUIRED` that was not reached."""
    seconds = {Case(*(row[key] for key in Case._fields)): row["seconds"] for row in results}
    missed = []
    for case, plain_time in seconds.items():
        least = REQUIRED.get((case.model, case.layout, case.size))
        if least is None or case.mode != "eager":
            continue
        speedup = plain_time / seconds[case._replace(layout="ours")]
        if speedup < least:
            missed.append(f"ours is {speedup:.2f} times as fast as {case.name}, not {least}")
    return missed


def list_cases(args: argparse.Namespace) -> list[list[Case]]:
    """Return groups of cases that are measured in turns."""
    own = [(model, "ours") for model in FAMILIES] + list(PEERS)
    own = [(model, layout) for model, layout in own if model in args.models]
    both = [(model, layout) for model in WITH_PLAIN if model in args.models for layout in PLAIN]
    groups = []
    for mode, size, batch in itertools.product(args.modes, args.sizes, args.batch):
        if mode == "compiled" and size not in args.compile_sizes:
            continue
        # The compiler settles memory formats itself.
        chosen = own + both if mode == "eager" else [pair for pair in own if pair[1] != "channels_last"]
        loops = [model for model in args.models if size in WITH_LOOP.get(model, ())]
        if (mode, batch) == ("eager", LOOP_BATCH):
            chosen += [(model, LOOP) for model in loops]
        groups.append([Case(model, layout, size, batch, mode) for model, layout in chosen])
    return groups


def parse_arguments() -> argparse.Namespace:
    names = list(dict.fromkeys((*FAMILIES, *(model for model, _ in PEERS))))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument(
        "--compile-sizes",
        type=int,
        nargs="+",
        default=[224],
        help="those of --sizes to compile for, minutes each",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="eager, 224 pixels, batch 1, three rounds")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.batch, args.modes, args.rounds = [224], [1], ["eager"], 3
    return args


def main() -> int:
    args = parse_arguments()
    start = time.monotonic()
    results = []
    for cases in list_cases(args):
        results += measure(cases, rounds=args.rounds, threads=args.threads)
    machine = describe_machine(args.threads, f"timm {timm.__version__}", describe_native())
    text = [f"float32, no gradient. {machine}; {(time.monotonic() - start) / 60:.0f} minutes.", ""]
    text += [*write_models(results), "", "Ours against the official layouts of the same computation, eager:", ""]
    text += write_layouts(results)
    text += ["", f"Selective scans against the loop of their reference, eager, batch {LOOP_BATCH}:", ""]
    text += write_scans(results)
    print("\n".join(text))
    if args.markdown:
        args.markdown.write_text("\n".join(text) + "\n")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    missed = list_missed(results)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
