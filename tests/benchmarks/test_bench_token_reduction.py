"""The benchmark of token reduction: its tables, what it refuses and what it counts as missed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TINY = {"embed_dim": 16, "num_heads": 2, "depth": 4}


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """With a tiny transformer of small pictures, a few methods, and one model of the family."""
    module = load_benchmark("bench_token_reduction")
    create = module.timm.create_model

    def create_tiny(name: str) -> Any:
        return create(name, img_size=32, patch_size=4, **TINY)

    monkeypatch.setattr(module.timm, "create_model", create_tiny)
    monkeypatch.setattr(module, "PICTURE", (3, 32, 32))
    some = ("ToMe, r = 13", "EViT, 0.9", "EViT, 0.7", "EViT, 0.5")
    monkeypatch.setattr(module, "METHODS", {name: module.METHODS[name] for name in some})
    monkeypatch.setattr(module, "COUNTERPARTS", {"eet_vit_small": module.DENSE})
    monkeypatch.setattr(module, "peak_memory", lambda name, build: 3_000_000 if build()() is not None else None)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def set_times(bench: Any, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str], list[float]]) -> None:
    def time_rounds(calls: Mapping[str, Callable[[], Tensor]], **_: object) -> dict[str, list[float]]:
        assert all(call().isfinite().all() for call in calls.values())
        return {name: seconds(name) for name in calls}

    monkeypatch.setattr(bench, "time_rounds", time_rounds)


def run_main(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_token_reduction.py", "--threads", "1", *arguments])
    return bench.main()


def test_a_run_writes_both_tables(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    set_times(bench, monkeypatch, lambda name: [1.0, 2.0, 9.0] if name == bench.DENSE else [0.5, 1.0, 3.0])
    table = tmp_path / "table.md"
    assert run_main(bench, monkeypatch, "--markdown", str(table)) == 0
    out, err = capsys.readouterr()
    assert table.read_text() in out and not err
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in out.splitlines() if line[:2] == "| "}
    assert set(bench.METHODS) | {bench.DENSE, "eet_vit_small"} <= set(rows)
    assert rows[bench.DENSE][2:6] == ["2000", "4", "**1.00**", "3"]
    assert rows["EViT, 0.5"][2:6] == ["1000", "8", "**2.00**", "3"]
    assert rows["EViT, 0.5"][6:9] == ["1000", "1", "**2.00**"]
    kept = [float(rows[f"EViT, {rate}"][1].split()[0]) for rate in (0.9, 0.7, 0.5)]
    assert float(rows[bench.DENSE][1]) > kept[0] > kept[1] > kept[2] > 0


def test_a_ratio_is_the_median_of_rounds_and_a_miss_gives_status_1(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The middle ratio of ToMe is 1.6, those of its medians would be 1.7."""
    times = {bench.DENSE: [1.6, 3.4, 1.7], "ToMe, r = 13": [1.0, 1.0, 1.0 + 1 / 16]}
    set_times(bench, monkeypatch, lambda name: times.get(name, [0.5, 0.5, 0.5]))
    assert run_main(bench, monkeypatch, "--quick") == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"missed: ToMe, r = 13 at batch 8 is 1.60 times as fast as {bench.DENSE}, not 1.64"]
    assert "eet_vit_small" not in out


def test_compiled_models_have_rows_at_the_batch_they_are_compiled_for(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench.torch, "compile", lambda model, **_: model)
    set_times(bench, monkeypatch, lambda name: [1.74 if name == bench.DENSE else 1.0])
    assert run_main(bench, monkeypatch, "--quick", "--compile") == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"missed: ToMe, r = 13, compiled at batch 8 is 1.74 times as fast as {bench.DENSE}, not 1.75"
    ]
    (line,) = (line for line in out.splitlines() if line.startswith("| EViT, 0.7, compiled"))
    assert line.endswith("| 1000 | 8 | **1.74** | - | - | - | - | - |")


def test_a_wrong_method_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(bench, monkeypatch, lambda name: [1.0])
    right = bench.reduced

    def wrong(method: Any, model: Any = None) -> Any:
        made = right(method, model)
        made.register_forward_hook(lambda _, __, out: 1.001 * out)
        return made

    monkeypatch.setattr(bench, "reduced", wrong)
    with pytest.raises(SystemExit, match=r"ToMe\(r=0, prop_attn=True\) of .* is off by .* nothing is reported"):
        run_main(bench, monkeypatch, "--quick")
