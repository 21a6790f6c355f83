"""Compile the Triton launches of an operator for GPUs that are not here, and report what the compiler made of them.

    python tests/kernels/aot_compile.py [--target sm90 ...] [--case map-32-half ...]

prints one JSON object a kernel: registers, spills, shared memory, tensor-core instructions. Nothing is launched: Triton
gets a driver that only names its target, and the operators' own launchers run on meta tensors, so that what is compiled
is what runs, with the same constants and specialisations. Run without TRITON_INTERPRET. Works with triton 3.6 to 3.9.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns that the default will change

import torch
import triton
from mixerzoo.kernels.cross_scan import ATROUS, BIDIRECTIONAL, CROSS, ScanPath
from mixerzoo.kernels.depthwise_conv import _triton as depthwise_conv
from mixerzoo.kernels.gated_linear_attention import _triton as gated_linear_attention
from mixerzoo.kernels.neighborhood_attention import _triton as neighborhood_attention
from mixerzoo.kernels.neighborhood_attention._geometry import Window
from mixerzoo.kernels.selective_scan import _triton as selective_scan
from mixerzoo.kernels.selective_scan._plain import to_integers
from mixerzoo.kernels.token_reduction import _triton as token_reduction
from mixerzoo.kernels.token_reduction import _triton_attention as evidence_attention
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class NamedTarget:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _report_nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([_tool(name), flag, path], capture_output=True, text=True, check=True).stdout
            for name, flag in [("cuobjdump", "-res-usage"), ("cuobjdump", "-sass")]
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources: {usage[:200]}")
    registers, _, local = map(int, found.groups())
    return {
        "registers": registers,
        "spills": len(re.findall(r"\bSTL\b", code)) + local,
        "tensor_core_instructions": len(re.findall(r"\bHGMMA\b|\bHMMA\b", code)),
        "warpgroup_instructions": len(re.findall(r"\bHGMMA\b", code)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/", code)),
    }


def _report_amd(assembly: str) -> dict[str, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no .{key} in the assembly")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        # accesses, since compilers also reserve stack that nothing uses
        "spills": number("vgpr_spill_count") + len(re.findall(r"\bscratch_(?:load|store)", assembly)),
        "tensor_core_instructions": len(re.findall(r"v_mfma", assembly)),
        "instructions": len(re.findall(r"^\s+[vs]_", assembly, re.MULTILINE)),
    }


@contextlib.contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[dict[str, Any]]]:
    """Inside, `kernel[grid](...)` compiles for `target` and appends a report instead of launching."""
    reports: list[dict[str, Any]] = []
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        self.device_caches.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        report = _report_nvidia(kernel.asm["cubin"]) if target.backend == "cuda" else _report_amd(kernel.asm["amdgcn"])
        reports.append({"kernel": self.__name__, "shared_memory": kernel.metadata.shared, **report})
        return kernel

    before = driver._active
    driver.set_active(NamedTarget(target))
    jit.JITFunction.run = compile_only
    try:
        yield reports
    finally:
        jit.JITFunction.run = run
        driver._active = before


Map = tuple[int, int, int]


def _attend(spatial: Map, windows: tuple[Window, ...], head_dim: int, dtype: torch.dtype, *, rpb: bool) -> None:
    query = torch.empty(2, *spatial, 2, head_dim, device="meta", dtype=dtype)
    table = torch.empty(2, *(2 * window.size - 1 for window in windows), device="meta") if rpb else None
    out, lse = neighborhood_attention.forward(query, query, query, table, windows, 1.0)
    neighborhood_attention.backward(out, query, query, query, table, lse, lse, windows, 1.0)


def _convolve(channels: int, side: int, kernel: tuple[int, int], dilation: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.empty(2, channels, side, side, device="meta", dtype=dtype)
    weight = torch.empty(channels, 1, *kernel, device="meta", dtype=dtype)
    depthwise_conv.forward(x, weight, weight[:, 0, 0, 0], dilation)
    depthwise_conv.weight_grad(x, x, weight, dilation)


def _gate(channels: int, side: int, dtype: torch.dtype) -> None:
    x = torch.empty(2, channels, side, side, device="meta", dtype=dtype)
    w5, w7d3, w1 = (
        torch.empty(channels, *rest, device="meta", dtype=dtype) for rest in ((1, 5, 5), (1, 7, 7), (channels, 1, 1))
    )
    bias = torch.empty(channels, device="meta", dtype=dtype)
    depthwise_conv.lka_gate(x, depthwise_conv.lka_spatial(x, w5, w7d3, bias, bias), w1, bias)


def _scan(
    size: tuple[int, int], dim: int, rank: int, state: int, paths: tuple[ScanPath, ...], dtype: torch.dtype
) -> None:
    """As the models call it; rank 0: as `selective_scan` does."""
    pixels, scans = size[0] * size[1], len(paths)
    x = torch.empty(2, pixels, 1, dim, device="meta", dtype=dtype)
    projected = torch.empty(2, pixels, scans, rank + 2 * state, device="meta", dtype=dtype)
    delta = None if rank else x.expand(-1, -1, scans, -1)
    bias = torch.empty(scans, dim, device="meta")
    weight = torch.empty(scans, dim, rank, device="meta", dtype=dtype) if rank else None
    A = torch.empty(scans, dim, state, device="meta")
    tensors = (x, delta, projected, weight, bias, A, bias)
    options = (size, to_integers(paths), True, rank > 0)
    y, states = selective_scan.forward(*tensors, *options, True)
    selective_scan.backward(y, *tensors, states, *options)


def _gated(batch: int, head_dim: int, value_dim: int, dtype: torch.dtype, *, directions: int = 2) -> None:
    """Strides as in the models. States are handed on in one walk or, of few heads, chunk by chunk."""
    rows = torch.empty(batch, 784, 3, 4 * head_dim, device="meta", dtype=dtype)
    query, key, *gates = rows.chunk(4, -1)
    value = torch.empty(batch, 784, 3, value_dim, device="meta", dtype=dtype)
    inputs = query, key, value, tuple(gates[:directions])
    gated_linear_attention.forward(*inputs, 1.0)
    gated_linear_attention.backward(value, *inputs, 1.0)


def _reduce_tokens(tokens: int, dtype: torch.dtype) -> None:
    """As a ViT-S calls it, keys with their heads, sizes, EViT's fused token."""
    x = torch.empty(2, tokens, 384, device="meta", dtype=dtype)
    key = torch.empty(2, tokens, 3, 6, 64, device="meta", dtype=dtype).permute(2, 0, 3, 1, 4)[1]
    size = torch.empty(2, tokens, device="meta")
    slot = token_reduction.match(key, 13, 1)
    token_reduction.merge(x, slot, tokens - 13, size)
    token_reduction.merge(x, slot, tokens - 13, None)
    token_reduction.keep(x, size[:, 1:], tokens // 2, 1, True)
    token_reduction.keep(x, size[:, 1:], tokens // 2, 1, False)


def _attend_with_evidence(head_dim: int, dtype: torch.dtype, *, sums: bool) -> None:
    """The first row without sizes; the sums, which take the most registers, with them."""
    q, k, v = torch.empty(2, 197, 3, 3, head_dim, device="meta", dtype=dtype).permute(2, 0, 3, 1, 4)
    log_size = torch.empty(2, 197, device="meta") if sums else None
    out, evidence, lse = evidence_attention.attend(q, k, v, log_size, 1.0, sums)
    evidence_attention.attend_backward(out, evidence, q, k, v, log_size, out, evidence, lse, 1.0, sums)


def _cases() -> dict[str, Callable[[], None]]:
    """Every configuration that ships, at the windows of the models, and every kind of geometry at the usual one."""
    one, five, seven = (Window(size, 1, 1, False) for size in (1, 5, 7))
    dilated, causal, strided = Window(7, 1, 4, False), Window(7, 1, 1, True), Window(8, 4, 1, False)
    eleven, long = Window(11, 1, 2, False), Window(31, 1, 1, False)
    half, large, huge = torch.bfloat16, (1, 56, 56), (1, 96, 96)
    cases: dict[str, Callable[[], None]] = {
        "no-bias": lambda: _attend(large, (one, seven, seven), 32, half, rpb=False),
        "dilated": lambda: _attend(large, (one, dilated, dilated), 32, half, rpb=True),
        "11x11-dilated": lambda: _attend(huge, (one, eleven, eleven), 32, half, rpb=True),
        "causal": lambda: _attend(large, (one, causal, seven), 32, half, rpb=True),
        "strided": lambda: _attend(large, (one, strided, strided), 32, half, rpb=False),
        "sequence": lambda: _attend((1, 1, 1000), (one, one, long), 64, half, rpb=True),
        "volume": lambda: _attend((16, 16, 16), (five, five, five), 32, half, rpb=True),
    }
    enough = gated_linear_attention.ENOUGH_PROGRAMS
    cases["tokens-many-half"] = lambda: _reduce_tokens(token_reduction.MOST_TOKENS, half)
    cases["gla-half"] = lambda: _gated(enough, 32, 64, half)
    cases["gla-causal-half"] = lambda: _gated(1, 32, 64, half, directions=1)
    cases["scan-16-half"] = lambda: _scan((1, 197), 384, 12, 16, BIDIRECTIONAL, half)
    cases["scan-sequence"] = lambda: _scan((1, 1000), 64, 0, 16, BIDIRECTIONAL[:1], half)
    for state in selective_scan.TILES:
        cases[f"scan-state-{state}"] = lambda n=state: _scan((57, 57), 96, selective_scan.MAX_RANK, n, ATROUS[3:], half)
    for dtype, kind in [(torch.float16, "half"), (torch.float32, "float")]:
        for head_dim in (32, *neighborhood_attention.CONFIGS[dtype.itemsize]):
            cases[f"map-{head_dim}-{kind}"] = lambda d=head_dim, t=dtype: _attend(
                large, (one, seven, seven), d, t, rpb=True
            )
        cases[f"conv-13-{kind}"] = lambda t=dtype: _convolve(64, 56, (13, 13), (1, 1), t)
        cases[f"conv-7-dilated-{kind}"] = lambda t=dtype: _convolve(32, 56, (7, 7), (3, 3), t)
        cases[f"conv-1x31-{kind}"] = lambda t=dtype: _convolve(24, 28, (1, 31), (1, 1), t)
        cases[f"scan-{kind}"] = lambda t=dtype: _scan((56, 56), 192, 6, 1, CROSS[:2], t)
        cases[f"gla-narrow-{kind}"] = lambda t=dtype: _gated(1, 16, 32, t)
        cases[f"gla-wide-{kind}"] = lambda t=dtype: _gated(enough, *gated_linear_attention.WIDEST[t.itemsize], t)
        for head_dim in (64, evidence_attention.WIDEST[dtype.itemsize]):
            for sums in (False, True):
                cases[f"evidence-{head_dim}-{'sums' if sums else 'row'}-{kind}"] = lambda d=head_dim, t=dtype, s=sums: (
                    _attend_with_evidence(d, t, sums=s)
                )
        cases[f"tokens-{kind}"] = lambda t=dtype: _reduce_tokens(197, t)
        cases[f"lka-{kind}"] = lambda t=dtype: _gate(64, 56, t)
    return cases


CASES = _cases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    for name in options.target:
        for case in options.case:
            with compiling_for(TARGETS[name]) as reports:
                CASES[case]()
            for report in reports:
                print(json.dumps({"target": name, "case": case, **report}), flush=True)


if __name__ == "__main__":
    main()
