"""The orders in which a scan walks a two-dimensional map, and maps to sequences and back.

A one-dimensional recurrence sees a picture only along a path, so visual state space models take several: VMamba the
rows, the columns and both backwards (Liu et al., arXiv 2401.10166), Vim and MobileMamba the rows both ways (Zhu et al.,
arXiv 2401.09417; He et al., arXiv 2411.15941), EfficientVMamba four disjoint sub-grids (Pei et al., arXiv 2403.09977).

An order is data: `ScanPath` says by which axis, from which end and over which sub-grid. The kernels of `selective_scan`
compute the pixel of a step from that and never make the sequences; `cross_scan` and `cross_merge` make them, with
standard PyTorch operators.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class ScanPath(NamedTuple):
    """One order in which a map [height, width] is walked.

    Attributes:
        by_columns: down the columns, one after the other, instead of along the rows.
        flip_rows: from the last row to the first.
        flip_columns: from the last column to the first.
        row: the first pixel's.
        column: the first pixel's.
        step: distance of the pixels visited, along both axes. Of a map of any size ceil(height / step) by
            ceil(width / step) positions are visited, wherever the first pixel is; those outside of the map read zeros.
    """

    by_columns: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    row: int = 0
    column: int = 0
    step: int = 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the sub-grid that is visited."""
        return (height + self.step - 1) // self.step, (width + self.step - 1) // self.step

    def indices(self, height: int, width: int) -> Tensor:
        """[steps] the pixel of each step, counted along the rows of the map; -1 outside of it."""
        pixels = torch.arange(height * width).view(1, height, width) + 1
        return self.sequence(pixels)[0] - 1

    def sequence(self, x: Tensor) -> Tensor:
        """A map [batch, height, width, ...] as [batch, steps, ...], zeros where the path leaves the map."""
        height, width = x.shape[1], x.shape[2]
        if self.step > 1:
            rows, columns = (torch.arange(n, device=x.device) * self.step for n in self.grid(height, width))
            x = F.pad(x, [0, 0] * (x.ndim - 3) + [0, self.step, 0, self.step])
            # Not by slices: exporting, they would tie the sizes to being odd or even.
            x = x.index_select(1, rows + self.row).index_select(2, columns + self.column)
        if self.flips:
            x = x.flip(self.flips)
        return (x.transpose(1, 2) if self.by_columns else x).flatten(1, 2)

    def place(self, y: Tensor, height: int, width: int) -> Tensor:
        """The inverse: [batch, steps, ...] as [batch, height, width, ...], zeros where the path does not come."""
        rows, columns = self.grid(height, width)
        y = y.unflatten(1, (columns, rows)).transpose(1, 2) if self.by_columns else y.unflatten(1, (rows, columns))
        if self.flips:
            y = y.flip(self.flips)
        if self.step > 1:
            down, right = torch.arange(height, device=y.device), torch.arange(width, device=y.device)
            y = y.index_select(1, down // self.step).index_select(2, right // self.step)
            visited = (down % self.step == self.row).unsqueeze(1) & (right % self.step == self.column)
            y = torch.where(visited.view(height, width, *[1] * (y.ndim - 3)), y, 0)
        return y

    @property
    def flips(self) -> list[int]:
        """The axes of [batch, height, width, ...] that are turned round."""
        return [axis for axis, is_flipped in ((1, self.flip_rows), (2, self.flip_columns)) if is_flipped]


CROSS = (
    ScanPath(),
    ScanPath(by_columns=True),
    ScanPath(flip_rows=True, flip_columns=True),
    ScanPath(by_columns=True, flip_rows=True, flip_columns=True),
)
"""VMamba: rows, columns, and both from the other end."""

BIDIRECTIONAL = (CROSS[0], CROSS[2])
"""MobileMamba, and Vim on a sequence (a map of one row): rows, and rows from the other end."""

ATROUS = (
    ScanPath(step=2),
    ScanPath(by_columns=True, row=1, step=2),
    ScanPath(column=1, step=2),
    ScanPath(by_columns=True, row=1, column=1, step=2),
)
"""EfficientVMamba: four disjoint sub-grids, each pixel visited once."""


def check_paths(paths: Sequence[ScanPath]) -> None:
    """Raise unless the paths have one length and begin inside their steps."""
    if not paths or len({path.step for path in paths}) != 1:
        raise ValueError(f"paths must be one or more ScanPath with the same step; got {list(paths)}")
    for path in paths:
        if path.step < 1 or not (0 <= path.row < path.step and 0 <= path.column < path.step):
            raise ValueError(f"a path's step must be at least 1 and its row and column below step; got {path}")


def cross_scan(x: Tensor, paths: Sequence[ScanPath] = CROSS) -> Tensor:
    """A map [batch, height, width, ...] along each path: [batch, paths, steps, ...].

    Raises:
        ValueError: for paths of different lengths, or one that begins outside of its sub-grid.
    """
    check_paths(paths)
    if x.ndim < 3:
        raise ValueError(f"x must be [batch, height, width, ...]; got {tuple(x.shape)}")
    return torch.stack([path.sequence(x) for path in paths], 1)


def cross_merge(y: Tensor, size: tuple[int, int], paths: Sequence[ScanPath] = CROSS) -> Tensor:
    """Sequences [batch, paths, steps, ...] back on the map, added: [batch, height, width, ...]; `cross_scan`'s adjoint.

    Args:
        size: height and width of the map.

    Raises:
        ValueError: for paths as in `cross_scan`, or sequences that do not belong to this size.
    """
    check_paths(paths)
    rows, columns = paths[0].grid(*size)
    if y.ndim < 3 or y.shape[1] != len(paths) or y.shape[2] != rows * columns:
        raise ValueError(
            f"y must be [batch, {len(paths)}, {rows * columns}, ...] for {len(paths)} paths over a map of "
            f"{size[0]} x {size[1]}; got {tuple(y.shape)}"
        )
    total = paths[0].place(y[:, 0], *size)
    for i in range(1, len(paths)):
        total = total + paths[i].place(y[:, i], *size)
    return total
