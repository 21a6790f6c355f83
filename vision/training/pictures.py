"""The pictures of a run folder: learning curves, the confusion matrix, a training batch, predictions beside the truth.

Drawn on `Figure` objects, without pyplot: no global state, no window system.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ..data.splits import IGNORE_INDEX

_TRAIN, _VAL, _RIGHT, _WRONG = "#4c78a8", "#e45756", "#2e7d32", "#c62828"
_MOST_NAMED_CLASSES = 30


def draw_curves(path: Path, rows: Sequence[dict[str, float]], metric: str, title: str) -> None:
    """Loss and metric by epoch; the best epoch is marked."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] + 1 for row in rows]
    for name, label, colour in (("train/loss", "training", _TRAIN), ("val/loss", "validation", _VAL)):
        left.plot(epochs, [row.get(name, np.nan) for row in rows], "o-", ms=4, color=colour, label=label)
    left.set(title="loss", xlabel="epoch")
    left.legend(frameon=False)
    values = np.array([row.get(f"val/{metric}", np.nan) for row in rows]) * 100
    right.plot(epochs, values, "o-", ms=4, color=_VAL)
    if np.isfinite(values).any():
        best = int(np.nanargmax(values))
        right.plot(epochs[best], values[best], "o", ms=9, mfc="none", color="black")
        right.annotate(
            f"{values[best]:.1f} %",
            (epochs[best], values[best]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="center",
        )
    right.set(title=f"validation {_words(metric)} (%)", xlabel="epoch")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.04, y=0.12)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str], title: str) -> None:
    """Rows are the truth, in percent of each row; cells are numbered while they can be read."""
    counts = confusion.double().cpu().numpy()
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    count = len(classes)
    side = 2.6 + 0.46 * min(count, _MOST_NAMED_CLASSES)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    # The square root keeps small confusions visible beside a strong diagonal.
    image = axes.imshow(np.sqrt(percent / 100), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="truth")
    axes.set_title(title, fontsize=11)
    if count <= _MOST_NAMED_CLASSES:
        axes.set_xticks(range(count), classes, **_slanted(classes))
        axes.set_yticks(range(count), classes)
    if count <= 20:
        for row, column in zip(*np.nonzero(percent >= 0.05), strict=True):
            value = percent[row, column]
            text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if value > 35 else "black")
    bar = figure.colorbar(image, ax=axes, shrink=0.75, label="percent of the true class")
    bar.set_ticks([0.0, 0.1**0.5, 0.25**0.5, 0.5**0.5, 1.0], labels=["0", "10", "25", "50", "100"])
    figure.savefig(path, dpi=130)


def _slanted(names: Sequence[str]) -> dict[str, Any]:
    """Tick labels are slanted where upright ones would overlap."""
    return {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}


def draw_batch(path: Path, images: Tensor, labels: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
    """The pictures of a training batch after augmentation, with their labels."""
    figure, grid = _grid(len(images), columns=8, title="a training batch as the model sees it")
    for axes, image, label in zip(grid, images, labels, strict=False):
        _show(axes, image, mean, std)
        axes.set_title(label, fontsize=7, pad=3)
    figure.savefig(path, dpi=130)


def draw_predictions(
    path: Path,
    images: Tensor,
    truth: Tensor,
    probabilities: Tensor,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Test pictures with prediction and confidence; a wrong one in red, with the truth below."""
    figure, grid = _grid(len(images), columns=8, title="test pictures: predicted class and confidence", row_height=1.5)
    confidence, predicted = probabilities.max(1)
    for index, axes in enumerate(grid[: len(images)]):
        _show(axes, images[index], mean, std)
        right = bool(predicted[index] == truth[index])
        text = f"{classes[int(predicted[index])]} ({100 * float(confidence[index]):.0f} %)"
        text += "" if right else f"\ntruth: {classes[int(truth[index])]}"
        axes.set_title(text, fontsize=7, pad=3, color=_RIGHT if right else _WRONG)
    figure.savefig(path, dpi=130)


def draw_masks(
    path: Path,
    images: Tensor,
    columns: dict[str, Tensor],
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """A row for each picture: the picture, then each of `columns` (masks [N, H, W]) laid over it, and a legend."""
    palette = class_colours(len(classes))
    count = len(images)
    figure = Figure(figsize=(1.9 * (1 + len(columns)) + 1.5, 1.9 * count + 0.3), layout="constrained")
    grid = figure.subplots(count, 1 + len(columns), squeeze=False)
    for row in range(count):
        _show(grid[row, 0], images[row], mean, std)
        for column, mask in enumerate(columns.values(), start=1):
            grid[row, column].imshow(overlay(_pixels(images[row], mean, std), mask[row].cpu().numpy(), palette))
            grid[row, column].axis("off")
    for column, name in enumerate(["picture", *columns]):
        grid[0, column].set_title(name, fontsize=10)
    shown = range(1, len(classes))
    if len(classes) > _MOST_NAMED_CLASSES:  # then only those that are in these pictures
        present = torch.cat([mask.flatten() for mask in columns.values()]).unique().tolist()
        shown = [index for index in present if index != IGNORE_INDEX][:_MOST_NAMED_CLASSES]
    handles = [Patch(color=palette[index], label=classes[index]) for index in shown]
    handles.append(Patch(facecolor="white", edgecolor="black", linewidth=0.5, label="ignored"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def class_colours(count: int) -> np.ndarray:
    """[count, 3] in 0..1: class 0, the ground, is black, the others as different as a palette of 20 allows."""
    # The strong colours of tab20 first, then their pale ones.
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    colours = np.array([colormaps["tab20"](order[index % 20])[:3] for index in range(max(count - 1, 0))])
    return np.concatenate([np.zeros((1, 3)), colours.reshape(-1, 3)])


def overlay(picture: np.ndarray, mask: np.ndarray, palette: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """`picture` [H, W, 3] under the colours of `mask` [H, W]: the ground dimmed, ignored pixels white."""
    colours = np.concatenate([palette, np.ones((1, 3))])[np.where(mask == IGNORE_INDEX, len(palette), mask)]
    grey = picture.mean(-1, keepdims=True).repeat(3, -1)
    blended = (1 - strength) * grey + strength * colours
    return np.where((mask == IGNORE_INDEX)[..., None], 1.0, blended)


def _grid(count: int, *, columns: int, title: str, row_height: float = 1.3) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure = Figure(figsize=(1.15 * columns, row_height * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    return figure, grid


def _show(axes: Axes, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    axes.imshow(_pixels(image, mean, std), interpolation="nearest")
    axes.axis("off")


def _pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised [C, H, W] as [H, W, 3] in 0..1."""
    values = image.detach().float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return values.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def _words(metric: str) -> str:
    return {"mean_iou": "mean IoU"}.get(metric, metric.replace("_", " "))
