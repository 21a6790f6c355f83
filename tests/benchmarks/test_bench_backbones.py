"""The plain networks that the benchmark measures ours against: the same logits, really in their format, and refused
when they differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import bench_backbones

    return bench_backbones


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


@pytest.mark.parametrize("name", ["van_b0", "unireplknet_a"])
@torch.no_grad()
def test_plain_networks_keep_their_format_and_use_no_operator_of_ours(bench, name: str) -> None:
    formats = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 4 and min(output.shape[1:]) > 1:
            formats.append((output.is_contiguous(), output.is_contiguous(memory_format=torch.channels_last)))

    for layout in bench.PLAIN:
        formats.clear()
        model, x = bench.build(bench.Case(name, layout, 64, 2, "eager"))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        with bench.plain(layout), torch.profiler.profile() as profile:
            model(x)
        wanted = (True, False) if layout == "plain, NCHW" else (False, True)
        assert len(formats) > 5 and formats.count(wanted) > 0.9 * len(formats), layout
        assert not [event.name for event in profile.events() if "mixerzoo" in event.name]


def test_a_wrong_model_is_refused(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "conv_chain", lambda x, *weights: x)
    with pytest.raises(SystemExit, match=r"van_b0 .* is wrong: its logits are off by .* nothing is reported"):
        bench.prepare(bench.Case("van_b0", "ours", 64, 1, "eager"))
