"""The private names of torch that the kernels rely on, each with the behaviour assumed of it.

tests/kernels/test_compat.py holds a canary for every function here, so that a torch release that changes one is
noticed by name and not by a wrong gradient. Those that modules ask are written so that TorchScript can read them.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_T = TypeVar("_T")


def is_exporting() -> bool:
    """Whether `torch.export` or the ONNX exporter is tracing.

    Not `torch.compiler.is_exporting()`: torch 2.11 folds that to True under a plain `torch.compile` as well, and the
    compiled model would silently lose its fused operators.
    """
    if torch.jit.is_scripting():
        return False
    else:
        # The exporter by tracing has no such flag; asking torch.onnx takes longer than a small operator.
        by_tracing = torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()
        return bool(torch.compiler._is_exporting_flag) or by_tracing


def is_differentiated_functionally() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active.

    A custom operator has no rule for either: forward mode would give tangents of zero without any error.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether something sees each operator that is called: a tracer, a counter, a mode of fake tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def trace_memo() -> dict[Any, Any] | None:
    """A dictionary that lives and dies with the graph that `torch.export` is tracing, None outside of a trace.

    Tensors made while tracing may be used again in the same trace and nowhere else. Dynamo (strict export) is left
    out: it would have to follow the dictionary.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.__dict__.setdefault("mixerzoo_memo", {})


def once_a_trace(key: Hashable, make: Callable[[], _T]) -> _T:
    """What `make` returns; while exporting the same tensors for all layers that ask with an equal key."""
    memo = trace_memo()
    if memo is None:
        return make()
    if key not in memo:
        memo[key] = make()
    return memo[key]


def size_key(size: int | torch.SymInt) -> Any:
    """Something hashable that is equal for equal sizes, symbols included."""
    return size.node.expr if isinstance(size, torch.SymInt) else size
