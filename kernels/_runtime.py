"""Which implementation may run for a tensor. Every kernel asks here; nothing else is decided here.

Importing this module imports neither Triton nor the native library, and touches no device.
"""

import importlib.util
import os

import torch
from torch import Tensor

from ._compat import is_differentiated_functionally, is_exporting

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
