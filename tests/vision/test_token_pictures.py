"""The pictures of tokens show what the map of assignments says, for any prefix, patch and aspect ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from mixerzoo.vision.backbones._token_reduction import TokenStage
from mixerzoo.vision.token_pictures import (
    FADED,
    GROUND,
    LONGEST,
    draw_tokens,
    example_figures,
    grid_of,
    group_sizes,
    look_for_the_middle,
    paint_groups,
    paint_kept,
    prepare_picture,
    shown_stages,
    spread_over,
    token_figure,
)
from mixerzoo.vision.visualize import main
from PIL import Image
from torch import Tensor

TINY: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "depth": 4}


@pytest.mark.parametrize(
    ("patches", "size", "grid"),
    [
        (196, (224, 224), (14, 14)),
        (294, (224, 336), (14, 21)),
        (294, (336, 224), (21, 14)),
        (210, (225, 224), (15, 14)),  # padded to whole patches
        (7, (16, 112), (1, 7)),
    ],
)
def test_the_grid_follows_from_the_number_of_patches(
    patches: int, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert grid_of(patches, *size) == grid


def test_values_stand_on_their_patches() -> None:
    spread = spread_over(torch.zeros(3, 8, 12), torch.arange(6))
    assert spread.shape == (8, 12)
    for index in range(6):
        row, column = divmod(index, 3)
        assert (spread[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] == index).all()


def test_dropped_patches_fade_and_kept_ones_do_not_change() -> None:
    picture = torch.rand(3, 8, 8)
    painted = paint_kept(picture, torch.tensor([5, -1, -1, 2]))
    assert torch.equal(painted[:, :4, :4], picture[:, :4, :4]) and torch.equal(painted[:, 4:, 4:], picture[:, 4:, 4:])
    torch.testing.assert_close(painted[:, :4, 4:], GROUND - FADED * (GROUND - picture[:, :4, 4:]))
    white = torch.ones(3, 8, 8)
    assert (white - paint_kept(white, torch.tensor([5, -1, -1, 2])))[:, :4, 4:].min() > 0.1, "seen on white, too"


def test_groups_have_their_mean_colour_and_an_outline_of_one_pixel() -> None:
    picture = 0.5 + torch.rand(3, 8, 12) / 2
    places = torch.tensor([7, 7, 2, 7, -1, 2])  # [2, 3] patches of 4 x 4 pixels
    painted = paint_groups(picture, places)
    of_seven = torch.zeros(8, 12, dtype=torch.bool)
    of_seven[:4, :8] = of_seven[4:, :4] = True
    mean = picture[:, of_seven].mean(1)
    torch.testing.assert_close(painted[:, 1, 1], mean)
    torch.testing.assert_close(painted[:, 2, 4], mean, msg="no line between patches of one token")
    torch.testing.assert_close(painted[:, 6, 2], mean)
    assert (painted[:, 1, 8] < picture[:, :, 8:].mean((1, 2)) - 0.1).all(), "a dark line where the next group begins"
    torch.testing.assert_close(painted[:, 1, 9], picture[:, :, 8:].mean((1, 2)))
    torch.testing.assert_close(painted[:, 6, 6], GROUND - FADED * (GROUND - picture[:, 6, 6]), msg="dropped")


def test_group_sizes() -> None:
    assert group_sizes(torch.tensor([3, -1, 3, 0, 3, -1])).tolist() == [3, 0, 3, 1, 3, 0]


def _stages(*maps: list[int]) -> list[TokenStage]:
    return [TokenStage(block, torch.tensor([places]), None) for block, places in enumerate(maps)]


def test_only_stages_that_change_something_are_shown() -> None:
    same, fewer = [0, 1, 2, 3], [0, 1, -1, 2]
    assert [stage.block for stage in shown_stages(_stages(same, fewer, fewer, [0, 1, -1, -1]))] == [1, 3]
    assert not shown_stages(_stages(same, same))
    many = _stages(*([0, *([-1] * n), *([1] * (13 - n))] for n in range(1, 13)))
    assert [stage.block for stage in shown_stages(many)] == [2, 5, 8, 11]


def _texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_titles_count_what_is_drawn() -> None:
    """Two pictures of different shapes; a prefix of two; one method merges, the other drops."""
    merged = _stages([0, 1, 2, 3, 4, 4], [0, 1, 2, 2, 3, 3])
    pruned = _stages([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, -1, 3, 2, -1, -1, 4])
    figure = draw_tokens([torch.rand(3, 8, 8), torch.rand(3, 16, 24)], [merged, pruned], "two", prefix=2)
    text = _texts(figure)
    assert "after blocks[0]: 4 patches in 3 tokens" in text and "after blocks[1]: 4 patches in 2 tokens" in text
    assert "after blocks[1]: 3 of 6 patches" in text and "blocks[0]: 6 of 6" not in text
    maps = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    assert (maps["patches that share a token at the end"] == 2).all()
    left: Any = maps["blocks that keep a patch"]
    assert left[::8, ::8].tolist() == [[1, 2, 2], [1, 1, 2]]


def test_a_picture_is_what_the_model_sees(tmp_path: Path) -> None:
    Image.new("RGB", (100, 61), (255, 0, 51)).save(tmp_path / "a.png")
    model: Any = timm.create_model("tome_deit_tiny_patch16_224", **TINY).eval()
    picture, x = prepare_picture(model, tmp_path / "a.png", 64)
    assert picture.shape == (3, 64, 112) and x.shape == (1, 3, 64, 112), "whole patches, the aspect ratio kept"
    assert picture[:, 5, 5].tolist() == pytest.approx([1.0, 0.0, 0.2], abs=1e-6)
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    torch.testing.assert_close(x[0, :, 5, 5], (torch.tensor([1.0, 0.0, 0.2]) - mean) / std)
    grey: Any = timm.create_model("tome_deit_tiny_patch16_224", in_chans=1, **TINY)
    picture, x = prepare_picture(grey, "flower.jpg", 32)
    assert picture.shape == (3, 32, 48) and x.shape == (1, 1, 32, 48)


def test_pictures_are_upright_and_not_clipped(tmp_path: Path) -> None:
    """As everywhere in the library: by their orientation tag, and of 16 bits as of 8."""
    model: Any = timm.create_model("tome_deit_tiny_patch16_224", **TINY).eval()
    lying = Image.new("RGB", (96, 64))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif)
    assert prepare_picture(model, tmp_path / "lying.jpg", 64)[0].shape == (3, 96, 64)
    Image.new("I;16", (64, 64), 0x8000).save(tmp_path / "deep.png")
    assert prepare_picture(model, tmp_path / "deep.png", 64)[0].mean() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match=r"notes\.jpg"):
        (tmp_path / "notes.jpg").write_text("no picture")
        prepare_picture(model, tmp_path / "notes.jpg", 64)


@pytest.mark.parametrize("size", [(700, 33), (12, 900)])
def test_long_pictures_are_scaled_down(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "long.png")
    model: Any = timm.create_model("tome_deit_tiny_patch16_224", **TINY).eval()
    shape = prepare_picture(model, tmp_path / "long.png", 64)[0].shape[1:]
    assert max(shape) == LONGEST * 64 and min(shape) == 16


def test_models_of_one_size_or_of_other_channels(tmp_path: Path) -> None:
    fixed: Any = timm.create_model("tome_deit_tiny_patch16_224", img_size=48, dynamic_img_size=False, **TINY)
    assert prepare_picture(fixed, "china.jpg", 224)[0].shape == (3, 48, 48)
    four: Any = timm.create_model("tome_deit_tiny_patch16_224", in_chans=4, **TINY)
    with pytest.raises(ValueError, match="in_chans=4"):
        prepare_picture(four, "china.jpg", 32)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tome_deit_small_distilled_patch16_224", {"r": 4}),  # two prefix tokens
        ("tome_mae_vit_huge_patch14_224", {"r": 4}),  # another patch size
        ("evit_deit_small_patch16_224", {"keep_rate": (0.8, 0.5), "locations": (1, 2)}),
    ],
)
def test_models_draw_their_tokens(name: str, settings: dict[str, Any]) -> None:
    model = timm.create_model(name, **TINY, **settings)
    figure = token_figure(model, name, ["china.jpg", "flower.jpg"], weights="random weights", side=70)
    text = _texts(figure)
    assert name in text and "random weights" in text and str(model.method) in text
    assert "patches in" in text if name.startswith("tome") else "of 28 patches" in text


def test_what_cannot_be_drawn_is_refused() -> None:
    def draw(model: Any, name: str) -> Figure:
        return token_figure(model, name, ["china.jpg"], weights="", side=32)

    with pytest.raises(ValueError, match=r"test_vit tells nothing of its tokens\. Take a model that reduces them"):
        draw(timm.create_model("test_vit"), "test_vit")
    with pytest.raises(ValueError, match="with these settings tome neither merges nor drops a token"):
        draw(timm.create_model("tome_deit_tiny_patch16_224", r=0, **TINY), "tome")


@pytest.mark.parametrize("name", ["dynamicvit_convnext_tiny", "dynamicvit_swin_tiny"])
def test_pyramids_draw_which_positions_get_the_mlp(name: str) -> None:
    kwargs: dict[str, Any] = {"depths": (1, 1, 4, 1), "locations": (1, 2, 3), "keep_rate": 0.9}
    kwargs |= {"dims": (8, 16, 32, 64)} if "convnext" in name else {"embed_dim": 24, "num_heads": (1, 1, 2, 2)}
    model: Any = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        stages = model.trace_tokens(torch.randn(2, 3, 224, 224))
    assert [stage.block for stage in stages] == [1, 2, 3]
    assert [(stage.assign >= 0).sum(1).tolist() for stage in stages] == [[176] * 2, [137] * 2, [98] * 2]
    text = _texts(token_figure(model, name, ["flower.jpg"], weights="random weights", side=64))
    assert "stages[2].blocks[1]: 21 of 24 positions get the MLP" in text
    assert "decisions that give a position the MLP" in text and "keep a patch" not in text


@torch.no_grad()
def test_the_example_keeps_what_looks_like_the_middle() -> None:
    """A picture of one colour with a square of another: in all stages the square stays, and the rest goes first."""
    torch.manual_seed(0)
    model: Any = timm.create_model("evit_deit_small_patch16_224").eval()
    x = torch.zeros(1, 3, 160, 160)
    x += torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1)
    x[..., 48:112, 48:112] = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)
    look_for_the_middle(model, x)
    for stage in model.trace_tokens(x):
        kept: Tensor = stage.assign[0, 1:].view(10, 10) >= 0
        assert kept[3:7, 3:7].all()
    assert kept.sum() < 40


def test_the_examples_say_what_their_weights_are() -> None:
    figures = example_figures(side=64)
    assert set(figures) == {"token_merging", "token_pruning"}
    assert "random weights" in _texts(figures["token_merging"])
    assert "the class token is the mean of the patches in the middle" in _texts(figures["token_pruning"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    name, to = "evit_deit_small_patch16_224", ["--output", str(tmp_path / "new"), "--input-size", "48"]
    tiny = ["--model-kwargs", *(f"{key}={value}" for key, value in TINY.items()), "keep_rate=0.5"]
    assert main(["tokens", name, str(tmp_path / "picture.png"), *to, *tiny]) == 0
    assert (tmp_path / "new" / f"tokens_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main(["tokens", name, *to, *tiny, "--folder", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["tokens", name, str(tmp_path / "none.png"), *to, *tiny]) == 2
    assert "none.png" in capsys.readouterr().err
    assert main(["tokens", name, *to, "--checkpoint", "other=file.pth"]) == 2
    assert f"MODEL=FILE with one of {name}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["hilo", name, *to])
    assert "choose from" in capsys.readouterr().err
