"""Compute the selective scan with standard PyTorch operators: for float64, and as the fallback implementation.

The recurrence is cut into chunks that are scanned in parallel; their final states are scanned recursively, and the
resulting initial states are added back. Decays, each at most one, are only ever multiplied together. Dividing by their
product, or adding their logarithms, is faster but gives NaN as soon as a chunk forgets its initial state.

Arguments and shapes of `forward` and `backward`, which every implementation shares:
    x           [batch, pixels, inputs, dim]; `inputs` is 1 (all scans read the same) or the number of scans.
    delta       [batch, pixels, scans, dim], or None: then it is dt_weight @ low rank.
    projected   [batch, pixels, slots, rank + 2 * state]: low rank, B, C; `slots` is 1 or the number of scans.
    dt_weight   [scans, dim, rank], or None if delta is given (then rank is 0).
    dt_bias, D  [scans, dim] or None.
    A           [scans, dim, state].
    size        height and width of the map; a sequence is a map of one row.
    paths       six integers per scan, the fields of its ScanPath.
    softplus    whether delta is softplus(delta + dt_bias).
    merge       True: y is [batch, pixels, dim], the sum of the scans. False: y is [batch, scans, dim, pixels].
    states      float32 [batch, scans, chunks + 1, state, dim]: before each chunk of CHUNK steps, and at the end.
All strides are allowed. A step outside the map has x = 0 and projected = 0, but not delta = 0: its state decays.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cross_scan import ScanPath, cross_merge, cross_scan

CHUNK = 32
"""Steps between two saved states, in every implementation."""

FIELDS = len(ScanPath._fields)


def to_integers(paths: tuple[ScanPath, ...]) -> list[int]:
    """Flatten paths to the integers that operators and kernels take."""
    return [int(field) for path in paths for field in path]


def to_paths(integers: list[int]) -> tuple[ScanPath, ...]:
    """Invert `to_integers`."""
    groups = [integers[i : i + FIELDS] for i in range(0, len(integers), FIELDS)]
    return tuple(ScanPath(bool(g[0]), bool(g[1]), bool(g[2]), g[3], g[4], g[5]) for g in groups)


def _along_steps(decay: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cumulative decay products and the states from zero along axis 3, computed sequentially."""
    decays, states = [decay[:, :, :, 0]], [value[:, :, :, 0]]
    for t in range(1, value.shape[3]):
        states.append(torch.addcmul(value[:, :, :, t], decay[:, :, :, t], states[-1]))
        decays.append(decays[-1] * decay[:, :, :, t])
    return torch.stack(decays, 3), torch.stack(states, 3)


def recurrence(decay: Tensor, value: Tensor) -> Tensor:
    """Solve h_t = decay_t h_{t-1} + value_t from h = 0 along axis 2 of [batch, scans, steps, ...]."""
    steps = value.shape[2]
    chunks = (steps + CHUNK - 1) // CHUNK
    if chunks > 1:
        pad = [0, 0] * (value.ndim - 3) + [0, chunks * CHUNK - steps]
        decay, value = F.pad(decay, pad, value=1.0), F.pad(value, pad)
    decay, value = _along_steps(decay.unflatten(2, (chunks, -1)), value.unflatten(2, (chunks, -1)))
    if chunks > 1:
        ends = recurrence(decay[:, :, :, -1], value[:, :, :, -1])
        starts = F.pad(ends, [0, 0] * (ends.ndim - 3) + [1, 0])[:, :, :chunks]
        value = torch.addcmul(value, decay, starts.unsqueeze(3))
    return value.flatten(2, 3)[:, :, :steps]


class _Sequences(NamedTuple):
    """Hold the inputs of the recurrence along each path, in float32 or better."""

    x: Tensor  # [batch, scans, steps, dim]
    raw: Tensor  # [batch, scans, steps, dim], delta before softplus
    delta: Tensor
    low_rank: Tensor  # [batch, scans, steps, rank]
    B: Tensor  # [batch, scans, steps, state]
    C: Tensor
    decay: Tensor  # [batch, scans, steps, state, dim]
    value: Tensor


def _along(x: Tensor, size: tuple[int, int], paths: tuple[ScanPath, ...]) -> Tensor:
    """Gather [batch, pixels, slots, channels] into [batch, scans, steps, channels]; one slot serves all scans."""
    x = x.unflatten(1, size)
    if x.shape[3] == 1:
        return cross_scan(x.squeeze(3), paths)
    return torch.cat([cross_scan(x[:, :, :, i], paths[i : i + 1]) for i in range(len(paths))], 1)


def _back(y: Tensor, size: tuple[int, int], paths: tuple[ScanPath, ...], slots: int) -> Tensor:
    """Apply the adjoint of `_along`."""
    if slots == 1:
        return cross_merge(y, size, paths).flatten(1, 2).unsqueeze(2)
    return torch.stack([cross_merge(y[:, i : i + 1], size, paths[i : i + 1]).flatten(1, 2) for i in range(slots)], 2)


def _sequences(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    size: tuple[int, int],
    paths: tuple[ScanPath, ...],
    softplus: bool,
) -> _Sequences:
    precise = torch.promote_types(x.dtype, torch.float32)
    rank, state = (0 if dt_weight is None else dt_weight.shape[2]), A.shape[2]
    x = _along(x, size, paths).to(precise)
    low_rank, B, C = _along(projected, size, paths).to(precise).split([rank, state, state], 3)
    if delta is not None:
        raw = _along(delta, size, paths).to(precise)
    else:
        assert dt_weight is not None
        raw = low_rank @ dt_weight.to(precise).transpose(1, 2)
    if dt_bias is not None:
        raw = raw + dt_bias.to(precise).unsqueeze(1)
    delta = F.softplus(raw) if softplus else raw
    decay = torch.exp(delta.unsqueeze(3) * A.to(precise).transpose(1, 2).unsqueeze(1))
    return _Sequences(x, raw, delta, low_rank, B, C, decay, (delta * x).unsqueeze(3) * B.unsqueeze(4))


def scan(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    size: tuple[int, int],
    paths: tuple[ScanPath, ...],
    softplus: bool,
    merge: bool,
) -> tuple[Tensor, Tensor]:
    """Return y, and the state [batch, scans, steps, state, dim] after each step; differentiable, for any dtype."""
    s = _sequences(x, delta, projected, dt_weight, dt_bias, A, size, paths, softplus)
    states = recurrence(s.decay, s.value)
    y = (s.C.unsqueeze(3) @ states).squeeze(3)
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype).unsqueeze(1), s.x)
    y = _back(y, size, paths, 1 if merge else len(paths)).to(x.dtype)
    return (y.squeeze(2) if merge else y.permute(0, 2, 3, 1).contiguous()), states


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
    y, all_states = scan(x, delta, projected, dt_weight, dt_bias, A, D, size, to_paths(paths), softplus, merge)
    if not save_states:
        return y, all_states.new_empty(0, dtype=torch.float32)
    chunk_starts = F.pad(all_states[:, :, CHUNK - 1 : -1 : CHUNK], [0, 0, 0, 0, 1, 0])
    return y, torch.cat([chunk_starts, all_states[:, :, -1:]], 2).float()


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
    """Return the gradients of x, delta, projected, dt_weight, dt_bias, A and D, None for inputs that are None.

    With G_t the gradient of h_t, the recurrence runs backwards: G_t = C_t grad_t + decay_{t+1} G_{t+1}. The states are
    recomputed here; `states` is for the implementations that start each chunk from it.
    """
    scan_paths = to_paths(paths)
    s = _sequences(x, delta, projected, dt_weight, dt_bias, A, size, scan_paths, softplus)
    grad = grad.unsqueeze(2) if merge else grad.permute(0, 3, 1, 2)
    grad = _along(grad, size, scan_paths).to(s.x.dtype)
    all_states = recurrence(s.decay, s.value)
    next_decay = F.pad(s.decay[:, :, 1:], [0, 0, 0, 0, 0, 1])
    G = recurrence(next_decay.flip(2), (s.C.unsqueeze(4) * grad.unsqueeze(3)).flip(2)).flip(2)
    forgotten = all_states - s.value  # decay_t h_{t-1}
    GB = (s.B.unsqueeze(3) @ G).squeeze(3)
    grad_x = s.delta * GB if D is None else s.delta * GB + D.to(grad.dtype).unsqueeze(1) * grad
    grad_raw = s.x * GB + torch.einsum("bktnd,bktnd,kdn->bktd", G, forgotten, A.to(G.dtype))
    if softplus:
        grad_raw = grad_raw * torch.sigmoid(s.raw)
    grad_B = (G @ (s.delta * s.x).unsqueeze(4)).squeeze(4)
    grad_C = (all_states @ grad.unsqueeze(4)).squeeze(4)
    grad_delta, grad_weight, columns = None, None, [grad_B, grad_C]
    if dt_weight is None:
        grad_delta = _back(grad_raw, size, scan_paths, len(scan_paths))
    else:
        grad_weight = torch.einsum("bktd,bktr->kdr", grad_raw, s.low_rank)
        columns.insert(0, grad_raw @ dt_weight.to(grad_raw.dtype))
    return (
        _back(grad_x, size, scan_paths, x.shape[2]),
        grad_delta,
        _back(torch.cat(columns, 3), size, scan_paths, projected.shape[2]),
        grad_weight,
        None if dt_bias is None else grad_raw.sum((0, 2)),
        torch.einsum("bktnd,bktnd,bktd->kdn", G, forgotten, s.delta),
        None if D is None else (grad * s.x).sum((0, 2)),
    )
