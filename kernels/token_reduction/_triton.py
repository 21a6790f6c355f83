# pyright: basic, reportCallIssue=false, reportArgumentType=false
# pyright understands neither kernel launches nor that Triton turns plain numbers into constants.
"""Triton kernels that match, merge and keep tokens.

* `_partner_kernel` runs one program per tile of even tokens. It loops over the odd tokens in tiles, sums the heads and
  normalises while loading, and keeps only the largest similarity so far: similarities are never stored in memory.
* `_slot_kernel` runs one program per image. It ranks each pair by counting the pairs before it: these independent
  comparisons take less time than the sequential steps of a sort, and the comparison defines how ties are resolved.
* Merging gathers. `_members_kernel` lists the tokens of each slot, also by counting, and `_merge_kernel` sums them, one
  program per tile of slots. It needs no atomics, and each sum is in the order of the tokens.
* Keeping scatters. `_rank_kernel` computes the slot of each token, and `_keep_kernel` writes the token there. One extra
  program per block of channels sums the dropped tokens.

Scores and sums are float32. Similarities use full float32 products, because TF32 cannot resolve their differences.
These kernels have not been timed on a GPU; the compiler reports no register spills (tests/kernels/aot_compile.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST_METRIC, MOST_TOKENS = 128, 2048
"""The most channels of a metric that fit into registers, and the most tokens per image whose pairs one program can
rank; larger inputs use the plain operators."""


@triton.jit
def _metric_tile(p_x, o_n, m_n, heads, s_h, s_n, D: tl.constexpr, BD: tl.constexpr):
    """Load tokens as [tokens, BD] in float32, summed over the heads: cosine similarity is invariant to scale."""
    o_d = tl.arange(0, BD)
    o_x = o_n.to(tl.int64)[:, None] * s_n + o_d[None, :]
    m_x = m_n[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    for i_h in range(1, heads):
        b_x += tl.load(p_x + i_h * s_h + o_x, mask=m_x, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _inverse_norm(b_x):
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), 1e-12)


@triton.jit
def _partner_kernel(
    p_x, p_best, p_partner, heads, s_b, s_h, s_n, first_a, count_a, first_b, count_b,
    D: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Find for each even token the largest cosine similarity to an odd token, and the lowest index that attains it."""
    i_a, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_x += i_b * s_b
    o_a = i_a * BA + tl.arange(0, BA)
    m_a = o_a < count_a
    b_a = _metric_tile(p_x, first_a + 2 * o_a, m_a, heads, s_h, s_n, D, BD)
    b_best = tl.full([BA], float("-inf"), tl.float32)
    b_partner = tl.zeros([BA], tl.int32)
    for start in range(0, count_b, BB):
        o_b = start + tl.arange(0, BB)
        m_b = o_b < count_b
        b_b = _metric_tile(p_x, first_b + 2 * o_b, m_b, heads, s_h, s_n, D, BD)
        b_b *= _inverse_norm(b_b)[:, None]
        b_s = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
        b_s = tl.where(m_b[None, :] & (b_s == b_s), b_s, float("-inf"))  # NaN cannot be ordered
        b_max = tl.max(b_s, 1)
        b_index = tl.min(tl.where(b_s == b_max[:, None], o_b[None, :], 2147483647), 1)
        is_better = b_max > b_best
        b_best = tl.where(is_better, b_max, b_best)
        b_partner = tl.where(is_better, b_index, b_partner)
    b_best *= _inverse_norm(b_a)
    b_best = tl.where(b_best == b_best, b_best, float("-inf"))
    tl.store(p_best + i_b * count_a + o_a, b_best, mask=m_a)
    tl.store(p_partner + i_b * count_a + o_a, b_partner, mask=m_a)


@triton.jit
def _slot_kernel(
    p_best, p_partner, p_slot, tokens, prefix, r, first_a, count_a, first_b, count_b,
    PAIRS: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Compute all slots of an image, merging the r best pairs."""
    i_b = tl.program_id(0).to(tl.int64)
    p_best += i_b * count_a
    p_slot += i_b * tokens
    o_i = tl.arange(0, PAIRS)
    m_a = o_i < count_a
    b_best = tl.load(p_best + o_i, mask=m_a, other=float("-inf"))
    b_rank = tl.zeros([PAIRS], tl.int32)
    for start in range(0, count_a, BJ):
        o_j = start + tl.arange(0, BJ)
        b_other = tl.load(p_best + o_j, mask=o_j < count_a, other=float("-inf"))[None, :]
        is_before = (b_other > b_best[:, None]) | ((b_other == b_best[:, None]) & (o_j[None, :] < o_i[:, None]))
        b_rank += tl.sum((is_before & (o_j < count_a)[None, :]).to(tl.int32), 1)
    merges = m_a & (b_rank < r)
    b_partner = tl.load(p_partner + i_b * count_a + o_i, mask=m_a, other=0)
    first_slot = prefix + count_a - r  # of the odd tokens
    b_stays = prefix - 1 + tl.cumsum(tl.where(merges, 0, 1), 0)
    tl.store(p_slot + first_a + 2 * o_i, tl.where(merges, first_slot + b_partner, b_stays).to(tl.int64), mask=m_a)
    tl.store(p_slot + first_b + 2 * o_i, (first_slot + o_i).to(tl.int64), mask=o_i < count_b)
    tl.store(p_slot + o_i, o_i.to(tl.int64), mask=o_i < prefix)


@triton.jit
def _members_kernel(p_slot, p_order, p_start, tokens, length, BI: tl.constexpr, BJ: tl.constexpr):
    """Sort the tokens by slot, dropped ones last, into [tokens], and store the start of each slot in [length + 1]."""
    i_i, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_slot += i_b * tokens
    o_i = i_i * BI + tl.arange(0, BI)
    b_slot = tl.load(p_slot + o_i, mask=o_i < tokens, other=-1).to(tl.int32)
    b_slot = tl.where(b_slot < 0, length, b_slot)
    b_place, b_start = tl.zeros([BI], tl.int32), tl.zeros([BI], tl.int32)
    for start in range(0, tokens, BJ):
        o_j = start + tl.arange(0, BJ)
        b_other = tl.load(p_slot + o_j, mask=o_j < tokens, other=-1).to(tl.int32)
        b_other = tl.where(b_other < 0, length, b_other)[None, :]
        m_j = (o_j < tokens)[None, :]
        is_before = (b_other < b_slot[:, None]) | ((b_other == b_slot[:, None]) & (o_j[None, :] < o_i[:, None]))
        b_place += tl.sum((is_before & m_j).to(tl.int32), 1)
        b_start += tl.sum(((b_other < o_i[:, None]) & m_j).to(tl.int32), 1)
    tl.store(p_order + i_b * tokens + b_place, o_i, mask=o_i < tokens)
    tl.store(p_start + i_b * (length + 1) + o_i, b_start, mask=o_i <= length)


@triton.jit
def _merge_kernel(
    p_x, p_size, p_order, p_start, p_out, p_total, tokens, length, dim, s_xb, s_xn,
    HAS_SIZE: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the weighted means of the tokens of BS slots, for BC channels."""
    i_s, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_x += i_b * s_xb
    p_size += i_b * tokens
    p_order += i_b * tokens
    p_start += i_b * (length + 1)
    o_s, o_c = i_s * BS + tl.arange(0, BS), i_c * BC + tl.arange(0, BC)
    m_s, m_c = o_s < length, o_c < dim
    b_begin = tl.load(p_start + o_s, mask=m_s, other=0)
    b_count = tl.load(p_start + o_s + 1, mask=m_s, other=0) - b_begin
    most = tl.max(b_count, 0)
    b_total = b_count.to(tl.float32)
    if HAS_SIZE:
        b_total = tl.zeros([BS], tl.float32)
        for i in range(most):
            m_n = i < b_count
            o_n = tl.load(p_order + b_begin + i, mask=m_n, other=0)
            b_total += tl.load(p_size + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_out = tl.zeros([BS, BC], tl.float32)
    for i in range(most):
        m_n = i < b_count
        o_n = tl.load(p_order + b_begin + i, mask=m_n, other=0)
        b_weight = tl.where(m_n, 1.0, 0.0)
        if HAS_SIZE:
            b_weight = tl.load(p_size + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_weight /= tl.where(m_n, b_total, 1.0)  # exactly 1 for an unmerged token
        o_x = o_n.to(tl.int64)[:, None] * s_xn + o_c[None, :]
        b_x = tl.load(p_x + o_x, mask=m_n[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_out += b_weight[:, None] * b_x
    o_out = (i_b * length + o_s)[:, None] * dim + o_c[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_s[:, None] & m_c[None, :])
    if i_c == 0:
        tl.store(p_total + i_b * length + o_s, b_total.to(p_total.dtype.element_ty), mask=m_s)


@triton.jit
def _load_score(p_score, o_i, m_i):
    b_score = tl.load(p_score + o_i, mask=m_i, other=0.0).to(tl.float32)
    return tl.where(b_score == b_score, b_score, float("inf"))  # NaN sorts first, as in PyTorch


@triton.jit
def _rank_kernel(p_score, p_slot, tokens, prefix, keep, BI: tl.constexpr, BJ: tl.constexpr):
    """Compute the slot of each token: its own position in the prefix, by rank for the `keep` best, otherwise -1."""
    i_i, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    candidates = tokens - prefix
    p_score += i_b * candidates
    o_n = i_i * BI + tl.arange(0, BI)
    o_i = o_n - prefix
    b_score = _load_score(p_score, o_i, (o_i >= 0) & (o_n < tokens))[:, None]
    b_rank = tl.zeros([BI], tl.int32)
    for start in range(0, candidates, BJ):
        o_j = start + tl.arange(0, BJ)
        b_other = _load_score(p_score, o_j, o_j < candidates)[None, :]
        is_before = (b_other > b_score) | ((b_other == b_score) & (o_j[None, :] < o_i[:, None]))
        b_rank += tl.sum((is_before & (o_j < candidates)[None, :]).to(tl.int32), 1)
    b_slot = tl.where(o_i < 0, o_n, tl.where(b_rank < keep, prefix + b_rank, -1))
    tl.store(p_slot + i_b * tokens + o_n, b_slot.to(tl.int64), mask=o_n < tokens)


@triton.jit
def _keep_kernel(
    p_x, p_score, p_slot, p_out, tokens, prefix, length, dim, s_xb, s_xn,
    FUSE: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Copy each kept token to its slot; with FUSE, the last program sums the dropped tokens."""
    i_n, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_x += i_b * s_xb
    p_slot += i_b * tokens
    p_score += i_b * (tokens - prefix)
    p_out += i_b * length * dim
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < dim
    if i_n * BN < tokens:
        o_n = i_n * BN + tl.arange(0, BN)
        b_slot = tl.load(p_slot + o_n, mask=o_n < tokens, other=-1)
        m_x = (b_slot >= 0)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_n.to(tl.int64)[:, None] * s_xn + o_c[None, :], mask=m_x, other=0.0)
        tl.store(p_out + b_slot[:, None] * dim + o_c[None, :], b_x, mask=m_x)
    elif FUSE:
        b_sum = tl.zeros([BC], tl.float32)
        for start in range(prefix, tokens, BN):
            o_n = start + tl.arange(0, BN)
            is_dropped = (o_n < tokens) & (tl.load(p_slot + o_n, mask=o_n < tokens, other=0) < 0)
            b_score = tl.load(p_score + o_n - prefix, mask=is_dropped, other=0.0).to(tl.float32)
            o_x = o_n.to(tl.int64)[:, None] * s_xn + o_c[None, :]
            b_x = tl.load(p_x + o_x, mask=is_dropped[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            b_sum += tl.sum(b_score[:, None] * b_x, 0)
        tl.store(p_out + (length - 1).to(tl.int64) * dim + o_c, b_sum.to(p_out.dtype.element_ty), mask=m_c)


def _power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _dense(x: Tensor) -> Tensor:
    """Make the channels contiguous; the other axes may have any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _sides(tokens: int, prefix: int) -> tuple[int, int, int, int]:
    """Return the first index and the number of the even tokens after the prefix, then those of the odd tokens."""
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    return even, (tokens - even + 1) // 2, odd, (tokens - odd + 1) // 2


def can_match(metric: Tensor) -> bool:
    """Return whether the kernels support a metric of this size."""
    return metric.shape[-1] <= WIDEST_METRIC and metric.shape[-2] <= MOST_TOKENS


def match(metric: Tensor, r: int, num_prefix: int) -> Tensor:
    """Compute `_plain.match`; r must be in range."""
    metric = _dense(metric if metric.dim() == 4 else metric.unsqueeze(1))
    batch, heads, tokens, dim = metric.shape
    sides = _sides(tokens, num_prefix)
    best = torch.empty(batch, sides[1], device=metric.device, dtype=torch.float32)
    partner = torch.empty(best.shape, device=metric.device, dtype=torch.int32)
    slot = torch.empty(batch, tokens, device=metric.device, dtype=torch.int64)
    block = 32
    _partner_kernel[(triton.cdiv(sides[1], block), batch)](
        metric, best, partner, heads, *metric.stride()[:3], *sides,
        D=dim, BD=_power_of_two(dim), BA=block, BB=16, num_warps=4,
    )  # fmt: skip
    pairs = _power_of_two(max(sides[1], sides[3], num_prefix))
    _slot_kernel[(batch,)](
        best, partner, slot, tokens, num_prefix, r, *sides,
        PAIRS=pairs, BJ=16, num_warps=4 if pairs <= 256 else 8,
    )  # fmt: skip
    return slot


def _channel_blocks(x: Tensor) -> dict[str, Any]:
    return {"BC": min(128, _power_of_two(x.shape[2])), "num_warps": 4}


def merge(x: Tensor, slot: Tensor, length: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `_plain.merge`."""
    x, slot = _dense(x), slot.contiguous()
    batch, tokens, dim = x.shape
    order = torch.empty(batch, tokens, device=x.device, dtype=torch.int32)
    start = torch.empty(batch, length + 1, device=x.device, dtype=torch.int32)
    _members_kernel[(triton.cdiv(max(tokens, length + 1), 64), batch)](
        slot, order, start, tokens, length, BI=64, BJ=64, num_warps=4
    )
    merged = torch.empty(batch, length, dim, device=x.device, dtype=x.dtype)
    total = torch.empty(batch, length, device=x.device, dtype=torch.float32 if size is None else size.dtype)
    sizes = total if size is None else size.contiguous()  # never read if None
    blocks, rows = _channel_blocks(x), 16
    _merge_kernel[(triton.cdiv(length, rows), triton.cdiv(dim, blocks["BC"]), batch)](
        x, sizes, order, start, merged, total, tokens, length, dim, *x.stride()[:2],
        HAS_SIZE=size is not None, BS=rows, **blocks,
    )  # fmt: skip
    return merged, total


def keep(x: Tensor, score: Tensor, count: int, num_prefix: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """Compute `_plain.keep`."""
    x, score = _dense(x), score.contiguous()
    batch, tokens, dim = x.shape
    slot = torch.empty(batch, tokens, device=x.device, dtype=torch.int64)
    _rank_kernel[(triton.cdiv(tokens, 64), batch)](score, slot, tokens, num_prefix, count, BI=64, BJ=64, num_warps=4)
    length = num_prefix + count + fuse
    kept = torch.empty(batch, length, dim, device=x.device, dtype=x.dtype)
    blocks, rows = _channel_blocks(x), 16
    _keep_kernel[(triton.cdiv(tokens, rows) + fuse, triton.cdiv(dim, blocks["BC"]), batch)](
        x, score, slot, kept, tokens, num_prefix, length, dim, *x.stride()[:2],
        FUSE=fuse, BN=rows, **blocks,
    )  # fmt: skip
    return kept, slot
