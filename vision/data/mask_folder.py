"""Segmentation of your own pictures: a folder of pictures beside a folder of masks, in ADE20K's layout.

    ROOT/images/training/….jpg    ROOT/annotations/training/….png     (also `train`; masks also below `masks`)
    ROOT/images/validation/….jpg  ROOT/annotations/validation/….png   (also `val`)

A mask is a PNG with a class number for each pixel, 255 where none is meant. Where 0 means that too, as in ADE20K, set
`data.ignore_zero`: the classes then count from 1. `ROOT/classes.txt`, one name a line, names the classes; without it
`data.classes` says how many there are.

Unusual: pictures are judged in the middle, scaled to a shorter side of `data.size` and cropped to a square, so that
batches are whole. Published numbers are of whole pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .classification import split_indices
from .loading import SeededItems
from .splits import IGNORE_INDEX, Augmentation, DataSettings, Splits

_log = logging.getLogger(__name__)

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class PicturesWithMasks(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """(picture [3, size, size] normalised, mask int64 [size, size]) for pairs of files."""

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], transform: v2.Transform, *, classes: int, ignore_zero: bool
    ) -> None:
        self.pairs, self.transform, self.classes, self.ignore_zero = pairs, transform, classes, ignore_zero

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture_file, mask_file = self.pairs[index]
        with Image.open(picture_file) as file:
            picture = tv_tensors.Image(file.convert("RGB"))
        mask = self._read_mask(mask_file)
        if mask.shape != picture.shape[-2:]:
            raise ValueError(
                f"{mask_file} is {list(mask.shape)}, its picture {list(picture.shape[-2:])}; sizes must agree"
            )
        picture, mask = self.transform(picture, tv_tensors.Mask(mask))
        return picture.as_subclass(Tensor), mask.as_subclass(Tensor).long()

    def _read_mask(self, path: Path) -> Tensor:
        with Image.open(path) as file:
            mask = np.array(file)
        if mask.ndim != 2:
            raise ValueError(
                f"{path} has {mask.ndim} axes; a mask holds one class number a pixel (grey or palette PNG)"
            )
        if self.ignore_zero:  # 0 becomes 255, 1 becomes 0
            mask = np.where((mask == 0) | (mask == IGNORE_INDEX), IGNORE_INDEX, mask - 1)
        wrong = mask[(mask >= self.classes) & (mask != IGNORE_INDEX)]
        if wrong.size:
            raise ValueError(
                f"{path} holds class {wrong.max()}, but there are {self.classes} classes, counted from 0; check "
                f"data.classes and data.ignore_zero (now {str(self.ignore_zero).lower()})"
            )
        return torch.from_numpy(mask.astype(np.uint8))


def load_mask_folder(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Training and validation pictures of ROOT; without a validation folder some training pictures are held out."""
    root = Path(config.root or "")
    if config.root is None or not (root / "images").is_dir():
        raise ValueError(f"data.root={config.root}: there is no folder {root / 'images'} with pictures")
    names = _class_names(root, config.classes)
    train = _pairs(root, ("training", "train"))
    val = _pairs(root, ("validation", "val"))
    if not train:
        raise ValueError(f"{root / 'images'} needs a folder training (or train) with pictures")
    if not val:
        chosen, kept = split_indices(len(train), config.held_out, seed)
        train, val = [train[index] for index in chosen], [train[index] for index in kept]
    order = np.random.default_rng(seed).permutation(len(train))[: config.limit]

    def make(pairs: Sequence[tuple[Path, Path]], transform: v2.Transform) -> SeededItems:
        return SeededItems(
            PicturesWithMasks(pairs, transform, classes=len(names), ignore_zero=config.ignore_zero), range(len(pairs))
        )

    judged = make(val, _evaluation(config.size))
    _log.warning("the final numbers are those of the validation pictures: this layout has no others")
    return Splits(
        train=make([train[index] for index in order], _training(config.size, augmentation)),
        val=judged,
        test=judged,
        classes=names,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=config.size,
        origin=f"pictures and masks in {root}",
        dense=True,
    )


def _training(size: int, augmentation: Augmentation) -> v2.Transform:
    low, high = (round(size * factor) for factor in augmentation.resize)
    fill = {tv_tensors.Image: [round(255 * value) for value in IMAGENET_DEFAULT_MEAN], tv_tensors.Mask: IGNORE_INDEX}
    strength = augmentation.color_jitter
    return v2.Compose(
        [
            v2.RandomShortestSize(list(range(low, high + 1))),
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),  # pyright: ignore[reportArgumentType]  # by kind
            v2.RandomHorizontalFlip(augmentation.hflip),
            *([v2.ColorJitter(strength, strength, strength)] if strength else []),
            *_normalised(),
        ]
    )


def _evaluation(size: int) -> v2.Transform:
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size), *_normalised()])


def _normalised() -> list[v2.Transform]:
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return [to_float, v2.Normalize(list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))]


def _pairs(root: Path, splits: tuple[str, str]) -> list[tuple[Path, Path]]:
    """Every picture of a split with its mask, sorted; none where there is no such folder."""
    folder = next((root / "images" / name for name in splits if (root / "images" / name).is_dir()), None)
    if folder is None:
        return []
    masks = next((root / name for name in ("annotations", "masks") if (root / name).is_dir()), None)
    if masks is None:
        raise ValueError(f"{root} has neither annotations/ nor masks/; the masks of images/{folder.name} belong there")
    pairs = []
    for picture in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES):
        mask = (masks / folder.name / picture.relative_to(folder)).with_suffix(".png")
        if not mask.is_file():
            raise ValueError(f"{picture} has no mask; it was expected at {mask}")
        pairs.append((picture, mask))
    return pairs


def _class_names(root: Path, count: int | None) -> tuple[str, ...]:
    file = root / "classes.txt"
    names = tuple(line for line in file.read_text().splitlines() if line.strip()) if file.is_file() else None
    if names is None and count is None:
        raise ValueError(f"data.classes is not set, and there is no {file} with a name a line; one of them is needed")
    if names is not None and count not in (None, len(names)):
        raise ValueError(
            f"data.classes={count}, but {file} names {len(names)}; set data.classes=null or correct the file"
        )
    names = names or tuple(str(index) for index in range(count or 0))
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise ValueError(f"masks can hold 2 to {IGNORE_INDEX} classes; got {len(names)}")
    return names
