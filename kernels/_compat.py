"""Wrap the private names of torch that the kernels rely on, state the behaviour assumed of each, and work around gaps
of its exporters.

tests/kernels/test_compat.py holds a canary test for every function here, so that a torch release that changes one
fails by name instead of producing a wrong gradient. Functions called inside modules are written so that TorchScript can
compile them.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_T = TypeVar("_T")


def is_exporting() -> bool:
    """Return whether `torch.export` or the ONNX exporter is tracing.

    `torch.compiler.is_exporting()` does not serve: torch 2.11 folds it to True under a plain `torch.compile` as well,
    and the compiled model would silently lose its fused operators.
    """
    if torch.jit.is_scripting():
        return False
    else:
        # The tracing-based ONNX exporter has no such flag. Querying torch.onnx takes longer than a small operator.
        by_tracing = torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()
        return bool(torch.compiler._is_exporting_flag) or by_tracing


def is_differentiated_functionally() -> bool:
    """Return whether a `torch.func` transform or forward-mode differentiation is active.

    A custom operator has no rule for either: forward mode would silently return zero tangents.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_watched() -> bool:
    """Return whether a tracer, an operator counter or a fake-tensor mode intercepts each operator call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def trace_memo() -> dict[Any, Any] | None:
    """Return a dictionary that lives as long as the graph that `torch.export` is tracing, None outside of a trace.

    Tensors created while tracing may be reused in the same trace and nowhere else. Dynamo (strict export) gets None,
    because it would have to trace through the dictionary.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.__dict__.setdefault("mixerzoo_memo", {})


def once_a_trace(key: Hashable, make: Callable[[], _T]) -> _T:
    """Return `make()`; while exporting, compute it once per key and share the tensors between all layers."""
    memo = trace_memo()
    if memo is None:
        return make()
    if key not in memo:
        memo[key] = make()
    return memo[key]


def size_key(size: int | torch.SymInt) -> Any:
    """Return a hashable value that is equal for equal sizes, including symbolic ones."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def divide_with_remainder(value: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Return quotient and remainder of whole numbers, at least 0, by a size that may be free in an export.

    The remainder is a difference, because torch.onnx cannot translate the remainder by a free size.
    """
    quotient = value // divisor
    return quotient, value - quotient * divisor
