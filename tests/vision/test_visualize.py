"""The pictures show what the operator does: the numbers behind them are checked, and the files are drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from mixerzoo.vision import visualize
from mixerzoo.vision.receptive_field import ReceptiveField
from mixerzoo.vision.visualize import SUBJECTS, Setting, attention_rows, main, parser
from PIL import Image


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


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model is asked for, a small one comes."""
    monkeypatch.setattr(visualize, "load_model", lambda name, **_: timm.create_model("test_convnext").eval())


@pytest.mark.slow
def test_all_pictures_are_drawn(
    tmp_path: Path, repository: Path, small_models: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "new"), "--models", "a", "b", "--images", "1", "--input-size", "64"]) == 0
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    gallery = (repository / "docs" / "gallery.md").read_text()
    measured = {"resolution.png"}  # bench_resolution.py draws it: it takes minutes and a quiet machine
    assert set(names) == set(re.findall(r"\(pictures/(\w+\.png)\)", gallery)) - measured
    assert capsys.readouterr().out.count("wrote") == len(names)
    for name in names:
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


def _texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


def _setting(**given: Any) -> Setting:
    empty = dict(models=["a", "b"], checkpoints=[], pretrained=False, images=1, input_size=64, folder=None)
    return Setting(**(empty | given))


def test_a_picture_says_where_its_weights_come_from(small_models: None) -> None:
    (untrained,) = SUBJECTS["effective_receptive_fields"](_setting()).values()
    assert "random weights" in _texts(untrained) and "branches at full strength" in _texts(untrained)
    assert "trained weights" not in _texts(untrained)
    (mixed,) = SUBJECTS["effective_receptive_fields"](_setting(checkpoints=["b=file.pth"])).values()
    assert "random weights" in _texts(mixed) and "trained weights" in _texts(mixed)
    (trained,) = SUBJECTS["effective_receptive_fields"](_setting(pretrained=True)).values()
    assert "random" not in _texts(trained) and "1 image of noise, 64 x 64" in _texts(trained)
    (stages,) = SUBJECTS["receptive_fields"](_setting(pretrained=True)).values()
    assert "random" not in _texts(stages)


def test_shares_under_a_field_are_those_of_the_gradient(small_models: None) -> None:
    """A gradient that is alike everywhere: a share of it needs that share of the image, in whole rings of pixels."""
    flat = ReceptiveField(torch.ones(100, 100), (4, 4))
    figure = visualize.draw_effective_receptive_fields({"known": {"flat": flat}}, subtitle="")
    assert "20 % in 21 % · 30 % in 31 %\n50 % in 52 % · 99 % in 100 %" in _texts(figure)


def test_images_of_a_folder_are_prepared_as_the_model_wants_them(tmp_path: Path) -> None:
    for index, shade in enumerate((0, 255)):
        Image.new("RGB", (80, 60), (shade,) * 3).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    model = timm.create_model("test_convnext")
    images = visualize.read_images(tmp_path, model, count=2, side=32)
    assert images.shape == (2, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(images, torch.stack([(shade - mean) / std for shade in (0, 1)]).expand_as(images))
    grey = timm.create_model("test_convnext", in_chans=1, pretrained_cfg_overlay=dict(mean=(0.5,), std=(0.5,)))
    assert visualize.read_images(tmp_path, grey, count=2, side=32)[:, :, 0, 0].tolist() == [[-1.0], [1.0]]
    with pytest.raises(ValueError, match=r"has 2 images; 3 were asked for \(--images\)"):
        visualize.read_images(tmp_path, model, count=3, side=32)


@pytest.mark.parametrize(("share", "text"), [(0.00012, "0.012 %"), (0.0123, "1.2 %"), (0.123, "12 %"), (1.0, "100 %")])
def test_small_shares_keep_their_digits(share: float, text: str) -> None:
    assert visualize._percent(share) == text


def test_pictures_of_the_gallery_are_in_the_repository(repository: Path) -> None:
    gallery = (repository / "docs" / "gallery.md").read_text()
    shown = set(re.findall(r"\(pictures/(\w+\.png)\)", gallery))
    pictures = {picture.name: picture.stat().st_size for picture in (repository / "docs" / "pictures").glob("*.png")}
    assert shown and shown <= set(pictures)
    assert max(pictures.values()) < 200_000, pictures


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receptive_fields", "--models", "no_such_model", "--output", str(tmp_path)]) == 2
    assert "no model is called" in capsys.readouterr().err
    assert main(["receptive_fields", "--checkpoint", "best.ckpt", "--output", str(tmp_path)]) == 2
    assert "MODEL=FILE" in capsys.readouterr().err
    assert main(["receptive_fields", "--images", "0", "--output", str(tmp_path)]) == 2
    assert "at least one is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["neighbourhoods"])
    assert not list(tmp_path.iterdir())


def test_words_of_yaml_are_read_as_train_reads_them() -> None:
    words = ["fuse_token=false", "prop_attn=True", "keep_rate=0.5", "locations=null", "act_layer=relu"]
    read = parser().parse_args(["tokens", "--model-kwargs", *words]).model_kwargs
    wanted = {"fuse_token": False, "prop_attn": True, "keep_rate": 0.5, "locations": None, "act_layer": "relu"}
    assert read == wanted
