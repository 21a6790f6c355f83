"""Compute neighborhood attention with standard PyTorch operators: blocks of queries against haloed blocks of keys.

A block of queries attends densely to all keys that its queries see (`_blocks`), under one additive bias that encodes
the window and the relative position table. This takes two batched matrix products between gathers; gathering the keys
of each query separately would copy every key once per window. This path exports (no custom operator, no branch on a
size), supports functional transforms, and serves where neither Triton nor a compiled kernel is available.

The backward pass is explicit because a custom operator cannot call autograd internally. It recomputes the probabilities
one image at a time, so that training keeps no scores in memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._compat import once_a_trace, size_key
from ._blocks import Blocks, cached_blocks
from ._geometry import Windows


def _tokens(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Flatten [batch, *spatial, heads, dim] to [batch, tokens, heads, dim] and cast it."""
    return tensor.to(dtype).flatten(1, -3)


def _scores(blocks: Blocks, query: Tensor, key: Tensor, scale: float) -> Tensor:
    return blocks.cut_queries(query * scale) @ blocks.cut_keys(key).transpose(-1, -2)


def _bias(rpb: Tensor | None, mask: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [heads or 1, blocks, queries, keys]: the table entry where a pair attends, minus infinity elsewhere."""
    if rpb is None:
        bias = torch.zeros((1, *mask.shape), dtype=dtype, device=mask.device)
    else:
        bias = rpb.to(dtype).flatten(1)[:, index]
    return bias.masked_fill(~mask, float("-inf"))


def _traced_blocks(spatial: Sequence[int], windows: Windows, device: torch.device) -> tuple[Blocks, Tensor, Tensor]:
    """Return blocks, mask and table index of a map whose sizes may be symbolic, shared by equal layers while exporting.

    Symbolic arithmetic dominates the export time, and the layers of a stage share their map.
    """

    def make() -> tuple[Blocks, Tensor, Tensor]:
        blocks = Blocks.cut(spatial, windows, device, symbolic=True)
        return blocks, blocks.mask(), blocks.table_index()

    return once_a_trace((tuple(size_key(n) for n in spatial), windows, device), make)


def forward(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, windows: Windows, scale: float, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute output [batch, *spatial, heads, head_dim] and natural log-sum-exp [batch, *spatial, heads] with autograd.

    Sizes may be symbolic, as while exporting. The log-sum-exp is computed only on request, because tracing it is slow.
    """
    spatial, dtype = query.shape[1:-2], torch.promote_types(query.dtype, torch.float32)
    blocks, mask, index = _traced_blocks(spatial, windows, query.device)
    q, k, v = (_tokens(tensor, dtype) for tensor in (query, key, value))
    scores = _scores(blocks, q, k, scale) + _bias(rpb, mask, index, dtype)
    out = blocks.join_queries(scores.softmax(-1) @ blocks.cut_keys(v)).to(query.dtype).unflatten(1, spatial)
    if not with_lse:
        return out, None
    lse = blocks.join_queries(scores.logsumexp(-1, keepdim=True))
    return out, lse.squeeze(-1).unflatten(1, spatial)


def forward_by_image(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `forward` for static sizes, without autograd, holding the scores of one image at a time."""
    spatial, dtype = query.shape[1:-2], torch.promote_types(query.dtype, torch.float32)
    blocks = cached_blocks(tuple(spatial), windows, query.device)
    bias = _bias(rpb, blocks.mask(), blocks.table_index(), dtype)
    q, k, v = (_tokens(tensor, dtype) for tensor in (query, key, value))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for i in range(q.shape[0]):
        image = slice(i, i + 1)
        scores = _scores(blocks, q[image], k[image], scale).add_(bias)
        norm = scores.logsumexp(-1, keepdim=True)
        out[image] = blocks.join_queries(scores.sub_(norm).exp_() @ blocks.cut_keys(v[image]))
        lse[image] = blocks.join_queries(norm).squeeze(-1)
    return out.to(query.dtype).view(query.shape), lse.view(query.shape[:-1])


def backward_by_image(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    windows: Windows,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key, value and table.

    `delta` [batch, *spatial, heads] is sum(out * grad_out) - grad_lse.
    """
    dtype = lse.dtype
    blocks = cached_blocks(tuple(query.shape[1:-2]), windows, query.device)
    index = blocks.table_index()
    bias = _bias(rpb, blocks.mask(valid_only=True), index, dtype)
    q, k, v, g = (_tokens(tensor, dtype) for tensor in (query, key, value, grad_out))
    norm, delta = (tensor.flatten(1, -2).unsqueeze(-1) for tensor in (lse, delta))
    grad_q, grad_k, grad_v = (torch.empty_like(tensor) for tensor in (q, k, v))
    grad_bias = torch.zeros_like(bias) if rpb is not None else None
    for i in range(q.shape[0]):
        image = slice(i, i + 1)
        weights = _scores(blocks, q[image], k[image], scale).add_(bias)
        weights.sub_(blocks.cut_queries(norm[image])).exp_()
        g_cut = blocks.cut_queries(g[image])
        grad_v[image] = blocks.sum_keys(weights.transpose(-1, -2) @ g_cut)
        grad_scores = g_cut @ blocks.cut_keys(v[image]).transpose(-1, -2)
        grad_scores.sub_(blocks.cut_queries(delta[image])).mul_(weights)
        if grad_bias is not None:
            grad_bias += grad_scores[0]
        grad_q[image] = blocks.join_queries(grad_scores @ blocks.cut_keys(k[image])).mul_(scale)
        grad_k[image] = blocks.sum_keys(grad_scores.transpose(-1, -2) @ blocks.cut_queries(q[image])).mul_(scale)
    grads = [grad.to(query.dtype).view(query.shape) for grad in (grad_q, grad_k, grad_v)]
    if rpb is None or grad_bias is None:
        return grads[0], grads[1], grads[2], None
    table = torch.zeros_like(rpb, dtype=dtype).flatten(1)
    table.index_add_(1, index.flatten(), grad_bias.flatten(1))
    return grads[0], grads[1], grads[2], table.view(rpb.shape).to(rpb.dtype)
