"""Token reduction in PyTorch operators: for the CPU, exporters, TorchScript, functional transforms and autograd.

The choice of operators never depends on the number of tokens, so an exported program works for any number.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import is_exporting
from .._runtime import wants_plain_ops


def _wide(x: Tensor) -> Tensor:
    """Convert half precision to float32, in which all sums and comparisons are computed."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def _descending(score: Tensor) -> Tensor:
    """Return the indices that sort each row of [batch, n] in descending order; ties keep the order of their indices.

    ONNX has no stable sort. Exported programs rank each element by counting those before it, which takes n^2
    comparisons but does not fix n.
    """
    if not is_exporting():
        return torch.sort(score, dim=1, descending=True, stable=True)[1]
    index = torch.arange(score.shape[1], device=score.device)
    this, other = score.unsqueeze(2), score.unsqueeze(1)
    before = (other > this) | ((other == this) & (index < index.unsqueeze(1)))
    return torch.zeros_like(score, dtype=torch.int64).scatter(1, before.sum(2), index.expand(score.shape))


def at_most_half(tokens: int, r: int, num_prefix: int) -> int:
    """Limit r to half of the tokens after the prefix."""
    half = (tokens - num_prefix) // 2
    if torch.jit.is_scripting():
        return min(r, half)
    else:
        if r == 0:
            return r
        # sym_min avoids a guard on which one is smaller while exporting; Dynamo of torch 2.11 rejects plain integers.
        return min(r, half) if isinstance(half, int) else torch.sym_min(r, half)  # pyright: ignore[reportReturnType]


def match(metric: Tensor, r: int, num_prefix: int) -> Tensor:
    """Compute `bipartite_match`; r may be larger than the tokens allow."""
    metric = _wide(metric.detach())
    if metric.dim() == 4:
        metric = metric.mean(1)
    batch, tokens = metric.shape[0], metric.shape[1]
    position = torch.arange(tokens, device=metric.device)
    r = at_most_half(tokens, r, num_prefix)
    if r == 0:
        return position.repeat(batch, 1)
    odd = num_prefix % 2
    of_a, of_b = num_prefix + odd, num_prefix + 1 - odd  # the first even and the first odd token after the prefix
    a, b = metric[:, of_a::2], F.normalize(metric[:, of_b::2], dim=-1)
    similarity, partner = torch.max(a @ b.transpose(1, 2), 2)
    best = _descending(similarity / torch.linalg.vector_norm(a, dim=-1).clamp(min=1e-12))
    merges = torch.zeros_like(best, dtype=torch.bool).scatter(1, best, (position[: a.shape[1]] < r).expand(best.shape))
    first_b = num_prefix + a.shape[1] - r
    slot_a = torch.where(merges, first_b + partner, num_prefix - 1 + (~merges).cumsum(1))
    prefix, slot_b = position[:num_prefix], first_b + position[: b.shape[1]]
    slots = torch.cat([prefix.expand(batch, -1), slot_a, slot_b.expand(batch, -1)], 1)
    # Interleaved by an index, since an assignment to every second element has no rule under vmap.
    order = torch.where((position - of_a) % 2 == 0, (position - of_a) // 2, a.shape[1] + (position - of_b) // 2)
    return slots.index_select(1, torch.where(position < num_prefix, position, num_prefix + order))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Select rows of x [batch, n, dim] by index [batch, m]; return [batch, m, dim].

    `gather` reads one index per element. `index_select` of whole rows is ten times as fast, but exporters would fix the
    number of rows.
    """
    batch, tokens, dim = x.shape
    if wants_plain_ops():
        return x.gather(1, index.unsqueeze(2).expand(-1, -1, dim))
    first = torch.arange(batch, device=x.device) * tokens
    return x.flatten(0, 1).index_select(0, (index + first.unsqueeze(1)).flatten()).view(batch, index.shape[1], dim)


def merge(x: Tensor, slot: Tensor, length: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `merge_tokens`, normalising the weights before the sum so that the weight of an unmerged token is 1."""
    if size is None:
        size = torch.ones(slot.shape, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    if wants_plain_ops():
        return _merge_traceably(x, slot, length, size)
    batch = x.shape[0]
    end = batch * length  # the index of dropped tokens: they sort last and belong to no bag
    first = torch.arange(0, end, length, device=slot.device).unsqueeze(1)
    flat = torch.where(slot < 0, end, slot + first).flatten()
    by_slot, order = torch.sort(flat, stable=True)
    bags = torch.searchsorted(by_slot, torch.arange(end + 1, device=slot.device))
    total = size.new_zeros(end + 1).scatter_add(0, flat, size.flatten())
    weight = size.flatten() / total.gather(0, flat)
    rows = _wide(x).flatten(0, 1)
    weight = weight.gather(0, order).to(rows.dtype)
    merged = F.embedding_bag(order, rows, bags, mode="sum", per_sample_weights=weight, include_last_offset=True)
    return merged.unflatten(0, [batch, length]).to(x.dtype), total[:-1].unflatten(0, [batch, length])


def _merge_traceably(x: Tensor, slot: Tensor, length: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `merge` with operators that ONNX and forward-mode differentiation support."""
    slot = torch.where(slot < 0, length, slot)  # dropped tokens share one extra slot, which is cut off
    total = size.new_zeros(x.shape[0], length + 1).scatter_add(1, slot, size)
    weight = size / total.gather(1, slot)
    wide = _wide(x)
    merged = wide.new_zeros(x.shape[0], length + 1, x.shape[2]).scatter_add(
        1, slot.unsqueeze(2).expand(-1, -1, x.shape[2]), wide * weight.unsqueeze(2).to(wide.dtype)
    )
    return merged[:, :length].to(x.dtype), total[:, :length]


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Compute `unmerge_tokens`."""
    is_present = slot >= 0
    return torch.where(is_present.unsqueeze(2), _rows(x, slot.clamp(min=0)), 0.0).to(x.dtype)


def scatter(x: Tensor, slot: Tensor, canvas: Tensor) -> Tensor:
    """Compute `scatter_tokens`."""
    is_present = slot >= 0
    return torch.where(is_present.unsqueeze(2), _rows(x, slot.clamp(min=0)), canvas)


def keep(x: Tensor, score: Tensor, count: int, num_prefix: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """Compute `keep_tokens`."""
    batch, candidates = score.shape[0], score.shape[1]
    order = _descending(_wide(score.detach()))
    position = torch.arange(candidates, device=x.device)
    places = torch.where(position < count, num_prefix + position, -1).expand(batch, -1)
    slot = torch.zeros_like(order).scatter(1, order, places)
    of_prefix = torch.arange(num_prefix, device=x.device).expand(batch, -1)
    # One gather for both: exporters would assume that a separate length of the kept tokens is never 1.
    parts = [_rows(x, torch.cat([of_prefix, num_prefix + order], 1)[:, : num_prefix + count])]
    if fuse:
        wide = _wide(x[:, num_prefix:])
        weight = torch.where(slot < 0, score.to(wide.dtype), 0.0)
        parts.append((weight.unsqueeze(1) @ wide).to(x.dtype))
    return torch.cat(parts, 1), torch.cat([of_prefix, slot], 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float) -> Tensor:
    bias = None if log_size is None else log_size[:, None, None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _probabilities(q: Tensor, k: Tensor, log_size: Tensor | None, scale: float) -> Tensor:
    """Return the rows of the attention matrix for these queries, in at least float32."""
    logits = (_wide(q) * scale) @ _wide(k).transpose(2, 3)
    if log_size is not None:
        logits = logits + log_size[:, None, None].to(logits.dtype)
    return logits.softmax(3)


def attend_row(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute `attention_with_class_row`."""
    row = _probabilities(q[:, :, :1], k, log_size, scale).squeeze(2)
    return _attend(q, k, v, log_size, scale), row


def attend_columns(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute `attention_with_column_sums` for a few queries at a time, or for all at once if loops are not allowed."""
    out = _attend(q, k, v, log_size, scale)
    if wants_plain_ops():
        return out, _probabilities(q, k, log_size, scale).sum(2)
    tile = 128
    sums = _probabilities(q[:, :, :tile], k, log_size, scale).sum(2)
    for first in range(tile, q.shape[2], tile):
        sums = sums + _probabilities(q[:, :, first : first + tile], k, log_size, scale).sum(2)
    return out, sums
