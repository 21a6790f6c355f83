"""Compute which keys a query sees along one axis.

An axis of length L with dilation d consists of d independent lattices; position i is point p = i // d of lattice g =
i % d, which has n = ceil((L - g) / d) points. On its lattice a query sees the points [start, end):

    not causal   lead = min(p // s * s + s // 2, n - 1)      start = clamp(lead - K // 2, 0, n - K)   end = start + K
    causal       lead = min(p // s * s + s - 1, n - 1)       start = max(lead - K + 1, 0)             end = p + 1

for a window of K points and a stride s. `start` and `end` never decrease with p, so the queries that see a key are
contiguous too, and a contiguous run of queries sees a contiguous run of keys.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, bool)
Axes = T | Sequence[T]
"""One value for all axes, or one per axis."""


@dataclass(frozen=True)
class Window:
    """Define the neighborhood along one axis, in lattice points."""

    size: int
    stride: int
    dilation: int
    is_causal: bool

    def bounds(self, point: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and one-past-last key of query `point` on a lattice of `points`; shapes broadcast."""
        last = points - 1
        group = point // self.stride * self.stride
        if self.is_causal:
            lead = torch.minimum(group + self.stride - 1, last)
            return (lead - self.size + 1).clamp(min=0), point + 1
        lead = torch.minimum(group + self.stride // 2, last)
        start = torch.minimum((lead - self.size // 2).clamp(min=0), points - self.size)
        return start, start + self.size


Windows = tuple[Window, ...]
"""One window per axis."""


def _per_axis(name: str, value: Axes[T], rank: int) -> list[T]:
    values = list(value) if isinstance(value, Sequence) else [value] * rank
    if len(values) != rank:
        raise ValueError(f"{name} needs one value or {rank}, one per axis; got {tuple(values)}")
    return values


def make_windows(
    rank: int, kernel_size: Axes[int], stride: Axes[int], dilation: Axes[int], is_causal: Axes[bool]
) -> Windows:
    """Return the windows of `rank` axes; raise ValueError for invalid ones."""
    make = _checked_windows if torch.compiler.is_dynamo_compiling() else _kept_windows
    return make(rank, _hashable(kernel_size), _hashable(stride), _hashable(dilation), _hashable(is_causal))


def _hashable(value: Axes[T]) -> Axes[T]:
    return tuple(value) if isinstance(value, Sequence) else value


def _checked_windows(
    rank: int, kernel_size: Axes[int], stride: Axes[int], dilation: Axes[int], is_causal: Axes[bool]
) -> Windows:
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    columns = [_per_axis(name, value, rank) for name, value in sizes.items()]
    windows = tuple(Window(*axis) for axis in zip(*columns, _per_axis("is_causal", is_causal, rank), strict=True))
    for axis, window in enumerate(windows):
        if window.size < 1 or window.dilation < 1:
            raise ValueError(
                f"kernel_size and dilation must be at least 1; axis {axis} has {window.size} and {window.dilation}"
            )
        if not 1 <= window.stride <= window.size:
            raise ValueError(
                f"stride must lie between 1 and kernel_size, so that a query sees itself; axis {axis} has stride "
                f"{window.stride} and kernel_size {window.size}"
            )
    return windows


_kept_windows = functools.lru_cache(maxsize=256)(_checked_windows)
"""Cached, because a model requests the same few windows at every call. Dynamo ignores such a cache and warns."""
