"""Fashion-MNIST: 60,000 + 10,000 grey photos of clothing, 28 x 28, ten classes; found on this machine or downloaded.

H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms,
2017, https://github.com/zalandoresearch/fashion-mnist (MIT licence). Its files have MNIST's IDX format (Y. LeCun): a
magic number 0x0000TTDD (TT the type, DD the number of axes), the axes as big-endian 32-bit integers, then the
values.

Unusual: Debian and its descendants ship the data as a package, `dataset-fashion-mnist`, see fetching.py.
"""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .fetching import cache_folder, fetch_debian_package, usual_places

_log = logging.getLogger(__name__)

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"
_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Arrays(NamedTuple):
    """A data set in memory: pictures uint8 [N, H, W] and labels int64 [N] of training and test, and their origin."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    origin: str


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or plain."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it begins with {data[:4].hex()}, not 000008..")
    axes = data[3]
    if len(data) < 4 + 4 * axes:
        raise ValueError(f"{path} is damaged: it ends inside its header")
    shape = np.frombuffer(data, ">u4", axes, 4)
    values = data[4 + 4 * axes :]
    if len(values) != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path} is damaged: shape {tuple(shape.tolist())} does not match {len(values)} values")
    return np.frombuffer(values, np.uint8).reshape(shape).copy()  # a view of bytes would be read-only


def load(root: str | None = None, *, download: bool = True) -> Arrays | None:
    """Load the data set from `root`, else from the usual places, else download it; return None if that fails."""
    if root is not None:
        found = _find(Path(root))
        if found is None:
            raise ValueError(
                f"no Fashion-MNIST in {root}: needs {_STEMS[0]}[.gz] and its three companions there, or in "
                f"FashionMNIST/raw below; `apt-get install {DEBIAN_PACKAGE}` puts them into /{DEBIAN_FOLDER}"
            )
        return _read(found)
    for place in _places():
        if (found := _find(place)) is not None:
            return _read(found)
    if not download:
        return None
    package = fetch_debian_package(DEBIAN_PACKAGE, DEBIAN_FOLDER, "fashion-mnist", size="31 MB")
    found = _find(package) if package is not None else _download_with_torchvision(cache_folder())
    return None if found is None else _read(found)


def _places() -> list[Path]:
    return usual_places(Path("/") / DEBIAN_FOLDER)


def _find(place: Path) -> list[Path] | None:
    """Find the four files in a folder, directly or in the layouts of the Debian package and torchvision below it."""
    for folder in (place, place / "fashion-mnist", place / DEBIAN_FOLDER, place / "FashionMNIST" / "raw"):
        files = [
            next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None) for stem in _STEMS
        ]
        if all(files):
            return [path for path in files if path is not None]
    return None


def _read(files: list[Path]) -> Arrays:
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in files)
    for images, labels, path in ((train_images, train_labels, files[0]), (test_images, test_labels, files[2])):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(f"{path} has shape {images.shape}, its labels {labels.shape}: they do not belong together")
    labels = train_labels.astype(np.int64), test_labels.astype(np.int64)
    return Arrays(train_images, labels[0], test_images, labels[1], f"Fashion-MNIST from {files[0].parent}")


def _download_with_torchvision(cache: Path) -> list[Path] | None:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        _log.info("torchvision could not download Fashion-MNIST: %s", error)
        return None
    return _find(cache)
