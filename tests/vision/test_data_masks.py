"""A folder of pictures and masks: which files belong together, what labels become, and that both are moved alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.data.mask_files import Labels, read_mask
from mixerzoo.vision.data.module import SOURCES, ZooData
from mixerzoo.vision.data.pictures import DataError
from mixerzoo.vision.data.splits import IGNORE_INDEX, Splits
from mixerzoo.vision.training.config import AugmentConfig, DataConfig
from PIL import Image

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a picture whose red channel is 40 times its mask, so that a transform that moves one alone shows."""

    def write(name: str, mask: np.ndarray, *, split: str = "training", masks: str = "annotations") -> Path:
        for folder, suffix, pixels in (
            ("images", "png", np.stack([40 * mask, mask * 0, mask * 0], -1).astype(np.uint8)),
            (masks, "png", mask.astype(np.uint8)),
        ):
            path = tmp_path / folder / split / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        return tmp_path

    return write


def _mask(height: int = 40, width: int = 60) -> np.ndarray:
    """Four blocks: 0 and 1 above, 2 and 3 below."""
    rows, columns = np.arange(height)[:, None] >= height // 2, np.arange(width)[None] >= width // 2
    return 2 * rows + columns


def _load(root: Path | None, **settings: object) -> Splits:
    config = DataConfig(**{"root": None if root is None else str(root), "size": 32, "classes": 4, **settings})
    return SOURCES["mask_folder"](config, AugmentConfig(), 0)


def _red(splits: Splits, images: torch.Tensor) -> torch.Tensor:
    return (images[:, 0] * splits.std[0] + splits.mean[0]) * 255


def test_pictures_and_masks_are_moved_alike(save: Save) -> None:
    for split in ("training", "validation"):
        root = save("one", _mask(), split=split)
    splits = _load(root)
    assert splits.dense and splits.classes == ("0", "1", "2", "3") and splits.test is splits.val
    seen = set()
    for seed in range(12):
        images, masks = splits.train.__getitems__(Request([0], seed))
        assert images.shape == (1, 3, 32, 32) and masks.shape == (1, 32, 32) and masks.dtype == torch.int64
        inside = masks != IGNORE_INDEX
        close = (_red(splits, images) - 40 * masks).abs() < 15
        assert close[inside].float().mean() > 0.8, seed  # all but the blurred edges of the blocks
        seen.add((bool(inside.all()), tuple(masks[inside].unique().tolist())))
        again = splits.train.__getitems__(Request([0], seed))
        assert torch.equal(again[0], images) and torch.equal(again[1], masks)
    assert len(seen) > 2 and {padded for padded, _ in seen} == {True, False}


class _Rank:
    """What a data module asks of its trainer."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = rank, world_size
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_pictures_are_judged_whole_one_by_one_and_each_once(save: Save, world_size: int) -> None:
    masks = {str(index): _mask(20 + index, 50 - 3 * index) for index in range(5)}
    save("one", _mask())
    for name, mask in masks.items():
        root = save(name, mask, split="validation")
    splits = _load(root)
    assert splits.whole
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    lengths = set()
    for rank in range(world_size):
        data = ZooData(splits, batch_size=4)
        data.trainer = _Rank(rank, world_size)  # type: ignore[assignment]
        batches = list(data.test_dataloader())
        lengths.add(len(batches))
        assert all(len(images) == len(masks) <= 1 and images.shape[1] == 3 for images, masks in batches)
        seen += [(images[0], mask[0]) for images, mask in batches if len(images)]
    assert len(lengths) == 1 and sorted(mask.shape[0] for _, mask in seen) == [20, 21, 22, 23, 24]
    for image, mask in seen:
        assert torch.equal(mask, torch.from_numpy(masks[str(mask.shape[0] - 20)]))
        torch.testing.assert_close(_red(splits, image[None])[0], 40.0 * mask, rtol=0, atol=1e-3)


def test_label_zero_may_mean_nothing(save: Save) -> None:
    save("one", _mask(), split="train", masks="masks")
    mask = _mask()
    mask[0, 0] = IGNORE_INDEX
    splits = _load(save("two", mask, split="val", masks="masks"), ignore_zero=True, classes=3)
    _, masks = splits.val.__getitems__(Request([0], 0))
    assert masks.unique().tolist() == [0, 1, 2, IGNORE_INDEX]
    assert (masks[0, :20, :10] == IGNORE_INDEX).all() and (masks[0, 25:, 35:] == 2).all()


def test_pictures_are_held_out_where_no_folder_is(save: Save) -> None:
    for index in range(8):
        root = save(f"picture{index}", _mask())
    splits = _load(root, held_out=0.25, limit=5)
    assert (len(splits.train), len(splits.val)) == (5, 2)
    train, val = ({pair[0].name for pair in part.dataset.pairs} for part in (splits.train, splits.val))
    assert not train & val


def test_names_of_classes_come_from_a_file(save: Save) -> None:
    root = save("one", _mask())
    save("two", _mask())
    (root / "classes.txt").write_text("wall\nfloor\nsky\ntree\n")
    assert _load(root, classes=None).classes == ("wall", "floor", "sky", "tree")
    with pytest.raises(ValueError, match=r"data.classes=3, but .* names 4"):
        _load(root, classes=3)


@pytest.mark.parametrize("name", ["classes.txt", "objectInfo150.txt"])
def test_names_that_are_not_in_utf8_are_an_error_with_the_file(name: str, save: Save) -> None:
    root = save("one", _mask())
    save("two", _mask())
    lines = "Name\nmur\nplanch\u00e9\nciel\n"
    (root / name).write_text(lines, encoding="utf-8-sig")  # as an editor of Windows does
    assert _load(root, classes=None, ignore_zero=True).classes[-2:] == ("planch\u00e9", "ciel")
    (root / name).write_text(lines, encoding="latin-1")
    with pytest.raises(DataError, match=rf"{name} is not in UTF-8 \(.* at byte 15\); save it in UTF-8"):
        _load(root, classes=None, ignore_zero=True)


def test_whole_numbers_of_a_float_mask_are_labels_and_others_are_refused(tmp_path: Path) -> None:
    labels = Labels(("a", "b"), {0: 0, 1: 1, 255: IGNORE_INDEX}, "there are 2 classes")
    values = np.array([[0, 1, 255]], np.float32)
    Image.fromarray(values).save(tmp_path / "mask.tif")
    assert read_mask(tmp_path / "mask.tif", labels).tolist() == [[0, 1, 255]]
    Image.fromarray(np.array([[0.5, 1, np.nan, np.inf]], np.float32)).save(tmp_path / "mask.tif")
    with pytest.raises(DataError, match=r"mask\.tif holds labels 0\.5, inf, nan, but there are 2 classes"):
        read_mask(tmp_path / "mask.tif", labels)


def test_ade20k_brings_its_names(save: Save) -> None:
    root = save("one", _mask())
    save("two", _mask())
    rows = ["1\t0.1\t5\t5\t1\twall", "2\t0.1\t5\t5\t1\tbuilding, edifice", "3\t0.1\t5\t5\t0\tbed "]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows, ""]))
    assert _load(root, classes=3, ignore_zero=True).classes == ("wall", "building", "bed")
    with pytest.raises(ValueError, match=r"data.classes=4, but .*objectInfo150\.txt names 3"):
        _load(root, classes=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": None}, r"data.classes is not set, and there is no .*classes.txt"),
        ({"root": None}, r"data.root=None: there is no such folder"),
        ({"classes": 300}, r"counted from 0 can hold 2 to 255 classes, .* got 300; correct data\.classes or .*classes"),
        ({"classes": 255, "ignore_zero": True}, "counted from 1 can hold 2 to 254 classes, as 255 is none; got 255"),
    ],
)
def test_unusable_settings_are_named(settings: dict, message: str, save: Save) -> None:
    root = save("one", _mask())
    with pytest.raises(ValueError, match=message):
        _load(**{"root": root, **settings})


def test_unusable_files_are_named(save: Save, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"needs a folder training \(or train\)"):
        _load(tmp_path)
    root = save("one", _mask())
    save("two", _mask())
    (root / "annotations" / "training" / "two.png").unlink()
    with pytest.raises(ValueError, match=r"two.png has no mask; it was expected at .*annotations"):
        _load(root)
