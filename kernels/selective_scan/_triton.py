# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright understands neither Triton launches nor that Triton turns plain numbers into constants.
"""Launch the Triton kernels of the selective scan, which are in `_triton_walk.py` and `_triton_chunks.py`.

Scans run one after the other. If several visit the same pixels, each adds to the sum of the earlier ones, in a float32
map if y has half precision, and the last scan writes y. This needs no buffer per scan and no atomics, and the results
are bitwise deterministic. `_plain.py` documents the arguments.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import _runtime
from ._plain import CHUNK, to_paths
from ._triton_chunks import _scan_bwd_kernel
from ._triton_walk import Walk, _scan_walk_kernel, walk

MAX_RANK = 16
"""Largest rank expanded in registers; a larger one takes a matrix product, one scan at a time."""

# Largest state -> channels per program, steps per group in the scan and in its adjoint, warps. Chosen from the
# compiler's reports (no spilled register, few instructions per step; tests/kernels/aot_compile.py), not from timings.
TILES = {1: (64, 4, 4, 1), 4: (64, 4, 4, 1), 16: (32, 4, 2, 1), 32: (32, 2, 2, 1), 64: (32, 1, 1, 2)}

PARTS = 4
"""Parts per chunk in the backward pass: the adjoint is saved per part, and a lane holds CHUNK // PARTS steps."""

CHANNELS = 32
"""Channels per program of the backward kernel."""


class _Scan(NamedTuple):
    """Hold the inputs of one scan; the maps are [batch, pixels, channels] with contiguous channels."""

    x: Tensor
    delta: Tensor | None
    projected: Tensor  # float32: low rank if delta is None, B, C
    weight: Tensor | None  # [dim, rank] if delta is None
    bias: Tensor | None
    A: Tensor
    D: Tensor | None
    walk: Walk

    @property
    def rank(self) -> int:
        return 0 if self.weight is None else self.weight.shape[1]


def _rows(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _select(x: Tensor, scan: int) -> Tensor:
    """Select the [batch, pixels, channels] of one scan from [batch, pixels, 1 or scans, channels]."""
    return x[:, :, scan if x.shape[2] > 1 else 0]


class _Scans:
    """Split the arguments of an operator call into the inputs of each scan."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor | None,
        projected: Tensor,
        dt_weight: Tensor | None,
        dt_bias: Tensor | None,
        A: Tensor,
        D: Tensor | None,
        size: tuple[int, int],
        paths: list[int],
    ) -> None:
        self.x, self.delta, self.projected = _rows(x), None if delta is None else _rows(delta), _rows(projected.float())
        self.A = A.contiguous()
        self.weight, self.bias, self.D = (
            None if tensor is None else tensor.contiguous() for tensor in (dt_weight, dt_bias, D)
        )
        self.paths = to_paths(paths)
        self.walks = [walk(path, *size) for path in self.paths]

    def __getitem__(self, scan: int) -> _Scan:
        delta, projected, weight = self.delta, _select(self.projected, scan), None
        if delta is not None:
            delta = _select(delta, scan)
        elif self.weight is not None:
            weight, rank = self.weight[scan], self.weight.shape[2]
            if rank > MAX_RANK:
                delta, projected, weight = projected[..., :rank] @ weight.float().t(), projected[..., rank:], None
        bias, D = (None if tensor is None else tensor[scan] for tensor in (self.bias, self.D))
        return _Scan(_select(self.x, scan), delta, projected, weight, bias, self.A[scan], D, self.walks[scan])

    @property
    def places(self) -> list[tuple[int, int]]:
        """Return the sub-grid of each scan; two sub-grids are either equal or disjoint."""
        return [(path.row, path.column) for path in self.paths]

    @property
    def covers_map(self) -> bool:
        return len(set(self.places)) == self.paths[0].step ** 2


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def segments_of(programs: int, chunks: int, multiprocessors: int) -> int:
    """Return the number of segments into which each path is cut, given `programs` batch entries times channel blocks.

    One warp scans a segment; eight warps keep a multiprocessor busy. Cutting nearly doubles the work, so it starts at
    three segments. A segment first reads the final states of all earlier ones, so there are at most as many segments
    as the square root of the number of steps.
    """
    segments = min(8 * multiprocessors // max(programs, 1), chunks, int((chunks * CHUNK) ** 0.5))
    return segments if segments >= 3 else 1


def _walk(
    scan: _Scan,
    value: Tensor,
    states: Tensor | None,
    *,
    softplus: bool,
    y: Tensor | None = None,
    before: Tensor | None = None,
    adjoint: bool = False,
    chunk: int = CHUNK,
) -> None:
    """Scan `value`, which is x or, for the adjoint, the gradient of y, along one path; y += before."""
    batch, _, dim = value.shape
    state = scan.A.shape[1]
    channels, *groups, warps = next(tile for largest_state, tile in TILES.items() if state <= largest_state)
    chunks, blocks = triton.cdiv(scan.walk.steps, chunk), triton.cdiv(dim, channels)
    segments = segments_of(batch * blocks, chunks, _multiprocessors(value.device))
    segment_chunks = triton.cdiv(chunks, segments)
    segments = triton.cdiv(chunks, segment_chunks)
    path = scan.walk.reversed() if adjoint else scan.walk
    ends = times = value
    if segments > 1:
        ends = torch.empty(batch, segments, state, dim, device=value.device)
        times = torch.empty(batch, segments, dim, device=value.device)
    delta, target = value if scan.delta is None else scan.delta, value if y is None else y
    saved = value if states is None else states
    tensors = (
        value, delta, scan.projected, *(value if t is None else t for t in (scan.weight, scan.bias)), scan.A,
        value if scan.D is None else scan.D, value if before is None else before, target, saved, ends, times,
    )  # fmt: skip
    strides = (stride for tensor in (value, delta, scan.projected, target) for stride in tensor.stride()[:2])
    is_wide = max(t.stride(1) * (t.shape[1] + 1) for t in (value, delta, scan.projected, target)) >= 2**31
    arguments = (*tensors, *strides, saved.stride(0), dim, segments, segment_chunks, *path, 1)
    constants = {
        "STATE": state, "PADDED": triton.next_power_of_2(state), "RANK": scan.rank, "SOFTPLUS": softplus,
        "HAS_BIAS": scan.bias is not None, "LEAVES": path.leaves_map, "ADJOINT": adjoint, "WIDE": is_wide,
        "GROUP": groups[adjoint], "CHUNK": chunk, "BC": channels, "num_warps": warps,
    }  # fmt: skip
    grid = (blocks * segments * batch,)
    if segments > 1:
        _scan_walk_kernel[grid](*arguments, HAS_D=False, ADD=False, CARRY=True, SAVE=False, **constants)
    has_d, adds = scan.D is not None and not adjoint, before is not None
    _scan_walk_kernel[grid](*arguments, HAS_D=has_d, ADD=adds, CARRY=False, SAVE=states is not None, **constants)


def forward(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    size: tuple[int, int],
    paths: list[int],
    softplus: bool,
    merge: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and `states`, which is empty unless `save_states`."""
    scans = _Scans(x, delta, projected, dt_weight, dt_bias, A, D, size, paths)
    batch, pixels, _, dim = x.shape
    count, state = A.shape[0], A.shape[2]
    chunks = triton.cdiv(scans.walks[0].steps, CHUNK)
    states = torch.empty((batch, count, chunks + 1, state, dim) if save_states else 0, device=x.device)
    empty = torch.empty if (scans.covers_map if merge else scans.paths[0].step == 1) else torch.zeros
    y = empty((batch, pixels, dim) if merge else (batch, count, pixels, dim), dtype=x.dtype, device=x.device)
    places, total = scans.places, None
    for i in range(count if y.numel() else 0):
        is_first, is_last = places[i] not in places[:i], places[i] not in places[i + 1 :]
        if not merge:
            target, before = y[:, i], None
        else:
            if total is None and not is_last:
                total = y if y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
            target, before = y if is_last else total, None if is_first else total
        scan_states = states[:, i] if save_states else None
        scan = scans[i]
        _walk(scan, scan.x, scan_states, softplus=softplus, y=target, before=before)
    return y if merge else y.transpose(2, 3).contiguous(), states


def _warps(threads: int) -> int:
    """Return the number of warps that `threads` threads form on this device; AMD's warps have 64 threads."""
    if _runtime.INTERPRET:
        return 1
    target = triton.runtime.driver.active.get_current_target()
    return max(1, threads // target.warp_size)


class _Partials(NamedTuple):
    """Hold the float32 partial sums of the backward programs of one scan."""

    BC: Tensor  # [blocks, batch, pixels, 2 * state]
    A: Tensor  # [batch * chunks, state, dim]
    D: Tensor  # [batch * chunks, dim]
    bias: Tensor


def _differentiate(
    scan: _Scan, grad: Tensor, states: Tensor, grad_x: Tensor, grad_delta: Tensor, *, softplus: bool, adds: bool
) -> _Partials:
    """Write or accumulate grad_x, write grad_delta (before softplus), and return the other partial gradients."""
    batch, pixels, dim = scan.x.shape
    state, device = scan.A.shape[1], scan.x.device
    chunks, blocks = triton.cdiv(scan.walk.steps, CHUNK), triton.cdiv(dim, CHANNELS)
    adjoint = torch.empty(batch, triton.cdiv(scan.walk.steps, CHUNK // PARTS), state, dim, device=device)
    _walk(scan, grad, adjoint, softplus=softplus, adjoint=True, chunk=CHUNK // PARTS)
    visits_all = scan.walk.steps == pixels and not scan.walk.leaves_map
    empty = torch.empty if visits_all else torch.zeros
    partials = _Partials(
        empty(blocks, batch, pixels, 2 * state, device=device),
        torch.empty(batch * chunks, state, dim, device=device),
        torch.empty(batch * chunks, dim, device=device),
        torch.empty(batch * chunks, dim, device=device),
    )
    delta = scan.x if scan.delta is None else scan.delta
    maps = (grad, scan.x, delta, scan.projected, grad_x, grad_delta)
    strides = [stride for tensor in maps for stride in tensor.stride()[:2]]
    saved = (states.stride(0), adjoint.stride(0))
    is_wide = max(t.stride(1) * (t.shape[1] + 1) for t in (*maps, partials.BC[0])) >= 2**31
    _scan_bwd_kernel[(blocks * chunks * batch,)](
        *maps[:4], *(scan.x if t is None else t for t in (scan.weight, scan.bias)), scan.A,
        scan.x if scan.D is None else scan.D, states, adjoint, grad_x, grad_delta, *partials,
        *strides[:8], *saved, *strides[8:], partials.BC.stride(1), partials.BC.stride(0), dim, chunks, *scan.walk, 1,
        state, scan.rank, softplus, scan.bias is not None, scan.D is not None, adds, scan.walk.leaves_map, is_wide,
        CHUNK // PARTS, PARTS, CHANNELS, num_warps=_warps(PARTS * CHANNELS),
    )  # fmt: skip
    return partials


def backward(
    grad: Tensor,
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    states: Tensor,
    size: tuple[int, int],
    paths: list[int],
    softplus: bool,
    merge: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, delta, projected, dt_weight, dt_bias, A and D, None for inputs that are None."""
    scans = _Scans(x, delta, projected, dt_weight, dt_bias, A, D, size, paths)
    grad = _rows(grad).unsqueeze(1) if merge else grad.transpose(2, 3).contiguous()
    places, rank = scans.places, 0 if dt_weight is None else dt_weight.shape[2]
    is_shared, is_sparse = x.shape[2] == 1, scans.paths[0].step > 1
    sums_x = is_shared and len(set(places)) < len(places)
    single = {"device": x.device, "dtype": torch.float32}
    empty = torch.zeros if is_sparse else torch.empty
    grad_x = empty(x.shape, device=x.device, dtype=torch.float32 if sums_x else x.dtype)
    grad_delta = None if delta is None else empty(delta.shape, device=x.device, dtype=delta.dtype)
    grad_projected = torch.zeros(projected.shape, **single)
    grad_A = torch.zeros(A.shape, **single)
    grad_weight, grad_bias, grad_D = (
        None if t is None else torch.zeros(t.shape, **single) for t in (dt_weight, dt_bias, D)
    )
    for i in range(len(places) if x.numel() else 0):
        scan, slot = scans[i], i if projected.shape[2] > 1 else 0
        raw = empty(x.shape[0], x.shape[1], x.shape[3], **single) if grad_delta is None else grad_delta[:, :, i]
        partials = _differentiate(
            scan, grad[:, 0 if merge else i], states[:, i], _select(grad_x, i), raw,
            softplus=softplus, adds=is_shared and places[i] in places[:i],
        )  # fmt: skip
        grad_projected[:, :, slot, rank:] += partials.BC.sum(0)
        grad_A[i] = partials.A.sum(0).t()
        if grad_D is not None:
            grad_D[i] = partials.D.sum(0)
        if grad_bias is not None:
            grad_bias[i] = partials.bias.sum(0)
        if grad_weight is not None and scans.weight is not None:
            low_rank = scans.projected[:, :, slot, :rank].flatten(0, 1)
            grad_projected[:, :, slot, :rank] += raw @ scans.weight[i].float()
            grad_weight[i] = raw.flatten(0, 1).t() @ low_rank
    return grad_x, grad_delta, grad_projected, grad_weight, grad_bias, grad_A, grad_D
