"""The benchmark of the selective scan at tiny shapes: its tables, what it refuses and what it counts as missed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_benchmark("bench_selective_scan")
    monkeypatch.setattr(module, "SEQUENCES", ((1, 8, 40), (16, 8, 33)))
    monkeypatch.setattr(module, "MAPS", ((1, 16, 5),))
    monkeypatch.setattr(module, "measure_memory", lambda case, methods: {name: [1, 1] for name in methods})
    return module


def run_main(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_selective_scan.py", "--rounds", "1", *arguments])
    return bench.main()


@pytest.mark.parametrize(("times", "missed"), [(41.0, 0), (39.0, 1), (11.0, 3), (1.0, 4)])
def test_a_miss_is_named_and_gives_status_1(
    times: float,
    missed: int,
    bench: Any,
    set_clock: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    set_clock(bench, lambda name: times if name == "reference loop" else 1.0)
    table = tmp_path / "table.md"
    assert run_main(bench, monkeypatch, "--markdown", str(table)) == bool(missed)
    out, err = capsys.readouterr()
    assert table.read_text() in out
    assert f"| 40 steps, D 8, state 1 | forward | **1000** | {times * 1e3:.0f} ({times:.1f}x) |" in out
    assert "| map 5x5, D 16, state 1 | forward + backward |" in out
    lines = err.splitlines()
    assert len(lines) == missed and all(line.startswith("missed: ") for line in lines)


def test_too_much_memory_is_a_miss(bench: Any) -> None:
    case = bench.Case(16, 8, 33)
    allowed = bench.allowed_memory(case)
    times = [{"ours": 1.0, "reference loop": 1e3}] * 2
    assert not list(bench.list_missed(case, times, {"ours": [int(a) for a in allowed]}))
    (missed,) = bench.list_missed(case, times, {"ours": [int(allowed[0]), int(allowed[1]) + 2]})
    assert missed.startswith("33 steps, D 8, state 16, forward + backward: ")


def test_a_wrong_method_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.selective_scan
    monkeypatch.setattr(bench, "selective_scan", lambda *given, **options: 1.001 * right(*given, **options))
    with pytest.raises(
        SystemExit, match=r"40 steps, D 8, state 1: the output of ours is off by .* nothing is reported"
    ):
        run_main(bench, monkeypatch)


def test_the_compiler_s_form_is_the_same_scan(bench: Any) -> None:
    case = bench.Case(16, 16, 5, is_map=True)
    bench.require_equal(case, {"plain": bench.on_sequences(bench.plain)})


def test_the_loop_takes_the_place_of_the_operator(bench: Any) -> None:
    loop = sys.modules["_scan_loop"]
    x, projected = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 5)
    rest = torch.randn(4, 6, 1), torch.randn(4, 6), -torch.rand(4, 6, 2), torch.randn(4, 6)
    for paths in (bench.CROSS, loop.CROSS[:4]):
        want = bench.selective_scan_2d(x, projected, *rest, paths=paths)
        torch.testing.assert_close(loop.scan_loop_2d(x, projected, *rest, paths=paths), want, atol=1e-4, rtol=1e-4)
