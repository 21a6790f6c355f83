"""The benchmark of families on composed scenes: its rows, what is kept of them, its table and its place in a page."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.training import results as results_module


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("bench_scenes")


@pytest.fixture
def tiny(bench: Any, tmp_path: Path) -> Any:
    smaller = "model.kwargs={embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}"
    return bench.Job("nat_mini", tmp_path / "nat_mini", (*bench.QUICK, "data.download=false", smaller))


def row(bench: Any, model: str, mean_iou: float) -> Any:
    return bench.Row(model, mean_iou, 1_230_000, 0.0451, 2.34, 101.4, 3, 4, "2026-11-21")


def test_the_table_stands_in_the_page_best_first(bench: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    start, end = bench.START.format("x"), bench.END
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    rows = [row(bench, "van_b0", 0.301), row(bench, "nat_mini", 0.42)]
    config = bench.Job("nat_mini", tmp_path, ()).config()
    bench.insert(page, "x", list(bench.describe(rows, ["litv2_s"], config, "the command")))
    lines = page.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("before", start, end, "after") and "old" not in lines
    assert lines[2].startswith("`the command`: 2 models, 5 minutes of the processor")
    assert lines[-6:-2] == [
        "| NAT | `nat_mini` | 42.0 | 1.23 | 0.045 | 2.3 | 101 |",
        "| VAN | `van_b0` | 30.1 | 1.23 | 0.045 | 2.3 | 101 |",
        "",
        "Not trained: LITv2.",
    ]
    page.write_text("nothing")
    with pytest.raises(SystemExit, match=r"page\.md has no lines <!-- scenes: x --> and .* to write the table between"):
        bench.insert(page, "x", [])


def test_a_row_is_kept_until_its_settings_change(bench: Any, tiny: Any) -> None:
    assert bench.finished(tiny) is None
    tiny.folder.mkdir()
    kept = {"row": row(bench, "nat_mini", 0.4)._asdict(), "settings": bench.settings_of(tiny.config())}
    del kept["settings"]["train.epochs"]  # as if that key were new
    (tiny.folder / bench.ROW).write_text(json.dumps(kept))
    assert bench.finished(tiny) == row(bench, "nat_mini", 0.4)
    assert bench.finished(tiny._replace(settings=(*tiny.settings, "optim.lr=0.5"))) is None


def test_one_that_fails_is_told_and_the_rest_go_on(
    bench: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(job: Any) -> Any:
        if job.model == "van_b0":
            raise ValueError("no such thing")
        return row(bench, job.model, 0.5)

    monkeypatch.setattr(bench, "make", make)
    jobs = [tiny._replace(model=name) for name in ("van_b0", "nat_mini")]
    assert bench.make_all(jobs, 1) == [row(bench, "nat_mini", 0.5)]
    assert "van_b0: ValueError: no such thing" in capsys.readouterr().out


@pytest.mark.slow
def test_every_model_of_the_recipe_can_be_built(bench: Any) -> None:
    """On tensors without storage. The table has a row for all that the recipe has settings for."""
    recipe = yaml.safe_load((bench.CONFIGS / "recipes" / "segmentation.yaml").read_text())
    parts = {recipe["model"]["name"]: recipe, **recipe["variants"]}
    for pattern in parts:
        assert fnmatch.filter(bench.FAMILIES, pattern), f"no row is made with the settings of {pattern}"
    for name in bench.FAMILIES:
        own = [part for pattern, part in parts.items() if fnmatch.fnmatchcase(name, pattern)]
        kwargs = {key: value for part in own for key, value in part["model"]["kwargs"].items()}
        head = {key: value for part in (recipe, *own) for key, value in part.get("head", {}).items()}
        with torch.device("meta"):
            model = build_segmenter(name, 11, head=head, **kwargs)
        parameters = sum(p.numel() for p in model.parameters())
        assert 0.5e6 < parameters < 3e6, (name, parameters)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_dry_run_trains_and_goes_on(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_module, "_draw_batch", lambda *_: None)
    monkeypatch.setattr(results_module, "_draw_results", lambda *_: None)
    page, picture = tmp_path / "page.md", tmp_path / "scenes.png"
    page.write_text(f"{bench.START.format('python benchmarks/bench_scenes.py')}\n{bench.END}\n")
    arguments = ["x", "--quick", "--out", str(tmp_path / "runs"), "--only", "nat_mini", "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--picture", str(picture), "data.download=false"])
    assert bench.main() == 0
    assert picture.read_bytes()[:4] == b"\x89PNG" and "| NAT | `nat_mini` |" in page.read_text()
    first = page.read_text()
    monkeypatch.setattr(bench, "run", lambda _: pytest.fail("the row is there"))
    assert bench.main() == 0 and page.read_text() == first
    sys.argv.append("--table")
    assert bench.main() == 0 and page.read_text() == first
