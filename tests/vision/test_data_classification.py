"""Fashion-MNIST's files, pictures in memory, and folders of pictures."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from mixerzoo.vision.data import fashion_mnist, fetching
from mixerzoo.vision.data.classification import PicturesInMemory, split_indices
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.data.module import SOURCES
from mixerzoo.vision.training.config import AugmentConfig, DataConfig
from PIL import Image


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def four_files(tmp_path: Path) -> Path:
    """A Fashion-MNIST of 20 training and 6 test pictures, two files gzipped and two plain."""
    rng = np.random.default_rng(0)
    for stem, count in (("train", 20), ("t10k", 6)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(_idx(labels))
    return tmp_path


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without Fashion-MNIST and without a network; returns its cache folder."""
    monkeypatch.delenv("MIXERZOO_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "_places", lambda: [fashion_mnist.cache_folder()])
    monkeypatch.setattr(fashion_mnist, "_download_with_torchvision", lambda cache: None)
    return tmp_path / "cache" / "mixerzoo"


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 4), (2, 5, 3)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_read_back(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = tmp_path / f"array{suffix}"
    path.write_bytes(gzip.compress(_idx(array)) if suffix else _idx(array))
    read = fashion_mnist.read_idx(path)
    assert read.dtype == np.uint8 and np.array_equal(read, array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "begins with 00000d01"),
        (_idx(np.zeros((3, 4), np.uint8))[:-1], "damaged: shape .3, 4. does not match 11 values"),
        (_idx(np.zeros((3, 4), np.uint8))[:6], "damaged"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file .*{message}"):
        fashion_mnist.read_idx(tmp_path / "file")


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(_idx(np.arange(200, dtype=np.uint8)))[:-20])
    with pytest.raises(ValueError, match=r"file\.gz cannot be read"):
        fashion_mnist.read_idx(tmp_path / "file.gz")


def test_a_given_folder_is_used_and_an_empty_one_is_an_error(four_files: Path, tmp_path: Path) -> None:
    arrays = fashion_mnist.load(str(four_files))
    assert arrays is not None and str(four_files) in arrays.origin
    assert arrays.train_images.shape == (20, 28, 28) and arrays.test_labels.tolist() == [0, 1, 2, 3, 4, 5]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no Fashion-MNIST in .*empty.*apt-get install dataset-fashion-mnist"):
        fashion_mnist.load(str(tmp_path / "empty"))


def test_torchvisions_layout_and_the_environment_are_searched(
    four_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in four_files.glob("*ubyte*"):
        shutil.copy(path, raw)
    monkeypatch.setenv("MIXERZOO_DATA", str(tmp_path / "root"))
    arrays = fashion_mnist.load(download=False)
    assert arrays is not None and str(raw) in arrays.origin


def test_the_debian_package_is_unpacked_without_root(
    four_files: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt-get and dpkg are stood in for by what they leave behind."""

    def run(command: list[str], folder: Path) -> None:
        if command[0] == "apt-get":
            (folder / "package.deb").touch()
        else:
            assert command[:2] == ["dpkg", "-x"] and command[2].endswith("package.deb")
            shutil.copytree(four_files, folder / fashion_mnist.DEBIAN_FOLDER, ignore=shutil.ignore_patterns("cache"))

    monkeypatch.setattr(fetching, "_run", run)
    monkeypatch.setattr(fetching.shutil, "which", lambda name: f"/usr/bin/{name}")
    first = fashion_mnist.load()
    assert first is not None and str(nowhere / "fashion-mnist") in first.origin
    monkeypatch.setattr(fetching, "_run", None)  # a second call finds the files and fetches nothing
    assert fashion_mnist.load() is not None
    assert [path.name for path in nowhere.iterdir()] == ["fashion-mnist"]


def test_digits_step_in_with_a_warning(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fashion_mnist, "fetch_debian_package", lambda *_, **__: None)
    splits = SOURCES["fashion_mnist"](DataConfig(), AugmentConfig(), 0)
    assert splits.origin == "digits from scikit-learn" and splits.classes == tuple("0123456789")
    assert "using digits" in caplog.text


def test_splits_never_meet_and_do_not_move_with_the_limit() -> None:
    train, val = split_indices(100, 0.2, seed=5)
    assert len(val) == 20 and not set(train) & set(val) and len({*train, *val}) == 100
    fewer, same = split_indices(100, 0.2, seed=5, limit=10)
    assert np.array_equal(same, val) and np.array_equal(fewer, train[:10])


def test_small_pictures_are_framed_not_resampled() -> None:
    image = np.arange(28 * 28).reshape(1, 28, 28).astype(np.uint8)
    [framed], _ = PicturesInMemory(image, np.zeros(1, np.int64), size=32, mean=0.0, std=1.0).__getitems__(
        Request([0], 0)
    )
    assert framed.shape == (1, 32, 32)
    assert torch.equal((framed[0, 2:30, 2:30] * 255).round().to(torch.uint8), torch.from_numpy(image[0]))
    framed[0, 2:30, 2:30] = 0
    assert not framed.any()


@pytest.mark.parametrize("size", [8, 28, 31, 64])
def test_any_size_can_be_asked_for(size: int) -> None:
    pictures = PicturesInMemory(
        np.full((2, 28, 28), 200, np.uint8), np.zeros(2, np.int64), size=size, mean=0.0, std=1.0
    )
    images, _ = pictures.__getitems__(Request([0, 1], 0))
    assert images.shape == (2, 1, size, size)
    assert images.max() == pytest.approx(200 / 255)


def test_shift_and_flip_move_the_picture_and_nothing_else() -> None:
    image = np.zeros((1, 9, 9), np.uint8)
    image[0, 4, 3:6] = (50, 100, 150)
    pictures = PicturesInMemory(
        image, np.zeros(1, np.int64), size=9, mean=0.0, std=1.0, augmentation=AugmentConfig(shift=2, hflip=0.5)
    )
    seen = set()
    for seed in range(200):
        [[result]] = pictures.__getitems__(Request([0], seed))[0]
        values = (result * 255).round().long()
        [row] = values.sum(1).nonzero().flatten().tolist()
        columns = values[row].nonzero().flatten().tolist()
        line = tuple(values[row, columns].tolist())
        assert line in {(50, 100, 150), (150, 100, 50)} and columns == list(range(columns[0], columns[0] + 3))
        seen.add((row - 4, columns[1] - 4, line))
    assert len(seen) == 5 * 5 * 2
    again = pictures.__getitems__(Request([0], 7))[0]
    assert torch.equal(again, pictures.__getitems__(Request([0], 7))[0])


def _folder(root: Path, splits: dict[str, list[str]], count: int = 4) -> Path:
    rng = np.random.default_rng(1)
    for split, classes in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


def _load(root: Path) -> object:
    return SOURCES["image_folder"](DataConfig(root=str(root), size=16, held_out=0.25), AugmentConfig(), 0)


def test_an_image_folder_with_splits(tmp_path: Path) -> None:
    splits = _load(_folder(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"], "test": ["cat", "dog"]}))
    assert splits.classes == ("cat", "dog") and splits.channels == 3
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [8, 8, 8]
    images, labels = splits.train.__getitems__(Request([0, 5, 2], 3))
    assert images.shape == (3, 3, 16, 16) and labels.dtype == torch.int64
    assert torch.equal(splits.train.__getitems__(Request([5], 3))[0][0], images[1])


def test_an_image_folder_without_splits_is_divided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = _load(_folder(tmp_path, {"": ["a", "b", "c"]}))
    assert (len(splits.train), len(splits.val)) == (9, 3)
    assert splits.test is splits.val and "no folder `test`" in caplog.text
    assert not set(splits.train.indices) & set(splits.val.indices)


def test_how_much_of_a_picture_is_judged(tmp_path: Path) -> None:
    """A ramp of columns, twice as wide as high: what is left of it shows the crop, and how it was resized."""
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (64, 1, 3))
    ramp[:24] = np.random.default_rng(0).integers(0, 256, (24, 128, 3))  # interpolation shows on noise
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.fromarray(ramp).save(tmp_path / name / f"{index}.png")

    def judged(**settings: object) -> torch.Tensor:
        config = DataConfig(root=str(tmp_path), size=32, held_out=0.5, **settings)
        splits = SOURCES["image_folder"](config, AugmentConfig(), 0)
        image = splits.val.__getitems__(Request([0], 0))[0][0, 0]
        return (image * splits.std[0] + splits.mean[0]) * 255

    whole, middle, squeezed = (judged(crop=crop)[16] for crop in (None, 0.5, 1.0))
    assert squeezed[0] < 8 and squeezed[-1] > 246  # from one end to the other
    assert 60 < whole[0] < 70 and 185 < whole[-1] < 195  # the middle half of the width: a square of full height
    assert 92 < middle[0] < 100 and 155 < middle[-1] < 163
    assert not torch.equal(judged(crop=0.7), judged(crop=0.7, interpolation="bicubic"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, r"needs a sub-folder with pictures for each class"),
        ({"train": ["a"], "val": ["a", "b"]}, r"val has other classes than the training folder: b"),
    ],
)
def test_an_unusable_folder_is_named(tmp_path: Path, layout: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _load(_folder(tmp_path, layout))


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    _folder(tmp_path, {"train": ["a", "b"]})
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        _load(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.root=.*/none: there is no such folder"):
        _load(tmp_path / "none")


def test_the_real_fashion_mnist_when_it_is_here() -> None:
    arrays = fashion_mnist.load(download=False)
    if arrays is None:
        pytest.skip(
            f"Fashion-MNIST is not on this machine; {os.environ.get('MIXERZOO_DATA', 'MIXERZOO_DATA is unset')}"
        )
    assert arrays.train_images.shape == (60_000, 28, 28) and arrays.test_images.shape == (10_000, 28, 28)
    assert np.bincount(arrays.train_labels).tolist() == [6_000] * 10
    assert np.bincount(arrays.test_labels).tolist() == [1_000] * 10
    # The first training pictures, as the data set's page shows them: a boot, two shirts, two dresses.
    assert [fashion_mnist.CLASSES[label] for label in arrays.train_labels[:5]] == [
        "Ankle boot",
        "T-shirt",
        "T-shirt",
        "Dress",
        "T-shirt",
    ]


def test_pictures_in_memory_come_in_the_size_of_a_request() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    augmentation = AugmentConfig(shift=2, erasing=1.0)
    pictures, small = (
        PicturesInMemory(noise, np.arange(3), size=size, mean=0.5, std=0.5, augmentation=augmentation)
        for size in (32, 16)
    )
    images, labels = pictures.__getitems__(Request([2, 0], 5, size=16))
    assert torch.equal(images, small.__getitems__(Request([2, 0], 5))[0]) and labels.tolist() == [2, 0]
