"""How the neighborhood-attention families say which block is dilated by how much."""

from collections.abc import Sequence
from itertools import cycle, islice

Dilations = int | Sequence[int | Sequence[int]]
"""One dilation for all blocks; or one entry a stage, each the dilation of its blocks or a list repeated over them."""


def repeat_to(dilations: int | Sequence[int], depth: int) -> list[int]:
    """The dilations of `depth` blocks: the given ones over and over, so (1, 8) is 1, 8, 1 in three blocks."""
    dilations = [dilations] if isinstance(dilations, int) else list(dilations)
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations must be at least one number, each 1 or more; got {dilations}")
    return list(islice(cycle(dilations), depth))


def per_stage_dilations(dilations: Dilations, depths: Sequence[int]) -> list[list[int]]:
    """The dilation of every block of every stage."""
    stages = [dilations] * len(depths) if isinstance(dilations, int) else list(dilations)
    if len(stages) != len(depths):
        raise ValueError(f"dilations needs one number, or one entry a stage, {len(depths)}; got {dilations}")
    return [repeat_to(stage, depth) for stage, depth in zip(stages, depths, strict=True)]
