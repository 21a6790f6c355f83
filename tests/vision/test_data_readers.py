"""timm's readers: archives, Hugging Face's and torchvision's data sets, and streams that go on where they stopped."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from mixerzoo.vision.data.loading import EpochBatches, Request, ResumableLoader
from mixerzoo.vision.data.module import SOURCES
from mixerzoo.vision.data.pictures import DataError
from mixerzoo.vision.data.splits import Splits
from mixerzoo.vision.data.streams import StreamBatches
from mixerzoo.vision.training import cli
from mixerzoo.vision.training.config import AugmentConfig, DataConfig
from mixerzoo.vision.training.settings import ConfigError, load
from PIL import Image


def _png(value: int) -> bytes:
    """A picture in one grey, by which it is known again."""
    file = io.BytesIO()
    Image.new("L", (20, 20), value).save(file, "PNG")
    return file.getvalue()


def _archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def _load(**settings: object) -> Splits:
    return SOURCES["timm"](DataConfig(size=16, **settings), AugmentConfig(scale=[1.0, 1.0], hflip=0.0), 0)


def _values(splits: Splits, images: torch.Tensor) -> list[int]:
    """The greys of a batch of pictures, all of which are even."""
    even = images.flatten(1).std(1) / images.flatten(1).std(1).clamp(min=1)
    assert (even < 1).all()
    return (images[:, 0, 8, 8] * splits.std[0] + splits.mean[0]).mul(255).round().int().tolist()


def _all(splits: Splits, part: str = "train") -> tuple[list[int], list[int]]:
    data = getattr(splits, part)
    images, labels = data.__getitems__(Request(list(range(len(data))), 0))
    return _values(splits, images), labels.tolist()


def _pictures(first: int, classes: Sequence[str] = ("cat", "dog"), count: int = 4) -> dict[str, bytes]:
    return {
        f"{name}/{index}.png": _png(first + 30 * number + index)
        for number, name in enumerate(classes)
        for index in range(count)
    }


def _below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_an_archive_without_splits_is_divided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = _load(root=str(_archive(tmp_path / "a.tar", _pictures(100))), held_out=0.25)
    assert splits.classes == ("cat", "dog") and (len(splits.train), len(splits.val)) == (6, 2)
    train, val = _all(splits), _all(splits, "val")
    assert sorted(train[0] + val[0]) == [100, 101, 102, 103, 130, 131, 132, 133]
    assert all(label == (value >= 130) for value, label in zip(*train, strict=True))
    assert splits.test is splits.val and "has no test pictures" in caplog.text


def test_an_archive_with_splits(tmp_path: Path) -> None:
    files = {
        **_below("set/train", _pictures(0)),
        **_below("set/val", _pictures(50)),
        **_below("set/test", _pictures(90)),
    }
    splits = _load(root=str(_archive(tmp_path / "a.tar", files)))
    assert [sorted(_all(splits, part)[0])[0] for part in ("train", "val", "test")] == [0, 50, 90]
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [8, 8, 8]


def test_an_archive_for_each_split_and_its_names(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("odd", 50), ("test", 90)):
        _archive(tmp_path / f"{name}.tar", _pictures(first))
    splits = _load(root=str(tmp_path), val_split="odd", limit=5)
    assert (len(splits.train), min(_all(splits, "val")[0]), min(_all(splits, "test")[0])) == (5, 50, 90)
    with pytest.raises(ValueError, match=r"data\.val_split=none: pictures in .* has no such split"):
        _load(root=str(tmp_path), val_split="none")
    _archive(tmp_path / "validation.tar", _pictures(0, ("cat", "fox")))
    with pytest.raises(ValueError, match="the split validation has other classes than training: dog, fox"):
        _load(root=str(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_archive_that_was_read_before_is_read_by_workers(workers: int, tmp_path: Path) -> None:
    splits = _load(root=str(_archive(tmp_path / "a.tar", _pictures(0, count=20))), held_out=0.1)
    expected = dict(zip(*_all(splits), strict=True))  # opens the archive in the main process
    loader = ResumableLoader(splits.train, EpochBatches(36, 4, seed=0, training=True), workers=workers)
    seen = [pair for images, labels in loader for pair in zip(_values(splits, images), labels.tolist(), strict=True)]
    assert len(seen) == 36 and dict(seen) == expected


def test_a_damaged_picture_in_an_archive_is_named(tmp_path: Path) -> None:
    files = {**_below("train", _pictures(0)), **_below("val", _pictures(50)), "val/cat/3.png": b"nothing"}
    splits = _load(root=str(_archive(tmp_path / "a.tar", files)))
    with pytest.raises(DataError, match=r"val/cat/3\.png cannot be read: no known picture format"):
        _all(splits, "val")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"data\.root=None: there is no such \.tar"),
        ({"root": "/no/where.tar"}, r"data\.root=/no/where\.tar: there is no such \.tar"),
        ({"dataset": "cifar10"}, r"data\.dataset=cifar10: needs one of hfds/…, torch/…, hfids/…"),
        ({"dataset": "torch/nothing", "download": False}, r"torch/nothing cannot be had .*Unknown torchvision dataset"),
        ({"dataset": "torch/cifar10", "root": "/no/where", "download": False}, r"cannot be had from /no/where"),
        ({"dataset": "wds/"}, r"data\.root=None: there is no such folder of shards"),
    ],
)
def test_unusable_settings_are_named(settings: dict, message: str) -> None:
    if settings.get("dataset") == "wds/":
        pytest.importorskip("webdataset")
    with pytest.raises(ValueError, match=message):
        _load(**settings)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_an_unusable_archive_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    if content is None:
        _archive(path, {"readme.txt": b"no pictures"})
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar (is no \.tar that can be read|holds no pictures)"):
        _load(root=str(path))


@pytest.mark.parametrize(("dataset", "package"), [("hfds/x", "datasets"), ("wds/", "webdataset")])
def test_a_missing_package_is_named(dataset: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"not installed: pip install {package}$"):
        _load(dataset=dataset)


def test_a_data_set_of_torchvision(tmp_path: Path) -> None:
    """CIFAR-10's own files, of 20 and 10 pictures."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(first: int, count: int) -> dict:
        grey = np.repeat(np.arange(first, first + count, dtype=np.uint8)[:, None], 3072, 1)
        return {"data": grey, "labels": [value % 10 for value in range(first, first + count)]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(100, 20))])
        patch.setattr(CIFAR10, "test_list", [write("test_batch", batch(200, 10))])
        file, md5 = write("batches.meta", {"label_names": [f"class{index}" for index in range(10)]})
        patch.setattr(CIFAR10, "meta", {"filename": file, "key": "label_names", "md5": md5})
        splits = _load(dataset="torch/cifar10", root=str(tmp_path), download=False, held_out=0.2)
    assert splits.classes[3] == "class3" and splits.origin == "torch/cifar10"
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [16, 4, 10]
    assert _all(splits, "test") == (list(range(200, 210)), list(range(10)))


def _parquet(folder: Path, names: dict[str, str], splits: dict[str, tuple[int, Sequence[int]]]) -> Path:
    """A local Hugging Face data set: a file a split, of pictures in greys from the given one on, with these labels."""
    datasets = pytest.importorskip("datasets")
    picture, label = names["picture"], names["label"]
    features = datasets.Features({picture: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog"])})
    for split, (first, labels) in splits.items():
        rows = {picture: [{"bytes": _png(first + i), "path": None} for i in range(len(labels))], label: list(labels)}
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize(
    ("picture", "label"), [("image", "label"), pytest.param("img", "fine_label", marks=pytest.mark.slow)]
)
def test_a_data_set_of_hugging_face(picture: str, label: str, tmp_path: Path) -> None:
    splits = {"train": (0, [0, 1] * 5), "validation": (50, [1, 0]), "test": (90, [-1, -1])}
    folder = _parquet(tmp_path / "set", {"picture": picture, "label": label}, splits)
    loaded = _load(dataset=f"hfds/{folder}", root=str(tmp_path / "cache"))
    assert loaded.classes == ("cat", "dog") and loaded.test is loaded.val  # the test labels are not public
    assert sorted(zip(*_all(loaded), strict=True)) == [(index, index % 2) for index in range(10)]
    assert _all(loaded, "val") == ([50, 51], [1, 0])
    with pytest.raises(ValueError, match=r"data\.val_split=other: hfds/.* has no such split"):
        _load(dataset=f"hfds/{folder}", root=str(tmp_path / "cache"), val_split="other")


def test_a_data_set_of_hugging_face_that_is_nowhere(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"hfds/.*/none cannot be had: "):
        _load(dataset=f"hfds/{tmp_path}/none", root=str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of 12 training pictures, two of 5 for validation; a picture's grey is its number, its class odd."""
    pytest.importorskip("webdataset")
    number = 0
    for name, count, size in (("train", 4, 12), ("val", 2, 5)):
        for shard in range(count):
            files = {}
            for _ in range(size):
                files |= {f"{number:04}.png": _png(number), f"{number:04}.cls": str(number % 2).encode()}
                number += 1
            _archive(tmp_path / f"{name}-{shard:04}.tar", files)
    return tmp_path


_LONG_CASE = pytest.param(3, 2, marks=pytest.mark.slow)
WDS = {
    "dataset": "wds/",
    "train_split": "train-{0000..0003}.tar|48",
    "val_split": "val-{0000..0001}.tar|10",
    "classes": 2,
}


def _stream(splits: Splits, part: str, *, workers: int = 0, **options: object) -> ResumableLoader:
    data = getattr(splits, part)
    shared = {"workers": workers, "seed": 3, "training": part == "train", **options}
    return ResumableLoader(data, StreamBatches(len(data), 4, **shared), workers=workers)  # type: ignore[arg-type]


def _same(batches: list, expected: list) -> bool:
    return len(batches) == len(expected) and all(
        torch.equal(images, want) and torch.equal(labels, want_labels)
        for (images, labels), (want, want_labels) in zip(batches, expected, strict=True)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_shards_are_streamed_and_an_epoch_goes_on_where_it_stopped(workers: int, shards: Path) -> None:
    splits = _load(root=str(shards), **WDS)
    assert (len(splits.train), len(splits.val), splits.classes) == (48, 10, ("0", "1"))
    loader = _stream(splits, "train", workers=workers)
    epochs = []
    for epoch in range(2):
        loader.batches.set_epoch(epoch)
        epochs.append(list(loader))
        greys = [value for images, labels in epochs[-1] for value in _values(splits, images)]
        assert len(epochs[-1]) == 12 and set(greys) <= set(range(48)) and len(set(greys)) > 40
    assert not _same(epochs[0], epochs[1])

    stopped = _stream(_load(root=str(shards), **WDS), "train", workers=workers)
    stopped.batches.set_epoch(1)
    batches = iter(stopped)
    first = [next(batches) for _ in range(5)]
    state = stopped.state_dict()
    batches.close()  # type: ignore[attr-defined]
    assert state == {"epoch": 1, "batches": 5, "of": 12, "workers": workers}
    with pytest.raises(ValueError, match=f"data.workers=3: this epoch of a stream was begun with {workers}"):
        _stream(_load(root=str(shards), **WDS), "train", workers=3).load_state_dict(state)
    torch.manual_seed(99)  # what a resumed run has drawn before must not matter
    resumed = _stream(_load(root=str(shards), **WDS), "train", workers=workers)
    resumed.load_state_dict(state)
    assert _same([*first, *resumed], epochs[1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 2), (2, 1), _LONG_CASE])
def test_an_evaluated_stream_holds_each_picture_once(workers: int, world_size: int, shards: Path) -> None:
    splits = _load(root=str(shards), **WDS)
    seen = []
    for rank in range(world_size):
        loader = _stream(splits, "val", workers=workers, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) <= len(loader)
        seen += [value for images, _ in batches for value in _values(splits, images)]
    assert sorted(seen) == list(range(48, 58))


def test_ranks_of_a_stream_read_different_shards(shards: Path) -> None:
    splits = _load(root=str(shards), **WDS)
    seen = [
        {value for images, _ in _stream(splits, "train", rank=rank, world_size=2) for value in _values(splits, images)}
        for rank in range(2)
    ]
    assert not seen[0] & seen[1] and min(map(len, seen)) > 20


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_stream_with_too_few_shards_or_pictures_is_named(shards: Path) -> None:
    splits = _load(root=str(shards), **WDS)
    with pytest.raises(DataError, match=r"4 shards cannot be shared among 6 .* at most 2 data\.workers"):
        list(_stream(splits, "train", workers=3, world_size=2))
    with pytest.raises(ValueError, match=r"augment\.repeats=3: a picture of a stream comes when it comes"):
        _stream(splits, "train", repeats=3)
    few = _load(root=str(shards), **{**WDS, "val_split": "val-{0000..0001}.tar|11"})
    with pytest.raises(DataError, match="10 of 11 pictures could be read"):
        list(_stream(few, "val"))
    with pytest.raises(ValueError, match=r"how many pictures these are is not known .a split may state its length"):
        _load(root=str(shards), **{**WDS, "val_split": "val-{0000..0001}.tar"})
    with pytest.raises(DataError, match=r"the stream holds label 1, but there are 1 classes .data\.classes"):
        few.train.classes = 1
        few.train.__getitems__(Request([0, 1, 2, 3, 4, 5], 0))
    with pytest.raises(ValueError, match=r"data\.classes"):
        _load(root=str(shards), **{**WDS, "classes": None})


def test_a_stream_of_hugging_face(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _parquet(
        tmp_path / "set",
        {"picture": "img", "label": "label"},
        {"train": (0, [0, 1] * 10), "validation": (50, [1, 0, 1])},
    )
    settings = {"dataset": f"hfids/{folder}", "root": str(tmp_path / "cache")}
    splits = _load(**settings, train_split="train|20", val_split="validation|3")
    assert "is a stream" in caplog.text and splits.classes == ("cat", "dog")
    expected = list(_stream(splits, "train"))
    assert {value for images, _ in expected for value in _values(splits, images)} == set(range(20))
    resumed = _stream(_load(**settings, train_split="train|20", val_split="validation|3"), "train")
    resumed.batches.start = 3
    assert _same(list(resumed), expected[3:])
    assert [value for images, _ in _stream(splits, "val") for value in _values(splits, images)] == [50, 51, 52]


@pytest.mark.parametrize(
    ("data", "key", "name"),
    [
        ("pictures.tar", "root", "timm"),
        ("hfds/uoft-cs/cifar10", "dataset", "timm"),
        ("torch/cifar100", "dataset", "timm"),
        (".", "root", "image_folder"),
    ],
)
def test_a_path_or_a_name_of_timms_stands_for_settings(
    data: str, key: str, name: str, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load([f"data={data}"], repository / "configs").data
    assert (config.name, config.source, getattr(config, key)) == (name, name, data)
    published = load(["recipe=van_imagenet", f"data={data}"], repository / "configs")
    assert published.data.size == 224 and published.augment.mixup == 0.8  # meant for photos, however they are read


def test_a_name_that_is_no_data_set_is_an_error(repository: Path) -> None:
    with pytest.raises(ConfigError, match="data=other/cifar10: there is no such folder"):
        load(["data=other/cifar10"], repository / "configs")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["archive", "shards"])
def test_a_run_trains_on_them(how: str, tmp_path: Path, repository: Path, request: pytest.FixtureRequest) -> None:
    tiny = [
        f"model.kwargs.{key}" for key in ("depths=[1,1,1,1]", "num_heads=[1,1,1,1]", "embed_dim=8", "kernel_size=3")
    ]
    if how == "archive":
        files = {**_below("train", _pictures(0)), **_below("val", _pictures(50))}
        data = [f"data={_archive(tmp_path / 'a.tar', files)}"]
    else:
        root = request.getfixturevalue("shards")
        data = ["data=wds/", f"data.root={root}", "data.classes=2"]
        data += [f"data.{key}={WDS[key]}" for key in ("train_split", "val_split")]
    settings = [
        *data,
        *tiny,
        "model.kwargs.stem_stride=2",
        "train.batch_size=4",
        "train.epochs=1",
        "train.progress=false",
    ]
    out = tmp_path / "out"
    assert cli.main([*settings, "data.size=32", "data.workers=1", f"out={out}"], configs=repository / "configs") == 0
    assert (out / "results.json").is_file() and (out / "predictions.png").is_file()
