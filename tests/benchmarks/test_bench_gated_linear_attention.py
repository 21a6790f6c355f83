"""The benchmark of gated linear attention at few tokens: its tables and picture, what it refuses and what is missed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_benchmark("bench_gated_linear_attention")
    monkeypatch.setattr(module, "TOKENS", (5, 33))
    monkeypatch.setattr(module, "COMPARED", 35)
    monkeypatch.setattr(module, "LONGEST", {("recurrence", which): 5 for which in module.PASSES})
    monkeypatch.setattr(module, "peak_memory", lambda name, build: (build()(), 3 * 2**20)[1])
    return module


def run_main(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_gated_linear_attention.py", "--threads", "1", "--rounds", "1", *arguments])
    return bench.main()


def test_a_run_writes_tables_and_a_picture(
    bench: Any, set_clock: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    set_clock(bench, lambda name: 0.1 if name == "gated linear attention" else 0.25)
    monkeypatch.setattr(bench, "ALLOWED_GROWTH", 1.0)
    table, picture = tmp_path / "table.md", tmp_path / "picture.png"
    assert run_main(bench, monkeypatch, "--markdown", str(table), "--picture", str(picture)) == 0
    out, err = capsys.readouterr()
    assert table.read_text() in out and not err
    assert out.count("| 5 | **100** | 250 (2.5x) | 250 (2.5x) | 3.0 | 3.0 | 3.0 |") == 2
    assert out.count("| 33 | **100** | 250 (2.5x) |  | 3.0 | 3.0 |  |") == 2
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_cost_that_is_not_linear_is_a_miss(
    bench: Any, set_clock: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    set_clock(bench, lambda name: 1.0)
    monkeypatch.setattr(bench, "growth", lambda results, which: 1.6 if which == "forward" else 1.5)
    assert run_main(bench, monkeypatch) == 1
    assert capsys.readouterr().err == (
        "missed: forward takes 1.60 times as long a token at 33 tokens as at 1024, more than 1.5\n"
    )


def test_growth_is_of_the_time_a_token(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TOKENS", (256, 1024, 4096))
    results = {(bench.NAMES[0], "forward", n): bench.Result(n * n * 1e-9, 0) for n in bench.TOKENS}
    assert bench.growth(results, "forward") == pytest.approx(4.0)


def test_wrong_numbers_are_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.ours
    monkeypatch.setattr(bench, "ours", lambda inputs: 1.001 * right(inputs))
    with pytest.raises(SystemExit, match=r"ours is off by .* nothing is reported"):
        bench.require_right_results()
