# pyright: basic, reportCallIssue=false
# A launch passes the constants that all kernels share as one tuple, which pyright cannot count.
"""Triton kernels for neighborhood attention: a forward kernel and three gathering backward kernels.

A program owns a tile of queries (or, for the gradients of key and value, of keys) of one dilation lattice, one head and
one image, and loops over blocks of the keys (queries) that the tile touches, as flash attention does. The tile is two-
or three-dimensional, so that neighbouring queries share most of their keys. A dilated lattice is an ordinary map with
other strides. Maps of one or two axes get leading axes of length 1, which cost nothing because their sizes are
constants.

What is unusual:
* The bias table is expanded once per call to [heads, tile, T + 2 (K - 1) per axis], the bias of every query of a tile
  to every key at a given place relative to the tile. The kernels then read it along rows. A lookup in the table itself
  would need an address for every pair of query and key, and spill registers.
* The gradient of the table is accumulated in the same expanded form by programs that each own a block of it and loop
  over all tiles; one strided sum folds it back to the table. So no gradient needs atomics.
* Scores are in units of log2 inside the kernels; the log-sum-exp they return is natural.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._geometry import Windows

LOG2E = math.log2(math.e)
_LOG2E = tl.constexpr(LOG2E)


@dataclass(frozen=True)
class Config:
    """Parameters of a launch: keys per block, warps, pipeline stages."""

    block: int
    num_warps: int
    num_stages: int


TILES = {1: (1, 1, 64), 2: (1, 8, 8), 3: (4, 4, 4)}
"""Queries per tile along each axis, by the rank of the map."""

# Chosen from the compiler's reports (tests/kernels/aot_compile.py: no spilled register, tensor-core instructions,
# shared memory of consumer cards), not from timings: bytes per element -> widest head_dim -> forward and backward.
CONFIGS: dict[int, dict[int, tuple[Config, Config]]] = {
    2: {64: (Config(32, 4, 2), Config(32, 4, 2)), 128: (Config(32, 8, 1), Config(16, 8, 1))},
    4: {64: (Config(16, 4, 1), Config(16, 4, 1))},
}


def supports(query: Tensor) -> bool:
    """Return whether a tile of `query`'s head_dim fits in registers; wider heads take the plain operators."""
    return query.shape[-1] <= max(CONFIGS[query.element_size()])


@triton.jit
def _window(point, points, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the first and one-past-last key of query `point` on a lattice of `points`."""
    if CAUSAL:
        lead = tl.minimum(point // S * S + (S - 1), points - 1)
        start = tl.maximum(lead - (K - 1), 0)
        end = point + 1
    else:
        lead = tl.minimum(point // S * S + S // 2, points - 1)
        start = tl.minimum(tl.maximum(lead - K // 2, 0), points - K)
        end = start + K
    return start, end


@triton.jit
def _key_range(first, points, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the range of keys that any query of the tile [first, first + T) sees."""
    low, _ = _window(first, points, K, S, CAUSAL)
    _, high = _window(tl.minimum(first + (T - 1), points - 1), points, K, S, CAUSAL)
    return low, high


@triton.jit
def _query_range(first, points, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """Return a range that contains all queries that see a key of the tile [first, first + T); strides may add a few."""
    last = tl.minimum(first + (T - 1), points - 1)
    if CAUSAL:
        low = first
        high = tl.minimum(last + K, points)
    else:
        low = tl.where(first < K, 0, tl.maximum(first - (K - K // 2 - 1) - S // 2, 0))
        high = tl.where(last >= points - K, points, tl.minimum(last + (K // 2 + S - S // 2), points))
    return low, high


@triton.jit
def _split3(index, NY, NX):
    return index // (NY * NX), index // NX % NY, index % NX


@triton.jit
def _address(g_z, g_y, g_x, p_z, p_y, p_x, s_z, s_y, s_x, DZ: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr):
    """Return the element offsets of lattice points in a map with the given strides."""
    z, y, x = (g_z + p_z * DZ).to(tl.int64), (g_y + p_y * DY).to(tl.int64), (g_x + p_x * DX).to(tl.int64)
    return z * s_z + y * s_y + x * s_x


@triton.jit
def _tile_corner(i_tile, Z, Y, X, DZ: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
                 TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):  # fmt: skip
    """Return the lattice of a tile, the lengths of the lattice's axes, and the tile's first point on each axis."""
    i_group = i_tile % (DZ * DY * DX)
    g_z, g_y, g_x = _split3(i_group, DY, DX)
    n_y = tl.cdiv(tl.cdiv(Y, DY), TY)
    n_x = tl.cdiv(tl.cdiv(X, DX), TX)
    t_z, t_y, t_x = _split3(i_tile // (DZ * DY * DX), n_y, n_x)
    len_z = (Z - g_z + (DZ - 1)) // DZ
    len_y = (Y - g_y + (DY - 1)) // DY
    len_x = (X - g_x + (DX - 1)) // DX
    return g_z, g_y, g_x, len_z, len_y, len_x, t_z * TZ, t_y * TY, t_x * TX


@triton.jit
def _visible(q_z, q_y, q_x, k_z, k_y, k_x, len_z, len_y, len_x, RANK: tl.constexpr,
             KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr,
             SX: tl.constexpr, CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr):  # fmt: skip
    """Return whether each query sees each key; the six coordinates broadcast to the shape of the scores."""
    start, end = _window(q_x, len_x, KX, SX, CX)
    visible = (k_x >= start) & (k_x < end)
    if RANK >= 2:
        start, end = _window(q_y, len_y, KY, SY, CY)
        visible = visible & (k_y >= start) & (k_y < end)
    if RANK == 3:
        start, end = _window(q_z, len_z, KZ, SZ, CZ)
        visible = visible & (k_z >= start) & (k_z < end)
    return visible


@triton.jit
def _na_fwd_kernel(
    p_q, p_k, p_v, p_bias, p_out, p_lse,
    s_b, s_z, s_y, s_x, s_h,
    Z, Y, X, heads, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    DZ: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_tile, i_h, i_b = pid % tiles, pid // tiles % heads, (pid // tiles // heads).to(tl.int64)
    g_z, g_y, g_x, len_z, len_y, len_x, t_z, t_y, t_x = _tile_corner(i_tile, Z, Y, X, DZ, DY, DX, TZ, TY, TX)
    M: tl.constexpr = TZ * TY * TX
    N: tl.constexpr = BZ * BY * BX
    o_m, o_n, o_d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    m_d = o_d < D

    q_z, q_y, q_x = _split3(o_m, TY, TX)
    q_z, q_y, q_x = q_z + t_z, q_y + t_y, q_x + t_x
    m_q = (q_z < len_z) & (q_y < len_y) & (q_x < len_x)
    base = i_b * s_b + i_h * s_h
    o_q = base + _address(g_z, g_y, g_x, q_z, q_y, q_x, s_z, s_y, s_x, DZ, DY, DX)
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)

    low_z, high_z = _key_range(t_z, len_z, TZ, KZ, SZ, CZ)
    low_y, high_y = _key_range(t_y, len_y, TY, KY, SY, CY)
    low_x, high_x = _key_range(t_x, len_x, TX, KX, SX, CX)
    n_y, n_x = tl.cdiv(high_y - low_y, BY), tl.cdiv(high_x - low_x, BX)
    PY: tl.constexpr = TY + 2 * (KY - 1)
    PX: tl.constexpr = TX + 2 * (KX - 1)
    PLACES: tl.constexpr = (TZ + 2 * (KZ - 1)) * PY * PX
    o_bias = (i_h * M + o_m) * PLACES

    b_out = tl.zeros([M, BLOCK_D], tl.float32)
    b_max = tl.full([M], -1e30, tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    for i_block in range(0, tl.cdiv(high_z - low_z, BZ) * n_y * n_x):
        j_z, j_y, j_x = _split3(i_block, n_y, n_x)
        k_z, k_y, k_x = _split3(o_n, BY, BX)
        k_z, k_y, k_x = k_z + low_z + j_z * BZ, k_y + low_y + j_y * BY, k_x + low_x + j_x * BX
        m_k = (k_z < high_z) & (k_y < high_y) & (k_x < high_x)
        o_k = base + _address(g_z, g_y, g_x, k_z, k_y, k_x, s_z, s_y, s_x, DZ, DY, DX)
        m_kd = m_k[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=m_kd, other=0.0)
        b_v = tl.load(p_v + o_k[:, None] + o_d[None, :], mask=m_kd, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * _LOG2E)
        if HAS_BIAS:
            place = ((k_z - t_z + (KZ - 1)) * PY + (k_y - t_y + (KY - 1))) * PX + (k_x - t_x + (KX - 1))
            b_s += tl.load(p_bias + (o_bias[:, None] + place[None, :]), mask=m_k[None, :], other=0.0)
        visible = m_k[None, :] & _visible(
            q_z[:, None], q_y[:, None], q_x[:, None], k_z[None, :], k_y[None, :], k_x[None, :],
            len_z, len_y, len_x, RANK, KZ, KY, KX, SZ, SY, SX, CZ, CY, CX,
        )  # fmt: skip
        b_s = tl.where(visible, b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        b_max = b_new

    r_sz, r_sy = Y * X * heads, X * heads
    o_row = i_b * Z * r_sz + i_h + _address(g_z, g_y, g_x, q_z, q_y, q_x, r_sz, r_sy, heads, DZ, DY, DX)
    b_sum = tl.where(m_q, b_sum, 1.0)
    b_out = b_out / b_sum[:, None]
    m_out = m_q[:, None] & m_d[None, :]
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_row, (b_max + tl.log2(b_sum)) / _LOG2E, mask=m_q)


@triton.jit
def _na_bwd_query_kernel(
    p_g, p_q, p_k, p_v, p_bias, p_lse, p_delta, p_dq,
    s_b, s_z, s_y, s_x, s_h,
    Z, Y, X, heads, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    DZ: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_tile, i_h, i_b = pid % tiles, pid // tiles % heads, (pid // tiles // heads).to(tl.int64)
    g_z, g_y, g_x, len_z, len_y, len_x, t_z, t_y, t_x = _tile_corner(i_tile, Z, Y, X, DZ, DY, DX, TZ, TY, TX)
    M: tl.constexpr = TZ * TY * TX
    N: tl.constexpr = BZ * BY * BX
    o_m, o_n, o_d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    m_d = o_d < D

    q_z, q_y, q_x = _split3(o_m, TY, TX)
    q_z, q_y, q_x = q_z + t_z, q_y + t_y, q_x + t_x
    m_q = (q_z < len_z) & (q_y < len_y) & (q_x < len_x)
    m_qd = m_q[:, None] & m_d[None, :]
    base = i_b * s_b + i_h * s_h
    o_q = base + _address(g_z, g_y, g_x, q_z, q_y, q_x, s_z, s_y, s_x, DZ, DY, DX)
    r_sz, r_sy = Y * X * heads, X * heads
    o_row = i_b * Z * r_sz + i_h + _address(g_z, g_y, g_x, q_z, q_y, q_x, r_sz, r_sy, heads, DZ, DY, DX)
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_qd, other=0.0)
    b_g = tl.load(p_g + o_row[:, None] * D + o_d[None, :], mask=m_qd, other=0.0)
    b_lse = tl.load(p_lse + o_row, mask=m_q, other=0.0) * _LOG2E
    b_delta = tl.load(p_delta + o_row, mask=m_q, other=0.0)

    low_z, high_z = _key_range(t_z, len_z, TZ, KZ, SZ, CZ)
    low_y, high_y = _key_range(t_y, len_y, TY, KY, SY, CY)
    low_x, high_x = _key_range(t_x, len_x, TX, KX, SX, CX)
    n_y, n_x = tl.cdiv(high_y - low_y, BY), tl.cdiv(high_x - low_x, BX)
    PY: tl.constexpr = TY + 2 * (KY - 1)
    PX: tl.constexpr = TX + 2 * (KX - 1)
    PLACES: tl.constexpr = (TZ + 2 * (KZ - 1)) * PY * PX
    o_bias = (i_h * M + o_m) * PLACES

    b_dq = tl.zeros([M, BLOCK_D], tl.float32)
    for i_block in range(0, tl.cdiv(high_z - low_z, BZ) * n_y * n_x):
        j_z, j_y, j_x = _split3(i_block, n_y, n_x)
        k_z, k_y, k_x = _split3(o_n, BY, BX)
        k_z, k_y, k_x = k_z + low_z + j_z * BZ, k_y + low_y + j_y * BY, k_x + low_x + j_x * BX
        m_k = (k_z < high_z) & (k_y < high_y) & (k_x < high_x)
        o_k = base + _address(g_z, g_y, g_x, k_z, k_y, k_x, s_z, s_y, s_x, DZ, DY, DX)
        m_kd = m_k[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=m_kd, other=0.0)
        b_v = tl.load(p_v + o_k[:, None] + o_d[None, :], mask=m_kd, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * _LOG2E)
        if HAS_BIAS:
            place = ((k_z - t_z + (KZ - 1)) * PY + (k_y - t_y + (KY - 1))) * PX + (k_x - t_x + (KX - 1))
            b_s += tl.load(p_bias + (o_bias[:, None] + place[None, :]), mask=m_k[None, :], other=0.0)
        visible = m_k[None, :] & _visible(
            q_z[:, None], q_y[:, None], q_x[:, None], k_z[None, :], k_y[None, :], k_x[None, :],
            len_z, len_y, len_x, RANK, KZ, KY, KX, SZ, SY, SX, CZ, CY, CX,
        )  # fmt: skip
        b_p = tl.where(visible, tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_ds = b_p * (tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    tl.store(p_dq + o_row[:, None] * D + o_d[None, :], (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_qd)


@triton.jit
def _na_bwd_key_kernel(
    p_g, p_q, p_k, p_v, p_bias, p_lse, p_delta, p_dk, p_dv,
    s_b, s_z, s_y, s_x, s_h,
    Z, Y, X, heads, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    DZ: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_tile, i_h, i_b = pid % tiles, pid // tiles % heads, (pid // tiles // heads).to(tl.int64)
    g_z, g_y, g_x, len_z, len_y, len_x, t_z, t_y, t_x = _tile_corner(i_tile, Z, Y, X, DZ, DY, DX, TZ, TY, TX)
    M: tl.constexpr = TZ * TY * TX
    N: tl.constexpr = BZ * BY * BX
    o_m, o_n, o_d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    m_d = o_d < D

    k_z, k_y, k_x = _split3(o_m, TY, TX)
    k_z, k_y, k_x = k_z + t_z, k_y + t_y, k_x + t_x
    m_k = (k_z < len_z) & (k_y < len_y) & (k_x < len_x)
    m_kd = m_k[:, None] & m_d[None, :]
    base = i_b * s_b + i_h * s_h
    o_k = base + _address(g_z, g_y, g_x, k_z, k_y, k_x, s_z, s_y, s_x, DZ, DY, DX)
    b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=m_kd, other=0.0)
    b_v = tl.load(p_v + o_k[:, None] + o_d[None, :], mask=m_kd, other=0.0)

    low_z, high_z = _query_range(t_z, len_z, TZ, KZ, SZ, CZ)
    low_y, high_y = _query_range(t_y, len_y, TY, KY, SY, CY)
    low_x, high_x = _query_range(t_x, len_x, TX, KX, SX, CX)
    n_y, n_x = tl.cdiv(high_y - low_y, BY), tl.cdiv(high_x - low_x, BX)
    PY: tl.constexpr = TY + 2 * (KY - 1)
    PX: tl.constexpr = TX + 2 * (KX - 1)
    PZ: tl.constexpr = TZ + 2 * (KZ - 1)
    PLACES: tl.constexpr = PZ * PY * PX
    o_bias = (i_h * M + o_m) * PLACES

    r_sz, r_sy = Y * X * heads, X * heads
    row_base = i_b * Z * r_sz + i_h
    b_dk = tl.zeros([M, BLOCK_D], tl.float32)
    b_dv = tl.zeros([M, BLOCK_D], tl.float32)
    for i_block in range(0, tl.cdiv(high_z - low_z, BZ) * n_y * n_x):
        j_z, j_y, j_x = _split3(i_block, n_y, n_x)
        q_z, q_y, q_x = _split3(o_n, BY, BX)
        q_z, q_y, q_x = q_z + low_z + j_z * BZ, q_y + low_y + j_y * BY, q_x + low_x + j_x * BX
        m_q = (q_z < high_z) & (q_y < high_y) & (q_x < high_x)
        o_q = base + _address(g_z, g_y, g_x, q_z, q_y, q_x, s_z, s_y, s_x, DZ, DY, DX)
        o_row = row_base + _address(g_z, g_y, g_x, q_z, q_y, q_x, r_sz, r_sy, heads, DZ, DY, DX)
        m_qd = m_q[:, None] & m_d[None, :]
        b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_qd, other=0.0)
        b_g = tl.load(p_g + o_row[:, None] * D + o_d[None, :], mask=m_qd, other=0.0)
        b_lse = tl.load(p_lse + o_row, mask=m_q, other=0.0) * _LOG2E
        b_delta = tl.load(p_delta + o_row, mask=m_q, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * _LOG2E)
        visible = m_q[None, :] & _visible(
            q_z[None, :], q_y[None, :], q_x[None, :], k_z[:, None], k_y[:, None], k_x[:, None],
            len_z, len_y, len_x, RANK, KZ, KY, KX, SZ, SY, SX, CZ, CY, CX,
        )  # fmt: skip
        if HAS_BIAS:  # a stride's range may include queries beyond the expanded table; none of them sees a tile key
            r_z, r_y, r_x = q_z - t_z + (KZ - 1), q_y - t_y + (KY - 1), q_x - t_x + (KX - 1)
            m_r = m_q & (r_z >= 0) & (r_z < PZ) & (r_y >= 0) & (r_y < PY) & (r_x >= 0) & (r_x < PX)
            place = (r_z * PY + r_y) * PX + r_x
            b_s += tl.load(p_bias + (o_bias[:, None] + place[None, :]), mask=m_r[None, :], other=0.0)
        b_p = tl.where(visible, tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_row = row_base + _address(g_z, g_y, g_x, k_z, k_y, k_x, r_sz, r_sy, heads, DZ, DY, DX)
    tl.store(p_dk + o_row[:, None] * D + o_d[None, :], (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_kd)
    tl.store(p_dv + o_row[:, None] * D + o_d[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_kd)


@triton.jit
def _na_bwd_bias_kernel(
    p_g, p_q, p_k, p_v, p_bias, p_lse, p_delta, p_dbias,
    s_b, s_z, s_y, s_x, s_h,
    Z, Y, X, batch, heads, tiles, splits, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    DZ: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    CZ: tl.constexpr, CY: tl.constexpr, CX: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    PZ: tl.constexpr = TZ + 2 * (KZ - 1)
    PY: tl.constexpr = TY + 2 * (KY - 1)
    PX: tl.constexpr = TX + 2 * (KX - 1)
    N_Y: tl.constexpr = (PY + BY - 1) // BY
    N_X: tl.constexpr = (PX + BX - 1) // BX
    BLOCKS: tl.constexpr = (PZ + BZ - 1) // BZ * N_Y * N_X
    pid = tl.program_id(0)
    i_block, i_h, i_split = pid % BLOCKS, pid // BLOCKS % heads, pid // BLOCKS // heads
    M: tl.constexpr = TZ * TY * TX
    N: tl.constexpr = BZ * BY * BX
    o_m, o_n, o_d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    j_z, j_y, j_x = _split3(i_block, N_Y, N_X)
    r_z, r_y, r_x = _split3(o_n, BY, BX)
    r_z, r_y, r_x = r_z + j_z * BZ, r_y + j_y * BY, r_x + j_x * BX
    m_r = (r_z < PZ) & (r_y < PY) & (r_x < PX)
    place = (r_z * PY + r_y) * PX + r_x
    o_bias = (i_h * M + o_m) * (PZ * PY * PX)
    b_bias = tl.load(p_bias + (o_bias[:, None] + place[None, :]), mask=m_r[None, :], other=0.0)

    r_sz, r_sy = Y * X * heads, X * heads
    b_sum = tl.zeros([M, N], tl.float32)
    for i_work in range(i_split, batch * tiles, splits):
        i_tile, i_b = i_work % tiles, (i_work // tiles).to(tl.int64)
        g_z, g_y, g_x, len_z, len_y, len_x, t_z, t_y, t_x = _tile_corner(i_tile, Z, Y, X, DZ, DY, DX, TZ, TY, TX)
        low_z, high_z = _key_range(t_z, len_z, TZ, KZ, SZ, CZ)
        low_y, high_y = _key_range(t_y, len_y, TY, KY, SY, CY)
        low_x, high_x = _key_range(t_x, len_x, TX, KX, SX, CX)
        f_z, f_y, f_x = t_z - (KZ - 1) + j_z * BZ, t_y - (KY - 1) + j_y * BY, t_x - (KX - 1) + j_x * BX
        touched = (f_z < high_z) & (f_z + BZ > low_z) & (f_y < high_y) & (f_y + BY > low_y)
        if touched & (f_x < high_x) & (f_x + BX > low_x):  # most place blocks lie outside an inner tile's halo
            q_z, q_y, q_x = _split3(o_m, TY, TX)
            q_z, q_y, q_x = q_z + t_z, q_y + t_y, q_x + t_x
            k_z, k_y, k_x = r_z + t_z - (KZ - 1), r_y + t_y - (KY - 1), r_x + t_x - (KX - 1)
            m_q = (q_z < len_z) & (q_y < len_y) & (q_x < len_x)
            m_k = m_r & (k_z >= 0) & (k_z < len_z) & (k_y >= 0) & (k_y < len_y) & (k_x >= 0) & (k_x < len_x)
            base = i_b * s_b + i_h * s_h
            o_q = base + _address(g_z, g_y, g_x, q_z, q_y, q_x, s_z, s_y, s_x, DZ, DY, DX)
            o_k = base + _address(g_z, g_y, g_x, k_z, k_y, k_x, s_z, s_y, s_x, DZ, DY, DX)
            o_row = i_b * Z * r_sz + i_h + _address(g_z, g_y, g_x, q_z, q_y, q_x, r_sz, r_sy, heads, DZ, DY, DX)
            m_qd, m_kd = m_q[:, None] & m_d[None, :], m_k[:, None] & m_d[None, :]
            b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_qd, other=0.0)
            b_g = tl.load(p_g + o_row[:, None] * D + o_d[None, :], mask=m_qd, other=0.0)
            b_lse = tl.load(p_lse + o_row, mask=m_q, other=0.0) * _LOG2E
            b_delta = tl.load(p_delta + o_row, mask=m_q, other=0.0)
            b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=m_kd, other=0.0)
            b_v = tl.load(p_v + o_k[:, None] + o_d[None, :], mask=m_kd, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * _LOG2E) + b_bias
            visible = m_q[:, None] & m_k[None, :] & _visible(
                q_z[:, None], q_y[:, None], q_x[:, None], k_z[None, :], k_y[None, :], k_x[None, :],
                len_z, len_y, len_x, RANK, KZ, KY, KX, SZ, SY, SX, CZ, CY, CX,
            )  # fmt: skip
            b_p = tl.where(visible, tl.exp2(b_s - b_lse[:, None]), 0.0)
            b_sum += b_p * (tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    o_out = ((i_split.to(tl.int64) * heads + i_h) * M + o_m[:, None]) * (BLOCKS * N) + i_block * N + o_n[None, :]
    tl.store(p_dbias + o_out, b_sum)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _rank(windows: Windows, spatial: tuple[int, ...]) -> int:
    """Return the number of axes of the map, without leading axes of length 1 under a window of 1."""
    for axis in range(2):
        if spatial[axis] != 1 or windows[axis].size != 1:
            return 3 - axis
    return 1


class _Launch:
    """Hold the geometry of one launch: the constants, grid and strides of its kernel."""

    def __init__(self, query: Tensor, windows: Windows, config: Config) -> None:
        self.batch, self.spatial = query.shape[0], tuple(query.shape[1:4])
        self.heads, self.head_dim = query.shape[4:]
        self.windows, self.config = windows, config
        self.rank = _rank(windows, self.spatial)
        self.tile = TILES[self.rank]
        self.places = [t + 2 * (w.size - 1) for t, w in zip(self.tile, windows, strict=True)]
        self.block = self._block_shape()
        per_lattice = [-(-n // w.dilation) for n, w in zip(self.spatial, windows, strict=True)]
        self.tiles = math.prod(w.dilation * -(-n // t) for n, t, w in zip(per_lattice, self.tile, windows, strict=True))

    def _block_shape(self) -> list[int]:
        """Return the shape of a key block, filled from the last axis: up to a tile's halo, then the axis before."""
        left, shape = self.config.block, []
        for tile, window in zip(reversed(self.tile), reversed(self.windows), strict=True):
            size = min(left, _power_of_two(tile + window.size - window.stride))
            shape.append(size)
            left //= size
        shape[0] *= left  # the halo is smaller than the block: let the last axis exceed it
        return shape[::-1]

    def constants(self) -> tuple[object, ...]:
        columns = [
            [w.size for w in self.windows],
            [w.stride for w in self.windows],
            [w.dilation for w in self.windows],
            [w.is_causal for w in self.windows],
            self.tile,
            self.block,
        ]
        flat = [value for column in columns for value in column]
        return self.head_dim, max(16, _power_of_two(self.head_dim)), self.rank, *flat

    def options(self) -> dict[str, int]:
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}


def _precision() -> str:
    """Return the tensor-core precision of float32 products, from PyTorch's own setting; half precision ignores it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _alike(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors with equal strides and contiguous channels: unchanged (views of one projection) or copied."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and all(tensor.stride() == strides for tensor in tensors):
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


@functools.lru_cache(maxsize=64)
def _spread_index(tile: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return [tile * places]: the table index of each query of a tile and place around it, clamped to the table."""
    index = torch.zeros((1,) * 6, dtype=torch.long, device=device)
    for axis, (count, size) in enumerate(zip(tile, sizes, strict=True)):
        query = torch.arange(count, device=device)[:, None]
        place = torch.arange(count + 2 * (size - 1), device=device)
        shape = [1] * 6
        shape[axis], shape[3 + axis] = count, len(place)
        index = index * (2 * size - 1) + (place - query).clamp(0, 2 * size - 2).view(shape)
    return index.flatten()


def _spread(rpb: Tensor | None, launch: _Launch, *, mirrored: bool = False) -> Tensor | None:
    """Expand the bias to [heads, tile, places] in units of log2; `mirrored` is from a tile of keys to its queries."""
    if rpb is None:
        return None
    table = rpb.flip(1, 2, 3) if mirrored else rpb
    sizes = tuple(window.size for window in launch.windows)
    index = _spread_index(launch.tile, sizes, rpb.device)
    return (table.float() * LOG2E).flatten(1).index_select(1, index)


def _fold(spread: Tensor, launch: _Launch) -> Tensor:
    """Sum [splits, heads, tile, blocks of places] into the table [heads, 2 K - 1 per axis].

    Query t of a tile finds offset o at place t + o, so one strided view aligns the entries of all queries per offset.
    """
    counts = [-(-n // b) for n, b in zip(launch.places, launch.block, strict=True)]
    parts = spread.view(*spread.shape[:2], *launch.tile, *counts, *launch.block)
    parts = parts.permute(0, 1, 2, 3, 4, 5, 8, 6, 9, 7, 10).contiguous()
    parts = parts.flatten(9, 10).flatten(7, 8).flatten(5, 6)
    tile, place = parts.stride()[2:5], parts.stride()[5:8]
    offsets = [2 * window.size - 1 for window in launch.windows]
    lined_up = parts.as_strided(
        (*parts.shape[:2], *launch.tile, *offsets),
        (*parts.stride()[:2], *(a + b for a, b in zip(tile, place, strict=True)), *place),
    )
    return lined_up.sum((0, 2, 3, 4))


def _configs(query: Tensor) -> tuple[Config, Config]:
    """Return the forward and backward configuration of the narrowest entry that supports the heads of `query`."""
    by_width = CONFIGS[query.element_size()]
    return by_width[min(width for width in by_width if width >= query.shape[-1])]


def forward(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output [batch, Z, Y, X, heads, head_dim] and natural log-sum-exp [batch, Z, Y, X, heads] in float32."""
    launch = _Launch(query, windows, _configs(query)[0])
    query, key, value = _alike(query, key, value)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    bias = _spread(rpb, launch)
    grid = (launch.tiles * launch.heads * launch.batch,)
    if out.numel():
        _na_fwd_kernel[grid](
            query, key, value, query if bias is None else bias, out, lse, *query.stride()[:5], *launch.spatial,
            launch.heads, launch.tiles, scale, *launch.constants(), bias is not None, _precision(), **launch.options(),
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, lse: Tensor, delta: Tensor,
    windows: Windows, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of query, key, value and table.

    `delta` [batch, Z, Y, X, heads] is sum(out * grad_out) - grad_lse.
    """
    launch = _Launch(query, windows, _configs(query)[1])
    query, key, value = _alike(query, key, value)
    grad_out, lse, delta = grad_out.contiguous(), lse.contiguous(), delta.float().contiguous()
    grads = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)]
    if not query.numel():
        return grads[0], grads[1], grads[2], None if rpb is None else torch.zeros_like(rpb)
    bias, mirrored = _spread(rpb, launch), _spread(rpb, launch, mirrored=True)
    has_bias = rpb is not None
    grid = (launch.tiles * launch.heads * launch.batch,)
    shape = (*query.stride()[:5], *launch.spatial)
    tail = (*launch.constants(), has_bias, _precision())
    _na_bwd_query_kernel[grid](
        grad_out, query, key, value, bias if has_bias else query, lse, delta, grads[0], *shape,
        launch.heads, launch.tiles, scale, *tail, **launch.options(),
    )  # fmt: skip
    _na_bwd_key_kernel[grid](
        grad_out, query, key, value, mirrored if has_bias else query, lse, delta, grads[1], grads[2], *shape,
        launch.heads, launch.tiles, scale, *tail, **launch.options(),
    )  # fmt: skip
    if bias is None:
        return grads[0], grads[1], grads[2], None
    blocks = math.prod(-(-n // b) for n, b in zip(launch.places, launch.block, strict=True))
    splits = max(1, min(launch.batch * launch.tiles, 1024 // (launch.heads * blocks)))  # about eight programs per SM
    sums = torch.empty(
        (splits, launch.heads, math.prod(launch.tile), blocks * math.prod(launch.block)),
        dtype=torch.float32, device=query.device,
    )  # fmt: skip
    _na_bwd_bias_kernel[(splits * launch.heads * blocks,)](
        grad_out, query, key, value, bias, lse, delta, sums, *shape, launch.batch, launch.heads, launch.tiles, splits,
        scale, *launch.constants(), _precision(), **launch.options(),
    )  # fmt: skip
    return grads[0], grads[1], grads[2], _fold(sums, launch)
