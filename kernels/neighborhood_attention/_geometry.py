"""The arithmetic of neighborhoods: which keys a query sees, per axis, and the haloed blocks that cover an axis.

An axis of length L with dilation d is d independent lattices; position i is point p = i // d of lattice g = i % d, which
has n = ceil((L - g) / d) points. On its lattice a query sees the points [start, end):

    not causal   lead = min(p // s * s + s // 2, n - 1)      start = clamp(lead - K // 2, 0, n - K)   end = start + K
    causal       lead = min(p // s * s + s - 1, n - 1)       start = max(lead - K + 1, 0)             end = p + 1

for a window of K points and a stride s. Both ends never decrease with p, so the queries that see a key are contiguous too.
"""

import functools
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


@dataclass(frozen=True)
class AxisBlocks:
    """An axis cut into blocks of queries, each with the run of keys that its queries see between them."""

    query: Tensor
    """[blocks * queries]: positions on the axis; a block that runs over the end repeats the last position."""
    key: Tensor
    """[blocks * keys]: positions on the axis, likewise."""
    allowed: Tensor
    """[blocks, queries, keys]: whether the key is in the window of the query."""
    offset: Tensor
    """[blocks, queries, keys]: size - 1 + (key - query) / dilation, the index into a bias table, clamped to it."""
    own: Tensor
    """[blocks, queries]: False where a query only repeats the last position."""
    slot: Tensor
    """[length]: where each position of the axis stands in `query`."""


def block_lengths(length: int, window: Window, *, symbolic: bool = False) -> tuple[int, int]:
    """Queries and keys of a block. A lattice that one block's halo would cover anyway becomes a single dense block.

    `symbolic`: the length is only known as a symbol, so the choice must not look at it.
    """
    queries = max(window.size, 4)
    queries = -(-queries // window.stride) * window.stride  # whole stride groups, so that their windows coincide
    keys = queries + window.size - window.stride
    if symbolic:
        return queries, keys
    points = -(-length // window.dilation)
    return (points, points) if points <= keys else (queries, keys)


def axis_blocks(length: int, window: Window, queries: int, keys: int, device: torch.device) -> AxisBlocks:
    """Cut an axis of `length` positions into blocks. `length` may be a symbol: nothing branches on it."""
    dilation = window.dilation
    blocks = (-(-length // dilation) + queries - 1) // queries
    lattice = torch.arange(dilation, device=device)[:, None]
    points = (length - lattice + dilation - 1) // dilation
    first = torch.arange(blocks, device=device)[None] * queries

    place = first[..., None] + torch.arange(queries, device=device)
    point = torch.minimum(place, points[..., None] - 1)
    start, end = window.bounds(point, points[..., None])
    key = start[..., :1] + torch.arange(keys, device=device)

    allowed = (key[:, :, None] >= start[..., None]) & (key[:, :, None] < end[..., None])
    offset = (key[:, :, None] - point[..., None] + window.size - 1).clamp(0, 2 * window.size - 2)
    position = torch.arange(length, device=device)
    slot = position % dilation * (blocks * queries) + position // dilation
    return AxisBlocks(
        query=(lattice[..., None] + dilation * point).flatten(),
        key=(lattice[..., None] + dilation * torch.minimum(key, points[..., None] - 1)).flatten(),
        allowed=allowed.flatten(0, 1),
        offset=offset.flatten(0, 1),
        own=(place < points[..., None]).flatten(0, 1),
        slot=slot,
    )


@functools.lru_cache(maxsize=256)
def cached_axis_blocks(length: int, window: Window, device: torch.device) -> AxisBlocks:
    """`axis_blocks` of a known length, kept: a model asks for the same few axes at every call."""
    return axis_blocks(length, window, *block_lengths(length, window), device)
