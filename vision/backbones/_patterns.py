"""Patterns of per-block settings in hierarchical models: dilations and kernel sizes."""

from collections.abc import Sequence
from itertools import cycle, islice

Pattern = int | Sequence[int | Sequence[int]]
"""One value for all blocks; or one entry per stage, each a value for its blocks or a list repeated over them."""


def repeat_to(values: int | Sequence[int], depth: int, name: str) -> list[int]:
    """Repeat `values` cyclically over `depth` blocks, so that (1, 8) becomes 1, 8, 1 for three blocks."""
    values = [values] if isinstance(values, int) else list(values)
    if not values or min(values) < 1:
        raise ValueError(f"{name} must be at least one number, each 1 or more; got {values}")
    return list(islice(cycle(values), depth))


def per_stage(values: Pattern, depths: Sequence[int], name: str) -> list[list[int]]:
    """Return the value of every block of every stage; `name` is the argument's name for error messages."""
    stages = [values] * len(depths) if isinstance(values, int) else list(values)
    if len(stages) != len(depths):
        raise ValueError(f"{name} needs one number, or one entry per stage, {len(depths)}; got {values}")
    return [repeat_to(stage, depth, name) for stage, depth in zip(stages, depths, strict=True)]
