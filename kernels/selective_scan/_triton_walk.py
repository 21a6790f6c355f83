# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright understands neither Triton launches nor what Triton makes of plain numbers and of tuples.
"""Triton kernel that scans along a path: the scan itself, the final states of its segments, and the adjoint scan.

A program owns a block of channels (one or two per lane) of one image and one segment of the path, and steps through it
sequentially with the state in registers. An associative scan would take two to three times as many instructions,
because its time axis lies across lanes. The maps are channels_last, so a step in any direction is a row of channels,
and one kernel serves all directions: a path is eight integers (`Walk`), which the kernel takes as data.

What is unusual:
* The low-rank delta is expanded here, step by step, from weights held in registers; delta is never in memory.
* The inputs of the next GROUP steps are loaded before the first of these steps stores. The compiler may not move a load
  before a store that could alias it, and would wait for memory at every step.
* softplus is max(x, 0) + log1p(exp(-|x|)) with a polynomial. It cannot overflow, keeps full relative precision for the
  small steps of Mamba's initialisation (the logarithm of the special function unit does not), and takes fewer
  instructions than the library's logarithm.
* A path cut into segments takes two launches. The first (CARRY) computes the final state of each segment started from
  zero, and the sum of its delta, which determines its decay: exp(A * sum). In the second, each segment combines those
  of all earlier segments into its initial state, and scans. A single segment takes the second launch only.
* The adjoint of the state obeys q <- exp(delta A) (q + C grad), scanned from the last step to the first by the same
  kernel on the reversed path.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..cross_scan import ScanPath

LOG2E = tl.constexpr(1.4426950408889634)


class Walk(NamedTuple):
    """Encode a path over a map for the kernel: row-major pixel indices, and positions in scan order."""

    inner_steps: int  # steps per line
    first: int  # pixel of the first step, which may lie outside the map
    inner: int  # pixel distance between steps of a line
    outer: int  # pixel distance between lines
    low_inner: int  # positions of a line, and lines, that are on the map: [low, high)
    high_inner: int
    low_outer: int
    high_outer: int
    steps: int

    @property
    def leaves_map(self) -> bool:
        lines = self.steps // self.inner_steps
        return (self.low_inner, self.high_inner, self.low_outer, self.high_outer) != (0, self.inner_steps, 0, lines)

    def reversed(self) -> "Walk":
        lines = self.steps // self.inner_steps
        last = self.first + (lines - 1) * self.outer + (self.inner_steps - 1) * self.inner
        return Walk(
            self.inner_steps,
            last,
            -self.inner,
            -self.outer,
            self.inner_steps - self.high_inner,
            self.inner_steps - self.low_inner,
            lines - self.high_outer,
            lines - self.low_outer,
            self.steps,
        )


def walk(path: ScanPath, height: int, width: int) -> Walk:
    """Encode a path over a map of the given size."""
    axes = []
    sizes = zip(path.grid(height, width), (height, width), strict=True)
    path_axes = ((path.row, width, path.flip_rows), (path.column, 1, path.flip_columns))
    for (count, size), (start, stride, is_flipped) in zip(sizes, path_axes, strict=True):
        inside = (size - start + path.step - 1) // path.step
        low, high = (count - inside, count) if is_flipped else (0, inside)
        first, step = start + (count - 1) * path.step * is_flipped, -path.step if is_flipped else path.step
        axes.append((count, first * stride, step * stride, low, high))
    outer, inner = reversed(axes) if path.by_columns else axes
    return Walk(inner[0], inner[1] + outer[1], inner[2], outer[2], *inner[3:], *outer[3:], inner[0] * outer[0])


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)); the polynomial is log1p(e) / e on [0, 1] to 2e-7."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = 0.04349389981533136 + e * -0.00837115254944365
    p = -0.1068500286374956 + e * p
    p = 0.17687476700423233 + e * p
    p = -0.24474774178478675 + e * p
    p = 0.332719283833915 + e * p
    p = -0.4999717452300584 + e * p
    p = 0.9999997807585044 + e * p
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def _column(p, o_n, is_here, STATE: tl.constexpr, LEAVES: tl.constexpr):
    """Load B or C of a step, one element per state; there is no state axis if STATE is 1."""
    if STATE == 1:
        b_column = tl.load(p).to(tl.float32)
    else:
        b_column = tl.load(p + o_n, mask=o_n < STATE, other=0.0).to(tl.float32)[:, None]
    return tl.where(is_here, b_column, 0.0) if LEAVES else b_column


@triton.jit
def _steps(
    b_h, b_time, i, o, pixel,
    p_x, p_delta, p_projected, p_before, p_y, o_c, m_c, b_bias, b_weights, b_A, b_D,
    s_xp, s_dp, s_pp, s_yp, dim, inner_steps, inner, outer, low_i, high_i, low_o, high_o,
    STATE: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr,
    ADD: tl.constexpr, LEAVES: tl.constexpr, ADJOINT: tl.constexpr, CARRY: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Advance GROUP steps; return the state, the sum of delta and the position after them."""
    WRITES: tl.constexpr = not (ADJOINT or CARRY)
    o_n = tl.arange(0, PADDED)
    x, raw, feed, read, before, place, mask = (), (), (), (), (), (), ()
    for _ in tl.static_range(GROUP):
        o_pixel, m, is_here = pixel.to(tl.int64) if WIDE else pixel, m_c, True
        if LEAVES:
            is_here = (i >= low_i) & (i < high_i) & (o >= low_o) & (o < high_o)
            o_pixel, m = tl.where(is_here, o_pixel, 0), tl.where(is_here, o_c, dim) < dim
        x += (tl.load(p_x + o_pixel * s_xp + o_c, mask=m, other=0.0).to(tl.float32),)
        p_row = p_projected + o_pixel * s_pp
        if RANK > 0:
            b_raw = b_bias
            for r in tl.static_range(RANK):
                b_z = tl.load(p_row + r).to(tl.float32)
                b_raw += (tl.where(is_here, b_z, 0.0) if LEAVES else b_z) * b_weights[r]
        else:
            b_raw = b_bias + tl.load(p_delta + o_pixel * s_dp + o_c, mask=m, other=0.0).to(tl.float32)
        raw += (b_raw,)
        feed += (_column(p_row + RANK + (STATE if ADJOINT else 0), o_n, is_here, STATE, LEAVES),)
        if WRITES:
            read += (_column(p_row + (RANK + STATE), o_n, is_here, STATE, LEAVES),)
            place += (o_pixel * s_yp,)
            mask += (m,)
            if ADD:
                before += (tl.load(p_before + o_pixel * s_yp + o_c, mask=m, other=0.0).to(tl.float32),)
        is_end = i + 1 == inner_steps
        pixel += tl.where(is_end, outer - (inner_steps - 1) * inner, inner)
        i = tl.where(is_end, 0, i + 1)
        if LEAVES:
            o += tl.where(is_end, 1, 0)
    for j in tl.static_range(GROUP):
        b_delta = softplus(raw[j]) if SOFTPLUS else raw[j]
        b_time += b_delta
        b_decay = tl.exp2(b_delta * b_A)
        b_h = b_decay * (b_h + x[j] * feed[j]) if ADJOINT else b_decay * b_h + b_delta * x[j] * feed[j]
        if WRITES:
            b_y = b_h * read[j]
            if STATE > 1:
                b_y = tl.sum(b_y, 0)
            if HAS_D:
                b_y += b_D * x[j]
            if ADD:
                b_y += before[j]
            tl.store(p_y + place[j] + o_c, b_y.to(p_y.dtype.element_ty), mask=mask[j])
    return b_h, b_time, i, o, pixel


@triton.jit(
    do_not_specialize=[
        "inner_steps", "first", "inner", "outer", "low_i", "high_i", "low_o", "high_o", "steps", "segment_chunks", "one"
    ]
)  # fmt: skip
def _scan_walk_kernel(
    p_x, p_delta, p_projected, p_weight, p_bias, p_A, p_D, p_before, p_y, p_states, p_ends, p_times,
    s_xb, s_xp, s_db, s_dp, s_pb, s_pp, s_yb, s_yp, s_sb, dim, segments, segment_chunks,
    inner_steps, first, inner, outer, low_i, high_i, low_o, high_o, steps, one,
    STATE: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr, ADD: tl.constexpr, LEAVES: tl.constexpr, ADJOINT: tl.constexpr, CARRY: tl.constexpr,
    SAVE: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Scan the segments of all images and channel blocks along one path.

    Shapes: states [batch, chunks + 1, state, dim], ends [batch, segments, state, dim], times [batch, segments, dim].
    The adjoint is saved once per chunk as well, before the chunk is scanned: the gradient of the chunk's last state.
    """
    blocks = tl.cdiv(dim, BC)
    i_c, i_s, i_b = (
        tl.program_id(0) % blocks,
        tl.program_id(0) // blocks % segments,
        (tl.program_id(0) // blocks // segments).to(tl.int64),
    )
    o_c, o_n = i_c * BC + tl.arange(0, BC), tl.arange(0, PADDED)
    m_c = o_c < dim
    if STATE == 1:
        o_h, m_h = o_c, m_c
        b_h = tl.zeros([BC], tl.float32)
        b_A = tl.load(p_A + o_c, mask=m_c, other=0.0).to(tl.float32) * LOG2E
    else:
        o_h, m_h = o_n[:, None] * dim + o_c[None, :] * one, (o_n < STATE)[:, None] & m_c[None, :]
        b_h = tl.zeros([PADDED, BC], tl.float32)
        b_A = (
            tl.load(p_A + o_c[None, :] * (STATE * one) + o_n[:, None] * one, mask=m_h, other=0.0).to(tl.float32) * LOG2E
        )
    b_time = tl.zeros([BC], tl.float32)
    b_bias, b_D, b_weights = b_time, b_time, ()
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if HAS_D:
        b_D = tl.load(p_D + o_c, mask=m_c, other=0.0).to(tl.float32)
    for r in tl.static_range(RANK):
        b_weights += (tl.load(p_weight + o_c * RANK + r, mask=m_c, other=0.0).to(tl.float32),)

    row = i_b * segments
    if not CARRY:
        for s in range(0, i_s):
            b_past = tl.load(p_times + (row + s) * dim + o_c, mask=m_c, other=0.0)
            b_end = tl.load(p_ends + (row + s) * (STATE * dim) + o_h, mask=m_h, other=0.0)
            b_h = tl.exp2(b_past * b_A) * b_h + b_end

    chunks = tl.cdiv(steps, CHUNK)
    begin, end = i_s * segment_chunks, tl.minimum((i_s + 1) * segment_chunks, chunks)
    t = begin * CHUNK
    if ADJOINT:  # chunks are counted from the end, so the first one scanned, not the last, may be short
        t = steps - tl.minimum((chunks - begin) * CHUNK, steps)
    i, o = t % inner_steps, t // inner_steps
    pixel = first + o * outer + i * inner
    p_x, p_delta, p_projected = p_x + i_b * s_xb, p_delta + i_b * s_db, p_projected + i_b * s_pb
    p_before, p_y, p_states = p_before + i_b * s_yb, p_y + i_b * s_yb, p_states + i_b * s_sb
    for k in range(begin, end):
        chunk = chunks - 1 - k if ADJOINT else k
        if SAVE:
            tl.store(p_states + chunk.to(tl.int64) * (STATE * dim) + o_h, b_h, mask=m_h)
        length = tl.minimum(steps - chunk * CHUNK, CHUNK)
        for _ in range(0, length // GROUP):
            b_h, b_time, i, o, pixel = _steps(
                b_h, b_time, i, o, pixel,
                p_x, p_delta, p_projected, p_before, p_y, o_c, m_c, b_bias, b_weights, b_A, b_D,
                s_xp, s_dp, s_pp, s_yp, dim, inner_steps, inner, outer, low_i, high_i, low_o, high_o,
                STATE, PADDED, RANK, SOFTPLUS, HAS_D, ADD, LEAVES, ADJOINT, CARRY, WIDE, GROUP,
            )  # fmt: skip
        for _ in range(0, length % GROUP):
            b_h, b_time, i, o, pixel = _steps(
                b_h, b_time, i, o, pixel,
                p_x, p_delta, p_projected, p_before, p_y, o_c, m_c, b_bias, b_weights, b_A, b_D,
                s_xp, s_dp, s_pp, s_yp, dim, inner_steps, inner, outer, low_i, high_i, low_o, high_o,
                STATE, PADDED, RANK, SOFTPLUS, HAS_D, ADD, LEAVES, ADJOINT, CARRY, WIDE, 1,
            )  # fmt: skip
    if CARRY:
        tl.store(p_times + (row + i_s) * dim + o_c, b_time, mask=m_c)
        tl.store(p_ends + (row + i_s) * (STATE * dim) + o_h, b_h, mask=m_h)
    elif SAVE and not ADJOINT:  # noqa: SIM102 (a condition for the compiler and one for the program)
        if end == chunks:
            tl.store(p_states + chunks.to(tl.int64) * (STATE * dim) + o_h, b_h, mask=m_h)
