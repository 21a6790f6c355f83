# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright understands neither Triton launches nor that Triton turns plain numbers into constants.
"""Triton backward kernel of the selective scan: one program per chunk of steps and block of channels.

The forward scan has saved the state at the start of each chunk, and the adjoint scan the adjoint at the end of each
PART of one, so only the recurrences inside remain. They are scanned for one state element after the other. With q the
gradient that flows back from the next step, and G that of h_t,

    G_t = C_t grad_t + q_t                  grad_B_t = sum G_t delta_t x_t              over channels
    q_{t-1} = decay_t G_t                   grad_C_t = sum grad_t h_t                   over channels
    grad_x_t = delta_t sum G_t B_t + D grad_t                                           over the state
    grad_delta_t = x_t sum G_t B_t + sum A G_t decay_t h_{t-1}                          over the state
    grad_A = sum G_t delta_t decay_t h_{t-1}                                            over steps

What is unusual:
* A tile is [steps, parts, channels]: channels in lanes, each part of the chunk in its own warp (or two parts in one
  warp of twice as many lanes), and the steps of a part in the registers of a lane. A scan therefore crosses no lanes,
  and takes one or two instructions per element. Triton chooses this layout only if it does not know that neighbouring
  channels are adjacent in memory; `one`, a stride that it must not specialise, hides that.
* The initial value of a scan is added to its first element where it is known: the products of the decays are then
  unused, and the compiler removes them. The states before the later parts are not known; a scan over the parts computes
  them.
* grad_B and grad_C are sums over channels, and cost as much as all the rest: five cross-lane additions per value.
  Every block of channels writes its own partial sums, which are added outside.
"""

import triton
import triton.language as tl

from ._triton_walk import LOG2E, softplus


@triton.jit
def _then(decay, value, next_decay, next_value):
    """Compose h <- decay h + value with the next such step."""
    return decay * next_decay, next_decay * value + next_value


@triton.jit
def _start(decay, value, factor, start, next_decay, next_value, next_factor, next_start):
    """Compose like `_then`, and carry the state at the start of the last part, which is start + factor h."""
    decay_both, value_both = _then(decay, value, next_decay, next_value)
    return decay_both, value_both, next_factor * decay, next_start + next_factor * value


@triton.jit
def _before(decay, factor, value, earlier_decay, earlier_factor, earlier_value):
    """Compose G = value + factor q, q <- decay G of some steps with the earlier steps, which follow in this scan."""
    carried = earlier_factor * decay
    return earlier_decay, carried * factor, earlier_value + carried * value


@triton.jit
def _pixels(
    start, end, inner_steps, first, inner, outer, low_i, high_i, low_o, high_o,
    LEAVES: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Return the pixels of T * PARTS steps from `start`, [T, PARTS], the mask of existing steps and that of the map.

    Steps outside either mask get pixel 0, so that loads need no per-step mask. Their gradient of y and their delta, or
    their x, are set to 0, which cancels whatever else is loaded there.
    """
    o_t = tl.arange(0, T)[:, None] + tl.arange(0, PARTS)[None, :] * T
    m_t = start + o_t < end
    o_t += start % inner_steps
    # Number of lines begun since the first. Division is slow, so short lines use a multiplication instead.
    lines = tl.where(o_t >= inner_steps, 1, 0)
    if inner_steps < T * PARTS:
        lines = (o_t * (65536 // inner_steps + 1)) >> 16
    i, o = o_t - lines * inner_steps, lines + start // inner_steps
    m_here = m_t
    if LEAVES:
        m_here = m_t & (i >= low_i) & (i < high_i) & (o >= low_o) & (o < high_o)
    pixel = tl.where(m_here, first + o * outer + i * inner, 0)
    return (pixel.to(tl.int64) if WIDE else pixel), m_t, m_here


@triton.jit
def _read(
    p_x, p_delta, p_projected, o_pixel, m_t, m_here, o_c, m_c, b_bias, p_weight, s_xp, s_dp, s_pp, one,
    RANK: tl.constexpr, SOFTPLUS: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """Load x and delta, [T, PARTS, channels]; delta is 0 at steps past the end."""
    m = m_c[None, None, :]
    o_x = o_pixel[:, :, None] * s_xp + o_c[None, None, :] * one
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    if LEAVES:
        b_x = tl.where(m_here[:, :, None], b_x, 0.0)
    b_raw = tl.zeros_like(b_x) + b_bias[None, None, :]
    for r in tl.static_range(RANK):
        b_z = tl.load(p_projected + o_pixel * s_pp + r)
        if LEAVES:
            b_z = tl.where(m_here, b_z, 0.0)
        b_weight = tl.load(p_weight + o_c * RANK + r, mask=m_c, other=0.0).to(tl.float32)
        b_raw += b_z[:, :, None] * b_weight[None, None, :]
    if RANK == 0:
        o_delta = o_pixel[:, :, None] * s_dp + o_c[None, None, :] * one
        b_raw += tl.load(p_delta + o_delta, mask=m, other=0.0).to(tl.float32)
    return b_x, tl.where(m_t[:, :, None], softplus(b_raw) if SOFTPLUS else b_raw, 0.0)


@triton.jit
def _softplus_slope(delta):
    """Return the derivative of softplus from its value, 1 - exp(-delta), in full relative precision."""
    p = -0.0414906541 + delta * 0.007513606213
    p = 0.1666510821 + delta * p
    p = -0.4999995148 + delta * p
    p = 0.9999999976 + delta * p
    return tl.where(delta < 0.25, delta * p, 1.0 - tl.exp2(delta * -LOG2E))


@triton.jit(
    do_not_specialize=[
        "inner_steps", "first", "inner", "outer", "low_i", "high_i", "low_o", "high_o", "steps", "one",
        "s_block",
    ]
)  # fmt: skip
def _scan_bwd_kernel(
    p_grad, p_x, p_delta, p_projected, p_weight, p_bias, p_A, p_D, p_states, p_adjoint,
    p_grad_x, p_grad_delta, p_grad_BC, p_grad_A, p_grad_D, p_grad_bias,
    s_gb, s_gp, s_xb, s_xp, s_db, s_dp, s_pb, s_pp, s_sb, s_qb, s_rb, s_rp, s_eb, s_ep, s_bb, s_block, dim, chunks,
    inner_steps, first, inner, outer, low_i, high_i, low_o, high_o, steps, one,
    STATE: tl.constexpr, RANK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr,
    ADD: tl.constexpr, LEAVES: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of one scan, those over several programs as partial sums.

    states [batch, chunks + 1, state, dim], adjoint [batch, parts, state, dim], grad_BC [blocks, batch, pixels,
    2 state], grad_A [batch chunks, state, dim], grad_D and grad_bias [batch chunks, dim].
    """
    blocks = tl.cdiv(dim, BC)
    i_c, i_row = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    i_t, i_b = (i_row % chunks).to(tl.int32), i_row // chunks
    o_c, o_part = i_c * BC + tl.arange(0, BC), i_t * PARTS + tl.arange(0, PARTS)[:, None]
    m_c = o_c < dim
    b_bias = tl.zeros([BC], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    p_grad, p_x, p_delta = p_grad + i_b * s_gb, p_x + i_b * s_xb, p_delta + i_b * s_db
    p_projected, p_grad_x, p_grad_delta = p_projected + i_b * s_pb, p_grad_x + i_b * s_rb, p_grad_delta + i_b * s_eb
    p_grad_BC += i_b * s_bb + i_c.to(tl.int64) * s_block
    p_states += i_b * s_sb + i_t.to(tl.int64) * (STATE * dim) + o_c
    p_adjoint += i_b * s_qb + o_part.to(tl.int64) * (STATE * dim) + o_c[None, :] * one
    m_q = o_part * T < steps

    o_pixel, m_t, m_here = _pixels(
        i_t * (T * PARTS), steps, inner_steps, first, inner, outer, low_i, high_i, low_o, high_o, LEAVES, WIDE, T,
        PARTS,
    )  # fmt: skip
    b_x, b_delta = _read(
        p_x, p_delta, p_projected, o_pixel, m_t, m_here, o_c, m_c, b_bias, p_weight, s_xp, s_dp, s_pp, one,
        RANK, SOFTPLUS, LEAVES,
    )  # fmt: skip
    m = m_here[:, :, None] & m_c[None, None, :]
    o_grad = o_pixel[:, :, None] * s_gp + o_c[None, None, :] * one
    b_grad = tl.load(p_grad + o_grad, mask=m_c[None, None, :], other=0.0).to(tl.float32)
    b_grad = tl.where(m_here[:, :, None], b_grad, 0.0)
    b_input = b_delta * b_x
    is_last = (tl.arange(0, T) == T - 1)[:, None, None]
    b_GB, b_forgotten = tl.zeros([T, PARTS, BC], tl.float32), tl.zeros([T, PARTS, BC], tl.float32)
    for n in range(STATE):
        b_A = tl.load(p_A + o_c * STATE + n, mask=m_c, other=0.0).to(tl.float32)
        b_B = tl.load(p_projected + o_pixel * s_pp + (RANK + n))[:, :, None]
        b_C = tl.load(p_projected + o_pixel * s_pp + (RANK + STATE + n))
        b_decay = tl.exp2(b_delta * (b_A * LOG2E)[None, None, :])
        b_new = b_input * b_B
        b_factor, b_state = tl.associative_scan((b_decay, b_new), 0, _then)
        b_end = tl.sum(tl.where(is_last, b_state, 0.0), 0)
        b_decayed = tl.sum(tl.where(is_last, b_factor, 0.0), 0)
        b_one, b_none = tl.full([PARTS, BC], 1.0, tl.float32), tl.zeros([PARTS, BC], tl.float32)
        _, _, b_lasts, b_start = tl.associative_scan((b_decayed, b_end, b_one, b_none), 0, _start)
        b_start += b_lasts * tl.load(p_states + n * dim, mask=m_c, other=0.0)[None, :]
        b_state += b_factor * b_start[None, :, :]
        b_q = tl.load(p_adjoint + n * dim, mask=m_q & m_c[None, :], other=0.0)
        b_value = b_grad * b_C[:, :, None] + tl.where(is_last, b_q[None, :, :], 0.0)
        b_one = tl.full([T, PARTS, BC], 1.0, tl.float32)
        _, _, b_G = tl.associative_scan((b_decay, b_one, b_value), 0, _before, reverse=True)
        b_GB += b_G * b_B
        b_lasting = b_G * (b_state - b_new)
        b_forgotten += b_lasting * b_A[None, None, :]
        o_BC = o_pixel * (2 * STATE) + n
        tl.store(p_grad_BC + o_BC, tl.sum(b_G * b_input, 2), mask=m_here)
        tl.store(p_grad_BC + o_BC + STATE, tl.sum(b_grad * b_state, 2), mask=m_here)
        tl.store(p_grad_A + (i_row * STATE + n) * dim + o_c, tl.sum(tl.sum(b_lasting * b_delta, 0), 0), mask=m_c)

    b_raw = b_GB * b_x + b_forgotten
    b_raw = b_raw * _softplus_slope(b_delta) if SOFTPLUS else tl.where(m_t[:, :, None], b_raw, 0.0)
    o_grad = o_pixel[:, :, None] * s_ep + o_c[None, None, :] * one
    tl.store(p_grad_delta + o_grad, b_raw.to(p_grad_delta.dtype.element_ty), mask=m)
    if HAS_BIAS:
        tl.store(p_grad_bias + i_row * dim + o_c, tl.sum(tl.sum(b_raw, 0), 0), mask=m_c)
    b_grad_x = b_GB * b_delta
    if HAS_D:
        b_grad_x += b_grad * tl.load(p_D + o_c, mask=m_c, other=0.0).to(tl.float32)[None, None, :]
        tl.store(p_grad_D + i_row * dim + o_c, tl.sum(tl.sum(b_grad * b_x, 0), 0), mask=m_c)
    o_grad = o_pixel[:, :, None] * s_rp + o_c[None, None, :] * one
    if ADD:
        b_grad_x += tl.load(p_grad_x + o_grad, mask=m, other=0.0).to(tl.float32)
    tl.store(p_grad_x + o_grad, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m)
