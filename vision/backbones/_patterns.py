"""How the hierarchical families say what differs from block to block: dilations, kernel sizes."""

from collections.abc import Sequence
from itertools import cycle, islice

Pattern = int | Sequence[int | Sequence[int]]
"""One value for all blocks; or one entry a stage, each the value of its blocks or a list repeated over them."""


def repeat_to(values: int | Sequence[int], depth: int, name: str) -> list[int]:
    """The values of `depth` blocks: the given ones over and over, so (1, 8) is 1, 8, 1 in three blocks."""
    values = [values] if isinstance(values, int) else list(values)
    if not values or min(values) < 1:
        raise ValueError(f"{name} must be at least one number, each 1 or more; got {values}")
    return list(islice(cycle(values), depth))


def per_stage(values: Pattern, depths: Sequence[int], name: str) -> list[list[int]]:
    """The value of every block of every stage; `name` is the argument's, for the errors."""
    stages = [values] * len(depths) if isinstance(values, int) else list(values)
    if len(stages) != len(depths):
        raise ValueError(f"{name} needs one number, or one entry a stage, {len(depths)}; got {values}")
    return [repeat_to(stage, depth, name) for stage, depth in zip(stages, depths, strict=True)]
