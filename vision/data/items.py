"""Batches from a data set that is asked for one picture after another, and what becomes of a picture that is damaged.

In training an unreadable picture is replaced by another one of the same set, drawn with the seed of its place, so that
the same run sees the same pictures again. Which files those are is counted, and too many are an error. In evaluation
one is an error: numbers of other pictures are other numbers.
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
    """Anything with a length and items (picture, target). An item that is damaged raises `UnreadableError`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


Transform = Callable[[Any, Any], tuple[Any, Any]]
"""Of an item: (picture, target) to tensors."""


class SeededItems:
    """Answers requests from `dataset`, seeding each picture's augmentation.

    `transforms` makes the transform for a size, None being the usual one. `max_bad` is how many files may be
    unreadable; None: not one.
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
        """The unreadable files met so far, and why each is. Filled in the main process, see `note`."""
        self._make, self._made = transforms, {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]:
        return self.answer(request)[0]

    def answer(self, request: Request) -> tuple[tuple[Tensor, Tensor], dict[str, str]]:
        """The batch, and the files that could not be read for it with the reasons."""
        transform, bad, items = self._transform(request.size), {}, []
        seen: Counter[int] = Counter()
        for index in request.indices:
            # Repeats of a picture, which may meet in a batch, are augmented differently.
            items.append(transform(*self._read(index, mix_seed(request.seed, index, seen[index]), bad)))
            seen[index] += 1
        images, targets = default_collate(items)
        return (images, targets), bad

    def note(self, bad: Mapping[str, str]) -> None:
        """Takes over what was found, wherever that was: names each file once, and refuses too many."""
        for file, reason in bad.items():
            if file not in self.bad:
                _log.warning("skipped %s, which cannot be read: %s", file, reason)
        self.bad |= bad
        if self.max_bad is not None and len(self.bad) > self.max_bad:
            raise DataError(
                f"{len(self.bad)} training pictures cannot be read, more than data.max_bad={self.max_bad} allows, the "
                f"last of them {list(self.bad)[-1]}; `{CHECK_COMMAND} …` lists all of them"
            )

    def _transform(self, size: int | None) -> Transform:
        if size not in self._made:
            self._made[size] = self._make(size) if self._make else _unchanged
        return self._made[size]

    def _read(self, index: int, seed: int, bad: dict[str, str]) -> tuple[Any, Any]:
        """The item, or in training another one where it is damaged. Leaves the random generators seeded."""
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
