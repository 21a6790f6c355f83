# pyright: basic, reportCallIssue=false, reportArgumentType=false
# pyright understands neither kernel launches nor that Triton turns plain numbers into constants.
"""Attention in Triton that also returns the evidence: the first row, or the column sums, of the attention matrix.

* `_attend_kernel` computes attention with an online softmax and adds the logarithms of the sizes to the logits of the
  keys. It stores the log-sum-exp of each row (`lse`), from which any part of the matrix can be recomputed.
* `_evidence_kernel` recomputes columns of the matrix, for the first query only (one pass over the keys), or for all
  queries (the product of queries and keys once more). The matrix is never stored in memory.
* Both are differentiable. With P the attention matrix and g the gradient of the evidence, g is added to the first row
  of dP, or to every row. The softmax gradient subtracts delta = sum(P dP) from each row. The part of delta due to the
  output is sum(grad * out). The part due to g is sum(g * evidence) for the first row, and needs another pass over the
  keys for column sums (`_query_grad_kernel`).

Sums and probabilities are float32, and float32 products have full precision. These kernels have not been timed on a
GPU; the compiler reports no register spills (tests/kernels/aot_compile.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = {2: 128, 4: 64}
"""The most channels per head that fit into registers, by bytes per element; wider heads use the plain operators."""


@triton.jit
def _rows(p_x, o_n, tokens, s_n, D: tl.constexpr, BD: tl.constexpr):
    """Load [tokens, BD] in the data type of the tensor, with zeros out of bounds."""
    o_d = tl.arange(0, BD)
    m_x = (o_n < tokens)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_n.to(tl.int64)[:, None] * s_n + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def _store_rows(p_x, b_x, o_n, tokens, s_n, D: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    m_x = (o_n < tokens)[:, None] & (o_d < D)[None, :]
    tl.store(p_x + o_n.to(tl.int64)[:, None] * s_n + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _logits(b_q, b_k, p_bias, o_k, tokens, scale, HAS_BIAS: tl.constexpr):
    """Compute the logits [queries, keys], with -inf for keys out of bounds."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    if HAS_BIAS:
        b_s += tl.load(p_bias + o_k, mask=o_k < tokens, other=0.0)[None, :]
    return tl.where((o_k < tokens)[None, :], b_s, float("-inf"))


@triton.jit
def _attend_kernel(
    p_q, p_k, p_v, p_bias, p_out, p_lse, tokens, heads, scale,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on,
    HAS_BIAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_q, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_q = i_q * BQ + tl.arange(0, BQ)
    b_q = _rows(p_q + i_b * s_qb + i_h * s_qh, o_q, tokens, s_qn, D, BD)
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_bias += i_b * tokens
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_out = tl.zeros([BQ, BD], tl.float32)
    for start in range(0, tokens, BK):
        o_k = start + tl.arange(0, BK)
        b_k = _rows(p_k, o_k, tokens, s_kn, D, BD)
        b_s = _logits(b_q, b_k, p_bias, o_k, tokens, scale, HAS_BIAS)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf while all keys so far have size zero
        b_p = tl.exp(b_s - b_base[:, None])
        b_decay = tl.exp(b_max - b_base)
        b_v = _rows(p_v, o_k, tokens, s_vn, D, BD)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_out = b_out * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new
    _store_rows(p_out + i_b * s_ob + i_h * s_oh, b_out / b_sum[:, None], o_q, tokens, s_on, D, BD)
    tl.store(p_lse + i_bh.to(tl.int64) * tokens + o_q, b_max + tl.log(b_sum), mask=o_q < tokens)


@triton.jit
def _evidence_kernel(
    p_q, p_k, p_bias, p_lse, p_evidence, tokens, heads, scale, s_qb, s_qh, s_qn, s_kb, s_kh, s_kn,
    SUMS: tl.constexpr, HAS_BIAS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the attention that BK keys receive: from the first query, or with SUMS from all queries together."""
    i_k, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_k, o_d = i_k * BK + tl.arange(0, BK), tl.arange(0, BD)
    p_q += i_b * s_qb + i_h * s_qh
    p_bias += i_b * tokens
    p_lse += i_bh.to(tl.int64) * tokens
    b_k = _rows(p_k + i_b * s_kb + i_h * s_kh, o_k, tokens, s_kn, D, BD)
    b_evidence = tl.zeros([BK], tl.float32)
    if SUMS:
        for start in range(0, tokens, BQ):
            o_q = start + tl.arange(0, BQ)
            b_q = _rows(p_q, o_q, tokens, s_qn, D, BD)
            b_lse = tl.load(p_lse + o_q, mask=o_q < tokens, other=float("inf"))  # gives exp(-inf) = 0 out of bounds
            b_s = _logits(b_q, b_k, p_bias, o_k, tokens, scale, HAS_BIAS)
            b_evidence += tl.sum(tl.exp(b_s - b_lse[:, None]), 0)
    else:
        b_q = tl.load(p_q + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_s = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1) * scale
        if HAS_BIAS:
            b_s += tl.load(p_bias + o_k, mask=o_k < tokens, other=0.0)
        b_evidence = tl.exp(b_s - tl.load(p_lse))
    tl.store(p_evidence + i_bh.to(tl.int64) * tokens + o_k, b_evidence, mask=o_k < tokens)


@triton.jit
def _grad_of_logits(b_p, b_grad, b_v, b_grad_evidence, o_q, b_delta, SUMS: tl.constexpr):
    """Compute the gradient of a tile of logits, P (dP - delta)."""
    b_grad_p = tl.dot(b_grad, tl.trans(b_v), input_precision="ieee")
    if SUMS:
        b_grad_p += b_grad_evidence[None, :]
    else:
        b_grad_p += tl.where((o_q == 0)[:, None], b_grad_evidence[None, :], 0.0)
    return b_p * (b_grad_p - b_delta[:, None])


@triton.jit
def _query_grad_kernel(
    p_grad, p_grad_evidence, p_q, p_k, p_v, p_bias, p_lse, p_delta, p_grad_q, tokens, heads, scale,
    s_ob, s_oh, s_on, s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gn,
    SUMS: tl.constexpr, HAS_BIAS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of BQ queries; with SUMS, complete and store their delta first."""
    i_q, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_q, o_row = i_q * BQ + tl.arange(0, BQ), i_bh.to(tl.int64) * tokens
    m_q = o_q < tokens
    b_q = _rows(p_q + i_b * s_qb + i_h * s_qh, o_q, tokens, s_qn, D, BD)
    b_grad = _rows(p_grad + i_b * s_ob + i_h * s_oh, o_q, tokens, s_on, D, BD)
    b_lse = tl.load(p_lse + o_row + o_q, mask=m_q, other=float("inf"))
    b_delta = tl.load(p_delta + o_row + o_q, mask=m_q, other=0.0)
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_bias += i_b * tokens
    p_grad_evidence += o_row
    if SUMS:
        for start in range(0, tokens, BK):
            o_k = start + tl.arange(0, BK)
            b_k = _rows(p_k, o_k, tokens, s_kn, D, BD)
            b_p = tl.exp(_logits(b_q, b_k, p_bias, o_k, tokens, scale, HAS_BIAS) - b_lse[:, None])
            b_delta += tl.sum(b_p * tl.load(p_grad_evidence + o_k, mask=o_k < tokens, other=0.0)[None, :], 1)
        tl.store(p_delta + o_row + o_q, b_delta, mask=m_q)
    b_grad_q = tl.zeros([BQ, BD], tl.float32)
    for start in range(0, tokens, BK):
        o_k = start + tl.arange(0, BK)
        b_k = _rows(p_k, o_k, tokens, s_kn, D, BD)
        b_v = _rows(p_v, o_k, tokens, s_vn, D, BD)
        b_grad_evidence = tl.load(p_grad_evidence + o_k, mask=o_k < tokens, other=0.0)
        b_p = tl.exp(_logits(b_q, b_k, p_bias, o_k, tokens, scale, HAS_BIAS) - b_lse[:, None])
        b_grad_s = _grad_of_logits(b_p, b_grad, b_v, b_grad_evidence, o_q, b_delta, SUMS)
        b_grad_q += tl.dot(b_grad_s.to(b_k.dtype), b_k, input_precision="ieee")
    _store_rows(p_grad_q + i_b * s_gb + i_h * s_gh, b_grad_q * scale, o_q, tokens, s_gn, D, BD)


@triton.jit
def _key_grad_kernel(
    p_grad, p_grad_evidence, p_q, p_k, p_v, p_bias, p_lse, p_delta, p_grad_k, p_grad_v, p_grad_bias,
    tokens, heads, scale,
    s_ob, s_oh, s_on, s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gn,
    SUMS: tl.constexpr, HAS_BIAS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BK keys, their values, and their biases in this head."""
    i_k, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_k, o_row = i_k * BK + tl.arange(0, BK), i_bh.to(tl.int64) * tokens
    b_k = _rows(p_k + i_b * s_kb + i_h * s_kh, o_k, tokens, s_kn, D, BD)
    b_v = _rows(p_v + i_b * s_vb + i_h * s_vh, o_k, tokens, s_vn, D, BD)
    b_grad_evidence = tl.load(p_grad_evidence + o_row + o_k, mask=o_k < tokens, other=0.0)
    p_q += i_b * s_qb + i_h * s_qh
    p_grad += i_b * s_ob + i_h * s_oh
    p_bias += i_b * tokens
    b_grad_k, b_grad_v = tl.zeros([BK, BD], tl.float32), tl.zeros([BK, BD], tl.float32)
    b_grad_bias = tl.zeros([BK], tl.float32)
    for start in range(0, tokens, BQ):
        o_q = start + tl.arange(0, BQ)
        b_q = _rows(p_q, o_q, tokens, s_qn, D, BD)
        b_grad = _rows(p_grad, o_q, tokens, s_on, D, BD)
        b_lse = tl.load(p_lse + o_row + o_q, mask=o_q < tokens, other=float("inf"))
        b_delta = tl.load(p_delta + o_row + o_q, mask=o_q < tokens, other=0.0)
        b_p = tl.exp(_logits(b_q, b_k, p_bias, o_k, tokens, scale, HAS_BIAS) - b_lse[:, None])
        b_grad_v += tl.dot(tl.trans(b_p).to(b_grad.dtype), b_grad, input_precision="ieee")
        b_grad_s = _grad_of_logits(b_p, b_grad, b_v, b_grad_evidence, o_q, b_delta, SUMS)
        b_grad_k += tl.dot(tl.trans(b_grad_s).to(b_q.dtype), b_q, input_precision="ieee")
        b_grad_bias += tl.sum(b_grad_s, 0)
    o_grad = i_b * s_gb + i_h * s_gh
    _store_rows(p_grad_k + o_grad, b_grad_k * scale, o_k, tokens, s_gn, D, BD)
    _store_rows(p_grad_v + o_grad, b_grad_v, o_k, tokens, s_gn, D, BD)
    if HAS_BIAS:
        tl.store(p_grad_bias + o_row + o_k, b_grad_bias, mask=o_k < tokens)


def can_attend(q: Tensor) -> bool:
    """Return whether the kernels support heads of this width."""
    return q.shape[3] <= WIDEST[q.dtype.itemsize]


def _blocks(q: Tensor, *, is_key_grad: bool = False) -> dict[str, Any]:
    """Choose the tile sizes and the number of warps.

    Tiles are smaller in float32, where products run without tensor cores and each thread holds its factors, for wide
    heads, and for key gradients, where two results and four operands are in registers at once.
    """
    dim, half = q.shape[3], q.dtype.itemsize == 2
    block = 64 if half and dim <= 64 else 32
    warps = 4 if half else 8
    queries, keys = block, block
    if is_key_grad:
        queries, keys, warps = 32, 32 if half else 16, 4
    width = max(16, 1 << (dim - 1).bit_length())
    return {"D": dim, "BD": width, "BQ": queries, "BK": keys, "num_warps": warps, "num_stages": 1}


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Make the channels contiguous; the other axes may have any stride."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _tokens_first(q: Tensor) -> Tensor:
    """Allocate [batch, heads, tokens, dim] with the memory layout [batch, tokens, heads, dim].

    Transposing back and flattening heads and dim then needs no copy.
    """
    batch, heads, tokens, dim = q.shape
    return torch.empty(batch, tokens, heads, dim, device=q.device, dtype=q.dtype).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the evidence, and the log-sum-exp of each row."""
    q, k, v = _dense(q, k, v)
    batch, heads, tokens, _ = q.shape
    out = _tokens_first(q)
    evidence, lse = (torch.empty(batch, heads, tokens, device=q.device, dtype=torch.float32) for _ in range(2))
    bias = lse if log_size is None else log_size.float().contiguous()  # never read if None
    blocks = {"HAS_BIAS": log_size is not None, **_blocks(q)}
    _attend_kernel[(triton.cdiv(tokens, blocks["BQ"]), batch * heads)](
        q, k, v, bias, out, lse, tokens, heads, scale, *_strides(q, k, v, out), **blocks
    )
    _evidence_kernel[(triton.cdiv(tokens, blocks["BK"]), batch * heads)](
        q, k, bias, lse, evidence, tokens, heads, scale, *_strides(q, k), SUMS=sums, **blocks
    )
    return out, evidence, lse


def attend_backward(
    grad: Tensor,
    grad_evidence: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    out: Tensor,
    evidence: Tensor,
    lse: Tensor,
    scale: float,
    sums: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, and of log_size unless it is None."""
    grad, q, k, v = _dense(grad, q, k, v)
    batch, heads, tokens, _ = q.shape
    grad_evidence = grad_evidence.float().contiguous()
    delta = (grad.float() * out.float()).sum(3)
    if not sums:
        delta[:, :, 0] += (grad_evidence * evidence).sum(2)
    delta, lse = delta.contiguous(), lse.contiguous()
    bias = lse if log_size is None else log_size.float().contiguous()
    grad_q, grad_k, grad_v = _tokens_first(q), _tokens_first(q), _tokens_first(q)
    grad_bias = torch.empty(delta.shape, device=q.device, dtype=torch.float32)
    blocks = {"SUMS": sums, "HAS_BIAS": log_size is not None, **_blocks(q)}
    strides = _strides(grad, q, k, v, grad_q)
    inputs = grad, grad_evidence, q, k, v, bias, lse, delta
    grid = triton.cdiv(tokens, blocks["BQ"]), batch * heads
    _query_grad_kernel[grid](*inputs, grad_q, tokens, heads, scale, *strides, **blocks)
    blocks |= _blocks(q, is_key_grad=True)
    grid = triton.cdiv(tokens, blocks["BK"]), batch * heads
    _key_grad_kernel[grid](*inputs, grad_k, grad_v, grad_bias, tokens, heads, scale, *strides, **blocks)
    grads = [grad_q, grad_k, grad_v]
    return grads if log_size is None else [*grads, grad_bias.sum(1).to(log_size.dtype)]
