"""Composed scenes: what the masks hold, which items appear where, and that a scene never changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.data.scenes import MEAN, STD, FashionScenes
from mixerzoo.vision.data.splits import IGNORE_INDEX
from mixerzoo.vision.training.config import AugmentConfig


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


def test_a_scene_is_the_same_in_any_batch_and_at_any_count() -> None:
    whole, masks = _scenes().render([0, 1, 2, 3])
    [one], [mask] = _scenes(count=4000).render([2])
    assert torch.equal(mask, masks[2])
    torch.testing.assert_close(one, whole[2], rtol=0, atol=1e-6)
    assert not torch.equal(_scenes(seed=5).render([2])[1][0], masks[2])
    assert not torch.equal(masks[0], masks[1])


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
    splits = scenes.load_fashion_scenes(DataConfig(scenes=8, size=32, held_out=0.25), AugmentConfig(), 0)
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
