"""Every public mixer has its panel, and what the panel shows is what the mixer sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixerzoo import mixers
from mixerzoo.vision.mixer_fields import SIDE, TOKENS, draw_mixers, subjects
from torch import Tensor

pytest.importorskip("matplotlib")

FIELDS = {subject.name: subject for subject in subjects()}
MIDDLE = SIDE // 2


def _seen(name: str) -> Tensor:
    field = FIELDS[name].field()
    assert field.isfinite().all() and field.max() > 0
    return field > 0


def test_every_mixer_has_a_panel_and_stands_in_the_gallery(repository: Path) -> None:
    assert sorted(FIELDS) == sorted(mixers.__all__)
    page = (repository / "docs/gallery.md").read_text()
    assert [name for name in mixers.__all__ if f"`{name}`" not in page] == []
    assert "pictures/mixers.png" in page


@pytest.mark.parametrize(
    ("name", "reach", "step"),
    [
        ("NeighborhoodAttention2d", 3, 2),
        ("NeighborhoodAttention3d", 2, 1),
        ("DepthwiseConv2d", 3, 3),
        ("DilatedReparamBlock", 6, 1),
    ],
)
def test_windows_and_kernels(name: str, reach: int, step: int) -> None:
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    places = MIDDLE + step * torch.arange(-reach, reach + 1)
    expected[places[:, None], places] = True
    assert torch.equal(_seen(name), expected)


def test_bands_lines_and_bins() -> None:
    rows, columns = _seen("InceptionDWConv").nonzero().T
    assert int((rows == MIDDLE).sum()) == int((columns == MIDDLE).sum()) == 11 and len(rows) == 11 + 11 + 9 - 6
    line = _seen("NeighborhoodAttention1d")
    assert line.sum() == 7 and line[MIDDLE, MIDDLE - 3 : MIDDLE + 4].all()
    window = _seen("WindowCrossAttention")
    assert window.sum() == 100 and window.any(0).sum() == window.any(1).sum() == 10
    assert _seen("pool_to_tokens").sum() <= 9


@pytest.mark.parametrize(
    "name",
    ["HiLo", "SelectiveScan2d", "SS2D", "BidirectionalMamba", "CrossAttention", "GatherAttention", "PredictorLG"],
)
def test_what_sees_everything(name: str) -> None:
    assert _seen(name).all()


def test_what_is_nearer_on_a_path_weighs_more() -> None:
    field = FIELDS["SelectiveScan2d"].field()
    cross = torch.cat([field[MIDDLE, MIDDLE + 2 : MIDDLE + 8], field[MIDDLE + 2 : MIDDLE + 8, MIDDLE]])
    assert cross.mean() > 3 * field[-4:, -4:].mean()
    assert FIELDS["TransposedAttention"].field().shape == (TOKENS, TOKENS)


def test_figure_has_all_panels_with_their_names() -> None:
    shown = [axes for axes in draw_mixers().axes if axes.images]
    assert [axes.get_title() for axes in shown] == list(FIELDS)
    assert all(axes.get_xlabel() for axes in shown)
