"""Draw the pictures of a run folder: learning curves, confusion matrix, training batch, and predictions.

They are drawn on `Figure` objects without pyplot, which would have global state and need a window system.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..drawing import (
    MOST_COLOURS,
    denormalised,
    large_regions,
    overlay,
    palette_of,
    picture_grid,
    plain_text,
    short_name,
)

_INK, _RIGHT, _WRONG = "#202124", "#2e7d32", "#c62828"
_COLOURS = {"train/loss": "#4c78a8", "val/loss": "#e45756", "train/lr": "#54a24b"}
_PART_COLOURS = ("#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
_STAGES = {"train": "training", "val": "validation"}
_MOST_NUMBERED_CLASSES = 20
_MOST_NAMED_CLASSES = 150
_CELLS = {_MOST_NUMBERED_CLASSES: 0.46, 30: 0.3, 100: 0.11, math.inf: 0.08}  # inches a class, by how many there are
_LONGEST_LEGEND = 40
_MOST_LISTED = 30
_MOST_CELLS = 250
_TALLEST, _FLATTEST = 1.3, 0.45  # height of a row of pictures as a part of its width; others leave room at their sides


def draw_curves(
    path: Path, rows: Sequence[dict[str, float]], metric: str, title: str, *, averaged: bool = False
) -> None:
    """Draw loss, validation metric and learning rate by epoch, and mark the best epoch.

    Beside `path`, a PNG file, lies the same as vector graphics, an SVG file; the same rows make the same files.
    `averaged` says that the validated weights are moving averages, which the title mentions.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, scores, rates = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    of_parts = itertools.cycle(_PART_COLOURS)
    for name in dict.fromkeys(name for row in rows for name in row):
        stage, _, word = name.partition("/")
        if word.startswith("loss"):
            part = word.removeprefix("loss").strip("_")
            label = f"{_STAGES.get(stage, stage)}{f', {in_words(part)}' if part else ''}"
            _line(losses, rows, name, label, next(of_parts) if part else _COLOURS.get(name), faint=bool(part))
        elif stage == "val" and word.endswith(metric) and word != "mean_accuracy":
            label = in_words(word.removesuffix(metric).strip("_/")) or "the model"
            _line(scores, rows, name, label, _COLOURS["val/loss"] if word == metric else None, factor=100)
    _line(rates, rows, "train/lr", "learning rate", _COLOURS["train/lr"])
    _mark_best(scores, rows, f"val/{metric}")
    losses.set(title="loss")
    losses.legend(frameon=False, fontsize=9)
    scores.set(title=f"validation {in_words(metric)} (%){', averaged weights' if averaged else ''}")
    if len(scores.get_lines()) > 2:  # more than the one curve and its ring
        scores.legend(frameon=False, fontsize=9)
    rates.set(title="learning rate")
    rates.ticklabel_format(axis="y", scilimits=(-2, 3))
    for axes in (losses, scores, rates):
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.04, y=0.12)
    figure.suptitle(plain_text(title), fontsize=11)
    figure.savefig(path, dpi=130)
    with rc_context({"svg.hashsalt": path.stem}):  # else identifiers are drawn anew with each file
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _line(
    axes: Axes,
    rows: Sequence[dict[str, float]],
    name: str,
    label: str,
    colour: str | None,
    *,
    factor: float = 1,
    faint: bool = False,
) -> None:
    known = [row for row in rows if name in row]
    epochs, values = [row["epoch"] + 1 for row in known], [factor * row[name] for row in known]
    size = 4 if len(known) <= 40 else 0  # dots of hundreds of epochs would hide the line
    axes.plot(epochs, values, "o-", ms=size, lw=1 if faint else 1.5, color=colour, label=label)


def _mark_best(axes: Axes, rows: Sequence[dict[str, float]], name: str) -> None:
    known = [row for row in rows if np.isfinite(row.get(name, np.nan))]
    if not known:
        return
    best = max(known, key=lambda row: row[name])
    place = (best["epoch"] + 1, 100 * best[name])
    axes.plot(*place, "o", ms=9, mfc="none", color=_INK, label="_")
    offset, side = ((0, -16), "center") if len(known) > 1 else ((12, -4), "left")
    axes.annotate(f"{place[1]:.1f} %", place, xytext=offset, textcoords="offset points", ha=side)


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix with the true classes as rows, in percent of each row.

    Cells have numbers while these are legible. With many classes a list beside it names the most frequent confusions.
    """
    counts = confusion.double().cpu().numpy()
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    count = len(classes)
    cell = next(size for most, size in _CELLS.items() if count <= most)
    side = 2.6 + cell * (count if count <= _MOST_NAMED_CLASSES else 80)
    listed = _MOST_LISTED if count > _MOST_NUMBERED_CLASSES else 0
    figure = Figure(figsize=(side + 0.8 + (6.0 if listed else 0), side), layout="constrained")
    widths = (side, 5.2) if listed else None
    axes, *beside = figure.subplots(1, 2 if listed else 1, width_ratios=widths, squeeze=False).flat
    shown, step = _pooled(percent, _MOST_CELLS)
    extent = (-0.5, step * len(shown) - 0.5, step * len(shown) - 0.5, -0.5)
    # The square root keeps small confusions visible beside a strong diagonal.
    image = axes.imshow(np.sqrt(shown / 100), cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axes.set(xlabel="prediction", ylabel="truth")
    note = f"\na cell is the largest of {step} x {step} classes" if step > 1 else ""
    axes.set_title(plain_text(title) + note, fontsize=11)
    if count <= _MOST_NAMED_CLASSES:
        names = [short_name(name) for name in classes]
        size = min(10.0, 0.8 * 72 * cell)
        axes.set_xticks(range(count), names, fontsize=size, **_turned(names, upright=cell < 0.2))
        axes.set_yticks(range(count), names, fontsize=size)
    if count <= _MOST_NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(percent >= 0.05), strict=True):
            value = percent[row, column]
            text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if value > 35 else "black")
    bar = figure.colorbar(image, ax=axes, shrink=0.75, label="percent of the true class")
    bar.set_ticks([0.0, 0.1**0.5, 0.25**0.5, 0.5**0.5, 1.0], labels=["0", "10", "25", "50", "100"])
    for axes in beside:
        _list_confusions(axes, counts, classes, listed)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _pooled(values: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """Max-pool a square matrix to at most `most` cells per side, so that single values stay visible.

    Returns the pooled matrix and the number of rows in a cell.
    """
    step = -(-len(values) // most)
    padded = np.pad(values, (0, -len(values) % step))
    return padded.reshape(len(padded) // step, step, len(padded) // step, step).max((1, 3)), step


def _list_confusions(axes: Axes, counts: np.ndarray, classes: Sequence[str], most: int) -> None:
    """Draw bars for the pairs of classes that are confused most often, in percent of the true class."""
    others = counts - np.diag(np.diag(counts))
    order = np.argsort(others, axis=None)[::-1][:most]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, counts.shape), strict=True)]
    pairs = [pair for pair in pairs if others[pair] > 0]
    shares = [100 * others[pair] / counts[pair[0]].sum() for pair in pairs]
    axes.barh(range(len(pairs)), shares, color=_COLOURS["val/loss"], alpha=0.35)
    for place, (truth, predicted) in enumerate(pairs):
        text = f" {short_name(classes[truth])} → {short_name(classes[predicted])}: {int(others[truth, predicted]):,}"
        axes.text(0, place, text, va="center", fontsize=9)
    axes.set(ylim=(max(len(pairs), 1) - 0.5, -0.5), xlim=(0, 100), yticks=[], xlabel="percent of the true class")
    axes.set_title("most frequent mistakes: truth → prediction" if pairs else "no mistakes", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _turned(names: Sequence[str], *, upright: bool) -> dict[str, Any]:
    """Return the rotation of tick labels that would overlap: 45 degrees, or 90 where there are many."""
    if upright:
        return {"rotation": 90}
    return {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}


def draw_batch(path: Path, images: Tensor, labels: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
    """Draw the pictures of a training batch after augmentation, with their labels."""
    figure, grid = picture_grid(len(images), title="a training batch as the model sees it")
    for axes, image, label in zip(grid, images, labels, strict=False):
        _show(axes, image, mean, std)
        axes.set_title("\n".join(short_name(line) for line in label.splitlines()), fontsize=7, pad=3)
    figure.savefig(path, dpi=130)


def draw_predictions(
    path: Path,
    images: Tensor,
    truth: Tensor,
    predicted: Tensor,
    confidence: Tensor,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    title: str,
) -> None:
    """Draw pictures with prediction and confidence; wrong ones in red, with the true class below."""
    figure, grid = picture_grid(len(images), title=title, row_height=1.5)
    for index, axes in enumerate(grid[: len(images)]):
        _show(axes, images[index], mean, std)
        right = bool(predicted[index] == truth[index])
        text = f"{short_name(classes[int(predicted[index])])} ({100 * float(confidence[index]):.0f} %)"
        text += "" if right else f"\ntruth: {short_name(classes[int(truth[index])])}"
        axes.set_title(text, fontsize=7, pad=3, color=_RIGHT if right else _WRONG)
    figure.savefig(path, dpi=130)


def draw_masks(
    path: Path,
    images: Sequence[Tensor],
    columns: Mapping[str, Sequence[Tensor]],
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    errors: Sequence[Tensor] | None = None,
) -> None:
    """A row for each picture [C, H, W], of any size: the picture, then each of `columns` (a mask [H, W] for each)
    laid over it, and a legend.

    `errors` [H, W], from 0 where a pixel is right to 1 where it is wrong without doubt, make a last column.
    """
    palette = palette_of(classes)
    names = ["picture", *columns, *(["where it is wrong"] if errors is not None else [])]
    shapes = [min(max(image.shape[-2] / image.shape[-1], _FLATTEST), _TALLEST) for image in images]
    height = max(1.9 * sum(shapes) + 0.12 * len(shapes) + 0.3, 1.8)
    figure = Figure(figsize=(1.9 * len(names) + 1.7, height), layout="constrained")
    grid = figure.subplots(len(images), len(names), squeeze=False, height_ratios=shapes)
    for row, image in enumerate(images):
        picture = denormalised(image, mean, std)
        shown = [picture, *(overlay(picture, masks[row].cpu().numpy(), palette) for masks in columns.values())]
        shown += [_redden(picture, errors[row].cpu().numpy())] if errors is not None else []
        for axes, panel in zip(grid[row], shown, strict=True):
            axes.imshow(panel, interpolation="nearest")
            axes.axis("off")
        if len(classes) > MOST_COLOURS:
            for axes, masks in zip(grid[row][1:], columns.values(), strict=False):
                _name_regions(axes, masks[row].cpu().numpy(), classes)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=10)
    handles = _legend(columns, classes, palette, most=min(int((height - 0.2) / 0.2), _LONGEST_LEGEND))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _name_regions(axes: Axes, mask: np.ndarray, classes: Sequence[str]) -> None:
    """Write the names of the larger classes into a mask: with many classes, some colours look alike."""
    for label, row, column in large_regions(mask):
        text = axes.text(
            column, row, short_name(classes[label], 14), ha="center", va="center", fontsize=6, color="white"
        )
        text.set(path_effects=[withStroke(linewidth=1.5, foreground="black")], clip_on=True)


def _legend(
    columns: Mapping[str, Sequence[Tensor]], classes: Sequence[str], palette: np.ndarray, *, most: int
) -> list[Patch]:
    """Return all classes, or if there are more than `most`, those with the most pixels in these masks."""
    fitting = max(most - 1, 4)  # the last place is for what is ignored
    shown = list(range(len(classes)))
    if len(classes) > fitting:
        counts = torch.stack([mask.flatten().bincount(minlength=256) for masks in columns.values() for mask in masks])
        counts = counts.sum(0)[: len(classes)]
        shown = sorted(index for index in counts.argsort(descending=True)[:fitting].tolist() if counts[index])
    handles = [Patch(color=palette[index], label=short_name(classes[index])) for index in shown]
    return [*handles, Patch(facecolor="white", edgecolor="black", linewidth=0.5, hatch="///", label="ignored")]


def _redden(picture: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Return the picture [H, W, 3] in pale grey, with red where `amount` [H, W] is 1."""
    grey = 0.6 + 0.4 * picture.mean(-1, keepdims=True).repeat(3, -1)
    return grey + amount[..., None] * (np.array([0.8, 0.05, 0.05]) - grey)


def _show(axes: Axes, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    axes.imshow(denormalised(image, mean, std), interpolation="nearest")
    axes.axis("off")


def in_words(metric: str) -> str:
    """Return the name of a metric as it is shown: "mean_iou" becomes "mean IoU"."""
    return metric.replace("_", " ").replace("iou", "IoU")
