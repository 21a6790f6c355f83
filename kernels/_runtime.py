"""Which implementation may run for a tensor. Every kernel asks here; nothing else is decided here.

Importing this module imports neither Triton nor the native library, and touches no device.
"""

import importlib.util
import os

import torch
from torch import Tensor

from ._compat import is_differentiated_functionally, is_exporting, is_watched

HAS_TRITON = importlib.util.find_spec("triton") is not None

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton kernels run on CPU tensors, in Triton's interpreter: for tests on machines without a GPU."""


def wants_plain_ops() -> bool:
    """Whether the caller needs standard PyTorch operators: while exporting (so that the file loads anywhere) and
    under functional transforms and forward-mode differentiation (which a custom operator cannot follow)."""
    return is_exporting() or is_differentiated_functionally()


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels can run on `tensor`: an accelerator with float16, bfloat16 or float32 data."""
    if not HAS_TRITON or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return tensor.device.type in ("cuda", "xpu") or (INTERPRET and tensor.device.type == "cpu")


def needs_operator(*tensors: Tensor | None) -> bool:
    """Whether a custom operator has to be called for these tensors and not just its implementation: for gradients, and
    for all who watch operators. A call of one takes as long as a small convolution."""
    if is_watched():
        return True
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    return any(tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in given)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast would choose the data type in which an operator of PyTorch takes `x`."""
    kind = x.device.type
    return kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)


def as_autocast_wants(x: Tensor) -> Tensor:
    """`x` in the data type in which PyTorch's own convolutions and attention would take it."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_autocast(x) else x
