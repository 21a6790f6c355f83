"""The interface of data sets: the settings they read, and `Splits`, which they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from .loading import Batches

IGNORE_INDEX = 255
"""Label of pixels that are ignored by the loss and by metrics."""


class Augmentation(Protocol):
    """The settings that the augmentation of a data set reads."""

    shift: int
    hflip: float
    scale: list[float]
    resize: list[float]
    random_interpolation: bool
    crop: list[int] | None
    cat_max_ratio: float
    photometric: bool
    sizes: dict[int, int]
    color_jitter: float
    auto_augment: str | None
    erasing: float


class DataSettings(Protocol):
    """The settings that select the pictures of a data set."""

    source: str
    root: str | None
    download: bool
    size: int
    short_side: int | None
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
    sbd: str | None
    max_bad: int


@dataclass(frozen=True)
class Splits:
    """The training, validation and test batches of a data set, and what models and figures need to know of it.

    Batches are (pictures float [B, C, size, size], labels int64 [B], or [B, size, size] if `dense`).

    Attributes:
        whole: validation and test pictures keep their own height and width, and come one to a batch.
        framed: pictures are prepared as `PicturesInMemory` does it, enlarged by a whole factor and framed with black.
    """

    train: Batches
    val: Batches
    test: Batches
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    origin: str
    dense: bool = False
    whole: bool = False
    framed: bool = False

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.origin}: there is one class only ({', '.join(self.classes) or 'none'}), and nothing to tell it "
                "from; at least 2 are needed"
            )
        for name, part in (("training", self.train), ("validation", self.val), ("test", self.test)):
            if not len(part):
                raise ValueError(f"{self.origin}: there are no {name} pictures")

    @property
    def channels(self) -> int:
        return len(self.mean)
