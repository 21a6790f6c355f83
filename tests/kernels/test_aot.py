"""Every Triton kernel and configuration compiles for the GPUs we name, and compiles well: see aot_compile.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mixerzoo.kernels import _runtime

SHARED_MEMORY = {"sm80": 99 * 1024, "sm90": 99 * 1024, "gfx942": 64 * 1024}
"""Bytes a block may use: for NVIDIA's targets the smallest consumer limit, that of sm_86, sm_89 and sm_120."""

PRODUCTS = {"_na_fwd_kernel", "_na_bwd_query_kernel", "_na_bwd_key_kernel", "_na_bwd_bias_kernel", "_lka_gate_kernel"}
"""Kernels that multiply matrices, and so belong on tensor cores."""

SMALL_PRODUCTS = {"_gla_state_kernel", "_gla_fwd_kernel", "_gla_bwd_kernel"}
SMALL_PRODUCTS |= {"_attend_kernel", "_query_grad_kernel", "_key_grad_kernel"}
"""Of 32 tokens, in some configuration, which are too few rows for the instructions of a whole warp group."""

SUMS = {"_dw_fwd_kernel", "_dw_weight_grad_kernel", "_lka_spatial_kernel", "_scan_walk_kernel", "_scan_bwd_kernel"}
SUMS |= {"_gla_carry_kernel", "_merge_kernel", "_keep_kernel", "_evidence_kernel"}

CHOICES = {"_partner_kernel", "_slot_kernel", "_members_kernel", "_rank_kernel"}
"""Which compare, and multiply only in full float32."""

SAMPLE = [
    "dilated",
    "map-32-float",
    "conv-7-dilated-half",
    "lka-half",
    "scan-half",
    "scan-16-half",
    "gla-half",
    "gla-causal-half",
]
SAMPLE += ["gla-wide-float", "evidence-64-row-half", "evidence-64-sums-half", "tokens-half", "tokens-float"]
"""Cases that launch every kernel, with the configurations that use the most registers among them."""

pytestmark = pytest.mark.skipif(not _runtime.HAS_TRITON, reason="Triton is not installed on this platform")


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name == "sm80" else pytest.mark.slow)
        for name in SHARED_MEMORY
    ],
)
def test_kernels_compile_without_spills_within_shared_memory_on_tensor_cores(target: str) -> None:
    _check(target, ["--case", *SAMPLE])


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_configuration_compiles_as_well(target: str) -> None:
    _check(target, [])


def _check(target: str, cases: list[str]) -> None:
    script = Path(__file__).with_name("aot_compile.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, "--target", target, *cases],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == PRODUCTS | SMALL_PRODUCTS | SUMS | CHOICES
    for report in reports:
        assert report["spills"] == 0, report
        assert report["shared_memory"] <= SHARED_MEMORY[target], report
        if (
            report["kernel"] in PRODUCTS | SMALL_PRODUCTS and "float" not in report["case"]
        ):  # full float32 products run outside the tensor cores
            assert report["tensor_core_instructions"] > 0, report
            if target == "sm90" and report["kernel"] in PRODUCTS:
                assert report["warpgroup_instructions"] > 0, report
