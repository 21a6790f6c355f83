# pyright: basic, reportCallIssue=false, reportArgumentType=false
# pyright understands neither Triton launches nor that Triton turns plain numbers into constants.
"""Triton kernels for depth-wise convolution and the two halves of large kernel attention, on channels_last maps.

* `_dw_fwd_kernel`: each program computes a tile of positions and channels, with one shifted load of the tile per tap.
  With mirrored filters it computes the gradient of the input.
* `_dw_weight_grad_kernel`: each program sums one row of taps for a block of channels over a share of all map rows. It
  writes its own partial sums, which are added outside, so there are no atomics.
* `_lka_spatial_kernel`: one launch computes both convolutions of LKA. A program owns all positions of an image for a
  block of channels: it writes the first convolution, a barrier makes it visible to the thread block, and the second
  reads it from the cache. This saves the second launch and, where the map fits the cache, its second fetch.
* `_lka_gate_kernel`: a matrix product computes the 1 x 1 convolution and multiplies it by the input before the store.

All kernels accumulate in float32. The tile sizes below follow the compiler's reports (registers, spills:
tests/kernels/aot_compile.py), not timings.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 8, 8
"""Positions per tile along each axis."""

CHANNELS = 32
"""Channels per tile: 64 bytes in half precision, the smallest memory transaction."""


@triton.jit
def _convolve_tile(
    p_x, p_w, p_b, base, o_y, o_x, o_c, m_c, H, W, C, KY: tl.constexpr, KX: tl.constexpr, DY: tl.constexpr,
    DX: tl.constexpr, HAS_BIAS: tl.constexpr, N: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Return [N, BC] float32 sums at the positions (o_y, o_x); filters are [KY, KX, C]."""
    b_sum = tl.zeros([N, BC], tl.float32)
    if HAS_BIAS:
        b_sum += tl.load(p_b + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for i in range(KY):
        y = o_y + (i - KY // 2) * DY
        m_y = (y >= 0) & (y < H)
        for j in range(KX):
            x = o_x + (j - KX // 2) * DX
            m = m_y & (x >= 0) & (x < W)
            o = base + (y.to(tl.int64) * W + x) * C
            b_x = tl.load(p_x + o[:, None] + o_c[None, :], mask=m[:, None] & m_c[None, :], other=0.0)
            b_w = tl.load(p_w + (i * KX + j) * C + o_c, mask=m_c, other=0.0)
            b_sum += b_x.to(tl.float32) * b_w.to(tl.float32)[None, :]
    return b_sum


@triton.jit
def _store_tile(p_out, base, o_y, o_x, o_c, m_c, H, W, C, b_sum):
    m = (o_y < H) & (o_x < W)
    o = base + (o_y.to(tl.int64) * W + o_x) * C
    tl.store(p_out + o[:, None] + o_c[None, :], b_sum.to(p_out.dtype.element_ty), mask=m[:, None] & m_c[None, :])


@triton.jit
def _dw_fwd_kernel(
    p_x, p_w, p_b, p_out, H, W, C,
    KY: tl.constexpr, KX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    HAS_BIAS: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_tile, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(W, TX)
    o_n = tl.arange(0, TY * TX)
    o_y, o_x = i_tile // tiles * TY + o_n // TX, i_tile % tiles * TX + o_n % TX
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    base = i_b.to(tl.int64) * H * W * C
    b_sum = _convolve_tile(
        p_x, p_w, p_b, base, o_y, o_x, o_c, m_c, H, W, C, KY, KX, DY, DX, HAS_BIAS, TY * TX, BC
    )  # fmt: skip
    _store_tile(p_out, base, o_y, o_x, o_c, m_c, H, W, C, b_sum)


@triton.jit
def _dw_weight_grad_kernel(
    p_g, p_x, p_sums, B, H, W, C, rows_a_program,
    KY: tl.constexpr, KX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    TAPS: tl.constexpr, TX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write partial sums [program, KY, KX, C] over `rows_a_program` rows of all images each.

    TAPS is KX rounded up to a power of two.
    """
    i_row, i_c, i_share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_j = tl.arange(0, TAPS)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_sum = tl.zeros([TAPS, BC], tl.float32)
    for i in range(rows_a_program):
        row = i_share.to(tl.int64) * rows_a_program + i
        y = row % H + (i_row - KY // 2) * DY
        if (row < B * H) & (y >= 0) & (y < H):
            g_row = row * W * C
            x_row = (row // H * H + y) * W * C
            for start in range(0, W, TX):
                g_x = start + tl.arange(0, TX)
                x = g_x[:, None] + (o_j[None, :] - KX // 2) * DX
                m = (g_x < W)[:, None] & (x >= 0) & (x < W) & (o_j < KX)[None, :]
                b_g = tl.load(p_g + g_row + g_x[:, None] * C + o_c[None, :],
                              mask=(g_x < W)[:, None] & m_c[None, :], other=0.0)  # fmt: skip
                b_x = tl.load(p_x + x_row + x[:, :, None] * C + o_c[None, None, :],
                              mask=m[:, :, None] & m_c[None, None, :], other=0.0)  # fmt: skip
                b_sum += tl.sum(b_g.to(tl.float32)[:, None, :] * b_x.to(tl.float32), axis=0)
    o = ((i_share * KY + i_row).to(tl.int64) * KX + o_j) * C
    tl.store(p_sums + o[:, None] + o_c[None, :], b_sum, mask=(o_j < KX)[:, None] & m_c[None, :])


@triton.jit
def _lka_spatial_kernel(
    p_x, p_w5, p_b5, p_w7, p_b7, p_middle, p_out, H, W, C,
    HAS_B5: tl.constexpr, HAS_B7: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_c, i_b = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(W, TX)
    o_n = tl.arange(0, TY * TX)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    base = i_b.to(tl.int64) * H * W * C
    for i_tile in range(tl.cdiv(H, TY) * tiles):
        o_y, o_x = i_tile // tiles * TY + o_n // TX, i_tile % tiles * TX + o_n % TX
        b_sum = _convolve_tile(
            p_x, p_w5, p_b5, base, o_y, o_x, o_c, m_c, H, W, C, 5, 5, 1, 1, HAS_B5, TY * TX, BC
        )  # fmt: skip
        _store_tile(p_middle, base, o_y, o_x, o_c, m_c, H, W, C, b_sum)
    tl.debug_barrier()
    for i_tile in range(tl.cdiv(H, TY) * tiles):
        o_y, o_x = i_tile // tiles * TY + o_n // TX, i_tile % tiles * TX + o_n % TX
        b_sum = _convolve_tile(
            p_middle, p_w7, p_b7, base, o_y, o_x, o_c, m_c, H, W, C, 7, 7, 3, 3, HAS_B7, TY * TX, BC
        )  # fmt: skip
        _store_tile(p_out, base, o_y, o_x, o_c, m_c, H, W, C, b_sum)


@triton.jit
def _lka_gate_kernel(
    p_a, p_w, p_b, p_x, p_out, M, C,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute out = x * (a w^T + b) for rows of channels: a, x, out are [M, C], w is [C out, C in]."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m, o_n = i_m.to(tl.int64) * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < C
    b_sum = tl.zeros([BM, BN], tl.float32)
    for start in range(0, C, BK):
        o_k = start + tl.arange(0, BK)
        m_k = o_k < C
        b_a = tl.load(p_a + o_m[:, None] * C + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + o_n[None, :] * C + o_k[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)
        b_sum += tl.dot(b_a, b_w, input_precision=PRECISION)
    if HAS_BIAS:
        b_sum += tl.load(p_b + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o, m = o_m[:, None] * C + o_n[None, :], m_m[:, None] & m_n[None, :]
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o, (b_x * b_sum).to(p_out.dtype.element_ty), mask=m)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _filters(weight: Tensor) -> Tensor:
    """Permute [C, 1, rows, columns] to [rows, columns, C], contiguous."""
    return weight[:, 0].permute(1, 2, 0).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _precision() -> str:
    """Return the tensor-core precision of float32 products, from PyTorch's own setting; half precision ignores it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int]) -> Tensor:
    """Return the depth-wise convolution [B, C, H, W], channels_last."""
    x, out = _channels_last(x), _empty(x)
    batch, channels, height, width = x.shape
    tiles = triton.cdiv(height, TILE_ROWS) * triton.cdiv(width, TILE_COLUMNS)
    if out.numel():
        _dw_fwd_kernel[(tiles, triton.cdiv(channels, CHANNELS), batch)](
            x, _filters(weight), x if bias is None else bias, out, height, width, channels,
            weight.shape[2], weight.shape[3], *dilation, bias is not None, TILE_ROWS, TILE_COLUMNS, CHANNELS,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, dilation: tuple[int, int]) -> Tensor:
    """Return the gradient of `weight` [C, 1, rows, columns], in float32."""
    grad, x = _channels_last(grad), _channels_last(x)
    batch, channels, height, width = x.shape
    rows, columns = weight.shape[2:]
    if not x.numel():
        return torch.zeros(weight.shape, device=x.device)
    taps = _power_of_two(columns)
    blocks = triton.cdiv(channels, 16)
    shares = max(1, min(batch * height, 1024 // (blocks * rows)))  # about eight programs per multiprocessor
    sums = torch.empty(shares, rows, columns, channels, dtype=torch.float32, device=x.device)
    _dw_weight_grad_kernel[(rows, blocks, shares)](
        grad, x, sums, batch, height, width, channels, triton.cdiv(batch * height, shares),
        rows, columns, *dilation, taps, max(1, 64 // taps), 16, num_warps=4,
    )  # fmt: skip
    return sums.sum(0).permute(2, 0, 1)[:, None]


def lka_spatial(x: Tensor, w5: Tensor, w7d3: Tensor, b5: Tensor | None, b7d3: Tensor | None) -> Tensor:
    """Apply both depth-wise convolutions of LKA to [B, C, H, W]; the result is channels_last."""
    x = _channels_last(x)
    middle, out = _empty(x), _empty(x)
    batch, channels, height, width = x.shape
    if out.numel():
        _lka_spatial_kernel[(triton.cdiv(channels, CHANNELS), batch)](
            x, _filters(w5), x if b5 is None else b5, _filters(w7d3), x if b7d3 is None else b7d3, middle, out,
            height, width, channels, b5 is not None, b7d3 is not None, TILE_ROWS, TILE_COLUMNS, CHANNELS, num_warps=8,
        )  # fmt: skip
    return out


def lka_gate(x: Tensor, spatial: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """Return x * conv1x1(spatial), [B, C, H, W], channels_last."""
    x, spatial, out = _channels_last(x), _channels_last(spatial), _empty(x)
    batch, channels, height, width = x.shape
    rows = batch * height * width
    if out.numel():
        block_m, block_n, block_k = (64, 64, 32) if x.element_size() == 2 else (64, 32, 16)
        _lka_gate_kernel[(triton.cdiv(rows, block_m), triton.cdiv(channels, block_n))](
            spatial, w1.contiguous(), x if b1 is None else b1, x, out, rows, channels,
            b1 is not None, _precision(), block_m, block_n, block_k, num_warps=4,
        )  # fmt: skip
    return out
