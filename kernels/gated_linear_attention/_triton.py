# pyright: basic, reportCallIssue=false, reportArgumentType=false
# pyright knows neither launches nor that Triton makes constants of plain numbers.
"""Gated linear attention in Triton, both directions in each launch: states, results, gradients.

* `_gla_state_kernel` walks over the chunks of a head and writes the state before each: one program a head and
  direction, that of the state in registers. Gradients of states are the same walk backwards, of queries and the
  result's gradient in place of keys and values.
* With few heads, every chunk's own contribution is written by a program of its own, and `_gla_carry_kernel` adds them
  up. That moves the states twice more, and the walk, which nothing else can overlap then, has no product left in it.
* `_gla_fwd_kernel` and `_gla_bwd_kernel` have a program for each chunk. It computes both directions' scores into the
  two triangles of one tile, as `_plain` does, so query, key and value are read once, and the directions are added in
  registers: no atomics, no second buffer.

Within a chunk blocks of 1, 2, 4, ... tokens pair up; what gates let through between the border of a pair and each token
is exp of a sum of just these gates, at most 1, and one product of whole tiles gives the scores of all pairs of a size.
Other ways would be: exp of differences from the chunk's start, which overflow; exp for each pair of tokens of blocks of
16, 16 exps for a channel of a token and direction instead of the 5 here; or the recurrence itself, which takes as many
instructions (two directions of three for each number of a 32 x 64 state), but one token after the other.

No GPU has timed any of this yet, and `_gla_bwd_kernel` does not yet fit registers: it spills on sm_90.

Sums are float32. Products of half precision tensors run as TF32, whose mantissa is float16's, so that no state can
overflow; those of float32 tensors run in full.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
LEVELS = 5
"""Sizes of blocks below a chunk: 1, 2, 4, 8, 16."""

MAX_HEAD_DIM, MAX_VALUE_DIM = 64, 128
"""What fits registers, by what the compiler reports (tests/kernels/aot_compile.py)."""

ENOUGH_PROGRAMS = 256
"""Walks that keep a GPU busy: about two a multiprocessor. Below, chunks run by themselves."""


def supports(query: Tensor, value: Tensor) -> bool:
    return query.shape[-1] <= MAX_HEAD_DIM and value.shape[-1] <= MAX_VALUE_DIM


@triton.jit
def _load_rows(p_x, s_token, o_t, tokens, DIM: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] in float32, zeros outside of the sequence; `s_token` is the distance of two tokens in memory."""
    o_d = tl.arange(0, BD)
    m = ((o_t >= 0) & (o_t < tokens))[:, None] & (o_d < DIM)[None, :]
    return tl.load(p_x + o_t.to(tl.int64)[:, None] * s_token + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(p_x, s_token, o_t, tokens, b_x, DIM: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    m = (o_t < tokens)[:, None] & (o_d < DIM)[None, :]
    tl.store(p_x + o_t.to(tl.int64)[:, None] * s_token + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def _state_offsets(K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    return o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]


@triton.jit
def _gla_state_kernel(
    p_x, p_y, p_gate, p_gate_back, p_state, p_decay, tokens, heads, chunks, scale,
    s_xb, s_xn, s_xh, s_yb, s_yn, s_yh, s_gb, s_gn, s_gh, s_rb, s_rn, s_rh,
    IS_GRAD: tl.constexpr, BY_CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """States [direction, batch * heads, chunks, K, V] of sums of x y^T; before each chunk, or of each by itself.

    Rows are in the order of walking, whichever end that starts from: so what a gate lets through on the way out of the
    chunk is always a sum over later rows. Keys skip their own gate; gradients, of queries, do not.
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
    o_state, m_state = _state_offsets(K, V, BK, BV)
    o_k, o_r = tl.arange(0, BK), tl.arange(0, C)
    first = (i_dir.to(tl.int64) * tl.num_programs(0) + i_bh) * chunks
    b_state = tl.zeros([BK, BV], tl.float32)
    for step in range(i_part if BY_CHUNK else 0, i_part + 1 if BY_CHUNK else chunks):
        i_c = tl.where(from_last, chunks - 1 - step, step)
        o_t = i_c * C + tl.where(from_last, C - 1 - o_r, o_r)
        if not BY_CHUNK:
            tl.store(p_state + (first + i_c) * K * V + o_state, b_state, mask=m_state)
        b_x = _load_rows(p_x, s_xn, o_t, tokens, K, BK)
        b_y = _load_rows(p_y, s_yn, o_t, tokens, V, BV) * scale
        b_g = _load_rows(p_g, s_g, o_t, tokens, K, BK)
        if IS_GRAD:
            b_out = b_g
        else:  # the gate of the next row instead
            o_next = tl.where(o_r + 1 < C, o_t + tl.where(from_last, -1, 1), -1)
            b_out = _load_rows(p_g, s_g, o_next, tokens, K, BK)
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
    """Every chunk's own contribution to the state before it, in place."""
    i_bh, i_dir, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    from_last = i_dir != (1 if IS_GRAD else 0)
    first = (i_dir.to(tl.int64) * tl.num_programs(0) + i_bh) * chunks
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
def _pair_masks(level, BOTH: tl.constexpr, C: tl.constexpr):
    """Which tokens stand in the later block of their pair, and [asking, asked] which pairs of tokens meet."""
    o_t = tl.arange(0, C)
    is_later = ((o_t >> level) & 1) == 1
    m = ((o_t[:, None] >> (level + 1)) == (o_t[None, :] >> (level + 1))) & (is_later[:, None] != is_later[None, :])
    if not BOTH:
        m = m & is_later[:, None]
    return is_later[:, None], m


@triton.jit
def _through_sibling(b_near, level, LAST: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """For each token the sum of all log gates of the block beside its own."""
    o_sibling = ((tl.arange(0, C) >> level) ^ 1) << level
    if LAST:
        o_sibling += (1 << level) - 1
    return tl.gather(b_near, tl.broadcast_to(o_sibling[:, None], [C, BK]), 0)


@triton.jit
def _widen(
    b_near, b_far, b_near_back, b_far_back, is_later, level, BOTH: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """To blocks of twice the size: log sums from the border to each token (near), from each to the border (far)."""
    b_sum = _through_sibling(b_near, level, True, C, BK)
    b_near += tl.where(is_later, b_sum, 0.0)
    b_far += tl.where(is_later, 0.0, b_sum)
    if BOTH:
        b_sum = _through_sibling(b_near_back, level, False, C, BK)
        b_near_back += tl.where(is_later, 0.0, b_sum)
        b_far_back += tl.where(is_later, b_sum, 0.0)
    return b_near, b_far, b_near_back, b_far_back


@triton.jit
def _gla_fwd_kernel(
    p_q, p_k, p_v, p_gate, p_gate_back, p_state, p_out, tokens, heads, scale,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_gb, s_gn, s_gh, s_rb, s_rn, s_rh,
    BOTH: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    i_c, i_bh = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_c = tl.arange(0, C)
    o_t = i_c * C + o_c
    b_q = _load_rows(p_q + i_b * s_qb + i_h * s_qh, s_qn, o_t, tokens, K, BK) * scale
    b_k = _load_rows(p_k + i_b * s_kb + i_h * s_kh, s_kn, o_t, tokens, K, BK)
    b_near = _load_rows(p_gate + i_b * s_gb + i_h * s_gh, s_gn, o_t, tokens, K, BK)
    b_far = tl.zeros([C, BK], tl.float32)
    b_near_back, b_far_back = b_far, b_far
    if BOTH:
        b_near_back = _load_rows(p_gate_back + i_b * s_rb + i_h * s_rh, s_rn, o_t, tokens, K, BK)
    b_own = tl.sum(b_q * b_k, 1) * (2 if BOTH else 1)
    b_scores = tl.where(o_c[:, None] == o_c[None, :], b_own[:, None], 0.0)
    for level in range(LEVELS):  # not unrolled: compilers would compute far ahead, and spill
        is_later, m = _pair_masks(level, BOTH, C)
        b_asking = b_q * tl.exp(tl.where(is_later, b_near, b_near_back))
        b_asked = b_k * tl.exp(tl.where(is_later, b_far_back, b_far))
        b_scores = tl.where(m, tl.dot(b_asking, tl.trans(b_asked), input_precision=PRECISION), b_scores)
        b_near, b_far, b_near_back, b_far_back = _widen(
            b_near, b_far, b_near_back, b_far_back, is_later, level, BOTH, C, BK
        )  # fmt: skip
    b_v = _load_rows(p_v + i_b * s_vb + i_h * s_vh, s_vn, o_t, tokens, V, BV)
    b_out = tl.dot(b_scores, b_v, input_precision=PRECISION)
    o_state, m_state = _state_offsets(K, V, BK, BV)
    p_state += (i_bh.to(tl.int64) * chunks + i_c) * K * V
    b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
    b_out += tl.dot(b_q * tl.exp(b_near), b_state, input_precision=PRECISION)
    if BOTH:
        p_state += tl.num_programs(1).to(tl.int64) * chunks * K * V
        b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
        b_out += tl.dot(b_q * tl.exp(b_near_back), b_state, input_precision=PRECISION)
    _store_rows(p_out + (i_b * tokens * heads + i_h) * V, heads * V, o_t, tokens, b_out, V, BV)


@triton.jit
def _through_state(
    b_q, b_k, b_v, b_grad, b_near, b_far, p_state, p_grad_state, o_state, m_state, to_next,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one direction's states add to the gradients of query, key and value, and of the gates from the next chunk's
    side."""
    b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
    b_near, b_far = tl.exp(b_near), tl.exp(b_far)
    b_grad_q = tl.dot(b_grad, tl.trans(b_state), input_precision=PRECISION) * b_near
    b_state = tl.load(p_grad_state + o_state, mask=m_state, other=0.0)
    b_grad_k = tl.dot(b_v, tl.trans(b_state), input_precision=PRECISION) * b_far
    b_grad_v = tl.dot(b_k * b_far, b_state, input_precision=PRECISION)
    b_next = tl.load(p_state + to_next + o_state, mask=m_state, other=0.0)  # if there is none, the gradient is zero
    return b_grad_q, b_grad_k, b_grad_v, tl.sum(b_next * b_state, 1)


@triton.jit
def _gla_bwd_kernel(
    p_grad, p_q, p_k, p_v, p_gate, p_gate_back, p_state, p_grad_state,
    p_grad_q, p_grad_k, p_grad_v, p_grad_gate, p_grad_gate_back, tokens, heads, scale,
    s_ob, s_on, s_oh, s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_gb, s_gn, s_gh, s_rb, s_rn, s_rh,
    BOTH: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """A gate weakens all that passes it; see `_plain._grad_of_log_gate`."""
    i_c, i_bh = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_c = tl.arange(0, C)
    o_t = i_c * C + o_c
    b_q = _load_rows(p_q + i_b * s_qb + i_h * s_qh, s_qn, o_t, tokens, K, BK)
    b_k = _load_rows(p_k + i_b * s_kb + i_h * s_kh, s_kn, o_t, tokens, K, BK)
    p_v += i_b * s_vb + i_h * s_vh
    p_grad += i_b * s_ob + i_h * s_oh
    b_v = _load_rows(p_v, s_vn, o_t, tokens, V, BV)
    b_grad = _load_rows(p_grad, s_on, o_t, tokens, V, BV) * scale
    b_near = _load_rows(p_gate + i_b * s_gb + i_h * s_gh, s_gn, o_t, tokens, K, BK)
    b_far = tl.zeros([C, BK], tl.float32)
    b_near_back, b_far_back = b_far, b_far
    if BOTH:
        b_near_back = _load_rows(p_gate_back + i_b * s_rb + i_h * s_rh, s_rn, o_t, tokens, K, BK)
    own = 2 if BOTH else 1
    is_own = o_c[:, None] == o_c[None, :]
    b_scores = tl.where(is_own, (tl.sum(b_q * b_k, 1) * own)[:, None], 0.0)
    b_grad_scores = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
    b_grad_own = (tl.sum(b_grad * b_v, 1) * own)[:, None]
    b_grad_q, b_grad_k = b_grad_own * b_k, b_grad_own * b_q
    b_passed = tl.zeros([C, BK], tl.float32)
    b_passed_back = b_passed
    for level in range(LEVELS):  # not unrolled: compilers would compute far ahead, and spill
        is_later, m = _pair_masks(level, BOTH, C)
        b_weak_q = tl.exp(tl.where(is_later, b_near, b_near_back))
        b_weak_k = tl.exp(tl.where(is_later, b_far_back, b_far))
        b_asking, b_asked = b_q * b_weak_q, b_k * b_weak_k
        b_scores = tl.where(m, tl.dot(b_asking, tl.trans(b_asked), input_precision=PRECISION), b_scores)
        b_pair = tl.where(m, b_grad_scores, 0.0)
        b_weak_q *= tl.dot(b_pair, b_asked, input_precision=PRECISION)
        b_weak_k *= tl.dot(tl.trans(b_pair), b_asking, input_precision=PRECISION)
        b_grad_q += b_weak_q
        b_grad_k += b_weak_k
        b_passed += tl.where(is_later, b_q * b_weak_q, -b_k * b_weak_k)
        if BOTH:
            b_passed_back += tl.where(is_later, -b_k * b_weak_k, b_q * b_weak_q)
        b_near, b_far, b_near_back, b_far_back = _widen(
            b_near, b_far, b_near_back, b_far_back, is_later, level, BOTH, C, BK
        )  # fmt: skip
    b_v = _load_rows(p_v, s_vn, o_t, tokens, V, BV)  # again, since registers are scarcer than the cache
    b_grad = _load_rows(p_grad, s_on, o_t, tokens, V, BV) * scale
    b_grad_v = tl.dot(tl.trans(b_scores), b_grad, input_precision=PRECISION)
    o_state, m_state = _state_offsets(K, V, BK, BV)
    o_chunk = (i_bh.to(tl.int64) * chunks + i_c) * K * V
    b_to_q, b_to_k, b_to_v, b_carried = _through_state(
        b_q, b_k, b_v, b_grad, b_near, b_far, p_state + o_chunk, p_grad_state + o_chunk, o_state, m_state,
        tl.where(i_c + 1 < chunks, K * V, 0), PRECISION,
    )  # fmt: skip
    b_passed += b_q * b_to_q - b_k * b_to_k
    b_grad_q += b_to_q
    b_grad_k += b_to_k
    b_grad_v += b_to_v
    b_passed = tl.cumsum(b_passed, 0, reverse=True) + b_carried[None, :]
    o_head = i_b * tokens * heads + i_h
    _store_rows(p_grad_gate + o_head * K, heads * K, o_t, tokens, b_passed, K, BK)
    if BOTH:
        o_chunk += tl.num_programs(1).to(tl.int64) * chunks * K * V
        b_to_q, b_to_k, b_to_v, b_carried = _through_state(
            b_q, b_k, b_v, b_grad, b_near_back, b_far_back, p_state + o_chunk, p_grad_state + o_chunk, o_state, m_state,
            tl.where(i_c > 0, -K * V, 0), PRECISION,
        )  # fmt: skip
        b_passed_back += b_q * b_to_q - b_k * b_to_k
        b_grad_q += b_to_q
        b_grad_k += b_to_k
        b_grad_v += b_to_v
        b_passed_back = tl.cumsum(b_passed_back, 0) + b_carried[None, :]
        _store_rows(p_grad_gate_back + o_head * K, heads * K, o_t, tokens, b_passed_back, K, BK)
    _store_rows(p_grad_q + o_head * K, heads * K, o_t, tokens, b_grad_q, K, BK)
    _store_rows(p_grad_k + o_head * K, heads * K, o_t, tokens, b_grad_k, K, BK)
    _store_rows(p_grad_v + o_head * V, heads * V, o_t, tokens, b_grad_v, V, BV)


def _power_of_two(n: int) -> int:
    """At least 16, the least that a product takes."""
    return max(16, 1 << (n - 1).bit_length())


def _blocks(query: Tensor, value: Tensor, *, warps: int) -> dict[str, Any]:
    """The constants of all kernels that multiply; twice as many warps where heads are wide."""
    K, V = query.shape[-1], value.shape[-1]
    return {
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        **{"K": K, "V": V, "BK": _power_of_two(K), "BV": _power_of_two(V), "C": CHUNK},
        **{"num_warps": warps * (2 if K > 32 or V > 64 else 1), "num_stages": 1},
    }  # fmt: skip


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With channels that lie beside each other; the other axes may lie as they like."""
    return tuple(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors)


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in range(3)]


def _states(x: Tensor, y: Tensor, gates: tuple[Tensor, ...], scale: float, *, is_grad: bool) -> Tensor:
    """[directions, batch * heads, chunks, K, V]: before each chunk, as that direction walks."""
    batch, tokens, heads, K = x.shape
    chunks, V = triton.cdiv(tokens, CHUNK), y.shape[-1]
    states = torch.empty(len(gates), batch * heads, chunks, K, V, device=x.device, dtype=torch.float32)
    by_chunk = chunks > 1 and len(gates) * batch * heads < ENOUGH_PROGRAMS
    decays = torch.empty(states.shape[:-1] if by_chunk else (1,), device=x.device, dtype=torch.float32)
    blocks = _blocks(x, y, warps=4)
    _gla_state_kernel[(batch * heads, len(gates), chunks if by_chunk else 1)](
        x, y, gates[0], gates[-1], states, decays, tokens, heads, chunks, scale,
        *_strides(x, y, gates[0], gates[-1]), IS_GRAD=is_grad, BY_CHUNK=by_chunk, **blocks,
    )  # fmt: skip
    if by_chunk:
        _gla_carry_kernel[(batch * heads, len(gates), triton.cdiv(V, 32))](
            states, decays, chunks, IS_GRAD=is_grad, K=K, V=V, BK=blocks["BK"], BV=32, num_warps=4
        )
    return states


def forward(query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, ...], scale: float) -> Tensor:
    """The sum over the directions, contiguous; one log gate or two."""
    query, key, value, *gates = _dense(query, key, value, *gates)
    batch, tokens, heads, _ = query.shape
    states = _states(key, value, tuple(gates), 1.0, is_grad=False)
    out = torch.empty(value.shape, device=value.device, dtype=value.dtype)
    _gla_fwd_kernel[(triton.cdiv(tokens, CHUNK), batch * heads)](
        query, key, value, gates[0], gates[-1], states, out, tokens, heads, scale,
        *_strides(query, key, value, gates[0], gates[-1]),
        BOTH=len(gates) == 2, LEVELS=LEVELS, **_blocks(query, value, warps=4),
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, ...], scale: float
) -> list[Tensor]:
    """Gradients of query, key, value and the log gates, contiguous."""
    grad, query, key, value, *gates = _dense(grad, query, key, value, *gates)
    batch, tokens, heads, _ = query.shape
    states = _states(key, value, tuple(gates), 1.0, is_grad=False)
    grad_states = _states(query, grad, tuple(gates), scale, is_grad=True)
    inputs = query, key, value, *gates
    grads = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in inputs]
    _gla_bwd_kernel[(triton.cdiv(tokens, CHUNK), batch * heads)](
        grad, query, key, value, gates[0], gates[-1], states, grad_states, *grads[:4], grads[-1], tokens, heads, scale,
        *_strides(grad, query, key, value, gates[0], gates[-1]),
        BOTH=len(gates) == 2, LEVELS=LEVELS, **_blocks(query, value, warps=8),
    )  # fmt: skip
    return grads
