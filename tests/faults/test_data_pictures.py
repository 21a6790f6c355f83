"""Unusual and damaged pictures: which are read, which are skipped in training, and which end an evaluation."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mixerzoo.vision.data.loading import EpochBatches, Request, ResumableLoader
from mixerzoo.vision.data.module import SOURCES
from mixerzoo.vision.data.pictures import DataError, UnreadableError, read_picture
from mixerzoo.vision.data.splits import Splits
from mixerzoo.vision.training import cli
from mixerzoo.vision.training.config import AugmentConfig, DataConfig
from PIL import Image


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _gradient(width: int = 48, height: int = 32) -> Image.Image:
    """Return a picture whose red increases to the right and whose green increases downwards."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns * 5, rows * 7, 0 * rows], -1).astype(np.uint8))


_JPEG = _encoded(Image.effect_noise((64, 64), 60), "JPEG")
_ZERO = _encoded(Image.new("RGB", (1, 1)), "BMP")
_BROKEN = {
    "truncated": _JPEG[: len(_JPEG) // 2],
    "empty": b"",
    "text": b"not a picture, whatever its name says",
    "zero_size": _ZERO[:18] + bytes(8) + _ZERO[26:],
    "huge": _encoded(Image.new("1", (20_000, 10_000)), "PNG"),
}


@pytest.mark.parametrize("kind", _BROKEN)
def test_an_unreadable_picture_is_named_with_the_reason(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.jpg"
    path.write_bytes(_BROKEN[kind])
    with pytest.raises(UnreadableError, match=f"{kind}.jpg cannot be read: .+") as caught:
        read_picture(path)
    assert {"empty": "the file is empty", "text": "no known picture format"}.get(kind, "") in caught.value.reason


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"gone\.jpg cannot be read: there is no such file"):
        read_picture(tmp_path / "gone.jpg")


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "LA", "RGBA", "1"])
def test_every_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    original = _gradient().convert(mode)
    path = tmp_path / "picture.tif"
    original.save(path)
    read = read_picture(path)
    assert read.mode == "RGB" and read.size == (48, 32)
    assert np.array_equal(np.asarray(read), np.asarray(original.convert("RGB")))


def test_a_palette_with_transparency_is_read(tmp_path: Path) -> None:
    picture = _gradient().quantize(16)
    picture.save(tmp_path / "a.png", transparency=bytes(range(16)))
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    red = np.asarray(read_picture(tmp_path / f"a.{suffix}"))[..., 0]
    assert np.abs(red - values / 257).max() <= 0.5


@pytest.mark.parametrize(("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)])
def test_a_cameras_orientation_is_applied(orientation: int, turn: Image.Transpose, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    _gradient().save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png")), np.asarray(_gradient().transpose(turn)))


def _folder(root: Path, *, broken: int = 0, count: int = 8) -> Path:
    """Write two classes in train and val; the first pictures of train/a are broken in different ways."""
    for split in ("train", "val"):
        for number, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                colour = (100 * number + 10 * index, 30, 200)
                Image.new("RGB", (20, 20), colour).save(root / split / name / f"{index}.png")
    for index, content in zip(range(broken), _BROKEN.values(), strict=False):
        (root / "train" / "a" / f"{index}.png").write_bytes(content)
    return root


def _load(root: Path, **settings: object) -> Splits:
    return SOURCES["image_folder"](DataConfig(root=str(root), size=16, **settings), AugmentConfig(), 0)


def _epochs(splits: Splits, *, workers: int = 0, epochs: int = 1) -> tuple[ResumableLoader, list]:
    loader = ResumableLoader(splits.train, EpochBatches(16, 4, seed=1, training=True), workers=workers)
    batches = []
    for epoch in range(epochs):
        loader.batches.set_epoch(epoch)
        batches += list(loader)
    return loader, batches


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_they_are_skipped_named_once_and_counted(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = _load(_folder(tmp_path, broken=3))
    _, batches = _epochs(splits, workers=workers, epochs=2)
    assert [len(images) for images, _ in batches] == [4] * 8
    assert {Path(file).name for file in splits.train.bad} == {"0.png", "1.png", "2.png"}
    named = [message for message in caplog.messages if message.startswith("skipped")]
    assert len(named) == 3 and any("1.png, which cannot be read: the file is empty" in message for message in named)
    totals = [message for message in caplog.messages if "so far: 3" in message]
    assert len(totals) == 2 and all(record.levelno == logging.WARNING for record in caplog.records)


def test_what_stands_in_is_the_same_with_workers_and_after_a_resume(tmp_path: Path) -> None:
    root = _folder(tmp_path, broken=5)
    whole, expected = _epochs(_load(root))
    _, with_workers = _epochs(_load(root), workers=2)
    splits = _load(root)
    stopped = ResumableLoader(splits.train, EpochBatches(16, 4, seed=1, training=True))
    batches = iter(stopped)
    first = [next(batches), next(batches)]
    resumed = ResumableLoader(_load(root).train, EpochBatches(16, 4, seed=1, training=True))
    resumed.load_state_dict(stopped.state_dict())
    for got in (with_workers, [*first, *resumed]):
        for (images, labels), (want, want_labels) in zip(got, expected, strict=True):
            assert torch.equal(images, want) and torch.equal(labels, want_labels)
    assert resumed.state_dict() == whole.state_dict()
    assert len({tuple(images.flatten().tolist()) for images, _ in expected}) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_pictures_end_the_training(workers: int, tmp_path: Path) -> None:
    splits = _load(_folder(tmp_path, broken=3), max_bad=2)
    with pytest.raises(DataError, match=r"^3 training pictures cannot be read, more than data\.max_bad=2 allows"):
        _epochs(splits, workers=workers)


def test_one_unreadable_picture_is_counted_in_the_singular(tmp_path: Path) -> None:
    splits = _load(_folder(tmp_path, broken=1), max_bad=0)
    with pytest.raises(DataError, match=r"^1 training picture cannot be read, more than data\.max_bad=0 allows"):
        _epochs(splits)


def test_pictures_that_are_all_unreadable_end_the_training_at_once(tmp_path: Path) -> None:
    root = _folder(tmp_path, count=2)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"in a row cannot be read, .*\.png among them: the file is empty"):
        _load(root).train.__getitems__(Request([0], 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_in_evaluation_one_is_an_error_with_its_name(workers: int, tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "val" / "b" / "3.png").write_bytes(_BROKEN["truncated"])
    loader = ResumableLoader(_load(root).val, EpochBatches(16, 4, seed=1, training=False), workers=workers)
    with pytest.raises(DataError, match=r"^\S*val/b/3\.png cannot be read: "):
        list(loader)


def _masks(root: Path, spoil: Callable[[Path], None]) -> Path:
    for split in ("training", "validation"):
        for folder, picture in (
            ("images", _gradient()),
            ("annotations", Image.fromarray(np.eye(32, 48, dtype=np.uint8))),
        ):
            (root / folder / split).mkdir(parents=True)
            for index in range(4):
                picture.save(root / folder / split / f"{index}.png")
    spoil(root)
    return root


def _load_masks(root: Path, **settings: object) -> Splits:
    return SOURCES["mask_folder"](DataConfig(root=str(root), size=16, classes=2, **settings), AugmentConfig(), 0)


def test_an_unreadable_picture_or_mask_is_skipped_in_training_too(tmp_path: Path) -> None:
    def spoil(root: Path) -> None:
        whole = (root / "images/training/0.png").read_bytes()
        (root / "images/training/0.png").write_bytes(whole[:-30])
        (root / "annotations/training/2.png").write_bytes(b"")

    splits = _load_masks(_masks(tmp_path, spoil))
    images, masks = splits.train.__getitems__(Request([0, 1, 2, 3], 0))
    assert images.shape == (4, 3, 16, 16) and masks.shape == (4, 16, 16)
    _, bad = splits.train.answer(Request([0, 1, 2, 3], 0))
    assert {Path(file).parent.parent.name for file in bad} == {"images", "annotations"}


def _save(name: str, picture: Image.Image) -> Callable[[Path], None]:
    return lambda root: picture.save(root / "annotations" / name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _save("training/2.png", Image.fromarray(np.full((32, 48), 7, np.uint8))),
            r"training/2\.png holds label 7, but there are 2 classes, counted from 0.*data\.ignore_zero \(now false\)",
        ),
        (
            _save("validation/1.png", Image.fromarray(np.arange(32 * 48, dtype=np.uint16).reshape(32, 48))),
            r"validation/1\.png holds labels 2, 3, 4, 5, 6, 7, 8, 9, …",
        ),
        (_save("training/0.png", Image.new("L", (20, 32))), r"training/0\.png is \[32, 20\], its picture \[32, 48\]"),
        (
            _save("training/3.png", Image.new("RGB", (48, 32), (9, 8, 7))),
            r"3\.png is RGB, with colours such as \(9, 8, 7\)",
        ),
    ],
    ids=["unknown_label", "unknown_labels_of_16_bits", "wrong_size", "rgb"],
)
def test_a_wrong_mask_is_named_before_training(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _load_masks(_masks(tmp_path, spoil))


@pytest.mark.parametrize("kind", ["annotations", "images"])
def test_what_a_model_is_judged_by_must_be_readable_before_training(kind: str, tmp_path: Path) -> None:
    def spoil(root: Path) -> None:
        for file in (root / kind / "validation" / "2.png", root / kind / "training" / "1.png"):
            file.write_bytes(file.read_bytes()[:20])

    with pytest.raises(DataError, match=rf"^\S*{kind}/validation/2\.png cannot be read: .+ lists all such files$"):
        _load_masks(_masks(tmp_path, spoil))


@pytest.fixture
def every_check_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A scan that takes long enough for its result to be cached, in a cache of this test."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("mixerzoo.vision.data.mask_files._LONG", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("every_check_takes_long")
def test_masks_of_which_one_cannot_be_read_are_checked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = _masks(tmp_path / "data", lambda root: (root / "annotations/training/2.png").write_bytes(b""))
    for _ in range(2):
        _load_masks(root)
    assert caplog.messages.count("checking 8 masks") == 2


@pytest.mark.usefixtures("every_check_takes_long")
def test_masks_that_took_long_to_check_are_remembered_until_they_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = _masks(tmp_path / "data", lambda root: None)
    for _ in range(2):
        _load_masks(root)
    assert caplog.messages.count("checking 8 masks") == 1
    _save("training/2.png", Image.fromarray(np.full((32, 48), 7, np.uint8)))(root)
    with pytest.raises(ValueError, match="label 7"):
        _load_masks(root)


@pytest.mark.slow
@pytest.mark.parametrize(("max_bad", "code"), [(3, 0), (2, 1)])
def test_a_run_counts_them_in_its_results_and_fails_beyond_the_limit(
    max_bad: int, code: int, tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    root, out = _folder(tmp_path / "set", broken=3), tmp_path / "out"
    settings = [setting for setting in tiny if not setting.startswith(("data", "train.batch"))]
    settings += [f"data={root}", "data.size=32", "data.workers=1", f"data.max_bad={max_bad}", "train.batch_size=4"]
    assert cli.main([*settings, "train.epochs=1", f"out={out}"], configs=repository / "configs") == code
    if code:
        [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "3 training pictures cannot be read, more than data.max_bad=2 allows" in error
    else:
        names = [Path(file).name for file in json.loads((out / "results.json").read_text())["unreadable"]]
        assert names == ["0.png", "1.png", "2.png"]
