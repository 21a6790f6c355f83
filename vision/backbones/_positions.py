"""Learned position embeddings at other sizes than theirs, also while the size is a symbol."""

from torch import Tensor
from torch.nn import functional as F

from ...kernels._runtime import is_exporting


def resample_positions(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A position embedding [1, rows * columns, C] of `grid` for a grid of `size`.

    A file that uses it has to say `torch.fx.wrap("resample_positions")`, since FX has no sizes to compare.
    """
    if is_exporting() or size[0] != grid[0] or size[1] != grid[1]:
        raster = table.unflatten(1, [grid[0], grid[1]]).permute(0, 3, 1, 2).float()
        raster = F.interpolate(raster, [size[0], size[1]], mode="bicubic", antialias=True)
        return raster.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return table
