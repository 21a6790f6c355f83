"""Triton's interpreter for the tests of kernels, made faster, and made right in bfloat16.

What is mended, on triton 3.6 to 3.9:
* a call of one Triton function by another patches the whole language anew, a millisecond each: once a launch is enough;
* an associative scan calls its function once for every element; here once for a row of them;
* bfloat16 is held as raw 16-bit integers and computed with as such; products and arithmetic go through float32 here,
  and what is stored is rounded, not cut off.
The canaries in test_interpreter.py fail when a new Triton makes either unnecessary or impossible.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mixerzoo.kernels import _native, _runtime

HAS_TRITON = "triton" in sys.modules  # ../conftest.py has loaded it, to be interpreted

if HAS_TRITON:
    import triton.language as tl
    from triton.runtime import interpreter


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: np.ndarray) -> Any:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _compute_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    dot, binary, truncate = builder.create_dot, builder.binary_op, builder.create_fp_trunc

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *rest)

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        if tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar):
            return binary(self, left, right, operation)
        result = operation(_widen(left).data, _widen(right).data)
        return interpreter.TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _narrow(result)

    def create_fp_trunc(self: Any, values: Any, kind: Any) -> Any:
        is_mended = kind.scalar == tl.bfloat16 and values.dtype.scalar == tl.float32
        return _narrow(values.data) if is_mended else truncate(self, values, kind)

    monkeypatch.setattr(builder, "create_fp_trunc", create_fp_trunc)
    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "binary_op", binary_op)


def _patch_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    patched: set[frozenset[int]] = set()
    launch = interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        languages = frozenset(id(v) for v in self.fn.__globals__.values() if v is tl or v is tl.core)
        if languages not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(languages)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def _scan_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def generic_scan(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        def row(i: int) -> tuple[Any, ...]:
            return tuple(self.to_tensor(np.take(x.handle.data, [i], axis=self.axis), x.dtype.scalar) for x in inputs)

        rows = [row(0)]
        for i in range(1, inputs[0].handle.data.shape[self.axis]):
            rows.append(self.combine_fn.fn(*rows[-1], *row(i)))
        columns = zip(*rows, strict=True)
        return [
            self.to_tensor(np.concatenate([x.handle.data for x in column], axis=self.axis), x.dtype.scalar)
            for x, column in zip(inputs, columns, strict=True)
        ]

    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", generic_scan)


@pytest.fixture
def triton_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton kernels run on CPU tensors, and the operators take them."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed on this platform")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_runtime, "INTERPRET", True)
    _compute_bfloat16(monkeypatch)
    _patch_once_a_launch(monkeypatch)
    _scan_by_rows(monkeypatch)
    yield


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is asked for unfilled comes full of NaN, so that an element nobody wrote shows."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def native_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Takes the library that a processor with these instructions would choose: "AVX2", or "DEFAULT" for any."""
    capability = torch.backends.cpu.get_cpu_capability()

    def take(instructions: str) -> None:
        if instructions == "AVX2" and not capability.startswith("AVX"):
            pytest.skip(f"this processor has {capability}")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
        _native.library.cache_clear()
        if not _native.is_available():
            pytest.skip("no compiled kernels: installed without a C++ compiler")

    yield take
    _native.library.cache_clear()


@pytest.fixture(params=["AVX2", "DEFAULT"])
def instructions(request: pytest.FixtureRequest, native_library: Callable[[str], None]) -> str:
    """Each native library in turn."""
    native_library(request.param)
    return request.param
