"""Reads masks from files, checks them, and pairs them with their pictures.

Masks of all layouts (mask_layouts.py) are read here. `Labels` states which values or colours a mask file may hold and
the class of each; anything else is an error that names the file and its content. All masks are read before training
begins, because a wrong label would otherwise end it at a random step.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from .fetching import cache_folder
from .pictures import CHECK_COMMAND, DataError, UnreadableError, picture_size, read_picture, reason_of

_log = logging.getLogger(__name__)

Pair = tuple[Path, Path]
"""A picture and its mask."""
_LONG = 2.0  # seconds; the result of a check that takes longer is remembered
_UNKNOWN = -1


@dataclass(frozen=True)
class Labels:
    """The meaning of mask files: the class, or `IGNORE_INDEX`, of each value and, for painted masks, of each colour.

    Args:
        meaning: the end of the error message "the file holds label 7, but …", with the settings to check.
    """

    classes: tuple[str, ...]
    of_value: Mapping[int, int]
    meaning: str
    of_colour: Mapping[tuple[int, int, int], int] = field(default_factory=dict)

    @cached_property
    def _of_byte(self) -> np.ndarray:
        table = np.full(256, _UNKNOWN, np.int16)
        for value, label in self.of_value.items():
            table[value] = label
        return table

    def of_values(self, values: np.ndarray) -> np.ndarray:
        """Map numbers [H, W] to labels, int16 [H, W]; -1 marks unknown numbers."""
        inside = (values >= 0) & (values < 256)
        if values.dtype.kind == "f":  # as a TIFF may hold; fractions are no labels
            inside &= values == np.floor(values)
        return np.where(inside, self._of_byte[np.where(inside, values, 0).astype(np.uint8)], _UNKNOWN)

    def of_colours(self, colours: np.ndarray) -> np.ndarray:
        """Map colours, RGB [H, W, 3], to labels, int16 [H, W]; -1 marks unknown colours."""
        packed = pack_colours(colours)
        order = sorted(self.of_colour)
        known = pack_colours(np.array(order))
        place = np.searchsorted(known, packed).clip(max=len(known) - 1)
        labels = np.array([self.of_colour[colour] for colour in order], np.int16)
        return np.where(known[place] == packed, labels[place], _UNKNOWN)


def pack_colours(colours: np.ndarray) -> np.ndarray:
    """Pack each colour [..., 3] into one number, which preserves the order of colours."""
    return (colours.astype(np.int64) * (1 << 16, 1 << 8, 1)).sum(-1)


class PicturesWithMasks:
    """A data set of (picture, mask), tv_tensors of equal size, read from pairs of files."""

    def __init__(self, pairs: Sequence[Pair], labels: Labels) -> None:
        self.pairs, self.labels = pairs, labels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        picture_file, mask_file = self.pairs[index]
        picture = tv_tensors.Image(read_picture(picture_file))
        mask = read_mask(mask_file, self.labels)
        _check_sizes(mask_file, mask.shape, tuple(picture.shape[-2:]))
        return picture, tv_tensors.Mask(torch.from_numpy(mask))

    def name_of(self, index: int) -> str:
        return str(self.pairs[index][0])


def read_mask(path: Path, labels: Labels) -> np.ndarray:
    """Read the class of each pixel or `IGNORE_INDEX`, uint8 [H, W]; raise a DataError for anything else."""
    try:
        values, mode = _read_values(path)
    except Exception as error:  # as when a picture is read
        raise UnreadableError(str(path), reason_of(path, error)) from error
    painted = values.ndim == 3
    if painted and not (labels.of_colour and mode == "RGB"):
        wanted = "the colours of its classes, as RGB" if labels.of_colour else "one class number a pixel, as a grey or "
        raise DataError(
            f"{path} is {mode}, with colours such as {_listed(_colours(values), 3)}; a mask holds {wanted}"
            + ("" if labels.of_colour else "palette PNG")
        )
    mask = labels.of_colours(values) if painted else labels.of_values(values)
    if (wrong := mask == _UNKNOWN).any():
        found = _colours(values[wrong]) if painted else [str(value) for value in np.unique(values[wrong])]
        name = "colour" if painted else "label"
        raise DataError(f"{path} holds {name}{'s' * (len(found) > 1)} {_listed(found, 8)}, but {labels.meaning}")
    return mask.astype(np.uint8)


def _read_values(path: Path) -> tuple[np.ndarray, str]:
    """Return the pixels of a mask, [H, W] or [H, W, channels], and Pillow's mode, or "mat"."""
    if path.suffix == ".mat":
        from scipy.io import loadmat

        record: Any = loadmat(path)["GTcls"]
        return np.asarray(record["Segmentation"][0, 0]), "mat"
    with Image.open(path) as file:
        values = np.array(file)
        return values.astype(np.uint8) if file.mode == "1" else values, file.mode


def _colours(values: np.ndarray) -> list[str]:
    colours = np.unique(values.reshape(-1, values.shape[-1]), axis=0)
    return [str(tuple(colour.tolist())) for colour in colours]


def _listed(found: Sequence[str], most: int) -> str:
    return ", ".join(found[:most]) + (", …" if len(found) > most else "")


def problem_of(pair: Pair, labels: Labels) -> DataError | None:
    """Check a mask against its picture, of which only the header is read; return the error or None."""
    picture_file, mask_file = pair
    try:
        mask = read_mask(mask_file, labels)
        _check_sizes(mask_file, mask.shape, picture_size(picture_file))
    except DataError as error:
        return error
    return None


def _check_sizes(mask_file: Path, mask: tuple[int, ...], picture: tuple[int, ...]) -> None:
    if tuple(mask) != tuple(picture):
        raise DataError(f"{mask_file} is {list(mask)}, its picture {list(picture)}; sizes must agree")


def check_all(train: Sequence[Pair], judged: Sequence[Pair], labels: Labels) -> None:
    """Raise a DataError for wrong masks, and for unreadable ones among the pairs `judged`, before training begins.

    Unreadable training masks are left to the replacement of unreadable items. Each file is read once; if that takes
    long, the cache folder records that these files are correct, by their paths, sizes and times.
    """
    pairs = [*train, *judged]
    for picture, mask in pairs:
        if not picture.is_file():
            raise ValueError(f"{picture} is not there, but a list of the data set names it")
        if not mask.is_file():
            raise ValueError(f"{picture} has no mask; it was expected at {mask}")
    facts = [
        f"{file} {found.st_size} {found.st_mtime_ns}" for pair in pairs for file in pair for found in [file.stat()]
    ]
    meant = f"{sorted(labels.of_value.items())} {sorted(labels.of_colour.items())}"
    known = cache_folder() / "checked" / hashlib.sha256("\n".join([meant, *facts]).encode()).hexdigest()
    if known.exists() or os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":  # once for all processes
        return
    started = time.monotonic()
    _log.info("checking %d masks", len(pairs))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        found = list(pool.map(lambda pair: problem_of(pair, labels), pairs))
    wrong = [error for error in found[: len(train)] if error is not None and not isinstance(error, UnreadableError)]
    wrong += [error for error in found[len(train) :] if error is not None]
    if wrong:
        more = f" ({len(wrong)} such masks; `{CHECK_COMMAND} …` lists them)" if len(wrong) > 1 else ""
        raise DataError(f"{wrong[0]}{more}")
    if time.monotonic() - started > _LONG and not any(found):  # of what was unreadable nothing is known yet
        with contextlib.suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()
