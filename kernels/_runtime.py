"""Decide which implementation may run for a tensor. Every kernel calls these functions; nothing else belongs here.

Importing this module imports neither Triton nor the native library, and touches no device.
"""

import importlib.util
import os

import torch
from torch import Tensor

from ._compat import is_differentiated_functionally, is_exporting, is_watched

HAS_TRITON = importlib.util.find_spec("triton") is not None

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton kernels run on CPU tensors, in Triton's interpreter: for tests on machines without a GPU."""


def wants_plain_ops() -> bool:
    """Return whether the caller must use standard PyTorch operators.

    This holds while exporting, so that the exported file loads anywhere, and under functional transforms and
    forward-mode differentiation, which cannot differentiate a custom operator.
    """
    return is_exporting() or is_differentiated_functionally()


def runs_triton(tensor: Tensor) -> bool:
    """Return whether Triton kernels can run on `tensor`: float16, bfloat16 or float32 data on an accelerator."""
    if not HAS_TRITON or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return tensor.device.type in ("cuda", "xpu") or (INTERPRET and tensor.device.type == "cpu")


def needs_operator(*tensors: Tensor | None) -> bool:
    """Return whether these tensors require a call of the custom operator rather than of its implementation.

    Gradients, tracers and operator counters, meta tensors and tensor subclasses need the operator. Its dispatch takes
    as long as a small convolution, so the implementation is called directly otherwise.
    """
    if is_watched():
        return True
    present = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return True
    return any(tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in present)


def is_autocast(x: Tensor) -> bool:
    """Return whether autocast would choose the dtype in which a PyTorch operator takes `x`."""
    kind = x.device.type
    return kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)


def as_autocast_wants(x: Tensor) -> Tensor:
    """Cast `x` to the dtype that autocast gives to PyTorch's own convolutions and attention."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_autocast(x) else x
