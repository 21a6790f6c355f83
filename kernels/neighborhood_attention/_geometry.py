"""The arithmetic of neighborhoods along one axis: which keys a query sees.

An axis of length L with dilation d is d independent lattices; position i is point p = i // d of lattice g = i % d,
which has n = ceil((L - g) / d) points. On its lattice a query sees the points [start, end):

    not causal   lead = min(p // s * s + s // 2, n - 1)      start = clamp(lead - K // 2, 0, n - K)   end = start + K
    causal       lead = min(p // s * s + s - 1, n - 1)       start = max(lead - K + 1, 0)             end = p + 1

for a window of K points and a stride s. Both ends never decrease with p, so the queries that see a key are contiguous
too, and a run of queries sees a run of keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The neighborhood along one axis, in lattice points."""

    size: int
    stride: int
    dilation: int
    is_causal: bool

    def bounds(self, point: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """First and one-past-last key of query `point` on a lattice of `points`; any broadcastable shapes."""
        last = points - 1
        group = point // self.stride * self.stride
        if self.is_causal:
            lead = torch.minimum(group + self.stride - 1, last)
            return (lead - self.size + 1).clamp(min=0), point + 1
        lead = torch.minimum(group + self.stride // 2, last)
        start = torch.minimum((lead - self.size // 2).clamp(min=0), points - self.size)
        return start, start + self.size
