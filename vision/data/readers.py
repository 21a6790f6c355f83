"""Classification data through timm's readers: a .tar, data sets of Hugging Face and torchvision, and streams.

`data.dataset` is timm's name of a data set; its prefix selects the reader (timm.data.create_dataset):

    null        data.root, a .tar of CLASS/… or train/CLASS/…, a folder with train.tar (val.tar, test.tar), or one of
                pictures as `image_folder` has it
    hfds/NAME   Hugging Face `datasets`: a name on the hub or a local folder; data.root is its cache
    torch/NAME  torchvision: cifar10, cifar100, mnist, kmnist, fashion_mnist, imagenet, …; data.root is where it lies
    hfids/NAME, wds/, tfds/NAME    streams, see streams.py

Unusual: timm's `ImageDataset` is not used, only its readers, because it replaces an unreadable picture by the next one
with nothing but a line in the log. If the validation or test split is not named, the usual names are tried; without a
validation split, training pictures are held out, as for every data set here.
"""

from __future__ import annotations

import importlib.util
import logging
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_factory import create_reader

from .classification import evaluated, load_image_folder, split_indices, trained
from .fetching import cache_folder
from .items import Items
from .pictures import DataError, UnreadableError, read_picture, to_rgb
from .sources import PREFIXES, STREAMS
from .splits import Augmentation, DataSettings, Splits
from .streams import columns, load_stream

_log = logging.getLogger(__name__)

_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}
_VAL, _TEST = ("validation", "val", "valid"), ("test",)
_TWO_SPLITS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")  # torchvision's: training and test


class ReaderPictures:
    """A data set of (RGB picture, class) over a timm reader, or over some of its indices."""

    def __init__(self, reader: Any, classes: tuple[str, ...], indices: Sequence[int] | None = None) -> None:
        self.reader, self.classes = reader, classes
        self.indices = range(len(reader)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, index = self.name_of(index), self.indices[index]
        try:
            file, label = self.reader[index]
        except Exception as error:  # a damaged archive, a file that is gone: each reader has its own
            raise UnreadableError(name, str(error) or type(error).__name__) from error
        with file:
            return read_picture(file, name), _checked(label, self.classes, name)

    def name_of(self, index: int) -> str:
        index = self.indices[index]
        try:
            file = self.reader.filename(index, absolute=True)
        except (KeyError, TypeError, AssertionError):
            file = None
        return str(file or f"picture {index}")


class TorchPictures:
    """A data set of (RGB picture, class) over one of torchvision's data sets, which timm returns unwrapped."""

    def __init__(self, dataset: Any, classes: tuple[str, ...]) -> None:
        self.dataset, self.classes = dataset, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = f"picture {index} of {type(self.dataset).__name__}"
        try:
            picture, label = self.dataset[index]
            picture = to_rgb(picture)
        except Exception as error:
            raise UnreadableError(name, str(error) or type(error).__name__) from error
        return picture, _checked(label, self.classes, name)


def _checked(label: Any, classes: Sequence[str], name: str) -> int:
    if not isinstance(label, (int, np.integer)) or not 0 <= label < len(classes):
        raise DataError(f"{name} has the label {label!r}, but there are {len(classes)} classes, counted from 0")
    return int(label)


def load_timm(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Load the data set that `data.dataset` and `data.root` name, through its timm reader."""
    prefix = _check_prefix(config.dataset)
    if prefix in STREAMS:
        return load_stream(config, augmentation, seed)
    root = Path(config.root) if config.root is not None else None
    if prefix == "" and root is not None and root.is_dir() and not (root / f"{config.train_split}.tar").is_file():
        return load_image_folder(config, augmentation, seed)
    source = {"": _Tar, "hfds": _HuggingFace, "torch": _Torchvision}[prefix](config)
    train = _split(source, config.train_split, (), "data.train_split")
    assert train is not None
    val = _split(source, config.val_split, _VAL, "data.val_split", train.classes)
    test = _split(source, config.test_split, _TEST, "data.test_split", train.classes)
    if val is None:
        chosen, kept = split_indices(len(train), config.held_out, seed, config.limit)
        judged = evaluated(train, config, kept)
    else:
        chosen = np.random.default_rng(seed).permutation(len(train))[: config.limit]
        judged = evaluated(val, config)
    if test is None:
        _log.warning("%s has no test pictures: the final numbers are those of the validation pictures", source.origin)
    return Splits(
        train=trained(train, config, augmentation, chosen),
        val=judged,
        test=judged if test is None else evaluated(test, config),
        classes=train.classes,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=config.size,
        origin=source.origin,
    )


class _Source(Protocol):
    """A source of splits; `split` returns None for one that does not exist."""

    origin: str

    def split(self, name: str) -> _Labelled | None: ...


class _Labelled(Items, Protocol):
    classes: tuple[str, ...]


def _split(
    source: _Source, given: str | None, usual: Sequence[str], key: str, classes: Sequence[str] | None = None
) -> _Labelled | None:
    """Return the split of the given name, or the first of the usual names that exists, or None."""
    for name in usual if given is None else (given,):
        found = source.split(name)
        if found is None:
            continue
        if classes is not None and found.classes != tuple(classes):
            odd = sorted(set(found.classes) ^ set(classes))[:10]
            raise ValueError(f"{source.origin}: the split {name} has other classes than training: {', '.join(odd)}")
        if len(found):
            return found
        raise ValueError(f"{source.origin}: the split {name} is empty")
    if given is not None:
        raise ValueError(f"{key}={given}: {source.origin} has no such split")
    return None


def _check_prefix(dataset: str | None) -> str:
    """Return the reader's prefix in lower case, "" for files; raise a ValueError if its package is missing."""
    if dataset is None:
        return ""
    prefix, slash, _ = dataset.partition("/")
    if not slash or prefix.lower() not in PREFIXES:
        known = ", ".join(f"{name}/…" for name in PREFIXES)
        raise ValueError(f"data.dataset={dataset}: needs one of {known}, or null for the files of data.root")
    package = _PACKAGES.get(prefix.lower())
    if package is not None and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ValueError(f"data.dataset={dataset} is read by a package that is not installed: pip install {package}")
    return prefix.lower()


class _Tar:
    """A .tar with a folder per class, optionally below train/, val/ and test/; or a folder with a .tar per split."""

    def __init__(self, config: DataSettings) -> None:
        root = Path(config.root or "")
        if config.root is None or not (root.is_dir() or (root.is_file() and root.suffix == ".tar")):
            raise ValueError(f"data.root={config.root}: there is no such .tar, and no such folder of pictures")
        self.root, self.origin = root, f"pictures in {root}"
        self.training = config.train_split
        self.whole = _read_tar(root) if root.is_file() else None

    def split(self, name: str) -> ReaderPictures | None:
        if self.whole is None:
            path = self.root / f"{name}.tar"
            return _read_tar(path) if path.is_file() else None
        above = [PurePath(self.whole.reader.filename(index)).parts[:-2] for index in range(len(self.whole))]
        if not any(self.training in folders for folders in above):
            return self.whole if name == self.training else None
        inside = [index for index, folders in enumerate(above) if name in folders]
        return ReaderPictures(self.whole.reader, self.whole.classes, inside) if inside else None


def _read_tar(path: Path) -> ReaderPictures:
    try:
        # An open archive would be shared by the loading processes, including its file position.
        reader: Any = create_reader("", root=str(path), cache_tarfiles=False)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no .tar that can be read: {error}") from error
    except ValueError:  # there is nothing to unpack into samples and classes
        raise ValueError(f"{path} holds no pictures in folders named by their class") from None
    return ReaderPictures(reader, _in_order(reader.class_name_to_idx))


class _HuggingFace:
    """A data set of the Hugging Face hub or a local folder, read by `datasets`."""

    def __init__(self, config: DataSettings) -> None:
        self.name, self.cache, self.given = str(config.dataset).partition("/")[2], config.root, config.test_split
        self.count, self.origin = config.classes, str(config.dataset)

    def split(self, name: str) -> ReaderPictures | None:
        import datasets

        try:
            features: Any = datasets.load_dataset(self.name, split=name, cache_dir=self.cache).features  # pyright: ignore
            keys = columns(features, self.origin)
            reader: Any = create_reader(f"hfds/{self.name}", root=self.cache, split=name, **keys)
        except ValueError as error:
            if "nknown split" in str(error):
                return None
            raise ValueError(f"data.dataset={self.origin}: {error}") from error
        except (OSError, RuntimeError) as error:  # not on the hub, or no network
            raise ValueError(f"data.dataset={self.origin} cannot be had: {str(error).splitlines()[0]}") from error
        labels = reader.dataset.with_format("numpy")[keys["target_key"]]
        if len(labels) and int(np.min(labels)) < 0 and name != self.given:
            _log.info("the labels of the split %s are not public", name)
            return None
        named = _in_order(reader.class_to_idx)
        return ReaderPictures(reader, named or tuple(map(str, range(self.count or int(np.max(labels)) + 1))))


class _Torchvision:
    """A torchvision data set that timm supports; downloaded if `data.download` allows it."""

    def __init__(self, config: DataSettings) -> None:
        self.config, self.origin = config, str(config.dataset)
        self.root = config.root or str(cache_folder())

    def split(self, name: str) -> TorchPictures | None:
        kind = self.origin.partition("/")[2].lower()
        known = ("train", "test") if kind in _TWO_SPLITS else ("train", "validation")
        asked = {"training": "train", "val": "validation"}.get(name, name)
        if asked not in known:
            return None
        try:
            dataset: Any = create_dataset(f"torch/{kind}", root=self.root, split=asked, download=self.config.download)
        except (RuntimeError, OSError, AssertionError) as error:
            raise ValueError(f"data.dataset={self.origin} cannot be had from {self.root}: {error}") from error
        names = (name if isinstance(name, str) else name[0] for name in dataset.classes)  # ImageNet's have synonyms
        return TorchPictures(dataset, tuple(names))


def _in_order(class_to_idx: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__))
