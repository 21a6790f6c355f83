"""Call the compiled depth-wise convolution of kernels/cpu/depthwise_conv.cpp."""

import torch
from torch import Tensor

from .._native import NO_MEMORY, as_words, is_available, library

__all__ = ["forward", "is_available", "weight_grad"]


def _adjacent(x: Tensor) -> Tensor:
    """Return `x`, or a contiguous copy unless its channels or its columns have stride 1, as the kernel requires."""
    return x if 1 in (x.stride(1), x.stride(3)) else x.contiguous()


def _map(x: Tensor) -> list[int]:
    """Return the fields of the C++ struct `Map`."""
    return [x.data_ptr(), *x.stride()]


def _call(name: str, x: Tensor, weight: Tensor, dilation: tuple[int, int], *arguments: object) -> None:
    convolution = as_words([torch.get_num_threads(), *x.shape, *weight.shape[2:], *dilation])
    status = getattr(library(), name)(convolution, *arguments)
    if status == NO_MEMORY:
        raise MemoryError(f"the native depth-wise convolution found no memory for a map {tuple(x.shape)}")
    if status:
        raise ValueError(
            f"needed odd kernel sides and positive dilations; got weight {tuple(weight.shape)}, dilation {dilation}"
        )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int], memory_format: torch.memory_format
) -> Tensor:
    """Convolve float32 CPU tensors into a [B, C, H, W] tensor of the requested memory format."""
    out = torch.empty(x.shape, memory_format=memory_format)
    if x.numel():
        x, weight = _adjacent(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        address = None if bias is None else bias.data_ptr()
        maps = as_words(_map(x)), as_words(_map(out))
        _call("mixerzoo_depthwise_forward", x, weight, dilation, maps[0], weight.data_ptr(), address, maps[1])
    return out


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, dilation: tuple[int, int]) -> Tensor:
    """Return the gradient of `weight` [C, 1, rows, columns]."""
    if not x.numel():
        return torch.zeros(weight.shape)
    out = torch.empty(weight.shape)
    grad, x = _adjacent(grad), _adjacent(x)
    maps = as_words(_map(grad)), as_words(_map(x))
    _call("mixerzoo_depthwise_weight_grad", x, weight, dilation, *maps, out.data_ptr())
    return out
