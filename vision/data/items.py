"""Batches of data sets that return one picture at a time, with a policy for damaged pictures.

In training an unreadable picture is replaced by another one of the same set, which the seed of its place determines, so
that a repeated run sees the same pictures. Such files are counted, and too many are an error. In evaluation a single
one is an error, because it would change the result.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from .loading import Request, mix_seed, seed_everything
from .pictures import CHECK_COMMAND, DataError, UnreadableError

_log = logging.getLogger(__name__)

_MOST_DRAWS = 50  # unreadable pictures in a row, after which there is no point in drawing another


class Items(Protocol):
    """A data set with a length and items (picture, target). A damaged item raises `UnreadableError`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


Transform = Callable[[Any, Any], tuple[Any, Any]]
"""Turns an item (picture, target) into tensors."""


class SeededItems:
    """Batches of `dataset` in which each picture's augmentation has its own seed.

    Args:
        indices: the items of `dataset` that are used; all by default.
        transforms: makes the transform for a picture size; None is the default size.
        max_bad: how many unreadable files are replaced before it is an error; None replaces none.
    """

    def __init__(
        self,
        dataset: Items,
        indices: Sequence[int] | None = None,
        *,
        transforms: Callable[[int | None], Transform] | None = None,
        max_bad: int | None = None,
    ) -> None:
        self.dataset, self.max_bad = dataset, max_bad
        self.indices = range(len(dataset)) if indices is None else indices
        self.bad: dict[str, str] = {}
        """Unreadable files so far and the reason for each. Filled in the main process by `note`."""
        self._make, self._made = transforms, {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]:
        return self.answer(request)[0]

    def answer(self, request: Request) -> tuple[tuple[Tensor, Tensor], dict[str, str]]:
        """Return the batch, and the files that could not be read for it with the reasons."""
        transform, bad, items = self._transform(request.size), {}, []
        seen: Counter[int] = Counter()
        for index in request.indices:
            # Repeats of a picture, which may meet in a batch, are augmented differently.
            items.append(transform(*self._read(index, mix_seed(request.seed, index, seen[index]), bad)))
            seen[index] += 1
        images, targets = default_collate(items)
        return (images, targets), bad

    def name_of(self, index: int) -> str | int:
        """The file of a picture of this set, or its row in `dataset` where pictures are not files of their own."""
        row = int(self.indices[index])
        name_of = getattr(self.dataset, "name_of", None)
        return row if name_of is None else name_of(row)

    def note(self, bad: Mapping[str, str]) -> None:
        """Record unreadable files, also those of other processes: log each once, and raise a DataError if there are too
        many."""
        for file, reason in bad.items():
            if file not in self.bad:
                _log.warning("skipped %s, which cannot be read: %s", file, reason)
        self.bad |= bad
        if self.max_bad is not None and len(self.bad) > self.max_bad:
            raise DataError(
                f"{len(self.bad)} training picture{'s' * (len(self.bad) > 1)} cannot be read, more than "
                f"data.max_bad={self.max_bad} allows, the last of them {list(self.bad)[-1]}; "
                f"`{CHECK_COMMAND} …` lists all of them"
            )

    def _transform(self, size: int | None) -> Transform:
        if size not in self._made:
            self._made[size] = self._make(size) if self._make else _unchanged
        return self._made[size]

    def _read(self, index: int, seed: int, bad: dict[str, str]) -> tuple[Any, Any]:
        """Read an item, or in training another one if it is damaged. The random generators are seeded afterwards."""
        others = np.random.default_rng(seed)
        for _ in range(_MOST_DRAWS):
            seed_everything(seed)
            try:
                return self.dataset[self.indices[index]]
            except UnreadableError as error:
                if self.max_bad is None:
                    raise
                bad[error.file] = error.reason
                index = int(others.integers(len(self.indices)))
        file, reason = bad.popitem()
        raise DataError(f"{_MOST_DRAWS} training pictures in a row cannot be read, {file} among them: {reason}")


def _unchanged(picture: Any, target: Any) -> tuple[Any, Any]:
    return picture, target
