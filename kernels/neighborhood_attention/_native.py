"""Call the compiled neighborhood attention of kernels/cpu/neighborhood_attention.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._native import BAD_GEOMETRY, NO_MEMORY, as_words, is_available, library

__all__ = ["backward", "forward", "is_available"]


def _view(tensor: Tensor | None) -> list[int]:
    """Return the fields of the C++ struct `View`: address, then strides of batch, Z, Y, X, heads."""
    words = [] if tensor is None else [tensor.data_ptr(), *tensor.stride()[:5]]
    return words + [0] * (6 - len(words))


def _rows(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy unless its last dimension is contiguous, as the kernel requires."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _call(
    name: str,
    query: Tensor,
    views: Sequence[Tensor | None],
    geometry: Sequence[Sequence[int]],
    scale: float,
) -> None:
    batch, *size, heads, dim = query.shape
    words = [torch.get_num_threads(), batch, heads, dim, *size]
    for axes in geometry:
        words += axes
    status = getattr(library(), name)(as_words(words), as_words([w for view in views for w in _view(view)]), scale)
    if status == BAD_GEOMETRY:
        raise ValueError(
            f"every axis needs 1 <= stride <= kernel_size and kernel_size * dilation <= length; got lengths {size}, "
            f"kernel_size, stride, dilation, is_causal {[list(axes) for axes in geometry]}"
        )
    if status == NO_MEMORY:
        raise MemoryError(f"the native neighborhood attention kernel found no memory for query {tuple(query.shape)}")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return output [batch, Z, Y, X, heads, head_dim] and natural log-sum-exp [batch, Z, Y, X, heads] of float32 CPU
    tensors.

    `rpb` is [heads, 2 K - 1 per axis]; all other arguments have one entry for each of the three axes.
    """
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1])
    if q.numel():
        rpb = None if rpb is None else rpb.contiguous()
        views = [_rows(q), _rows(k), _rows(v), rpb, out, lse]
        _call("mixerzoo_na_forward", q, views, [kernel_size, stride, dilation, is_causal], scale)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and rpb.

    `delta` [batch, Z, Y, X, heads] is sum(out * grad_out) over head_dim, minus grad_lse.
    """
    grads = [q.new_empty(q.shape) for _ in range(3)]
    grad_rpb = None if rpb is None else rpb.new_zeros(rpb.shape)
    if q.numel():
        rpb = None if rpb is None else rpb.contiguous()
        views = [_rows(t) for t in (grad_out, q, k, v)] + [rpb, lse, delta, *grads, grad_rpb]
        _call("mixerzoo_na_backward", q, views, [kernel_size, stride, dilation, is_causal], scale)
    return grads[0], grads[1], grads[2], grad_rpb
