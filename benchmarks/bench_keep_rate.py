"""Measures accuracy and throughput against the keep rate of tokens, on Fashion-MNIST.

    python benchmarks/bench_keep_rate.py --threads 2

A small ViT is trained (configs/recipes/token_reduction.yaml, 49 patches of a picture). From its weights, for each keep
rate: EViT, fine-tuned with its warm start; DynamicViT, fine-tuned with its three losses and the dense model as teacher;
ToMe as it is, without training, its `r` chosen so that it takes about as many multiply-adds as EViT. All
training goes through what train.py runs. Then every model answers the 10,000 test pictures, and all of them take turns
for the throughput: pictures a second of a batch, float32, without gradient.

Beside the dense model stands the same with as many further steps as the others got (EViT at a keep rate of 1), so that
nothing is put down to fewer tokens that comes of more training.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mixerzoo.vision  # noqa: F401  registers the models
import timm
import torch
from _harness import describe_machine, describe_native, markdown_table, time_calls
from mixerzoo.vision.backbones import reduce_tokens
from mixerzoo.vision.data.loading import EpochBatches
from mixerzoo.vision.data.splits import Splits
from mixerzoo.vision.summary import summarize
from mixerzoo.vision.training.build import build_model
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.run import load_data, run
from mixerzoo.vision.training.settings import load
from torch import nn

DENSE, EVIT, DYNAMIC = (f"{kind}deit_small_patch16_224" for kind in ("", "evit_", "dynamicvit_"))
KEEP_RATES = (0.9, 0.7, 0.5, 0.3)
BATCH = 256
FINETUNE = ("train.epochs=1", "train.limit_batches=420")  # half of the pictures
QUICK = ("data=digits", "data.size=28", "data.limit=64", "train.epochs=1", "train.batch_size=16")
"""Settings of a dry run, which tests the script and measures nothing."""

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
COLOURS = {"dense": "#343a40", "ToMe": "#2ca02c", "EViT": "#1f77b4", "DynamicViT": "#d62728"}
LABEL_HEIGHTS = {"ToMe": -11, "EViT": 5, "DynamicViT": -11}  # of the rates beside the points, which lie close together


class Contender(NamedTuple):
    method: str
    rate: float
    model: nn.Module
    accuracy: float


class Point(NamedTuple):
    method: str
    rate: float
    macs: int
    accuracy: float
    pictures_per_second: float


def train(folder: Path, model: str, more: Sequence[str]) -> tuple[nn.Module, float]:
    """Train a model by the recipe and the settings `more`, unless the run in `folder` is finished.

    Returns:
        The model with its best weights in eval mode, and its test accuracy.
    """
    settings = ["recipe=token_reduction", f"model={model}", f"out={folder}", "train.progress=false", *more]
    config = load(settings, CONFIGS)
    finished = folder / "results.json"
    results = json.loads(finished.read_text()) if finished.is_file() else run(config)
    print(f"{folder.name}: accuracy {results['test']['accuracy']:.4f} in {results['seconds']:.0f} s", flush=True)
    config.model.start_from = None
    trained = build_model(config, load_data(config))
    state = load_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"]
    trained.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
    return trained.eval(), results["test"]["accuracy"]


def train_all(folder: Path, rates: Sequence[float], splits: Splits, more: Sequence[str]) -> Iterator[Contender]:
    """Yield the dense model, the same after further training, and each method at each rate."""
    trained = train(folder / "dense", DENSE, more)
    dense: Any = trained[0]
    yield Contender("dense", 1.0, *trained)
    shape = (splits.channels, splits.size, splits.size)
    require_same(dense, reduce_tokens(dense, "evit", keep_rate=1.0), shape)
    weights = folder / "dense" / "checkpoints" / "best.ckpt"
    for rate in (1.0, *rates):
        start = [*FINETUNE, *more, f"model.start_from={weights}", f"model.kwargs.keep_rate={rate}"]
        shrink = ["reduction.shrink_epochs=null"] if rate == 1 else []
        evit = train(folder / f"evit_{rate}", EVIT, [*start, *shrink])
        yield Contender("EViT", rate, *evit)
        if rate < 1:
            merging = merge_like(dense, evit[0], shape)
            yield Contender("ToMe", rate, merging, measure_accuracy(merging, splits))
            start.append(f"distill.checkpoint={weights}")
            yield Contender("DynamicViT", rate, *train(folder / f"dynamicvit_{rate}", DYNAMIC, start))


@torch.no_grad()
def require_same(dense: nn.Module, reduced: nn.Module, shape: tuple[int, int, int]) -> None:
    picture = torch.randn(4, *shape)
    difference = float((dense(picture) - reduced.eval()(picture)).abs().max())
    if difference > 1e-4:
        raise SystemExit(f"with all tokens the answers differ by {difference:.2g} from the dense model's: no report")


def merge_like(dense: Any, other: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Return ToMe on the dense weights, with the `r` whose multiply-adds are closest to the other model's."""
    target = summarize(other, shape).macs
    options = [reduce_tokens(dense, "tome", r=r).eval() for r in range(dense.patch_embed.num_patches // 2)]
    return min(options, key=lambda model: abs(summarize(model, shape).macs - target))


@torch.no_grad()
def measure_accuracy(model: nn.Module, splits: Splits) -> float:
    right = 0
    for request in EpochBatches(len(splits.test), BATCH, seed=0, training=False):
        pictures, labels = splits.test.__getitems__(request)
        right += int((model(pictures).argmax(1) == labels).sum())
    return right / len(splits.test)


def measure(contenders: Sequence[Contender], splits: Splits, batch: int, rounds: int) -> list[Point]:
    pictures = torch.randn(batch, splits.channels, splits.size, splits.size)
    with torch.inference_mode():
        calls = {f"{c.method} {c.rate}": functools.partial(c.model, pictures) for c in contenders}
        seconds = time_calls(calls, rounds=rounds)
    shape = (splits.channels, splits.size, splits.size)
    return [
        Point(
            c.method,
            c.rate,
            summarize(c.model, shape).macs,
            c.accuracy,
            batch / seconds[f"{c.method} {c.rate}"],
        )
        for c in contenders
    ]


def name_of(point: Point) -> str:
    return "dense, trained on" if (point.method, point.rate) == ("EViT", 1.0) else point.method


def write_table(points: Sequence[Point]) -> Iterator[str]:
    base = points[0]
    order = ["dense", "dense, trained on", "ToMe", "EViT", "DynamicViT"]
    ordered = sorted(points, key=lambda point: (-point.rate, order.index(name_of(point))))
    rows = [
        [
            f"{point.rate:g}",
            name_of(point),
            f"{point.macs / 1e6:.1f}",
            f"{100 * point.accuracy:.2f}",
            f"{point.pictures_per_second:.0f}",
            f"{point.pictures_per_second / base.pictures_per_second:.2f}",
        ]
        for point in ordered
    ]
    header = ["keep rate", "method", "MMACs", "test accuracy, %", "pictures a second", "times dense"]
    return markdown_table(header, rows)


def draw(points: Sequence[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    base, more = points[0], next(point for point in points if name_of(point) == "dense, trained on")
    for method in ("ToMe", "EViT", "DynamicViT"):
        begin = base if method == "ToMe" else more
        own = [begin, *(point for point in points if point.method == method and point.rate < 1)]
        values = [100 * point.accuracy for point in own]
        style = {"marker": "o", "markersize": 4, "color": COLOURS[method], "label": method}
        left.plot([point.rate for point in own], values, **style)
        right.plot([point.pictures_per_second for point in own], values, **style)
        for point, value in zip(own[1:], values[1:], strict=True):
            text = {"color": COLOURS[method], "fontsize": 7, "ha": "center", "textcoords": "offset points"}
            place = (point.pictures_per_second, value)
            right.annotate(f"{point.rate:g}", place, xytext=(0, LABEL_HEIGHTS[method]), **text)
    for axes in (left, right):
        for point, marker in ((base, "s"), (more, "D")):
            place = point.rate if axes is left else point.pictures_per_second
            axes.plot(place, 100 * point.accuracy, marker, color=COLOURS["dense"], label=name_of(point), markersize=6)
        axes.grid(alpha=0.3)
    left.invert_xaxis()
    left.set(xlabel="keep rate", ylabel="test accuracy, %")
    right.set(xlabel="pictures a second")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle("A small ViT on Fashion-MNIST with fewer tokens: ToMe without training, the others fine-tuned")
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("settings", nargs="*", help="of every run, as train.py takes them, such as data.limit=8000")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rates", type=float, nargs="+", default=list(KEEP_RATES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a dry run on digits, which says nothing of accuracy")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and take those that are finished")
    parser.add_argument("--markdown", type=Path, default=Path("docs/benchmark_keep_rate.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/keep_rate.png"))
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    start = time.monotonic()
    more = [*(QUICK if arguments.quick else ()), *arguments.settings]
    splits = load_data(load(["recipe=token_reduction", *more], CONFIGS))
    with tempfile.TemporaryDirectory() as temporary:
        contenders = list(train_all(arguments.runs or Path(temporary), arguments.rates, splits, more))
    batch = 16 if arguments.quick else BATCH
    points = measure(contenders, splits, batch, 1 if arguments.quick else arguments.rounds)
    kept = f" and what the runs in {arguments.runs} took" if arguments.runs else ", training included"
    machine = describe_machine(arguments.threads, f"timm {timm.__version__}", describe_native())
    link = os.path.relpath(arguments.picture, arguments.markdown.parent)
    text = ["# Accuracy and throughput against the keep rate", ""]
    command = shlex.join(["python", "benchmarks/bench_keep_rate.py", *sys.argv[1:]])
    text += [f"Made by `{command}`. ToMe is not trained, the others are fine-tuned from the dense model.", ""]
    text += [f"![Test accuracy over keep rate and over throughput, a line a method]({link})", ""]
    text += [f"{machine}; {(time.monotonic() - start) / 60:.1f} minutes{kept}. {splits.origin},"]
    text += [f"{len(splits.test)} test pictures; throughput in float32 at batch {batch}, no gradient. The methods are"]
    text += ["described in `benchmarks/bench_keep_rate.py`.", "", *write_table(points)]
    print("\n".join(text))
    arguments.markdown.write_text("\n".join(text) + "\n")
    draw(points, arguments.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
