"""Compute the selective scan for exporters: standard operators, no loop over steps, no view of a symbolic axis.

When sizes are symbolic, each reshape of such an axis costs the exporter seconds of algebra. Steps are therefore
gathered from the map into chunks by index tensors, and scattered back by another gather. Inside a chunk, and then over
the final states of all chunks, states are combined at doubling strides. Decays are only multiplied together, as in
`_plain.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import once_a_trace, size_key
from ..cross_scan import ScanPath
from ._plain import CHUNK

_ROUNDS = 16
"""Doublings over the chunks if their number is symbolic: enough for two million steps."""


def _steps(paths: tuple[ScanPath, ...], height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the row and column of each step, and whether it is on the map: [scans, chunks, CHUNK] each."""
    rows, columns = paths[0].grid(height, width)
    steps = rows * columns
    # A symbolic number of chunks must never be one: the exporter would specialise it.
    chunks = (steps + CHUNK - 1) // CHUNK if isinstance(steps, int) else steps // CHUNK + 2
    step = torch.arange(chunks, device=device).unsqueeze(1) * CHUNK + torch.arange(CHUNK, device=device)
    step = step.clamp(max=steps - 1)  # steps past the end are never read
    indices = []
    for path in paths:
        # A tensor, because ONNX has no modulo by a symbolic size.
        inner = torch.full((1,), rows if path.by_columns else columns, dtype=torch.int64, device=device)
        i, j = (step % inner, step // inner) if path.by_columns else (step // inner, step % inner)
        i = rows - 1 - i if path.flip_rows else i
        j = columns - 1 - j if path.flip_columns else j
        indices.append((path.row + path.step * i, path.column + path.step * j))
    row, column = (torch.stack(axis_indices) for axis_indices in zip(*indices, strict=True))
    return row.clamp(max=height - 1), column.clamp(max=width - 1), (row < height) & (column < width)


def _visits(path: ScanPath, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the chunk and the step in it that visit each pixel, and whether any does: [height, width] each."""
    rows, columns = path.grid(height, width)
    down = torch.arange(height, device=device).unsqueeze(1)
    right = torch.arange(width, device=device)
    i, j = down // path.step, right // path.step
    i = rows - 1 - i if path.flip_rows else i
    j = columns - 1 - j if path.flip_columns else j
    step = j * rows + i if path.by_columns else i * columns + j
    visited = (down % path.step == path.row) & (right % path.step == path.column)
    return step // CHUNK, step % CHUNK, visited.unsqueeze(2)


def _place(y: Tensor, path: ScanPath, height: int, width: int) -> Tensor:
    """Place one scan's [batch, chunks, CHUNK, dim] on a map [batch, height, width, dim]; unvisited pixels are zero."""
    key = "scan visits", path, size_key(height), size_key(width), y.device
    chunk, step, visited = once_a_trace(key, lambda: _visits(path, height, width, y.device))
    y = y[:, chunk, step]
    return y if path.step == 1 else torch.where(visited, y, 0)


def _within_chunks(decay: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decay products and the states from zero along axis 3 of [batch, scans, chunks, CHUNK, state, dim]."""
    shift = 1
    while shift < CHUNK:
        value = value + decay * F.pad(value[:, :, :, :-shift], [0, 0, 0, 0, shift, 0])
        decay = decay * F.pad(decay[:, :, :, :-shift], [0, 0, 0, 0, shift, 0], value=1.0)
        shift *= 2
    return decay, value


def _earlier_chunks(value: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return for each doubling stride the index of the earlier chunk, and whether it exists, along axis 2."""
    chunks = value.shape[2]

    def make() -> list[tuple[Tensor, Tensor]]:
        rounds = max(chunks - 1, 1).bit_length() if isinstance(chunks, int) else _ROUNDS
        chunk = torch.arange(chunks, device=value.device)
        return [((chunk - 2**r).clamp(min=0), (chunk >= 2**r).unsqueeze(1).unsqueeze(2)) for r in range(rounds)]

    return once_a_trace(("scan chunks", size_key(chunks), value.device), make)


def _starts(decay: Tensor, value: Tensor) -> Tensor:
    """Return the state before each chunk, along axis 2 of [batch, scans, chunks, state, dim].

    `value` is the final state of each chunk started from zero, `decay` its total decay.
    """
    earlier = _earlier_chunks(value)
    for source, exists in earlier:
        value = torch.where(exists, value + decay * value.index_select(2, source), value)
        decay = torch.where(exists, decay * decay.index_select(2, source), decay)
    source, exists = earlier[0]
    return torch.where(exists, value.index_select(2, source), 0)


def scan(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    paths: tuple[ScanPath, ...],
    softplus: bool,
) -> tuple[list[Tensor], Tensor]:
    """Return each scan's y [batch, height, width, dim], and the last states [batch, scans, state, dim].

    The arguments are those of `_plain.scan`, with separate map axes: [batch, height, width, inputs, dim] and so on.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    height, width, scans = x.shape[1], x.shape[2], len(paths)
    rank, state = (0 if dt_weight is None else dt_weight.shape[2]), A.shape[2]
    key = "scan steps", paths, size_key(height), size_key(width), x.device
    row, column, inside = once_a_trace(key, lambda: _steps(paths, height, width, x.device))
    slot = torch.arange(scans, device=x.device).unsqueeze(1).unsqueeze(2)

    def gather(map_: Tensor) -> Tensor:
        """Gather [batch, height, width, slots, channels] into [batch, scans, chunks, CHUNK, channels]."""
        map_ = map_.to(precise)
        gathered = map_[:, :, :, 0][:, row, column] if map_.shape[3] == 1 else map_[:, row, column, slot]
        return gathered if paths[0].step == 1 else torch.where(inside.unsqueeze(3), gathered, 0)

    if dt_weight is not None:
        low_rank = projected[..., :rank].to(precise)
        weights = dt_weight.to(precise)
        slots = [min(k, projected.shape[3] - 1) for k in range(scans)]
        delta = torch.stack([F.linear(low_rank[:, :, :, s], weights[k]) for k, s in enumerate(slots)], 3)
    assert delta is not None
    raw, inputs = gather(delta), gather(x)
    B, C = gather(projected[..., rank:]).split([state, state], 4)
    if dt_bias is not None:
        raw = raw + dt_bias.to(precise).unsqueeze(1).unsqueeze(1)
    step = F.softplus(raw) if softplus else raw
    decay = torch.exp(step.unsqueeze(4) * A.to(precise).transpose(1, 2).unsqueeze(1).unsqueeze(1))
    decay, states = _within_chunks(decay, (step * inputs).unsqueeze(4) * B.unsqueeze(5))
    states = states + decay * _starts(decay[:, :, :, -1], states[:, :, :, -1]).unsqueeze(3)
    y = (states * C.unsqueeze(5)).sum(4)
    if D is not None:
        y = y + D.to(precise).unsqueeze(1).unsqueeze(1) * inputs
    rows, columns = paths[0].grid(height, width)
    end = torch.arange(rows * columns - 1, rows * columns, device=x.device)
    last = states[:, :, end // CHUNK, end % CHUNK].squeeze(2)
    return [_place(y[:, k], path, height, width).to(x.dtype) for k, path in enumerate(paths)], last
