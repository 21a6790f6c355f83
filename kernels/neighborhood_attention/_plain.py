"""Neighborhood attention in standard PyTorch operators: blocks of queries against their haloed blocks of keys.

Each axis is cut into blocks (`_geometry.axis_blocks`); a block of queries attends densely to the run of keys that its
queries see between them, under one additive bias that carries the window and the relative position table. That is two
batched matrix products and two gathers, about eight times faster than gathering each query's own keys, and it is the
path that exports (no operator of ours, no branch on a size) and that functional transforms see.

The backward pass is written out because a custom operator cannot call autograd inside. It recomputes the probabilities,
one image at a time, so that training keeps no score in memory.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ._geometry import Window, axis_blocks, block_lengths, cached_axis_blocks


def _spread(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[blocks_i, queries_i, keys_i] per axis -> the same, broadcastable over [blocks..., queries..., keys...]."""
    rank = len(tensors)
    spread = []
    for axis, tensor in enumerate(tensors):
        shape = [1] * (3 * rank)
        for part in range(3):
            shape[part * rank + axis] = tensor.shape[part]
        spread.append(tensor.reshape(shape))
    return spread


def _flatten_pairs(tensor: Tensor, rank: int) -> Tensor:
    """[..., blocks..., queries..., keys...] -> [..., blocks, queries, keys]."""
    first = tensor.dim() - 3 * rank
    return tensor.flatten(first + 2 * rank).flatten(first + rank, first + 2 * rank - 1).flatten(first, first + rank - 1)


def _cut(tensor: Tensor, positions: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """[batch, *spatial, heads, dim] -> [batch, heads, blocks, points of a block, dim]."""
    rank = len(positions)
    for axis, (position, count) in enumerate(zip(positions, counts, strict=True)):
        tensor = tensor.index_select(1 + 2 * axis, position).unflatten(1 + 2 * axis, (-1, count))
    blocks, points = range(1, 2 * rank + 1, 2), range(2, 2 * rank + 1, 2)
    tensor = tensor.permute(0, 2 * rank + 1, *blocks, *points, 2 * rank + 2)
    return tensor.flatten(2 + rank, 1 + 2 * rank).flatten(2, 1 + rank)


def _lay_out(tensor: Tensor, block_counts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The inverse arrangement of `_cut`: [batch, heads, blocks, points, dim] -> [batch, *(blocks * points), heads, dim]."""
    rank = len(counts)
    tensor = tensor.unflatten(3, counts).unflatten(2, block_counts)
    order = [place for axis in range(rank) for place in (2 + axis, 2 + rank + axis)]
    tensor = tensor.permute(0, *order, 1, 2 + 2 * rank)
    for axis in range(rank):
        tensor = tensor.flatten(1 + axis, 2 + axis)
    return tensor


class _Cut:
    """The blocks of one call: how tensors are cut into them and put back."""

    def __init__(
        self, spatial: Sequence[int], windows: Sequence[Window], device: torch.device, *, symbolic: bool
    ) -> None:
        self.windows = windows
        lengths = [block_lengths(n, window, symbolic=symbolic) for n, window in zip(spatial, windows, strict=True)]
        self.queries, self.keys = ([pair[i] for pair in lengths] for i in (0, 1))
        if symbolic:
            self.axes = [
                axis_blocks(n, window, *pair, device) for n, window, pair in zip(spatial, windows, lengths, strict=True)
            ]
        else:
            self.axes = [cached_axis_blocks(n, window, device) for n, window in zip(spatial, windows, strict=True)]

    def cut_queries(self, tensor: Tensor) -> Tensor:
        return _cut(tensor, [axis.query for axis in self.axes], self.queries)

    def cut_keys(self, tensor: Tensor) -> Tensor:
        return _cut(tensor, [axis.key for axis in self.axes], self.keys)

    def join_queries(self, tensor: Tensor) -> Tensor:
        """Each position's own row, [batch, *spatial, heads, dim]."""
        tensor = _lay_out(tensor, [axis.allowed.shape[0] for axis in self.axes], self.queries)
        for i, axis in enumerate(self.axes):
            tensor = tensor.index_select(1 + i, axis.slot)
        return tensor

    def sum_keys(self, tensor: Tensor, spatial: Sequence[int]) -> Tensor:
        """The sum over all copies of each position, [batch, *spatial, heads, dim]: the transpose of `cut_keys`."""
        tensor = _lay_out(tensor, [axis.allowed.shape[0] for axis in self.axes], self.keys)
        for i, (axis, length) in enumerate(zip(self.axes, spatial, strict=True)):
            shape = [*tensor.shape[: 1 + i], length, *tensor.shape[2 + i :]]
            tensor = tensor.new_zeros(shape).index_add_(1 + i, axis.key, tensor)
        return tensor

    def bias(self, rpb: Tensor | None, dtype: torch.dtype, *, own_only: bool = False) -> Tensor:
        """[heads or 1, blocks, queries, keys]: the table's entry inside the window, minus infinity outside.

        `own_only`: minus infinity also for the queries that repeat another, so that they add to no sum over queries.
        """
        allowed = [axis.allowed & axis.own[..., None] if own_only else axis.allowed for axis in self.axes]
        mask = _flatten_pairs(functools.reduce(torch.logical_and, _spread(allowed)), len(self.axes))
        if rpb is None:
            bias = torch.zeros((1, *mask.shape), dtype=dtype, device=mask.device)
        else:
            index = self.table_index()
            bias = rpb.to(dtype).flatten(1).index_select(1, index.flatten()).unflatten(1, index.shape)
        return bias.masked_fill(~mask, float("-inf"))

    def table_index(self) -> Tensor:
        """[blocks, queries, keys]: where each pair finds its entry in the flattened relative position table."""
        index = torch.zeros((), dtype=torch.long, device=self.axes[0].offset.device)
        for offset, window in zip(_spread([axis.offset for axis in self.axes]), self.windows, strict=True):
            index = index * (2 * window.size - 1) + offset
        return _flatten_pairs(index, len(self.axes))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    windows: Sequence[Window],
    scale: float,
    *,
    symbolic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [batch, *spatial, heads, head_dim] and natural log-sum-exp [batch, *spatial, heads], differentiable.

    `symbolic`: sizes may be symbols and nothing may be cached, as while exporting.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    cut = _Cut(query.shape[1:-2], windows, query.device, symbolic=symbolic)
    scores = cut.cut_queries(query.to(dtype) * scale) @ cut.cut_keys(key.to(dtype)).transpose(-1, -2)
    scores = scores + cut.bias(rpb, dtype)
    lse = scores.logsumexp(-1, keepdim=True)
    out = cut.join_queries((scores - lse).exp() @ cut.cut_keys(value.to(dtype)))
    return out.to(query.dtype), cut.join_queries(lse).squeeze(-1)


def forward_by_image(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, windows: Sequence[Window], scale: float
) -> tuple[Tensor, Tensor]:
    """`forward`, holding the scores of one image at a time."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    cut = _Cut(query.shape[1:-2], windows, query.device, symbolic=False)
    bias = cut.bias(rpb, dtype)
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    for i in range(query.shape[0]):
        one = slice(i, i + 1)
        scores = cut.cut_queries(query[one].to(dtype) * scale) @ cut.cut_keys(key[one].to(dtype)).transpose(-1, -2)
        scores += bias
        norm = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(norm).exp_()
        out[one] = cut.join_queries(weights @ cut.cut_keys(value[one].to(dtype)))
        lse[one] = cut.join_queries(norm).squeeze(-1)
    return out, lse


def backward_by_image(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    windows: Sequence[Window],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and table. `delta` [batch, *spatial, heads] is sum(out * grad_out) - grad_lse."""
    dtype, spatial = lse.dtype, query.shape[1:-2]
    cut = _Cut(spatial, windows, query.device, symbolic=False)
    bias = cut.bias(rpb, dtype, own_only=True)
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    grad_bias = torch.zeros_like(bias) if rpb is not None else None
    for i in range(query.shape[0]):
        one = slice(i, i + 1)
        q, g = (cut.cut_queries(tensor[one].to(dtype)) for tensor in (query, grad_out))
        k, v = (cut.cut_keys(tensor[one].to(dtype)) for tensor in (key, value))
        weights = (q * scale) @ k.transpose(-1, -2)
        weights += bias
        weights.sub_(cut.cut_queries(lse[one].unsqueeze(-1))).exp_()
        grads[2][one] = cut.sum_keys(weights.transpose(-1, -2) @ g, spatial)
        grad_scores = g @ v.transpose(-1, -2)
        grad_scores -= cut.cut_queries(delta[one].unsqueeze(-1))
        grad_scores *= weights
        if grad_bias is not None:
            grad_bias += grad_scores[0]
        grads[0][one] = cut.join_queries(grad_scores @ k).mul_(scale)
        grads[1][one] = cut.sum_keys(grad_scores.transpose(-1, -2) @ q, spatial).mul_(scale)
    grad_rpb = None
    if rpb is not None and grad_bias is not None:
        index = cut.table_index().flatten()
        flat = torch.zeros_like(rpb, dtype=dtype).flatten(1)
        grad_rpb = flat.index_add_(1, index, grad_bias.flatten(1)).view(rpb.shape).to(rpb.dtype)
    return grads[0], grads[1], grads[2], grad_rpb
