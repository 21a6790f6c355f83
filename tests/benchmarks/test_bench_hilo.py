"""The benchmark of HiLo at few channels: its tables, what it refuses and what it counts as missed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_benchmark("bench_hilo")
    for name, value in {"WIDTHS": (24, 48), "REQUIRED_WIDTH": 48, "REQUIRED_BATCH": 1, "MERGINGS": ((4, 8),)}.items():
        monkeypatch.setattr(module, name, value)
    return module


def run_main(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_hilo.py", "--rounds", "1", "--batch", "1", "2", *arguments])
    return bench.main()


def test_a_run_writes_both_tables(
    bench: Any, set_clock: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    set_clock(bench, lambda name: 0.1 if name in ("HiLo", "ours") else 0.2)
    table = tmp_path / "table.md"
    assert run_main(bench, monkeypatch, "--markdown", str(table)) == 0
    out, err = capsys.readouterr()
    assert table.read_text() in out
    assert not err
    assert "| 24 | 1 | **10** | 5 (2.00x) | 5 (2.00x) | 5 (2.00x) |" in out
    assert "| 48 | 2 | **20** | 10 (2.00x) | 10 (2.00x) | 10 (2.00x) |" in out
    for name in ("forward", "forward + backward"):
        assert f"| 4x4, C 8 | 1 | {name} | **100** | 200 (2.0x) |" in out


def test_a_miss_is_named_and_gives_status_1(
    bench: Any, set_clock: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seconds = {"spatial reduction": 1.39, "7 x 7 windows": 1.61, "whole map": 0.5}
    set_clock(bench, lambda name: seconds.get(name, 1.0))
    assert run_main(bench, monkeypatch) == 1
    out, err = capsys.readouterr()
    assert "(1.39x)" in out
    assert err.splitlines() == ["missed: HiLo at C = 48, batch 1 is 1.39 times as fast as spatial reduction, not 1.4"]


def test_wrong_numbers_are_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.sample_taps
    monkeypatch.setattr(bench, "sample_taps", lambda x, offset: 1.001 * right(x, offset))
    with pytest.raises(SystemExit, match=r"the merging at 4 x 4 is off by .* nothing is reported"):
        list(bench.merging_rows([1], 1))

    class Wrong(bench.HiLo):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(1)).flip(1) * 1.001

    monkeypatch.setattr(bench, "HiLo", Wrong)
    with pytest.raises(SystemExit, match=r"HiLo at C = 24 is off by .* nothing is reported"):
        run_main(bench, monkeypatch)
