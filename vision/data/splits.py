"""What a data set is to the rest of the library: three sets of batches and the facts a model and a picture need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from .loading import Batches

IGNORE_INDEX = 255
"""Label of pixels that count neither for the loss nor for a metric."""


class Augmentation(Protocol):
    """The settings that a data set's own augmentation reads."""

    shift: int
    hflip: float
    scale: list[float]
    resize: list[float]
    random_interpolation: bool
    color_jitter: float
    auto_augment: str | None
    erasing: float


class DataSettings(Protocol):
    """The settings that say which pictures are wanted, and how many."""

    root: str | None
    download: bool
    size: int
    crop: float | None
    interpolation: Literal["bilinear", "bicubic"]
    held_out: float
    limit: int | None
    scenes: int
    classes: int | None
    ignore_zero: bool
    dataset: str | None
    train_split: str
    val_split: str | None
    test_split: str | None
    max_bad: int


@dataclass(frozen=True)
class Splits:
    """Batches are (pictures float [B, C, size, size], labels int64 [B], or [B, size, size] where `dense`)."""

    train: Batches
    val: Batches
    test: Batches
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    origin: str
    dense: bool = False

    @property
    def channels(self) -> int:
        return len(self.mean)
