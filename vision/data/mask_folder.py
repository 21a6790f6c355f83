"""Segmentation of your own pictures: a folder of pictures beside a folder of masks, in ADE20K's layout.

    ROOT/images/training/….jpg    ROOT/annotations/training/….png     (also `train`; masks also below `masks`)
    ROOT/images/validation/….jpg  ROOT/annotations/validation/….png   (also `val`)

A mask is a PNG with a class number for each pixel, 255 where none is meant. Where 0 means that too, as in ADE20K, set
`data.ignore_zero`: the classes then count from 1. `ROOT/classes.txt`, one name a line, names the classes; without it
`data.classes` says how many there are.

Unusual: validation and test pictures keep their own size, one to a batch, as published numbers are of whole pictures.
All masks are read before training begins: one wrong label would otherwise end it at a random step.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .classification import split_indices
from .fashion_mnist import cache_folder
from .items import SeededItems
from .pictures import CHECK_COMMAND, DataError, UnreadableError, picture_size, read_picture, reason_of
from .splits import IGNORE_INDEX, Augmentation, DataSettings, Splits

_log = logging.getLogger(__name__)

FOLDERS = {"train": ("training", "train"), "val": ("validation", "val")}  # of a split, either name
_LONG = 2.0  # seconds that checking the masks may take each time
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class PicturesWithMasks:
    """(picture, mask) as tv_tensors of one size, for pairs of files."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], *, classes: int, ignore_zero: bool) -> None:
        self.pairs, self.classes, self.ignore_zero = pairs, classes, ignore_zero

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        picture_file, mask_file = self.pairs[index]
        picture = tv_tensors.Image(read_picture(picture_file))
        mask = read_mask(mask_file, self.classes, ignore_zero=self.ignore_zero)
        _check_sizes(mask_file, mask.shape, tuple(picture.shape[-2:]))
        return picture, tv_tensors.Mask(torch.from_numpy(mask))


def read_mask(path: Path, classes: int, *, ignore_zero: bool) -> np.ndarray:
    """uint8 [H, W]: the class of each pixel, or `IGNORE_INDEX`."""
    try:
        with Image.open(path) as file:
            mask = np.array(file)
            mode = file.mode
    except Exception as error:  # as when a picture is read
        raise UnreadableError(str(path), reason_of(path, error)) from error
    if mask.ndim != 2:
        colours = ", ".join(
            str(tuple(colour.tolist())) for colour in np.unique(mask.reshape(-1, mask.shape[-1]), axis=0)[:3]
        )
        raise DataError(
            f"{path} is {mode}, with colours such as {colours}; a mask holds one class number a pixel, as a grey or "
            "palette PNG"
        )
    labels = np.unique(mask)
    highest = classes if ignore_zero else classes - 1
    if unknown := [int(label) for label in labels if not 0 <= label <= highest and label != IGNORE_INDEX]:
        shown = ", ".join(map(str, unknown[:8])) + (", …" if len(unknown) > 8 else "")
        raise DataError(
            f"{path} holds label{'s' * (len(unknown) > 1)} {shown}, but there are {classes} classes, counted from "
            f"{int(ignore_zero)}; check data.classes and data.ignore_zero (now {str(ignore_zero).lower()})"
        )
    if ignore_zero:  # 0 becomes 255, 1 becomes 0
        mask = np.where((mask == 0) | (mask == IGNORE_INDEX), IGNORE_INDEX, mask - 1)
    return mask.astype(np.uint8)


def problem_of(picture_file: Path, mask_file: Path, classes: int, *, ignore_zero: bool) -> DataError | None:
    """What is wrong with a mask beside its picture, of which only the header is read."""
    try:
        mask = read_mask(mask_file, classes, ignore_zero=ignore_zero)
        _check_sizes(mask_file, mask.shape, picture_size(picture_file))
    except DataError as error:
        return error
    return None


def _check_sizes(mask_file: Path, mask: tuple[int, ...], picture: tuple[int, ...]) -> None:
    if tuple(mask) != tuple(picture):
        raise DataError(f"{mask_file} is {list(mask)}, its picture {list(picture)}; sizes must agree")


def _check_all(pairs: Sequence[tuple[Path, Path]], classes: int, *, ignore_zero: bool) -> None:
    """Refuses masks that cannot be meant, before training finds them after hours. Reads each once: where that takes
    long, the cache folder remembers that these very files were right."""
    facts = [
        f"{file} {found.st_size} {found.st_mtime_ns}" for pair in pairs for file in pair for found in [file.stat()]
    ]
    key = hashlib.sha256("\n".join([f"{classes} {ignore_zero}", *facts]).encode()).hexdigest()
    known = cache_folder() / "checked" / key
    if known.exists() or os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":  # once for all processes
        return
    started = time.monotonic()
    _log.info("checking %d masks", len(pairs))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        found = pool.map(lambda pair: problem_of(pair[0], pair[1], classes, ignore_zero=ignore_zero), pairs)
        wrong = [error for error in found if error is not None and not isinstance(error, UnreadableError)]
    if wrong:
        more = f" ({len(wrong)} such masks; `{CHECK_COMMAND} …` lists them)" if len(wrong) > 1 else ""
        raise DataError(f"{wrong[0]}{more}")
    if time.monotonic() - started > _LONG:
        with contextlib.suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()


def load_mask_folder(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Training and validation pictures of ROOT; without a validation folder some training pictures are held out."""
    root = Path(config.root or "")
    if config.root is None or not (root / "images").is_dir():
        raise ValueError(f"data.root={config.root}: there is no folder {root / 'images'} with pictures")
    names = class_names(root, config.classes)
    train, val = (_pairs(root, folders) for folders in FOLDERS.values())
    if not train:
        raise ValueError(f"{root / 'images'} needs a folder training (or train) with pictures")
    if not val:
        chosen, kept = split_indices(len(train), config.held_out, seed)
        train, val = [train[index] for index in chosen], [train[index] for index in kept]
    order = np.random.default_rng(seed).permutation(len(train))[: config.limit]

    train = [train[index] for index in order]
    _check_all([*train, *val], len(names), ignore_zero=config.ignore_zero)
    augmented, evaluated = MaskTransforms(config.size, augmentation), MaskTransforms(config.size, None)

    def make(pairs: Sequence[tuple[Path, Path]], transforms: MaskTransforms, max_bad: int | None = None) -> SeededItems:
        dataset = PicturesWithMasks(pairs, classes=len(names), ignore_zero=config.ignore_zero)
        return SeededItems(dataset, transforms=transforms, max_bad=max_bad)

    judged = make(val, evaluated)
    _log.warning("the final numbers are those of the validation pictures: this layout has no others")
    return Splits(
        train=make(train, augmented, config.max_bad),
        val=judged,
        test=judged,
        classes=names,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=config.size,
        origin=f"pictures and masks in {root}",
        dense=True,
        whole=True,
    )


@dataclass(frozen=True)
class MaskTransforms:
    """Transforms of a picture and its mask, for any size; without augmentation those of evaluation, which keep it."""

    size: int
    augmentation: Augmentation | None

    def __call__(self, size: int | None) -> MaskTransform:
        size = size or self.size
        if self.augmentation is None:
            return MaskTransform(v2.Compose(_normalised()))
        return MaskTransform(_training(size, self.augmentation))


@dataclass(frozen=True)
class MaskTransform:
    """Moves picture and mask alike, to tensors [3, height, width] and int64 [height, width]."""

    of_both: v2.Transform

    def __call__(self, picture: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[Tensor, Tensor]:
        picture, mask = self.of_both(picture, mask)
        return picture.as_subclass(Tensor), mask.as_subclass(Tensor).long()


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


def _normalised() -> list[v2.Transform]:
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return [to_float, v2.Normalize(list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))]


def _pairs(root: Path, names: Sequence[str]) -> list[tuple[Path, Path]]:
    """Every picture of a split with its mask, sorted; none where there is no such folder."""
    pairs = expected_pairs(root, names)
    for picture, mask in pairs:
        if not mask.is_file():
            raise ValueError(f"{picture} has no mask; it was expected at {mask}")
    return pairs


def expected_pairs(root: Path, names: Sequence[str]) -> list[tuple[Path, Path]]:
    """The same, with the places where masks should be. `names`: of the split's folder, one of them or another."""
    folder = next((root / "images" / name for name in names if (root / "images" / name).is_dir()), None)
    if folder is None:
        return []
    masks = next((root / name for name in ("annotations", "masks") if (root / name).is_dir()), None)
    if masks is None:
        raise ValueError(f"{root} has neither annotations/ nor masks/; the masks of images/{folder.name} belong there")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    return [(picture, (masks / folder.name / picture.relative_to(folder)).with_suffix(".png")) for picture in pictures]


def class_names(root: Path, count: int | None) -> tuple[str, ...]:
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
