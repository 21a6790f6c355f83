"""The benchmark of keep rates: what it counts as alike, its table, and a dry run of all the training it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mixerzoo.vision.backbones import reduce_tokens
from mixerzoo.vision.summary import summarize
from mixerzoo.vision.training import results as results_module

SHAPE = (1, 28, 28)


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("bench_keep_rate")


@pytest.fixture
def dense() -> Any:
    kwargs = {"img_size": 28, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "in_chans": 1}
    return timm.create_model("deit_small_patch16_224", **kwargs).eval()


def test_tome_gets_the_multiply_adds_of_the_other_model(bench: Any, dense: Any) -> None:
    fewer = reduce_tokens(dense, "tome", r=4)
    macs = summarize(fewer, SHAPE).macs
    assert summarize(bench.merge_like(dense, fewer, SHAPE), SHAPE).macs == macs < summarize(dense, SHAPE).macs
    half = reduce_tokens(dense, "evit", keep_rate=0.5)
    alike = summarize(bench.merge_like(dense, half, SHAPE), SHAPE).macs / summarize(half, SHAPE).macs
    assert alike == pytest.approx(1, abs=0.06)


def test_a_model_that_answers_otherwise_with_all_tokens_is_refused(bench: Any, dense: Any) -> None:
    reduced = reduce_tokens(dense, "evit", keep_rate=1.0)
    bench.require_same(dense, reduced, SHAPE)
    with pytest.raises(SystemExit, match=r"with all tokens the answers differ by .*: no report"):
        bench.require_same(dense, reduce_tokens(dense, "evit", keep_rate=0.5), SHAPE)


def test_the_table_and_the_picture(bench: Any, tmp_path: Path) -> None:
    points = [
        bench.Point("dense", 1.0, 20_000_000, 0.9, 1000.0),
        bench.Point("EViT", 1.0, 20_000_000, 0.91, 990.0),
        bench.Point("EViT", 0.5, 10_000_000, 0.89, 1800.0),
        bench.Point("ToMe", 0.5, 10_400_000, 0.85, 1500.0),
        bench.Point("DynamicViT", 0.5, 10_100_000, 0.88, 1900.0),
    ]
    assert list(bench.write_table(points))[2:] == [
        "| 1 | dense | 20.0 | 90.00 | 1000 | 1.00 |",
        "| 1 | dense, trained on | 20.0 | 91.00 | 990 | 0.99 |",
        "| 0.5 | ToMe | 10.4 | 85.00 | 1500 | 1.50 |",
        "| 0.5 | EViT | 10.0 | 89.00 | 1800 | 1.80 |",
        "| 0.5 | DynamicViT | 10.1 | 88.00 | 1900 | 1.90 |",
    ]
    bench.draw(points, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_dry_run_trains_every_method(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results_module, "_draw_batch", lambda *_: None)
    monkeypatch.setattr(results_module, "_draw_results", lambda *_: None)
    files = ["--markdown", str(tmp_path / "x.md"), "--picture", str(tmp_path / "x.png")]
    monkeypatch.setattr(
        sys, "argv", ["x", "--quick", "--rates", "0.5", "--threads", "1", "--runs", str(tmp_path), *files]
    )
    assert bench.main() == 0
    rows = [line for line in (tmp_path / "x.md").read_text().splitlines() if line.startswith(("| 0.5", "| 1 "))]
    assert [row.split(" | ")[1] for row in rows] == ["dense", "dense, trained on", "ToMe", "EViT", "DynamicViT"]
    macs = [float(row.split(" | ")[2]) for row in rows]
    assert macs[0] == macs[1] > 1.5 * max(macs[2:])
    start, tuned = (
        torch.load(tmp_path / name / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
        for name in ("dense", "dynamicvit_0.5")
    )
    assert torch.equal(start["model.pos_embed"], tuned["model.pos_embed"])
    assert not torch.equal(start["model.head.weight"], tuned["model.head.weight"])
    assert (tmp_path / "x.png").exists()
