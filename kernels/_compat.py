"""The private names of torch that the kernels rely on, each with the behaviour assumed of it.

tests/kernels/test_compat.py holds a canary for every function here, so that a torch release that changes one is
noticed by name and not by a wrong gradient.
"""

import torch


def is_exporting() -> bool:
    """Whether `torch.export` or the ONNX exporter is tracing.

    Not `torch.compiler.is_exporting()`: torch 2.11 folds that to True under a plain `torch.compile` as well, and the
    compiled model would silently lose its fused operators.
    """
    return bool(torch.compiler._is_exporting_flag) or torch.onnx.is_in_onnx_export()


def is_differentiated_functionally() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active.

    A custom operator has no rule for either: forward mode would give tangents of zero without any error.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
