"""BEVANet's benchmark with a tiny network: its table, its order, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.mixers import DepthwiseConv2d
from torch import Tensor, nn

TINY = {"depths": (1, 1, 1, 1, 1), "embed_dim": 4, "last_dim": 8}


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_benchmark("bench_bevanet")
    tiny = module.Configuration("S, tiny", "bevanet_s", 5, (40, 64), 70.0, {"channels": 4, "neck_channels": 4}, TINY)
    monkeypatch.setattr(module, "CONFIGURATIONS", (tiny, tiny._replace(name="L, tiny", published=None)))
    return module


def test_a_run_writes_its_table(
    bench: Any, set_clock: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    set_clock(bench, {"logits at 1/8": 0.1, "every pixel's class": 0.2, "PyTorch's convolutions": 0.5}.__getitem__)
    table = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["bench_bevanet.py", "--device", "cpu", "--markdown", str(table)])
    assert bench.main() == 0
    out = capsys.readouterr().out
    assert table.read_text() in out
    assert "| S, tiny | 40 x 64 | 0.2 | 10 | **5** | 2 (2.5x) | 70.0 |" in out
    assert "| L, tiny | 40 x 64 | 0.2 | 10 | **5** | 2 (2.5x) |  |" in out
    assert DepthwiseConv2d.forward is not nn.Conv2d.forward, "PyTorch's convolutions were for their column alone"


def test_models_and_size_can_be_chosen(
    bench: Any, set_clock: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    set_clock(bench, lambda name: 1.0)
    arguments = ["--device", "cpu", "--models", "L", "--size", "32", "50"]
    monkeypatch.setattr(sys, "argv", ["bench_bevanet.py", *arguments])
    assert bench.main() == 0
    out = capsys.readouterr().out
    assert "| L, tiny | 32 x 50 |" in out and "S, tiny" not in out


@torch.no_grad()
def test_wrong_numbers_are_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = DepthwiseConv2d.forward

    def wrong(self: DepthwiseConv2d, input: Tensor) -> Tensor:
        return 2 * right(self, input)

    monkeypatch.setattr(DepthwiseConv2d, "forward", wrong)
    with pytest.raises(SystemExit, match=r"S, tiny is off by .* nothing is reported"):
        list(bench.rows(bench.CONFIGURATIONS, None, "cpu", 1))
