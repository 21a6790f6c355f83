"""The benchmark of depth-wise convolution at tiny maps: its tables, what it refuses and what it counts as missed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_benchmark("bench_depthwise_conv")
    tiny: dict[str, Any] = {
        "VAN_STAGES": [(8, 6)],
        "DENSE_STAGES": [(8, 6)],
        "DENSE_KERNELS": [5],
        "DILATED": [(3, 2)],
        "BANDS": [(1, 5)],
        "LARGE_MAP": (4, 9, 5),
        "TRAINED": [(5, 1)],
    }
    for name, value in tiny.items():
        monkeypatch.setattr(module, name, value)
    return module


def run_main(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_depthwise_conv.py", "--rounds", "1", *arguments])
    return bench.main()


def test_a_run_writes_every_table(
    bench: Any, set_clock: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    set_clock(bench, lambda name: 1.0 if name.startswith("ours") else 4.5)
    table = tmp_path / "table.md"
    assert run_main(bench, monkeypatch, "--markdown", str(table)) == 0
    captured = capsys.readouterr()
    assert table.read_text() == captured.out
    for row in (
        "| 6x6x8, kernel 7x7, dilation 3, batch 1 | 4500.000 | 1000.000 |",
        "| 6x6x8, kernel 5x5, batch 1 |",
        "| 6x6x8, kernel 1x5, batch 1 |",
        "| 9x9x4, kernel 5x5, batch 1 |",
        "| 6x6x8, kernel 5x5, batch 8 |",
    ):
        assert captured.out.count(row) == 1, row
    assert captured.out.count("Large kernel attention, batch") == 2
    assert "missed" not in captured.err


@pytest.mark.parametrize(
    ("times", "missed"),
    [
        (3.9, ["kernel 7x7, dilation 3, batch 1: 3.90 times"]),  # no allowance for a tie here
        (0.96, ["kernel 7x7, dilation 3, batch 1: 0.96 times"]),  # elsewhere a tie
        (0.9, [f"{kernel}: 0.90 times" for kernel in ("dilation 3, batch 1", "1x5, batch 1", "5x5, batch 8")]),
    ],
)
def test_a_miss_is_named_and_gives_status_1(
    times: float,
    missed: list[str],
    bench: Any,
    set_clock: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    set_clock(bench, lambda name: times if name.startswith("conv2d") else 1.0)
    assert run_main(bench, monkeypatch) == 1
    captured = capsys.readouterr()
    assert "| map |" in captured.out
    lines = [line for line in captured.err.splitlines() if line.startswith("missed: ")]
    assert len(lines) == (5 if len(missed) > 1 else 1)
    for text in missed:
        assert any(text in line for line in lines), text


def test_slower_in_one_format_is_a_miss(bench: Any, set_clock: Callable) -> None:
    set_clock(bench, lambda name: {"ours, contiguous": 2.0, "conv2d, contiguous": 1.0}.get(name, 1.0))
    missed: list[str] = []
    list(bench.section("Title.", [bench.square(4, 5, 5)], 1, missed))
    assert missed == ["Title. 5x5x4, kernel 5x5, batch 1: 1.00 times, 0.50 in the same format"]


def test_a_wrong_method_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right, gate = bench.depthwise_conv2d, bench.large_kernel_attention
    monkeypatch.setattr(bench, "depthwise_conv2d", lambda *inputs, dilation: 1.001 * right(*inputs, dilation=dilation))
    with pytest.raises(SystemExit, match=r"ours, contiguous is off by 1\.0e-03 at 6x6x8, kernel 7x7, dilation 3"):
        run_main(bench, monkeypatch)
    monkeypatch.setattr(bench, "large_kernel_attention", lambda *inputs: 1.001 * gate(*inputs))
    with pytest.raises(SystemExit, match="LKA, ours, contiguous is off by"):
        list(bench.attention_section(1, 1))


@pytest.mark.parametrize(("lattice", "status"), [(1.0, 0), (0.5, 1)])
def test_the_rule_is_wrong_where_another_way_is_much_faster(
    lattice: float,
    status: int,
    bench: Any,
    set_clock: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    set_clock(bench, lambda name: lattice if name.startswith("lattice") else 1.0)
    assert run_main(bench, monkeypatch, "--rule") == status
    assert f"at most {1 / lattice:.2f} times" in capsys.readouterr().out
