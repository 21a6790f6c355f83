"""Draws the scan paths of the visual state space models over a picture.

    python -m mixerzoo.vision.visualize scan_orders --output docs/pictures

The paths are those of the operators: `ScanPath.indices` of a grid, and for Vim the sequence with its class token.
Colour runs from dark at the first step to bright at the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..kernels.cross_scan import ATROUS, BIDIRECTIONAL, CROSS, ScanPath
from .diagrams import load_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = 6  # patches per side
COLOURS = "plasma"
TOKEN, INK = "#2f9e44", "#343a40"


@dataclass(frozen=True)
class Order:
    """The scan paths of a family; `has_token` if a class token stands in the middle of the sequence."""

    name: str
    note: str
    paths: Sequence[ScanPath]
    has_token: bool = False


VMAMBA = Order("VMamba", "four paths over the whole map, their outputs added", CROSS)
EFFICIENT = Order("EfficientVMamba", "four sub-grids, each patch visited once", ATROUS)
MOBILE = Order("MobileMamba", "along the rows and back, outputs added", BIDIRECTIONAL)
VIM = Order("Vim", "one sequence and back, the class token in its middle", BIDIRECTIONAL, has_token=True)
ROWS = ((VMAMBA,), (EFFICIENT,), (MOBILE, VIM))


def steps_of(path: ScanPath, side: int, *, has_token: bool = False) -> list[tuple[float, float]]:
    """Return (column, row) of each step of a path on a map of `side` x `side` patches, where `side` is even.

    A class token is visited after half of the patches, between two rows, and is drawn in the middle of the map.
    """
    pixels = [index for index in path.indices(side, side).tolist() if index >= 0]
    steps: list[tuple[float, float]] = [(index % side + 0.5, index // side + 0.5) for index in pixels]
    if has_token:
        steps.insert(len(steps) // 2, (side / 2, side / 2))
    return steps


def draw_scan_orders(picture: Tensor, rows: Sequence[Sequence[Order]] = ROWS, side: int = GRID) -> Figure:
    """Draw a panel per path, in rows of four."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 2.85 * len(rows) + 0.9), layout="constrained", facecolor="white")
    figure.suptitle(f"The orders in which scans walk a picture of {side} x {side} patches", fontsize=13, color=INK)
    strips = figure.subfigures(len(rows), 1, squeeze=False, hspace=0.04).ravel().tolist()
    for strip, orders in zip(strips, rows, strict=True):
        parts = strip.subfigures(1, len(orders), squeeze=False, width_ratios=[len(o.paths) for o in orders])
        for part, order in zip(parts.ravel().tolist(), orders, strict=True):
            panels = part.subplots(1, len(order.paths), squeeze=False).ravel().tolist()
            for axes, path in zip(panels, order.paths, strict=True):
                _panel(axes, picture, side)
                _walk(axes, steps_of(path, side, has_token=order.has_token))
                if order.has_token:
                    _token(axes, side)
            part.suptitle(f"$\\bf{{{order.name}}}$: {order.note}", fontsize=10, color=INK)
    note = "● first step, dark    ■ last step, bright    dashed: a jump to a patch that is no neighbour"
    figure.supxlabel(note, fontsize=9.5, color=INK)
    return figure


def _panel(axes: Axes, picture: Tensor, side: int) -> None:
    image = picture.permute(1, 2, 0).clamp(0, 1).numpy()
    axes.imshow(0.45 * image + 0.55, extent=(0, side, side, 0), interpolation="bilinear")  # pale, behind the path
    for place in range(side + 1):
        axes.plot([place, place], [0, side], color="white", linewidth=1)
        axes.plot([0, side], [place, place], color="white", linewidth=1)
    axes.set(xlim=(-0.1, side + 0.1), ylim=(side + 0.1, -0.1), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _token(axes: Axes, side: int) -> None:
    axes.plot(side / 2, side / 2, "s", color=TOKEN, markersize=15, zorder=5)
    axes.text(side / 2, side / 2, "cls", color="white", fontsize=7.5, ha="center", va="center", zorder=6)


def _walk(axes: Axes, steps: Sequence[tuple[float, float]]) -> None:
    """Draw an arrow per step; jumps are thin and dashed."""
    import matplotlib

    colours = matplotlib.colormaps[COLOURS]
    for number, (start, end) in enumerate(itertools.pairwise(steps)):
        across, down = abs(start[0] - end[0]), abs(start[1] - end[1])
        is_jump = across > 0 and down > 0
        axes.annotate(
            "",
            xy=end,
            xytext=start,
            arrowprops={
                "arrowstyle": "-|>",
                "color": colours(0.9 * number / max(len(steps) - 2, 1)),
                "linewidth": 0.8 if is_jump else 1.9,
                "linestyle": (0, (3, 2)) if is_jump else "solid",
                "mutation_scale": 7 if is_jump else 9,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            zorder=2 if is_jump else 3,
        )
    axes.plot(*steps[0], "o", color=colours(0.0), markersize=7, zorder=4)
    axes.plot(*steps[-1], "s", color=colours(0.9), markersize=7, zorder=4)


def scan_orders(file: Path | None) -> Figure:
    """Draw the diagram over a picture, scikit-learn's flower by default."""
    return draw_scan_orders(load_picture(file))
