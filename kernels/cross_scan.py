"""Define the orders in which a scan traverses a two-dimensional map, and convert maps to sequences and back.

A one-dimensional recurrence sees an image only along a path, so visual state space models scan along several: VMamba
the rows, the columns and both reversed (Liu et al., arXiv 2401.10166), Vim and MobileMamba the rows in both directions
(Zhu et al., arXiv 2401.09417; He et al., arXiv 2411.15941), EfficientVMamba four disjoint sub-grids (Pei et al., arXiv
2403.09977).

An order is data: `ScanPath` states the axis, the starting corner and the sub-grid. The kernels of `selective_scan`
compute the pixel of each step from it and never materialise the sequences; `cross_scan` and `cross_merge` materialise
them, with standard PyTorch operators.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class ScanPath(NamedTuple):
    """Describe one order in which a map [height, width] is traversed.

    Attributes:
        by_columns: column-major (down one column after the other) instead of row-major.
        flip_rows: from the last row to the first.
        flip_columns: from the last column to the first.
        row: row of the first pixel.
        column: column of the first pixel.
        step: distance between visited pixels, along both axes. A path visits ceil(height / step) by
            ceil(width / step) positions of a map, regardless of its first pixel; positions outside the map read zero.
    """

    by_columns: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    row: int = 0
    column: int = 0
    step: int = 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the visited sub-grid."""
        return (height + self.step - 1) // self.step, (width + self.step - 1) // self.step

    def indices(self, height: int, width: int) -> Tensor:
        """Return [steps] the row-major pixel index of each step, -1 outside the map."""
        pixels = torch.arange(height * width).view(1, height, width) + 1
        return self.sequence(pixels)[0] - 1

    def sequence(self, x: Tensor) -> Tensor:
        """Gather a map [batch, height, width, ...] into [batch, steps, ...]; steps outside the map are zero."""
        height, width = x.shape[1], x.shape[2]
        if self.step > 1:
            rows, columns = (torch.arange(n, device=x.device) * self.step for n in self.grid(height, width))
            x = F.pad(x, [0, 0] * (x.ndim - 3) + [0, self.step, 0, self.step])
            # Slicing instead would make the exported program depend on the parity of the sizes.
            x = x.index_select(1, rows + self.row).index_select(2, columns + self.column)
        if self.flips:
            x = x.flip(self.flips)
        return (x.transpose(1, 2) if self.by_columns else x).flatten(1, 2)

    def place(self, y: Tensor, height: int, width: int) -> Tensor:
        """Scatter [batch, steps, ...] to [batch, height, width, ...], the inverse; unvisited pixels are zero."""
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
        """Return the axes of [batch, height, width, ...] that are reversed."""
        return [axis for axis, is_flipped in ((1, self.flip_rows), (2, self.flip_columns)) if is_flipped]


CROSS = (
    ScanPath(),
    ScanPath(by_columns=True),
    ScanPath(flip_rows=True, flip_columns=True),
    ScanPath(by_columns=True, flip_rows=True, flip_columns=True),
)
"""VMamba: rows, columns, and both reversed."""

BIDIRECTIONAL = (CROSS[0], CROSS[2])
"""MobileMamba, and Vim on a sequence (a map of one row): rows, and rows reversed."""

ATROUS = (
    ScanPath(step=2),
    ScanPath(by_columns=True, row=1, step=2),
    ScanPath(column=1, step=2),
    ScanPath(by_columns=True, row=1, column=1, step=2),
)
"""EfficientVMamba: four disjoint sub-grids that together visit each pixel once."""


def check_paths(paths: Sequence[ScanPath]) -> None:
    """Raise ValueError unless all paths have the same step and each begins inside its step."""
    if not paths or len({path.step for path in paths}) != 1:
        raise ValueError(f"paths must be one or more ScanPath with the same step; got {list(paths)}")
    for path in paths:
        if path.step < 1 or not (0 <= path.row < path.step and 0 <= path.column < path.step):
            raise ValueError(f"a path's step must be at least 1 and its row and column below step; got {path}")


def cross_scan(x: Tensor, paths: Sequence[ScanPath] = CROSS) -> Tensor:
    """Gather a map [batch, height, width, ...] along each path into [batch, paths, steps, ...].

    Raises:
        ValueError: if the paths differ in length, or one begins outside its sub-grid.
    """
    check_paths(paths)
    if x.ndim < 3:
        raise ValueError(f"x must be [batch, height, width, ...]; got {tuple(x.shape)}")
    return torch.stack([path.sequence(x) for path in paths], 1)


def cross_merge(y: Tensor, size: tuple[int, int], paths: Sequence[ScanPath] = CROSS) -> Tensor:
    """Sum sequences [batch, paths, steps, ...] into a map [batch, height, width, ...]; the adjoint of `cross_scan`.

    Args:
        size: height and width of the map.

    Raises:
        ValueError: for the paths that `cross_scan` rejects, or sequences that do not match this size.
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
