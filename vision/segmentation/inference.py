"""Inference of segmenters on whole pictures: at once or by a sliding window, at several scales, with mirror images.

The definition is that of mmsegmentation (`slide_inference`, `whole_inference` and its test-time augmentation), with
which the published numbers of the zoo's families were measured; https://github.com/open-mmlab/mmsegmentation. Scales
multiply the shorter side, as in its versions 0.x; mirrored logits are flipped back before they are resized, as in 1.x.

Unusual:

* The last window of a row or column is moved back to the edge and overlaps its neighbour further; logits are averaged
  where windows overlap. A picture smaller than the window is one window of its own size, without padding.
* Windows are processed one at a time: a batch of them would change the order of summation, and with it the results.
* Pictures are resized without antialiasing, as by OpenCV, since models were trained on such pictures.
* Logits are resized to the picture's own size before the softmax, which is averaged over the views.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .._sizes import resized

COARSEST = 32
"""The stride of most backbones' coarsest map: pictures are enlarged to at least this side, unless trained on
smaller."""
_MOST_AT_ONCE = 2**25  # logits at picture size that are held in memory at a time


@dataclass(frozen=True)
class Inference:
    """The settings of inference on a picture. Sizes are (height, width).

    Args:
        stride: distance of the windows; two thirds of the window by default.
        short_side: shorter side of the picture at scale 1; 0 keeps its own size.
        divisor: sides are enlarged to multiples of this.
        least: no side becomes smaller than this.
        fixed: the model takes one size only. A picture is resized to a square of `short_side`, or in mode slide
            enlarged to the window if it is smaller.
    """

    mode: Literal["whole", "slide"] = "whole"
    window: Sequence[int] | None = None
    stride: Sequence[int] | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    short_side: int = 0
    divisor: int = 1
    least: int = 1
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("whole", "slide"):
            raise ValueError(f"the mode of inference is whole or slide, not {self.mode!r}")
        if not self.scales or not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise ValueError(f"scales must be positive numbers, at least one, got {list(self.scales)}")
        if self.short_side < 0 or min(self.divisor, self.least) < 1:
            raise ValueError(
                "short_side must be at least 0, divisor and least at least 1, got "
                f"{self.short_side}, {self.divisor} and {self.least}"
            )
        if self.mode == "slide":
            _check_window(self.window, self.stride)
        elif self.window is not None or self.stride is not None:
            raise ValueError("window and stride are of mode slide; the mode is whole")
        elif self.fixed and not self.short_side:
            raise ValueError("a model of one size needs short_side, or mode slide with its size as the window")

    @property
    def views(self) -> list[tuple[float, bool]]:
        """The views that are averaged, as (scale, mirrored)."""
        return [(scale, mirrored) for scale in self.scales for mirrored in ((False, True) if self.flip else (False,))]

    def size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Return the (height, width) of a resized picture, before its sides become multiples of `divisor`."""
        if self.fixed and self.mode == "whole":
            short = max(1, int(self.short_side * scale))
            return short, short
        low, narrow = self.window if self.fixed and self.window is not None else (self.least, self.least)
        height, width = resized(height, width, self.short_side, scale)
        return max(low, height), max(narrow, width)

    def multiple(self, height: int, width: int) -> tuple[int, int]:
        """Return the sides, rounded up to multiples of `divisor`."""
        height, width = (-(-side // self.divisor) * self.divisor for side in (height, width))
        return height, width


def of_settings(
    evaluate: Mapping[str, Any], *, size: int, short_side: int | None = None, fixed: bool = False
) -> Inference:
    """Make the `Inference` of a run from its settings `evaluate.…`, `data.size` and `data.short_side`; missing ones
    have their defaults."""
    window = evaluate.get("window") or (size, size)
    return Inference(
        mode=evaluate.get("mode", "whole"),
        window=window if evaluate.get("mode") == "slide" else None,
        stride=evaluate.get("stride"),
        scales=tuple(evaluate.get("scales", (1.0,))),
        flip=evaluate.get("flip", False),
        short_side=size if short_side is None else short_side,
        divisor=evaluate.get("divisor", 1),
        least=min(COARSEST, size, short_side or size),
        fixed=fixed,
    )


def _check_window(window: Sequence[int] | None, stride: Sequence[int] | None) -> None:
    if window is None or len(window) != 2 or min(window) < 1:
        raise ValueError(f"mode slide needs a window of two positive sides (height, width), got {window}")
    if stride is None:
        return
    if len(stride) != 2 or any(not 1 <= step <= side for step, side in zip(stride, window, strict=True)):
        raise ValueError(
            f"strides are two numbers from 1 to the window's sides {list(window)}, or pixels between windows would "
            f"stay unseen; got {list(stride)}"
        )


@torch.no_grad()
def infer(model: Callable[[Tensor], Tensor], images: Tensor, inference: Inference) -> Tensor:
    """Map [B, C, H, W] to [B, K, H, W]: logits of a single view, or probabilities averaged over several views.

    `model` maps [B, C, h, w] to logits [B, K, h, w], as a `Segmenter` in eval mode does.
    """
    size = images.shape[-2], images.shape[-1]
    views = inference.views
    if len(views) == 1:
        return _resize(view_logits(model, images, inference, *views[0]), size)
    total: Tensor | None = None
    for scale, mirrored in views:
        chances = _resize(view_logits(model, images, inference, scale, mirrored), size).softmax(1)
        total = chances if total is None else total.add_(chances)
    assert total is not None  # there is a scale, which was checked
    return total.div_(len(views))


@torch.no_grad()
def label_map(model: Callable[[Tensor], Tensor], images: Tensor, inference: Inference) -> Tensor:
    """Return the most likely class of each pixel, int64 [B, H, W]: `infer(…).argmax(1)` up to rounding.

    A few classes are processed at a time, since all classes of all pixels of a photograph take gigabytes.
    """
    size = images.shape[-2], images.shape[-1]
    views = [view_logits(model, images, inference, *view) for view in inference.views]
    count = views[0].shape[1]
    step = max(1, _MOST_AT_ONCE // max(len(images) * size[0] * size[1], 1))
    parts = [slice(first, first + step) for first in range(0, count, step)]
    totals: list[Tensor] = []  # per view, the logarithm of the softmax's denominator
    if len(views) > 1:
        for view in views:
            sums = [_resize(view[:, part], size).logsumexp(1, keepdim=True) for part in parts]
            totals.append(functools.reduce(torch.logaddexp, sums))
    likeliest: tuple[Tensor, Tensor] | None = None
    for part in parts:
        answers = [_resize(view[:, part], size) for view in views]
        if totals:
            answers = [answer.sub(total).exp() for answer, total in zip(answers, totals, strict=True)]
        value, label = functools.reduce(torch.add, answers).max(1)
        label = label + part.start
        if likeliest is not None:
            more = value > likeliest[0]
            value, label = torch.where(more, value, likeliest[0]), torch.where(more, label, likeliest[1])
        likeliest = value, label
    assert likeliest is not None  # there is a class
    return likeliest[1]


def view_logits(
    model: Callable[[Tensor], Tensor], images: Tensor, inference: Inference, scale: float, mirrored: bool
) -> Tensor:
    """Return the logits [B, K, h, w] of one view at the size of the model's input; mirrored ones are flipped back."""
    images = _resize(images, inference.size(images.shape[-2], images.shape[-1], scale))
    images = _resize(images, inference.multiple(images.shape[-2], images.shape[-1]))
    if mirrored:
        images = images.flip(-1)
    logits = _slide(model, images, inference) if inference.mode == "slide" else _ask(model, images)
    return logits.flip(-1) if mirrored else logits


def _slide(model: Callable[[Tensor], Tensor], images: Tensor, inference: Inference) -> Tensor:
    assert inference.window is not None  # which was checked
    height, width = inference.window
    stride = inference.stride or [max(1, side * 2 // 3) for side in inference.window]
    total: Tensor | None = None
    counts = images.new_zeros(1, 1, *images.shape[-2:])
    for rows in windows(images.shape[-2], height, stride[0]):
        for columns in windows(images.shape[-1], width, stride[1]):
            logits = _ask(model, images[..., rows, columns])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
            total[..., rows, columns] += logits
            counts[..., rows, columns] += 1
    assert total is not None  # there is always one window
    return total.div_(counts)


def windows(length: int, window: int, stride: int) -> Iterator[slice]:
    """Yield the windows along one axis. The last ends at the edge; a window longer than the axis is the whole axis."""
    for place in range(max(length - window + stride - 1, 0) // stride + 1):
        end = min(place * stride + window, length)
        yield slice(max(end - window, 0), end)


def _ask(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    logits = model(images)
    if logits.shape[-2:] != images.shape[-2:]:
        raise ValueError(f"the model answered {list(logits.shape)} for {list(images.shape)}; sizes must agree")
    return logits.to(images.dtype)  # sums in half precision, under autocast, would be too inexact


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
