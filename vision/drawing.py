"""Drawing primitives that the pictures of training and of `predict` share: colours of classes, masks and evidence laid
over pictures, labels inside regions, and grids of pictures.

Figures are matplotlib `Figure` objects, made without pyplot: no global state and no window system. matplotlib is an
optional dependency and is imported when the first colour or figure is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data.splits import IGNORE_INDEX
from .label_sets import published_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLOURS = 20  # with more classes than this, class names are also written into the pictures
LONGEST_NAME = 24
_NAMED_SHARE = 0.03  # least share of a picture's pixels for which a class is named in it


def palette_of(classes: Sequence[str]) -> np.ndarray:
    """Return one colour per class, float [classes, 3] in 0..1: the published ones of a known data set, or else
    `class_colours`."""
    known = published_colours(classes)
    if known is not None:
        return np.array(known) / 255
    return class_colours(len(classes), ground=classes[0].lower() in ("ground", "background"))


def class_colours(count: int, *, ground: bool = True) -> np.ndarray:
    """Return `count` distinguishable colours, float [count, 3] in 0..1.

    Args:
        ground: class 0 is the background behind all others; it is black.
    """
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb

    # The strong colours of tab20 come first, then its pale ones. Further colours step around the hue circle by the
    # golden ratio, so that consecutive classes do not look alike.
    colours = [colormaps["tab20"](index)[:3] for index in (*range(0, 20, 2), *range(1, 20, 2))]
    for index in range(count - 20):
        hue, colour, light = index * 0.381966 % 1, 0.55 + 0.15 * (index % 4), 0.95 - 0.13 * (index % 5)
        colours.append(tuple(hsv_to_rgb((hue, colour, light)).tolist()))
    black = [(0.0, 0.0, 0.0)] if ground else []
    return np.array([*black, *colours][:count], dtype=float).reshape(-1, 3)


def denormalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Convert a normalised picture [C, H, W] to [H, W, 3] with values in 0..1."""
    values = image.detach().float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return values.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def overlay(picture: np.ndarray, mask: np.ndarray, palette: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """Blend the class colours of `mask` [H, W] over a grey version of `picture` [H, W, 3], both in 0..1.

    Ignored pixels become white with grey stripes.

    Args:
        strength: weight of the class colours; the picture has the rest.
    """
    ignored = mask == IGNORE_INDEX
    colours = palette[np.where(ignored, 0, mask)]
    grey = picture.mean(-1, keepdims=True).repeat(3, -1)
    rows, columns = np.indices(mask.shape)
    width = max(min(mask.shape) // 48, 1)
    stripes = np.where((rows + columns) // width % 4 == 0, 0.8, 1.0)[..., None]
    return np.where(ignored[..., None], stripes, (1 - strength) * grey + strength * colours)


def heat(picture: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Lay the positive part of `evidence` [H, W] over a grey version of `picture` [H, W, 3] in 0..1.

    The strongest place of the picture is yellow, however strong it is; places without evidence for the class are grey.
    """
    from matplotlib import colormaps

    positive = evidence.clip(min=0)
    share = positive / max(float(positive.max()), 1e-12)
    grey = picture.mean(-1, keepdims=True).repeat(3, -1)
    weight = 0.8 * np.sqrt(share)[..., None]
    return (1 - weight) * grey + weight * colormaps["plasma"](share)[..., :3]


def large_regions(mask: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (class, row, column) for each class that covers enough of `mask` [H, W] to be named in the picture.

    The place is where the pixels of the class are densest.
    """
    step = max(1, max(mask.shape) // 200)  # large masks are subsampled: the place need not be exact
    seen = torch.from_numpy(np.ascontiguousarray(mask[::step, ::step]))
    labels, counts = seen[seen != IGNORE_INDEX].unique(return_counts=True)
    reach = max(seen.shape) // 8
    for label in labels[counts >= _NAMED_SHARE * seen.numel()].tolist():
        own = (seen == label).float()[None]
        around = F.avg_pool2d(own, (2 * reach + 1, 1), 1, (reach, 0))
        around = F.avg_pool2d(around, (1, 2 * reach + 1), 1, (0, reach))
        densest = (own * around)[0]
        places = (densest >= 0.9 * densest.max()).nonzero()
        row, column = places[(places - places.float().mean(0)).square().sum(1).argmin()].tolist()
        yield label, step * row, step * column


def short_name(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a class name short enough to stand under a picture, escaped for matplotlib."""
    return plain_text(name if len(name) <= longest else f"{name[: longest - 1]}…")


def plain_text(text: str) -> str:
    """Escape dollar signs, between which matplotlib would parse a formula."""
    return text.replace("$", r"\$")


def picture_grid(
    count: int, *, title: str, row_height: float = 1.3, column_width: float = 1.15, columns: int = 8
) -> tuple[Figure, list[Axes]]:
    """Return a figure with at least `count` axes without frames, in row-major order. Sizes are in inches."""
    from matplotlib.figure import Figure

    rows, columns = -(-count // columns), min(count, columns)
    figure = Figure(figsize=(max(column_width * columns, 3.0), row_height * rows + 0.4), layout="constrained")
    figure.suptitle(plain_text(title), fontsize=10)
    grid: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    return figure, grid
