"""The selective scan by the compiled kernel of kernels/cpu/selective_scan.cpp; `_plain.py` says what the arguments are."""

import torch
from torch import Tensor

from .._native import NO_MEMORY, as_words, is_available, library
from ._plain import CHUNK, FIELDS, to_paths

__all__ = ["backward", "forward", "is_available"]


def _view(tensor: Tensor | None) -> list[int]:
    """The `View` of the C++ file of [batch, pixels, scans, channels]; all scans read the same where there is one."""
    if tensor is None:
        return [0] * 5
    batch, pixel, scan, channel = tensor.stride()
    return [tensor.data_ptr(), batch, pixel, scan if tensor.shape[2] > 1 else 0, channel]


def _call(
    name: str,
    x: Tensor,
    projected: Tensor,
    parameters: tuple[Tensor | None, ...],
    size: tuple[int, int],
    paths: list[int],
    softplus: bool,
    tensors: list[int],
) -> None:
    """Run the function of that name; `parameters` are dt_weight, dt_bias, A and D."""
    given = [None if p is None else p.contiguous() for p in parameters]
    A = parameters[2]
    assert A is not None
    scans, dim, state = A.shape
    rank = projected.shape[3] - 2 * state
    geometry = [x.shape[0], scans, dim, rank, state, *size, softplus, _leaves_gaps(paths)]
    status = getattr(library(), name)(
        as_words([torch.get_num_threads(), *geometry]),
        as_words(paths),
        as_words(tensors),
        as_words([0 if p is None else p.data_ptr() for p in given]),
    )
    if status == NO_MEMORY:
        raise MemoryError(f"the native selective scan found no memory for x {tuple(x.shape)}")
    if status:
        raise ValueError(
            f"needed a map, a state and paths with positive steps; got {size}, A {tuple(A.shape)}, {paths}"
        )


def _leaves_gaps(paths: list[int]) -> bool:
    """Whether some path does not visit every pixel: outputs then start as zeros and are added to."""
    return any(step > 1 for step in paths[FIELDS - 1 :: FIELDS])


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
    """y and `states`, which is empty unless `save_states`, of float32 CPU tensors."""
    batch, pixels, _, dim = x.shape
    scans, _, state = A.shape
    shape = (batch, pixels, dim) if merge else (batch, scans, dim, pixels)
    y = torch.zeros(shape) if _leaves_gaps(paths) else torch.empty(shape)
    rows, columns = to_paths(paths)[0].grid(*size)
    chunks = (rows * columns + CHUNK - 1) // CHUNK
    states = torch.empty((batch, scans, chunks + 1, state, dim) if save_states else 0)
    if x.numel():
        views = [x, delta, projected, y.unsqueeze(2) if merge else y.permute(0, 3, 1, 2)]
        tensors = [*(word for view in views for word in _view(view)), states.data_ptr() if save_states else 0]
        _call("mixerzoo_scan_forward", x, projected, (dt_weight, dt_bias, A, D), size, paths, softplus, tensors)
    return y, states
