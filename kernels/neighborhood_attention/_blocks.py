"""Cut a map into blocks of queries, each with the block of all keys that its queries see.

Along one axis a block consists of `queries` successive points of one dilation lattice, and the `keys` points that start
at the first key of its first query; a block of the map is the product of one block per axis. Everything is index
arithmetic on whole tensors, so that sizes may be symbolic (`torch.export` with any height and width).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._compat import divide_with_remainder
from ._geometry import Window, Windows


def _block_lengths(length: int, window: Window, *, symbolic: bool) -> tuple[int, int]:
    """Return the queries and keys per block along an axis; an axis covered by one block's halo becomes one block."""
    queries = max(window.size, 4)
    queries = -(-queries // window.stride) * window.stride  # whole stride groups, so that their windows coincide
    keys = queries + window.size - window.stride
    if symbolic:
        return queries, keys
    points = -(-length // window.dilation)
    return (points, points) if points <= keys else (queries, keys)


@dataclass(frozen=True)
class _Axis:
    """Hold the indices of each of the `blocks` blocks of the map, along one axis."""

    query: Tensor
    """[blocks, queries]: positions; a block that extends past the end of its lattice repeats the last position."""
    key: Tensor
    """[blocks, keys]: positions, padded like `query`."""
    valid: Tensor
    """[blocks, queries]: False where a query is padding, a repetition of the last position."""
    allowed: Tensor
    """[blocks, queries, keys]: whether the key is in the window of the query."""
    offset: Tensor
    """[blocks, queries, keys]: size - 1 + (key - query) / dilation, the bias table index, clamped to the table."""

    @classmethod
    def cut(cls, length: int, window: Window, queries: int, keys: int, block: Tensor) -> "_Axis":
        """Compute the indices; `block` [blocks] maps each block of the map to its block of this axis, lattice-major."""
        per_lattice = _blocks_per_lattice(length, window, queries)
        lattice, tile = (part[:, None] for part in divide_with_remainder(block, per_lattice))
        points = (length - lattice + window.dilation - 1) // window.dilation
        place = tile * queries + torch.arange(queries, device=block.device)
        query = torch.minimum(place, points - 1)
        start, end = window.bounds(query, points)
        key = start[:, :1] + torch.arange(keys, device=block.device)
        step = key[:, None] - query[..., None]
        return cls(
            query=lattice + window.dilation * query,
            key=lattice + window.dilation * torch.minimum(key, points - 1),
            valid=place < points,
            allowed=(key[:, None] >= start[..., None]) & (key[:, None] < end[..., None]),
            offset=(step + window.size - 1).clamp(0, 2 * window.size - 2),
        )


def _blocks_per_lattice(length: int, window: Window, queries: int) -> int:
    # Not -(-a // b): ONNX integer division rounds towards zero, so a negative quotient would be off by one.
    return ((length + window.dilation - 1) // window.dilation + queries - 1) // queries


def _outer(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Reshape one [blocks, queries_a, keys_a] per axis a, to broadcast over [blocks, queries..., keys...]."""
    rank = len(tensors)
    shaped = []
    for axis, tensor in enumerate(tensors):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = tensor.shape[1:]
        shaped.append(tensor.reshape(-1, *shape))
    return shaped


@dataclass(frozen=True)
class Blocks:
    """Map the rows of a flattened map to blocks, and mark which pairs of a block attend."""

    windows: Windows
    axes: tuple[_Axis, ...]
    shape: tuple[int, int, int]
    """Number of blocks, queries per block, keys per block."""
    query: Tensor
    """[blocks * queries]: token of each query, block-major."""
    key: Tensor
    """[blocks * keys]: token of each key, block-major."""
    slot: Tensor
    """[tokens]: index of each token in `query`."""

    @classmethod
    def cut(cls, spatial: Sequence[int], windows: Windows, device: torch.device, *, symbolic: bool = False) -> "Blocks":
        """Cut a map of shape `spatial`; with `symbolic`, its sizes may be symbols, and no code branches on them."""
        lengths = [_block_lengths(n, w, symbolic=symbolic) for n, w in zip(spatial, windows, strict=True)]
        per_lattice = [_blocks_per_lattice(n, w, q) for n, w, (q, _) in zip(spatial, windows, lengths, strict=True)]
        counts = [w.dilation * count for w, count in zip(windows, per_lattice, strict=True)]
        total = math.prod(counts)
        # With symbolic sizes, append a copy of the last block: exporting specialises a count that may be 1.
        block = torch.arange(total + int(symbolic), device=device).clamp(max=total - 1)
        token = torch.arange(math.prod(spatial), device=device)

        axes, query, key = [], torch.zeros_like(block)[:, None], torch.zeros_like(block)[:, None]
        token_block, token_place = torch.zeros_like(token), torch.zeros_like(token)
        for a, (length, window, (queries, keys)) in enumerate(zip(spatial, windows, lengths, strict=True)):
            _, axis_block = divide_with_remainder(block // math.prod(counts[a + 1 :]), counts[a])
            axis = _Axis.cut(length, window, queries, keys, axis_block)
            axes.append(axis)
            query = (query[..., None] * length + axis.query[:, None]).flatten(1)
            key = (key[..., None] * length + axis.key[:, None]).flatten(1)
            _, position = divide_with_remainder(token // math.prod(spatial[a + 1 :]), length)
            point, lattice = divide_with_remainder(position, window.dilation)
            tile, place = divide_with_remainder(point, queries)
            token_block = token_block * counts[a] + lattice * per_lattice[a] + tile
            token_place = token_place * queries + place
        shape = (block.shape[0], query.shape[1], key.shape[1])
        slot = token_block * shape[1] + token_place
        return cls(windows, tuple(axes), shape, query.flatten(), key.flatten(), slot)

    def cut_queries(self, tensor: Tensor) -> Tensor:
        """Gather [batch, tokens, heads, dim] into [batch, heads, blocks, queries, dim]."""
        blocks, queries, _ = self.shape
        return tensor.index_select(1, self.query).unflatten(1, (blocks, queries)).permute(0, 3, 1, 2, 4)

    def cut_keys(self, tensor: Tensor) -> Tensor:
        """Gather [batch, tokens, heads, dim] into [batch, heads, blocks, keys, dim]."""
        blocks, _, keys = self.shape
        return tensor.index_select(1, self.key).unflatten(1, (blocks, keys)).permute(0, 3, 1, 2, 4)

    def join_queries(self, tensor: Tensor) -> Tensor:
        """Gather each token's row of [batch, heads, blocks, queries, dim] into [batch, tokens, heads, dim]."""
        return tensor.permute(0, 2, 3, 1, 4).flatten(1, 2).index_select(1, self.slot)

    def sum_keys(self, tensor: Tensor) -> Tensor:
        """Sum all copies of a token in [batch, heads, blocks, keys, dim] into [batch, tokens, heads, dim]."""
        rows = tensor.permute(0, 2, 3, 1, 4).flatten(1, 2)
        shape = (rows.shape[0], self.slot.shape[0], *rows.shape[2:])
        return rows.new_zeros(shape).index_add_(1, self.key, rows)

    def mask(self, *, valid_only: bool = False) -> Tensor:
        """Return [blocks, queries, keys], whether each pair attends.

        With `valid_only`, padding queries are masked out, so that they do not contribute to a sum over queries.
        """
        allowed = [axis.allowed & axis.valid[..., None] if valid_only else axis.allowed for axis in self.axes]
        return self._flatten_pairs(functools.reduce(torch.logical_and, _outer(allowed)))

    def table_index(self) -> Tensor:
        """Return [blocks, queries, keys], the index of each pair into the flattened relative position table."""
        index = torch.zeros((), dtype=torch.long, device=self.slot.device)
        for offset, window in zip(_outer([axis.offset for axis in self.axes]), self.windows, strict=True):
            index = index * (2 * window.size - 1) + offset
        return self._flatten_pairs(index)

    def _flatten_pairs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)


@functools.lru_cache(maxsize=256)
def cached_blocks(spatial: tuple[int, ...], windows: Windows, device: torch.device) -> Blocks:
    """Call `Blocks.cut` for static sizes and cache the result: a model requests the same few maps at every call."""
    return Blocks.cut(spatial, windows, device)
