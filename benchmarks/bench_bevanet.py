"""Benchmarks BEVANet's segmenters at batch 1, as published and with all steps that a user needs.

    python benchmarks/bench_bevanet.py --threads 2 --markdown table.md
    python benchmarks/bench_bevanet.py --device cuda

The published numbers end with logits at an eighth of the picture's size, without upsampling and argmax, and the script
behind them asks to comment batch norms out. Here every layer is in place; one column ends where theirs does, the next
goes on to a class for each pixel. The last has PyTorch's own depth-wise convolutions in place of ours. float32, in
evaluation, without the two heads that only learn, fresh weights.

Before anything is timed, a segmenter's answer is compared with that of PyTorch's convolutions; one that differs ends
the run.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import mixerzoo.vision  # noqa: F401  registers the models
import torch
from _harness import describe_machine, describe_native, markdown_table, time_calls
from mixerzoo.mixers import DepthwiseConv2d
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.segmentation.bevanet import BEVANetSegmenter
from torch import Tensor, nn

TOLERANCE = 1e-4  # of the largest logit


class Configuration(NamedTuple):
    name: str
    backbone: str
    classes: int
    size: tuple[int, int]
    published: float | None
    """The authors' pictures per second on an RTX 3090."""
    head: Mapping[str, int] = MappingProxyType({})
    kwargs: Mapping[str, Any] = MappingProxyType({})


CITYSCAPES = (1024, 2048)
CONFIGURATIONS = (
    Configuration("S, Cityscapes", "bevanet_s", 19, CITYSCAPES, 70.0),
    Configuration("base, Cityscapes", "bevanet", 19, CITYSCAPES, 32.8),
    Configuration("SW, Cityscapes", "bevanet", 19, CITYSCAPES, None, kwargs={"depths": (2, 2, 3, 2, 2)}),
    Configuration(
        *("L, Cityscapes", "bevanet", 19, CITYSCAPES, None),
        {"channels": 256, "neck_channels": 112},
        {"depths": (3, 3, 4, 2, 2)},
    ),
    Configuration("S, CamVid", "bevanet_s", 11, (720, 960), 79.4),
    Configuration("base, ADE20K", "bevanet", 150, (512, 512), 73.3),
)


def make_segmenter(configuration: Configuration, device: str) -> BEVANetSegmenter:
    head: dict[str, Any] = {"name": "bevanet", "auxiliary": False, **configuration.head}
    model = build_segmenter(configuration.backbone, configuration.classes, head=head, **configuration.kwargs)
    assert isinstance(model, BEVANetSegmenter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:  # or fresh blocks would add too little to be compared
                parameter.fill_(1.0)
    return model.eval().to(device)


@contextlib.contextmanager
def plain_convolutions() -> Iterator[None]:
    """Replace our depth-wise convolutions by PyTorch's."""
    ours = DepthwiseConv2d.forward
    DepthwiseConv2d.forward = nn.Conv2d.forward
    try:
        yield
    finally:
        DepthwiseConv2d.forward = ours


def require_equal(model: BEVANetSegmenter, images: Tensor, name: str) -> None:
    ours = model(images)
    with plain_convolutions():
        theirs = model(images)
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= TOLERANCE:
        raise SystemExit(f"{name} is off by {error:.1e} of the largest logit; nothing is reported")


def finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    """Return a call that waits until the device has finished."""
    if device == "cpu":
        return call

    def run() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return run


@torch.no_grad()
def rows(
    configurations: Sequence[Configuration], size: Sequence[int] | None, device: str, rounds: int
) -> Iterator[list[str]]:
    for configuration in configurations:
        model = make_segmenter(configuration, device)
        height, width = size or configuration.size
        require_equal(model, torch.randn(1, 3, 64, 128, device=device), configuration.name)
        images = torch.randn(1, 3, height, width, device=device)

        def whole(model: BEVANetSegmenter = model, images: Tensor = images) -> Tensor:
            return model(images).argmax(1)

        def plain(whole: Callable[[], Tensor] = whole) -> Tensor:
            with plain_convolutions():
                return whole()

        calls: dict[str, Callable[[], object]] = {
            "logits at 1/8": lambda model=model, images=images: model.forward_heads(images),
            "every pixel's class": whole,
            "PyTorch's convolutions": plain,
        }
        seconds = time_calls({name: finished(call, device) for name, call in calls.items()}, rounds=rounds)
        logits, classes, theirs = seconds.values()
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        published = "" if configuration.published is None else f"{configuration.published:.1f}"
        yield [
            *(configuration.name, f"{height} x {width}", f"{parameters:.1f}", f"{1 / logits:.3g}"),
            f"**{1 / classes:.3g}**",
            f"{1 / theirs:.3g} ({theirs / classes:.1f}x)",
            published,
        ]


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the table."""
    device: str = arguments.device
    more = (torch.cuda.get_device_name(),) if device == "cuda" else (describe_native(),)
    rounds = f"float32, median of {arguments.rounds} rounds taken in turns"
    yield f"{describe_machine(arguments.threads, *more)}. {rounds}; pictures per second:\n"
    header = ["model", "picture", "params (M)", "logits at 1/8", "every pixel's class", "PyTorch's convolutions"]
    wanted = [c for c in CONFIGURATIONS if not arguments.models or c.name.split(",")[0] in arguments.models]
    table = rows(wanted, arguments.size, device, arguments.rounds)
    yield from markdown_table([*header, "published (RTX 3090)"], table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=("S", "base", "SW", "L"), help="default: all")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="default: the data set's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    # A size stays the same, so each layer takes its fastest way on a GPU.
    torch.backends.cudnn.benchmark = arguments.device == "cuda"
    text = "\n".join(report(arguments)) + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
