"""What a segmenter says of whole pictures: at once or through a sliding window, at several sizes, mirrored or not.

The definition is that of mmsegmentation (`slide_inference`, `whole_inference` and its test-time augmentation), by which
the published numbers of the zoo's families were made; https://github.com/open-mmlab/mmsegmentation. Scales multiply the
shorter side, as in its versions 0.x; the mirror image is turned back before logits are resized, as in 1.x.

Unusual:

* The last window of a row or column is moved back to the edge, so that it overlaps the one before by more; where
  windows overlap, logits are averaged. A picture smaller than the window is one window of its own size, not padded.
* Windows go through the model one position at a time. A batch of them would be other sums in another order, and the
  results could be compared with nothing.
* Pictures are resized without antialiasing, as OpenCV does it; models were trained on such pictures.
* Logits are brought to the picture's own size before the softmax, whose average over the views is what counts.
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

LONGEST = 4
"""How many times as long as `short_side` the longer side may become, as in the published 2048 x 512."""
COARSEST = 32
"""Pixels to a position of the coarsest maps of most backbones: a side must not be shorter, but for small models."""
_MOST_AT_ONCE = 2**25  # logits at the size of a picture


@dataclass(frozen=True)
class Inference:
    """How a picture is shown to a segmenter. Sizes are (height, width).

    `short_side` is that of the picture at scale 1, 0 its own; no side becomes smaller than `least`. `stride` is two
    thirds of the window by default. `divisor` enlarges each side to a multiple. `fixed`: the model takes one size only,
    and a picture is squeezed to a square of `short_side`, or enlarged to the window where it is smaller.
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
        """(scale, mirrored) of each time that the model sees the picture."""
        return [(scale, mirrored) for scale in self.scales for mirrored in ((False, True) if self.flip else (False,))]

    def size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Of a picture, before its sides become multiples."""
        short = max(1, int(self.short_side * scale))
        if self.fixed and self.mode == "whole":
            return short, short
        factor = scale
        if self.short_side:
            factor = min(int(LONGEST * self.short_side * scale) / max(height, width), short / min(height, width))
        low, narrow = self.window if self.fixed and self.window is not None else (self.least, self.least)
        height, width = max(low, int(height * factor + 0.5)), max(narrow, int(width * factor + 0.5))
        return height, width

    def multiple(self, height: int, width: int) -> tuple[int, int]:
        """The next sizes that `divisor` divides."""
        height, width = (-(-side // self.divisor) * self.divisor for side in (height, width))
        return height, width


def of_settings(
    evaluate: Mapping[str, Any], *, size: int, short_side: int | None = None, fixed: bool = False
) -> Inference:
    """Of the settings `evaluate.…` of a run and its `data.size` and `data.short_side`; what is missing is as by
    default."""
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
    """[B, C, H, W] to [B, K, H, W]: the logits of one view, or the probabilities averaged over several.

    `model` answers for [B, C, h, w] with logits [B, K, h, w], as a `Segmenter` in eval mode does.
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
    """The most likely class of each pixel, int64 [B, H, W]: `infer(…).argmax(1)` up to rounding, a few classes at a
    time, since all of them for each pixel of a photograph are gigabytes."""
    size = images.shape[-2], images.shape[-1]
    views = [view_logits(model, images, inference, *view) for view in inference.views]
    count = views[0].shape[1]
    step = max(1, _MOST_AT_ONCE // max(len(images) * size[0] * size[1], 1))
    parts = [slice(first, first + step) for first in range(0, count, step)]
    totals: list[Tensor] = []  # of each view, the logarithm of what its softmax divides by
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
    """Logits [B, K, h, w] of one view, no longer mirrored, at the size of the model's input."""
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
    """Where the windows along one axis lie: the last ends at the edge, and one that is too long is the whole axis."""
    for place in range(max(length - window + stride - 1, 0) // stride + 1):
        end = min(place * stride + window, length)
        yield slice(max(end - window, 0), end)


def _ask(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    logits = model(images)
    if logits.shape[-2:] != images.shape[-2:]:
        raise ValueError(f"the model answered {list(logits.shape)} for {list(images.shape)}; sizes must agree")
    return logits.to(images.dtype)  # sums of half precision, under autocast, would lose what is averaged


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
