"""Resampling of learned position embeddings to other grids, including grids of symbolic size."""

from torch import Tensor
from torch.nn import functional as F

from ...kernels._runtime import is_exporting


def resample_positions(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resample a position embedding [1, rows * columns, C] from `grid` to a grid of `size`.

    A module that calls this function must call `torch.fx.wrap("resample_positions")`, since FX cannot compare sizes.
    """
    if is_exporting() or size[0] != grid[0] or size[1] != grid[1]:
        raster = table.unflatten(1, [grid[0], grid[1]]).permute(0, 3, 1, 2).float()
        raster = F.interpolate(raster, [size[0], size[1]], mode="bicubic", antialias=True)
        return raster.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return table
