"""The pictures show what the operator does: the numbers behind them are checked, and the files are drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from mixerzoo.vision import visualize
from mixerzoo.vision.visualize import ReceptiveField, attention_rows, main, receptive_fields, side_of_share
from torch import nn


def test_rows_are_attention_weights() -> None:
    rows = attention_rows((9, 7), 3)
    torch.testing.assert_close(rows.sum(1), torch.ones(63))
    seen = (rows[4 * 7 + 3] > 0).view(9, 7)  # the query (4, 3)
    expected = torch.zeros(9, 7, dtype=torch.bool)
    expected[3:6, 2:5] = True
    assert torch.equal(seen, expected)
    corner = (rows[0] > 0).view(9, 7)
    assert corner[:3, :3].all() and corner.sum() == 9


def test_line_with_dilation_and_causality() -> None:
    (row,) = (attention_rows((12,), 3, dilation=2)[6] > 0).nonzero(as_tuple=True)
    assert row.tolist() == [4, 6, 8]
    causal = attention_rows((8,), 3, is_causal=True) > 0
    assert torch.equal(causal, causal.tril()) and causal.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


class _Blur(nn.Module):
    """A model whose receptive field is known: one 3 x 3 mean, then another."""

    def forward_intermediates(self, images: torch.Tensor, intermediates_only: bool) -> list[torch.Tensor]:
        weight = torch.full((1, 1, 3, 3), 1 / 9)
        first = nn.functional.conv2d(images, weight, padding=1)
        return [first, nn.functional.conv2d(first, weight, padding=1)]


def test_receptive_field_of_a_known_model() -> None:
    first, second = receptive_fields(_Blur(), torch.randn(2, 1, 11, 11))
    expected = torch.zeros(11, 11)
    expected[4:7, 4:7] = 1 / 9
    torch.testing.assert_close(first.gradient, expected)
    assert first.centre == second.centre == (5.5, 5.5) and first.map_size == (11, 11)
    assert [side_of_share(field, 1.0 - 1e-6) for field in (first, second)] == [3, 5]
    assert (second.gradient > 0).sum() == 25


def test_side_of_share_counts_mass_not_pixels() -> None:
    gradient = torch.full((9, 9), 0.001)
    gradient[4, 4] = 1.0
    assert side_of_share(ReceptiveField(gradient, (9, 9)), 0.9) == 1


def test_a_dilated_model_looks_further() -> None:
    arguments = dict(depths=(2,), embed_dim=16, num_heads=(1,), stem_stride=2)
    near = timm.create_model("nat_mini", **arguments)
    far = timm.create_model("nat_mini", **arguments, dilations=((1, 3),))
    far.load_state_dict(near.state_dict())
    images = torch.randn(1, 3, 64, 64)
    reach = [int((receptive_fields(model.eval(), images)[0].gradient > 0).any(0).sum()) for model in (near, far)]
    assert reach[1] > reach[0] + 15


def test_all_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(visualize, "load_model", lambda name, **_: timm.create_model("test_convnext").eval())
    assert main(["--output", str(tmp_path / "new"), "--models", "a", "b", "--images", "1", "--input-size", "64"]) == 0
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["neighborhood_attention_1d.png", "neighborhood_attention_2d.png", "receptive_fields.png"]
    assert capsys.readouterr().out.count("wrote") == 3
    for name in names:
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_of_the_gallery_are_in_the_repository(repository: Path) -> None:
    gallery = (repository / "docs" / "gallery.md").read_text()
    shown = set(re.findall(r"\(pictures/(\w+\.png)\)", gallery))
    pictures = {picture.name: picture.stat().st_size for picture in (repository / "docs" / "pictures").glob("*.png")}
    assert shown and shown <= set(pictures)
    assert max(pictures.values()) < 200_000, pictures


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "no_such_model", "--output", str(tmp_path)]) == 2
    assert "no model is called" in capsys.readouterr().err
    assert main(["--checkpoint", "best.ckpt", "--output", str(tmp_path)]) == 2
    assert "MODEL=FILE" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
