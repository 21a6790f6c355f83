"""Call the compiled selective scan of kernels/cpu/selective_scan*.cpp; `_plain.py` documents the arguments."""

import torch
from torch import Tensor

from .._native import NO_MEMORY, as_words, is_available, library
from ._plain import CHUNK, FIELDS, to_paths

__all__ = ["backward", "forward", "is_available"]


def _view(tensor: Tensor | None) -> list[int]:
    """Return the C++ `View` of [batch, pixels, scans, channels]; a single scan slot is shared by all scans."""
    if tensor is None:
        return [0] * 5
    batch, pixel, scan, channel = tensor.stride()
    return [tensor.data_ptr(), batch, pixel, scan if tensor.shape[2] > 1 else 0, channel]


def _by_pixels(y: Tensor, merge: bool) -> Tensor:
    """View y or its gradient as [batch, pixels, scans, dim]."""
    return y.unsqueeze(2) if merge else y.permute(0, 3, 1, 2)


def _leaves_gaps(paths: list[int]) -> bool:
    """Return whether some path skips pixels, so that outputs must be initialised to zero."""
    return any(step > 1 for step in paths[FIELDS - 1 :: FIELDS])


def _empty_like(tensor: Tensor, paths: list[int]) -> Tensor:
    return torch.zeros_like(tensor) if _leaves_gaps(paths) else torch.empty_like(tensor)


def _call(
    name: str,
    A: Tensor,
    views: list[Tensor | None],
    states: Tensor | None,
    parameters: list[Tensor | None],
    size: tuple[int, int],
    paths: list[int],
    softplus: bool,
) -> None:
    """Call the C function `name`. `views` begin with x, delta and projected; all `parameters` are contiguous."""
    x, _, projected = views[:3]
    assert x is not None and projected is not None
    scans, dim, state = A.shape
    rank = projected.shape[3] - 2 * state
    threads = torch.get_num_threads()
    status = getattr(library(), name)(
        as_words([threads, x.shape[0], scans, dim, rank, state, *size, softplus, _leaves_gaps(paths)]),
        as_words(paths),
        as_words([*(word for view in views for word in _view(view)), 0 if states is None else states.data_ptr()]),
        as_words([0 if p is None else p.data_ptr() for p in parameters]),
    )
    if status == NO_MEMORY:
        raise MemoryError(f"the native selective scan found no memory for x {tuple(x.shape)}")
    if status:
        raise ValueError(f"needed a map, a state and paths of positive steps; got {size}, A {tuple(A.shape)}, {paths}")


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
    """Return y and `states` of float32 CPU tensors; `states` is empty unless `save_states`."""
    batch, pixels, _, dim = x.shape
    scans, _, state = A.shape
    shape = (batch, pixels, dim) if merge else (batch, scans, dim, pixels)
    y = torch.zeros(shape) if _leaves_gaps(paths) else torch.empty(shape)
    rows, columns = to_paths(paths)[0].grid(*size)
    chunks = (rows * columns + CHUNK - 1) // CHUNK
    states = torch.empty((batch, scans, chunks + 1, state, dim) if save_states else 0)
    if x.numel():
        views = [x, delta, projected, _by_pixels(y, merge)]
        parameters = [None if p is None else p.contiguous() for p in (dt_weight, dt_bias, A, D)]
        saved = states if save_states else None
        _call("mixerzoo_scan_forward", A, views, saved, parameters, size, paths, softplus)
    return y, states


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
    inputs = [x, delta, projected]
    parameters = [None if p is None else p.contiguous() for p in (dt_weight, dt_bias, A, D)]
    grads = [None if t is None else _empty_like(t, paths) for t in inputs]
    sums = [None if p is None else torch.zeros_like(p) for p in parameters]
    if x.numel():
        views = [*inputs, _by_pixels(grad, merge), *grads]
        _call("mixerzoo_scan_backward", A, views, states.contiguous(), parameters + sums, size, paths, softplus)
    grad_x, grad_delta, grad_projected = grads
    grad_weight, grad_bias, grad_A, grad_D = sums
    assert grad_x is not None and grad_projected is not None and grad_A is not None
    return grad_x, grad_delta, grad_projected, grad_weight, grad_bias, grad_A, grad_D
