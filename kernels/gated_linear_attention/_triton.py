# pyright: basic, reportCallIssue=false, reportArgumentType=false
# pyright understands neither Triton launches nor that Triton turns plain numbers into constants.
"""Triton kernels for gated linear attention: states, outputs and gradients, with both directions in each launch.

* `_gla_state_kernel` scans the chunks of a head and writes the state before each: one program per head and direction,
  with the state in registers. Gradients of states come from the reversed scan, with queries and the output gradient in
  place of keys and values.
* If there are few heads, a separate program writes the contribution of each chunk, and `_gla_carry_kernel` accumulates
  them. That moves the states twice more, but the sequential scan, which nothing can overlap, then contains no matrix
  product.
* `_gla_fwd_kernel` runs one program per chunk. It computes the scores of both directions into the two triangles of one
  tile, as `_plain` does. Query, key and value are therefore read once, and the directions are added in registers: no
  atomics, no second buffer. The gradient of the value is the same computation with the keys in place of the queries.
* `_gla_bwd_kernel` computes all other gradients. Each program handles 16 channels of a head, however wide the head is:
  larger tiles would not fit in registers.

Within a chunk, blocks of 1, 2, 4, ... tokens pair up. The decay between the border of a pair and each token is exp of
the sum of exactly these log gates, so it is at most 1, and one product of whole tiles gives the scores of all pairs of
a size. The alternatives are: exp of differences from the start of the chunk, which overflows; exp for each pair of
tokens in blocks of 16, which takes 16 exps per channel, token and direction instead of the 5 here; and the recurrence
itself, which takes as many instructions (two directions of three for each element of a 32 x 64 state) but is sequential
in the tokens.

No GPU has timed any of this yet; the compiler's reports show no register spills (tests/kernels/aot_compile.py).

All kernels accumulate in float32. Products of half precision tensors run as TF32, whose mantissa is that of float16, so
that no state can overflow; products of float32 tensors run in full precision.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
LEVELS = 5
"""Number of block sizes below a chunk: 1, 2, 4, 8, 16."""

WIDEST = {2: (64, 128), 4: (32, 64)}
"""Bytes per element -> largest head_dim and value_dim that fit in registers, according to the compiler's reports."""

ENOUGH_PROGRAMS = 256
"""Scans that keep a GPU busy, about two per multiprocessor. With fewer, chunks run as separate programs."""


def supports(query: Tensor, value: Tensor) -> bool:
    """Return whether the tiles of a head fit in registers; wider heads take the plain operators."""
    head_dim, value_dim = WIDEST[query.dtype.itemsize]
    return query.shape[-1] <= head_dim and value.shape[-1] <= value_dim


@triton.jit
def _offsets(s_token, o_t, tokens, dim, BD: tl.constexpr, AXIS: tl.constexpr):
    """Return the memory offsets of tokens `o_t`, along AXIS of a tile, by channels, and the mask of valid elements.

    `s_token` is the stride between tokens.
    """
    o_t, o_d = tl.expand_dims(o_t, 1 - AXIS), tl.expand_dims(tl.arange(0, BD), AXIS)
    return o_t.to(tl.int64) * s_token + o_d, (o_t >= 0) & (o_t < tokens) & (o_d < dim)


@triton.jit
def _load(p_x, s_token, o_t, tokens, dim, BD: tl.constexpr, AXIS: tl.constexpr):
    """Load [tokens, BD] in float32, or [BD, tokens] if AXIS is 1; zeros outside the sequence."""
    o_x, m = _offsets(s_token, o_t, tokens, dim, BD, AXIS)
    return tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p_x, s_token, o_t, tokens, b_x, dim, BD: tl.constexpr, AXIS: tl.constexpr):
    o_x, m = _offsets(s_token, o_t, tokens, dim, BD, AXIS)
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def _state_offsets(rows, columns, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    return o_k[:, None] * V + o_v[None, :], (o_k < rows)[:, None] & (o_v < columns)[None, :]


@triton.jit
def _gla_state_kernel(
    p_x, p_y, p_gate, p_gate_back, p_state, p_decay, tokens, heads, chunks, scale,
    s_xb, s_xn, s_xh, s_yb, s_yn, s_yh, s_gb, s_gn, s_gh, s_rb, s_rn, s_rh,
    IS_GRAD: tl.constexpr, BY_CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write states [direction, batch * heads, chunks, K, V], which accumulate x y^T.

    Each state is the one before its chunk, or with BY_CHUNK the contribution of the chunk alone. Rows are in scan
    order, from whichever end the scan starts, so the decay on the way out of the chunk is always a sum over later rows.
    Keys exclude their own gate; the gradients of queries include it.
    """
    i_bh, i_dir, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    from_last = i_dir != (1 if IS_GRAD else 0)
    p_x += i_b * s_xb + i_h * s_xh
    p_y += i_b * s_yb + i_h * s_yh
    if i_dir == 0:
        p_g = p_gate + i_b * s_gb + i_h * s_gh
        s_g = s_gn
    else:
        p_g = p_gate_back + i_b * s_rb + i_h * s_rh
        s_g = s_rn
    o_state, m_state = _state_offsets(K, V, V, BK, BV)
    o_k, o_r = tl.arange(0, BK), tl.arange(0, C)
    first = (i_dir.to(tl.int64) * tl.num_programs(0) + i_bh) * chunks  # pyright: ignore[reportAttributeAccessIssue]
    b_state = tl.zeros([BK, BV], tl.float32)
    for step in range(i_part if BY_CHUNK else 0, i_part + 1 if BY_CHUNK else chunks):
        i_c = tl.where(from_last, chunks - 1 - step, step)
        o_t = i_c * C + tl.where(from_last, C - 1 - o_r, o_r)
        if not BY_CHUNK:
            tl.store(p_state + (first + i_c) * K * V + o_state, b_state, mask=m_state)
        b_x = _load(p_x, s_xn, o_t, tokens, K, BK, 0)
        b_y = _load(p_y, s_yn, o_t, tokens, V, BV, 0) * scale
        b_g = _load(p_g, s_g, o_t, tokens, K, BK, 0)
        if IS_GRAD:
            b_out = b_g
        else:  # use the gate of the next row instead
            o_next = tl.where(o_r + 1 < C, o_t + tl.where(from_last, -1, 1), -1)
            b_out = _load(p_g, s_g, o_next, tokens, K, BK, 0)
        b_x *= tl.exp(tl.cumsum(b_out, 0, reverse=True))
        b_own = tl.dot(tl.trans(b_x), b_y, input_precision=PRECISION)
        b_decay = tl.exp(tl.sum(b_g, 0))
        if BY_CHUNK:
            tl.store(p_state + (first + i_c) * K * V + o_state, b_own, mask=m_state)
            tl.store(p_decay + (first + i_c) * K + o_k, b_decay, mask=o_k < K)
        else:
            b_state = b_state * b_decay[:, None] + b_own


@triton.jit
def _gla_carry_kernel(
    p_state, p_decay, chunks, IS_GRAD: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Replace the contribution of every chunk by the state before it, in place."""
    i_bh, i_dir, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    from_last = i_dir != (1 if IS_GRAD else 0)
    first = (i_dir.to(tl.int64) * tl.num_programs(0) + i_bh) * chunks  # pyright: ignore[reportAttributeAccessIssue]
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_state, m_state = o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]
    b_state = tl.zeros([BK, BV], tl.float32)
    for step in range(chunks):
        i_c = first + tl.where(from_last, chunks - 1 - step, step)
        b_own = tl.load(p_state + i_c * K * V + o_state, mask=m_state, other=0.0)
        b_decay = tl.load(p_decay + i_c * K + o_k, mask=o_k < K, other=0.0)
        tl.store(p_state + i_c * K * V + o_state, b_state, mask=m_state)
        b_state = b_state * b_decay[:, None] + b_own


@triton.jit
def _pair_masks(level, BOTH: tl.constexpr, AXIS: tl.constexpr, C: tl.constexpr):
    """Return which tokens, along AXIS, are in the later block of their pair, and the mask of token pairs that meet.

    Query tokens lie along AXIS, key tokens along the other axis.
    """
    o_t = tl.arange(0, C)
    later = ((o_t >> level) & 1) == 1
    m = ((o_t[:, None] >> (level + 1)) == (o_t[None, :] >> (level + 1))) & (later[:, None] != later[None, :])
    is_later = tl.expand_dims(later, 1 - AXIS)
    if not BOTH:
        m = m & is_later
    return is_later, m


@triton.jit
def _through_sibling(b_near, level, LAST: tl.constexpr, AXIS: tl.constexpr, C: tl.constexpr):
    """Return for each token the sum of all log gates of its sibling block."""
    o_sibling = ((tl.arange(0, C) >> level) ^ 1) << level
    if LAST:
        o_sibling += (1 << level) - 1
    return tl.gather(b_near, tl.broadcast_to(tl.expand_dims(o_sibling, 1 - AXIS), b_near.shape), AXIS)


@triton.jit
def _widen(
    b_near, b_far, b_near_back, b_far_back, is_later, level,
    BOTH: tl.constexpr, AXIS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Double the block size of the log sums from the border to each token (near) and from each to the border (far)."""
    b_sum = _through_sibling(b_near, level, True, AXIS, C)
    b_near += tl.where(is_later, b_sum, 0.0)
    b_far += tl.where(is_later, 0.0, b_sum)
    if BOTH:
        b_sum = _through_sibling(b_near_back, level, False, AXIS, C)
        b_near_back += tl.where(is_later, 0.0, b_sum)
        b_far_back += tl.where(is_later, b_sum, 0.0)
    return b_near, b_far, b_near_back, b_far_back


@triton.jit
def _gla_fwd_kernel(
    p_q, p_k, p_v, p_gate, p_gate_back, p_state, p_out, tokens, heads, scale,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_gb, s_gn, s_gh, s_rb, s_rn, s_rh,
    IS_GRAD: tl.constexpr, BOTH: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Compute the output; with IS_GRAD, the gradient of the value.

    For the latter, `p_v` holds the output gradient and `p_state` the gradients of the states, and the keys act as the
    queries.
    """
    i_c, i_bh = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_c = tl.arange(0, C)
    o_t = i_c * C + o_c
    b_q = _load(p_q + i_b * s_qb + i_h * s_qh, s_qn, o_t, tokens, K, BK, 0) * scale
    b_k = _load(p_k + i_b * s_kb + i_h * s_kh, s_kn, o_t, tokens, K, BK, 0)
    b_near = _load(p_gate + i_b * s_gb + i_h * s_gh, s_gn, o_t, tokens, K, BK, 0)
    b_far = tl.zeros([C, BK], tl.float32)
    b_near_back, b_far_back = b_far, b_far
    if BOTH:
        b_near_back = _load(p_gate_back + i_b * s_rb + i_h * s_rh, s_rn, o_t, tokens, K, BK, 0)
    b_own = tl.sum(b_q * b_k, 1) * (2 if BOTH else 1)
    b_scores = tl.where(o_c[:, None] == o_c[None, :], b_own[:, None], 0.0)
    for level in range(LEVELS):  # not unrolled: the compiler would hoist computations, and spill
        is_later, m = _pair_masks(level, BOTH, 0, C)
        b_asking = b_q * tl.exp(tl.where(is_later, b_near, b_near_back))
        b_asked = b_k * tl.exp(tl.where(is_later, b_far_back, b_far))
        b_scores = tl.where(m, tl.dot(b_asking, tl.trans(b_asked), input_precision=PRECISION), b_scores)
        b_near, b_far, b_near_back, b_far_back = _widen(
            b_near, b_far, b_near_back, b_far_back, is_later, level, BOTH, 0, C
        )  # fmt: skip
    if IS_GRAD:
        b_scores, b_q, b_near, b_near_back = tl.trans(b_scores), b_k, b_far, b_far_back
    b_v = _load(p_v + i_b * s_vb + i_h * s_vh, s_vn, o_t, tokens, V, BV, 0)
    b_out = tl.dot(b_scores, b_v, input_precision=PRECISION)
    o_state, m_state = _state_offsets(K, V, V, BK, BV)
    p_state += (i_bh.to(tl.int64) * chunks + i_c) * K * V
    b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
    b_out += tl.dot(b_q * tl.exp(b_near), b_state, input_precision=PRECISION)
    if BOTH:
        p_state += tl.num_programs(1).to(tl.int64) * chunks * K * V
        b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
        b_out += tl.dot(b_q * tl.exp(b_near_back), b_state, input_precision=PRECISION)
    _store(p_out + (i_b * tokens * heads + i_h) * V, heads * V, o_t, tokens, b_out, V, BV, 0)


@triton.jit
def _log_sums(p_gate, s_gate, o_t, o_next, tokens, channels, REVERSE: tl.constexpr, BK: tl.constexpr):
    """Return [BK, tokens] log-gate sums of one direction: from the chunk's border to each token, and from it to the
    border.

    `o_next` holds the token that follows each token in scan order, -1 for none.
    """
    b_near = tl.cumsum(_load(p_gate, s_gate, o_t, tokens, channels, BK, 1), 1, reverse=REVERSE)
    return b_near, tl.cumsum(_load(p_gate, s_gate, o_next, tokens, channels, BK, 1), 1, reverse=not REVERSE)


@triton.jit
def _through_state(
    b_to_q, b_to_k, b_carried, b_v, b_grad, p_state, p_grad_state, to_next, o_state, m_state,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one direction's states to the gradients of query and key, before gates, and of the gates.

    The contribution to the gates is taken on the side of the next chunk; without a next chunk its gradient is zero.
    """
    b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
    b_grad_state = tl.load(p_grad_state + o_state, mask=m_state, other=0.0)
    b_next = tl.load(p_state + to_next + o_state, mask=m_state, other=0.0)
    b_to_q += tl.dot(b_state, b_grad, input_precision=PRECISION)
    b_to_k += tl.dot(b_grad_state, b_v, input_precision=PRECISION)
    return b_to_q, b_to_k, b_carried + tl.sum(b_next * b_grad_state, 1)


@triton.jit
def _through_states(
    p_v, s_vn, p_grad, s_on, p_state, p_grad_state, o_back, to_next, to_next_back, o_t, tokens, channels, scale,
    BOTH: tl.constexpr, PRECISION: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute everything that needs values and the output gradient.

    Return the gradients of the scores [key, query], their diagonal separately, and for each direction the sums of
    `_through_state`.
    """
    b_to_q = tl.zeros([BK, C], tl.float32)
    b_to_k, b_to_q_back, b_to_k_back = b_to_q, b_to_q, b_to_q
    b_carried = tl.zeros([BK], tl.float32)
    b_carried_back, b_grad_own, b_grad_scores = b_carried, tl.zeros([C], tl.float32), tl.zeros([C, C], tl.float32)
    for i_v in range(0, V, BV):
        b_v = _load(p_v + i_v, s_vn, o_t, tokens, V - i_v, BV, 1)
        b_grad = _load(p_grad + i_v, s_on, o_t, tokens, V - i_v, BV, 1) * scale
        b_grad_scores += tl.dot(tl.trans(b_v), b_grad, input_precision=PRECISION)
        b_grad_own += tl.sum(b_grad * b_v, 0)
        o_state, m_state = _state_offsets(channels, V - i_v, V, BK, BV)
        o_state += i_v
        b_to_q, b_to_k, b_carried = _through_state(
            b_to_q, b_to_k, b_carried, b_v, b_grad, p_state, p_grad_state, to_next, o_state, m_state, PRECISION
        )  # fmt: skip
        if BOTH:
            b_to_q_back, b_to_k_back, b_carried_back = _through_state(
                b_to_q_back, b_to_k_back, b_carried_back, b_v, b_grad,
                p_state + o_back, p_grad_state + o_back, to_next_back, o_state, m_state, PRECISION,
            )  # fmt: skip
    return b_grad_scores, b_grad_own, b_to_q, b_to_k, b_carried, b_to_q_back, b_to_k_back, b_carried_back


@triton.jit
def _through_pairs(
    b_q, b_k, b_grad_q, b_grad_k, b_passed, b_passed_back, b_grad_scores, b_near, b_near_back,
    BOTH: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Add what block pairs within the chunk contribute to the gradients of query, key and, per direction, the gates."""
    b_far = tl.zeros([BK, C], tl.float32)
    b_far_back = b_far
    for level in range(LEVELS):  # not unrolled: the compiler would hoist computations, and spill
        is_later, m = _pair_masks(level, BOTH, 1, C)
        b_weak_q = tl.exp(tl.where(is_later, b_near, b_near_back))
        b_weak_k = tl.exp(tl.where(is_later, b_far_back, b_far))
        b_pair = tl.where(m, b_grad_scores, 0.0)
        b_to_q = b_weak_q * tl.dot(b_k * b_weak_k, b_pair, input_precision=PRECISION)
        b_to_k = b_weak_k * tl.dot(b_q * b_weak_q, tl.trans(b_pair), input_precision=PRECISION)
        b_grad_q += b_to_q
        b_grad_k += b_to_k
        b_passed += tl.where(is_later, b_q * b_to_q, -b_k * b_to_k)
        if BOTH:
            b_passed_back += tl.where(is_later, -b_k * b_to_k, b_q * b_to_q)
        b_near, b_far, b_near_back, b_far_back = _widen(
            b_near, b_far, b_near_back, b_far_back, is_later, level, BOTH, 1, C
        )  # fmt: skip
    return b_grad_q, b_grad_k, b_passed, b_passed_back


@triton.jit
def _gla_bwd_kernel(
    p_grad, p_q, p_k, p_v, p_gate, p_gate_back, p_state, p_grad_state,
    p_grad_q, p_grad_k, p_grad_gate, p_grad_gate_back, tokens, heads, scale,
    s_ob, s_on, s_oh, s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_gb, s_gn, s_gh, s_rb, s_rn, s_rh,
    BOTH: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Compute all gradients except that of the value, for BK channels of a head.

    Channels interact only in the gradient of the scores, which each program recomputes. A gate scales all contributions
    that pass it; see `_plain._grad_of_log_gate`.

    Two choices save registers. States come first, so that values need not stay live. Tokens lie along the second axis:
    Triton gives each warp its own columns of a tile that is wider than high, but assigns the columns of other tiles
    to several warps.
    """
    i_c, i_bh, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BK
    chunks, channels = tl.num_programs(0), K - i_k
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_c = tl.arange(0, C)
    o_t = i_c * C + o_c
    o_state = ((i_bh.to(tl.int64) * chunks + i_c) * K + i_k) * V
    b_grad_scores, b_grad_own, b_grad_q, b_grad_k, b_carried, b_to_q, b_to_k, b_carried_back = _through_states(
        p_v + i_b * s_vb + i_h * s_vh, s_vn, p_grad + i_b * s_ob + i_h * s_oh, s_on,
        p_state + o_state, p_grad_state + o_state, tl.num_programs(1).to(tl.int64) * chunks * K * V,
        tl.where(i_c + 1 < chunks, K * V, 0), tl.where(i_c > 0, -K * V, 0), o_t, tokens, channels, scale,
        BOTH, PRECISION, V, BK, BV, C,
    )  # fmt: skip
    b_q = _load(p_q + i_b * s_qb + i_h * s_qh + i_k, s_qn, o_t, tokens, channels, BK, 1)
    b_k = _load(p_k + i_b * s_kb + i_h * s_kh + i_k, s_kn, o_t, tokens, channels, BK, 1)
    p_gate += i_b * s_gb + i_h * s_gh + i_k
    p_gate_back += i_b * s_rb + i_h * s_rh + i_k
    o_next = tl.where(o_c + 1 < C, o_t + 1, -1)
    b_near, b_far = _log_sums(p_gate, s_gn, o_t, o_next, tokens, channels, False, BK)
    b_grad_q *= tl.exp(b_near)
    b_grad_k *= tl.exp(b_far)
    b_passed = b_q * b_grad_q - b_k * b_grad_k
    b_near = _load(p_gate, s_gn, o_t, tokens, channels, BK, 1)
    b_passed_back, b_near_back = tl.zeros([BK, C], tl.float32), b_near
    if BOTH:
        o_next = tl.where(o_c > 0, o_t - 1, -1)
        b_near_back, b_far = _log_sums(p_gate_back, s_rn, o_t, o_next, tokens, channels, True, BK)
        b_to_q *= tl.exp(b_near_back)
        b_to_k *= tl.exp(b_far)
        b_passed_back = b_q * b_to_q - b_k * b_to_k
        b_grad_q += b_to_q
        b_grad_k += b_to_k
        b_near_back = _load(p_gate_back, s_rn, o_t, tokens, channels, BK, 1)
    b_grad_own = (b_grad_own * (2 if BOTH else 1))[None, :]
    b_grad_q, b_grad_k, b_passed, b_passed_back = _through_pairs(
        b_q, b_k, b_grad_q + b_grad_own * b_k, b_grad_k + b_grad_own * b_q, b_passed, b_passed_back, b_grad_scores,
        b_near, b_near_back, BOTH, PRECISION, BK, C, LEVELS,
    )  # fmt: skip
    o_rows = (i_b * tokens * heads + i_h) * K + i_k
    _store(p_grad_q + o_rows, heads * K, o_t, tokens, b_grad_q, channels, BK, 1)
    _store(p_grad_k + o_rows, heads * K, o_t, tokens, b_grad_k, channels, BK, 1)
    b_passed = tl.cumsum(b_passed, 1, reverse=True) + b_carried[:, None]
    _store(p_grad_gate + o_rows, heads * K, o_t, tokens, b_passed, channels, BK, 1)
    if BOTH:
        b_passed_back = tl.cumsum(b_passed_back, 1) + b_carried_back[:, None]
        _store(p_grad_gate_back + o_rows, heads * K, o_t, tokens, b_passed_back, channels, BK, 1)


def _power_of_two(n: int) -> int:
    """Round up to a power of two of at least 16, the smallest side of a tensor-core product."""
    return max(16, 1 << (n - 1).bit_length())


def _blocks(query: Tensor, value: Tensor) -> dict[str, Any]:
    """Return the constants of the kernels that hold a whole head; wider heads use more warps."""
    K, V = query.shape[-1], value.shape[-1]
    warps = 4 if K <= 32 and V <= 64 else 8
    return {
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        **{"K": K, "V": V, "BK": _power_of_two(K), "BV": _power_of_two(V), "C": CHUNK},
        **{"num_warps": warps, "num_stages": 1},
    }  # fmt: skip


def _backward_blocks(query: Tensor, value: Tensor) -> dict[str, Any]:
    """Return the constants of the kernel that splits heads; without tensor cores, each thread holds its factors."""
    blocks, full = _blocks(query, value), query.dtype == torch.float32
    return {**blocks, "BK": 16, "BV": min(blocks["BV"], 16 if full else 32), "num_warps": 8 if full else 4}


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Make the channels of each tensor adjacent; the other axes may have any stride."""
    return tuple(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors)


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in range(3)]


def _states(x: Tensor, y: Tensor, gates: list[Tensor], scale: float, *, is_grad: bool) -> Tensor:
    """Return [directions, batch * heads, chunks, K, V], the state before each chunk in that direction's scan order."""
    batch, tokens, heads, K = x.shape
    chunks, V = triton.cdiv(tokens, CHUNK), y.shape[-1]
    states = torch.empty(len(gates), batch * heads, chunks, K, V, device=x.device, dtype=torch.float32)
    by_chunk = chunks > 1 and len(gates) * batch * heads < ENOUGH_PROGRAMS
    decays = torch.empty(states.shape[:-1] if by_chunk else (1,), device=x.device, dtype=torch.float32)
    blocks = _blocks(x, y)
    _gla_state_kernel[(batch * heads, len(gates), chunks if by_chunk else 1)](
        x, y, gates[0], gates[-1], states, decays, tokens, heads, chunks, scale,
        *_strides(x, y, gates[0], gates[-1]), IS_GRAD=is_grad, BY_CHUNK=by_chunk, **blocks,
    )  # fmt: skip
    if by_chunk:
        _gla_carry_kernel[(batch * heads, len(gates), triton.cdiv(V, 32))](
            states, decays, chunks, IS_GRAD=is_grad, K=K, V=V, BK=blocks["BK"], BV=32, num_warps=4
        )
    return states


def _apply(
    query: Tensor, key: Tensor, value: Tensor, gates: list[Tensor], states: Tensor, scale: float, *, is_grad: bool
) -> Tensor:
    """Compute the contiguous output from states, or the gradient of the value from the gradients of states."""
    batch, tokens, heads, _ = query.shape
    out = torch.empty(value.shape, device=value.device, dtype=value.dtype)
    _gla_fwd_kernel[(triton.cdiv(tokens, CHUNK), batch * heads)](
        query, key, value, gates[0], gates[-1], states, out, tokens, heads, scale,
        *_strides(query, key, value, gates[0], gates[-1]),
        IS_GRAD=is_grad, BOTH=len(gates) == 2, LEVELS=LEVELS, **_blocks(query, value),
    )  # fmt: skip
    return out


def forward(query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, ...], scale: float) -> Tensor:
    """Return the contiguous sum over the directions; `gates` holds one log gate or two."""
    query, key, value, *log_gates = _dense(query, key, value, *gates)
    states = _states(key, value, log_gates, 1.0, is_grad=False)
    return _apply(query, key, value, log_gates, states, scale, is_grad=False)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, ...], scale: float
) -> list[Tensor]:
    """Return the contiguous gradients of query, key, value and the log gates."""
    grad, query, key, value, *log_gates = _dense(grad, query, key, value, *gates)
    batch, tokens, heads, _ = query.shape
    states = _states(key, value, log_gates, 1.0, is_grad=False)
    grad_states = _states(query, grad, log_gates, scale, is_grad=True)
    grad_value = _apply(query, key, grad, log_gates, grad_states, scale, is_grad=True)
    grad_query, grad_key, *grad_gates = (
        torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (query, key, *log_gates)
    )
    blocks = _backward_blocks(query, value)
    _gla_bwd_kernel[(triton.cdiv(tokens, CHUNK), batch * heads, triton.cdiv(query.shape[-1], blocks["BK"]))](
        grad, query, key, value, log_gates[0], log_gates[-1], states, grad_states,
        grad_query, grad_key, grad_gates[0], grad_gates[-1], tokens, heads, scale,
        *_strides(grad, query, key, value, log_gates[0], log_gates[-1]),
        BOTH=len(log_gates) == 2, LEVELS=LEVELS, **blocks,
    )  # fmt: skip
    return [grad_query, grad_key, grad_value, *grad_gates]
