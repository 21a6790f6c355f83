"""Classification data sets: Fashion-MNIST, scikit-learn's digits, and folders with a sub-folder per class.

Small pictures are kept in memory. Where they fit, they are framed to the requested size and not resampled, so that no
detail is invented; they are augmented a batch at a time. Folders are read through torchvision, with timm's transforms.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from . import fashion_mnist
from .fashion_mnist import Arrays
from .items import SeededItems
from .loading import Request, mix_seed, seed_everything
from .pictures import read_picture
from .splits import Augmentation, DataSettings, Splits

_log = logging.getLogger(__name__)


class PicturesInMemory:
    """Grey pictures uint8 [N, H, W], returned as normalised batches [B, 1, size, size] and augmented a batch at a
    time."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        size: int,
        mean: float,
        std: float,
        augmentation: Augmentation | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        """`rows`: the numbers of the pictures in the data set that they were taken from; None if these are all."""
        self.rows = np.arange(len(images)) if rows is None else rows
        self.originals = torch.from_numpy(np.ascontiguousarray(images))
        self.images = _to_size(self.originals, size)
        self.labels = torch.from_numpy(np.ascontiguousarray(labels))
        self.size, self.mean, self.std, self.augmentation = size, mean, std, augmentation
        probability = augmentation.erasing if augmentation else 0.0
        self._erase = RandomErasing(probability, mode="const", device="cpu") if probability else None

    def __len__(self) -> int:
        return len(self.images)

    def name_of(self, index: int) -> int:
        return int(self.rows[index])

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(request.indices)
        if request.size in (None, self.size):
            images = self.images[indices]
        else:
            images = _to_size(self.originals[indices], request.size)
        if self.augmentation is not None:
            images = _shift_and_flip(images, self.augmentation, torch.Generator().manual_seed(request.seed))
        normalised = images[:, None].to(torch.float32).div_(255).sub_(self.mean).div_(self.std)
        if self._erase is not None:
            seed_everything(request.seed)
            normalised = self._erase(normalised)
        return normalised, self.labels[indices]


def _to_size(images: Tensor, size: int) -> Tensor:
    """Enlarge uint8 [N, H, W] by a whole factor and frame it with black to [N, size, size]; shrink it only if too
    large."""
    height, width = images.shape[1:]
    if max(height, width) > size:
        small = F.interpolate(images[:, None].float(), (size, size), mode="bilinear", antialias=True)
        return small[:, 0].round().to(torch.uint8)
    factor = size // max(height, width)
    if factor > 1:
        shape = (height * factor, width * factor)
        large = F.interpolate(images[:, None].float(), shape, mode="bilinear", align_corners=False)
        images, (height, width) = large[:, 0].round().to(torch.uint8), shape
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def _shift_and_flip(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Shift each picture of [B, S, S] by up to `shift` pixels, filling with black, and mirror it with probability
    `hflip`."""
    batch, size, shift = len(images), images.shape[-1], augmentation.shift
    flip = torch.rand(batch, generator=generator) < augmentation.hflip
    offset = torch.randint(0, 2 * shift + 1, (2, batch), generator=generator)
    steps = torch.arange(size)
    rows = steps + offset[0, :, None]
    columns = torch.where(flip[:, None], steps.flip(0), steps) + offset[1, :, None]
    padded = F.pad(images, (shift,) * 4)
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def load_fashion_mnist(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Load Fashion-MNIST, or digits if it is unavailable. Validation pictures are held out of the training files."""
    arrays = fashion_mnist.load(config.root, download=config.download)
    if arrays is None:
        _log.warning(
            "Fashion-MNIST is nowhere to be had (apt-get install %s): using digits", fashion_mnist.DEBIAN_PACKAGE
        )
        return load_digits(config, augmentation, seed)
    return _from_arrays(arrays, fashion_mnist.CLASSES, config, augmentation, seed)


def load_digits(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """scikit-learn's 1,797 digits; every sixth picture is for testing."""
    return _from_arrays(digits(), tuple("0123456789"), config, augmentation, seed)


def digits() -> Arrays:
    """Load scikit-learn's digits, 8 x 8; every sixth is a test picture."""
    from sklearn.datasets import load_digits as read

    bunch: Any = read()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    test = np.arange(len(images)) % 6 == 5
    return Arrays(images[~test], labels[~test], images[test], labels[test], "digits from scikit-learn")


def _from_arrays(
    arrays: Arrays, classes: tuple[str, ...], config: DataSettings, augmentation: Augmentation, seed: int
) -> Splits:
    train, val = split_indices(len(arrays.train_images), config.held_out, seed, config.limit)
    mean, std = float(arrays.train_images.mean() / 255), float(arrays.train_images.std() / 255)
    common = {"size": config.size, "mean": mean, "std": std}

    def held(rows: np.ndarray, augment: Augmentation | None = None) -> PicturesInMemory:
        pictures, labels = arrays.train_images[rows], arrays.train_labels[rows]
        return PicturesInMemory(pictures, labels, augmentation=augment, rows=rows, **common)

    return Splits(
        train=held(train, augmentation),
        val=held(val),
        test=PicturesInMemory(arrays.test_images, arrays.test_labels, **common),
        classes=classes,
        mean=(mean,),
        std=(std,),
        size=config.size,
        origin=arrays.origin,
        framed=True,
    )


def split_indices(length: int, held_out: float, seed: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return disjoint indices for training (at most `limit`) and validation, from a shuffle that `seed` determines."""
    if length < 2:
        raise ValueError(
            f"{length} picture cannot be divided: one at least is needed for training and another for validation"
        )
    order = np.random.default_rng(mix_seed(seed, length)).permutation(length)
    count = min(max(round(length * held_out), 1), length - 1)
    return order[count:][:limit], order[:count]


def load_image_folder(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Load ROOT/{train,val,test}/CLASS/…. Without val, training pictures are held out; without test, val is used."""
    root = Path(config.root or "")
    if config.root is None or not root.is_dir():
        raise ValueError(f"data.root={config.root}: there is no such folder; give one with a sub-folder for each class")
    folders = split_folders(root)
    train, val_folder = _read_folder(folders["train"]), folders.get("val")
    if val_folder is None:
        chosen, kept = split_indices(len(train), config.held_out, seed, config.limit)
        val = evaluated(train, config, kept)
    else:
        chosen = np.random.default_rng(seed).permutation(len(train))[: config.limit]
        val = evaluated(_read_folder(val_folder, train.classes), config)
    if "test" not in folders:
        _log.warning("%s has no folder `test`: the final numbers are those of the validation pictures", root)
    return Splits(
        train=trained(train, config, augmentation, chosen),
        val=val,
        test=evaluated(_read_folder(folders["test"], train.classes), config) if "test" in folders else val,
        classes=tuple(train.classes),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=config.size,
        origin=f"pictures in {root}",
    )


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split. A folder without sub-folders for splits is for training as a whole.

    Raises:
        ValueError: there is a folder for validation or test, but none for training.
    """
    names = {"train": "train", "validation": "val", "val": "val", "test": "test"}
    folders = {split: root / name for name, split in names.items() if (root / name).is_dir()}
    if folders and "train" not in folders:
        found = ", ".join(folder.name for folder in folders.values())
        raise ValueError(
            f"{root} holds {found} but no folder train; pictures for training are needed in {root / 'train'}/CLASS/…"
        )
    return folders or {"train": root}


def trained(dataset: Any, config: DataSettings, augmentation: Augmentation, indices: np.ndarray) -> SeededItems:
    """Return the training batches of a data set of (RGB picture, class)."""
    transforms = PictureTransforms(config, augmentation)
    return SeededItems(dataset, indices.tolist(), transforms=transforms, max_bad=config.max_bad)


def evaluated(dataset: Any, config: DataSettings, indices: np.ndarray | None = None) -> SeededItems:
    """Return the evaluation batches of a data set of (RGB picture, class)."""
    return SeededItems(
        dataset, None if indices is None else indices.tolist(), transforms=PictureTransforms(config, None)
    )


@dataclass(frozen=True)
class PictureTransforms:
    """Makes timm's transform for a picture size; without augmentation, the one of evaluation."""

    config: DataSettings
    augmentation: Augmentation | None

    def __call__(self, size: int | None) -> PictureTransform:
        config, augmentation, size = self.config, self.augmentation, size or self.config.size
        common: dict[str, Any] = {
            "input_size": (3, size, size),
            "interpolation": config.interpolation,
            "use_prefetcher": False,
        }
        if augmentation is None:
            crop = config.crop or (0.9 if size > 64 else 1.0)
            mode = "squash" if config.crop == 1 else "center"
            return PictureTransform(create_transform(**common, is_training=False, crop_pct=crop, crop_mode=mode))
        if augmentation.random_interpolation:
            common["interpolation"] = "random"
        return PictureTransform(
            create_transform(
                **common,
                is_training=True,
                scale=(augmentation.scale[0], augmentation.scale[1]),
                hflip=augmentation.hflip,
                color_jitter=augmentation.color_jitter,
                auto_augment=augmentation.auto_augment,
                re_prob=augmentation.erasing,
                re_mode="pixel",
            )
        )


@dataclass(frozen=True)
class PictureTransform:
    """Applies `of_picture` to the picture of an item (picture, target) and leaves the target as it is."""

    of_picture: Any

    def __call__(self, picture: Any, target: Any) -> tuple[Any, Any]:
        return self.of_picture(picture), target


class PictureFolder(ImageFolder):
    """torchvision's folder with a sub-folder for each class, which can also name its files."""

    def name_of(self, index: int) -> str:
        return self.samples[index][0]


def _read_folder(folder: Path, classes: Sequence[str] | None = None) -> PictureFolder:
    try:
        dataset = PictureFolder(str(folder), loader=read_picture)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} needs a sub-folder with pictures for each class: {error}") from None
    if classes is not None and dataset.classes != list(classes):
        odd = sorted(set(dataset.classes) ^ set(classes))
        raise ValueError(f"{folder} has other classes than the training folder: {', '.join(odd[:10])}")
    return dataset
