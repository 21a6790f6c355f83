"""The plain networks that the benchmark measures ours against: the same logits, really in their format, refused when
they differ; and the speedups that a run must show."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.kernels import conv_mlp
from torch import Tensor, nn


@pytest.fixture
def bench(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("bench_backbones")


@pytest.mark.parametrize("name", ["nat_mini", "van_b0", "unireplknet_a", "litv2_s"])
@torch.no_grad()
def test_plain_networks_give_the_same_logits(bench, name: str) -> None:
    model, x = bench.build(bench.Case(name, "ours", 224, 1, "eager"))
    x = x[:, :, :96, :64]
    want = model(x)
    for layout in bench.PLAIN:
        with bench.plain(layout):
            got = model(x)
        assert (got - want).abs().max() < 1e-5 * want.abs().max(), layout


@pytest.mark.parametrize("name", ["van_b0", "unireplknet_a", "litv2_s"])
@torch.no_grad()
def test_plain_networks_keep_their_format_and_use_no_operator_of_ours(
    bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats, parts = [], []
    by_parts = conv_mlp._by_parts
    monkeypatch.setattr(conv_mlp, "_by_parts", lambda *inputs: parts.append(name) or by_parts(*inputs))

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 4 and min(output.shape[1:]) > 1:
            formats.append((output.is_contiguous(), output.is_contiguous(memory_format=torch.channels_last)))

    for layout in bench.PLAIN:
        formats.clear()
        model, x = bench.build(bench.Case(name, layout, 160, 2, "eager"))
        model(x)
        assert bool(parts) == (name != "unireplknet_a")
        parts.clear()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        with bench.plain(layout), torch.profiler.profile() as profile:
            model(x)
        wanted = (True, False) if layout == "plain, NCHW" else (False, True)
        assert len(formats) > 5 and formats.count(wanted) > 0.9 * len(formats), layout
        assert not parts
        assert not [event.name for event in profile.events() if "mixerzoo" in event.name]


@pytest.mark.parametrize(("name", "scans"), [("vim_tiny", 24), ("vmamba_tiny_s1l8", 14), ("vmambav0_tiny", 15)])
@torch.no_grad()
def test_the_reference_scan_takes_the_place_of_every_scan(
    bench, name: str, scans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loop = [], bench.scan_loop_2d
    monkeypatch.setattr(bench, "scan_loop_2d", lambda *given, **options: calls.append(1) or loop(*given, **options))
    model, x = bench.build(bench.Case(name, "ours", 64, 1, "eager"))
    want = model(x)
    assert not calls
    with bench.in_layout(bench.LOOP):
        got = model(x)
    assert len(calls) == scans
    torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=0)


def test_a_slow_scan_is_a_miss(bench) -> None:
    case = bench.Case("vim_tiny", "ours", 512, 1, "eager")
    for times, lines in ((10.1, 0), (9.9, 1)):
        rows = [case._asdict() | {"seconds": 1.0}, case._replace(layout=bench.LOOP)._asdict() | {"seconds": times}]
        assert len(bench.list_missed(rows)) == lines


def test_a_wrong_model_is_refused(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "lka_chain", lambda x, *weights: x)
    with pytest.raises(SystemExit, match=r"van_b0 .* is wrong: its logits are off by .* nothing is reported"):
        bench.prepare(bench.Case("van_b0", "ours", 64, 1, "eager"))


@pytest.mark.parametrize(
    ("plain_times", "missed"),
    [
        ((2.01, 1.21), []),
        ((1.99, 1.21), ["ours is 1.99 times as fast as van_b0 (plain, NCHW, eager) at 224 pixels, batch {}, not 2.0"]),
        ((2.01, 1.19), ["as van_b0 (plain, channels_last, eager) at 224 pixels, batch {}, not 1.2"]),
    ],
)
def test_a_missed_speedup_gives_status_1_after_the_tables(
    plain_times: tuple[float, float],
    missed: list[str],
    bench,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    seconds = {"ours": 1.0, **dict(zip(bench.PLAIN, plain_times, strict=True))}

    def measure(cases: list, **_: int) -> list[dict]:
        slow = {"seconds": 0.1, "bytes": 1}  # nothing is asked of other models and sizes
        own = [case.model == "van_b0" and case.size == 224 and case.mode == "eager" for case in cases]
        rows = [case._asdict() | slow | ({"seconds": 9.0} if case.layout == bench.LOOP else {}) for case in cases]
        return [
            row | {"seconds": seconds[row["layout"]]} if is_own else row for row, is_own in zip(rows, own, strict=True)
        ]

    monkeypatch.setattr(bench, "measure", measure)
    files = tmp_path / "table.md", tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["bench_backbones.py", "--markdown", f"{files[0]}", "--json", f"{files[1]}"])
    assert bench.main() == bool(missed)
    captured = capsys.readouterr()
    assert files[0].read_text() == captured.out
    assert f"| van_b0 | 224 | 1 | **1** | {1 / plain_times[0]:.3g} ({plain_times[0]:.2f}x) |" in captured.out
    assert {row["size"] for row in json.loads(files[1].read_text())["results"]} == {224, 512}
    lines = captured.err.splitlines()
    assert len(lines) == 2 * len(missed)
    for line, batch in zip(lines, (1, 8)[: len(lines)], strict=True):
        assert line.startswith("missed: ") and line.endswith(missed[0].format(batch))


def test_a_small_run_measures(bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--models", "van_b0", "--sizes", "64", "--batch", "1", "--modes", "eager", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_backbones.py", *arguments])
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.001)
    assert bench.main() == 0  # nothing is asked of this size
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| van_b0 ")]
    assert len(rows) == 2 and rows[1].startswith("| van_b0 | 64 | 1 | **")
