"""Batches that are the same whenever and wherever they are asked for: the ground under exact resumption.

The order of an epoch is a function of (seed, epoch), the augmentation of a batch a function of (seed, epoch, rank,
batch). Unusual:

* A data set here answers `__getitems__(request)` with a finished batch. PyTorch's loader calls it when it exists,
  which lets pictures in memory be augmented by one vectorised operation, and gives every batch its seed, whatever
  worker makes it.
* `ResumableLoader` counts what it has handed out. Lightning stores that in the checkpoint and gives it back before
  the first batch; without it a run resumed inside an epoch would see the epoch's first batches again.
* Evaluation shards hold each picture once. PyTorch's DistributedSampler repeats some to make the ranks equal, and so
  falsifies every metric."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate


class Request(NamedTuple):
    """What a sampler asks of a data set: which pictures, the seed of their augmentation, and their height and width
    where they are not those of the data set."""

    indices: list[int]
    seed: int
    size: int | None = None


class Batches(Protocol):
    """A data set of this library: it has a length and answers a request with (pictures, targets)."""

    def __len__(self) -> int: ...

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]: ...


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Seeds torch, numpy and random: timm's transforms, mixup and drop path draw from all three."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class EpochBatches(Sampler[Request]):
    """The requests of one rank for one epoch. Training is shuffled and drops the incomplete last batch.

    `repeats` shows each picture so many times in an epoch, differently augmented, and so much fewer pictures: an epoch
    is as long as ever (repeated augmentation: E. Hoffer et al., Augment your batch, CVPR 2020; the repeats of a
    picture land on different ranks, as in DeiT). `sizes` holds, by the epoch from which on it counts, the height and
    width of training pictures; before the first of these epochs they are those of the data set.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        training: bool,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        if training and length < batch_size * world_size:
            raise ValueError(
                f"{length} training pictures do not fill one batch of {batch_size} on {world_size} device(s); "
                f"use train.batch_size={max(length // world_size, 1)} or less"
            )
        self.length, self.batch_size, self.seed, self.training = length, batch_size, seed, training
        self.rank, self.world_size = rank, world_size
        self.repeats, self.sizes = repeats, dict(sizes or {})
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> EpochBatches:
        """Lightning looks for `set_epoch` on the sampler inside a batch sampler; here both are one."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        if self.training:
            return self.length // (self.batch_size * self.world_size)
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Request]:
        return self._requests(self.epoch, self.start)

    def _requests(self, epoch: int, start: int) -> Iterator[Request]:
        order, size = np.arange(self.length), None
        if self.training:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            order = order.repeat(self.repeats)[: len(self) * self.batch_size * self.world_size]
            size = self.sizes.get(max((first for first in self.sizes if first <= epoch), default=-1))
        # As many batches on each rank, so that no rank waits for another; sizes differ by one at most.
        parts = np.array_split(order[self.rank :: self.world_size], max(len(self), 1))
        for index, part in enumerate(parts):
            if index >= start:
                yield Request(part.tolist(), mix_seed(self.seed, epoch, self.rank, index), size)


class ResumableLoader(DataLoader):
    """A loader that knows how far it is, through `state_dict` and `load_state_dict`."""

    def __init__(self, dataset: Batches, batches: EpochBatches, *, workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__(
            dataset,  # pyright: ignore[reportArgumentType]
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=120 if workers else 0,  # a hanging worker is an error, not a silent stop
        )
        self.batches = batches
        self._handed_out = 0

    def __iter__(self) -> Iterator[Any]:
        self._handed_out = self.batches.start
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.batches.epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        finished = state["batches"] >= len(self.batches)
        self.batches.epoch = state["epoch"] + finished
        self.batches.start = 0 if finished else state["batches"]


def _as_is(batch: Any) -> Any:
    return batch


class SeededItems:
    """Answers requests from an ordinary data set of (picture, target), seeding each picture's augmentation."""

    def __init__(self, dataset: Dataset, indices: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.indices = range(len(dataset)) if indices is None else indices  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]:
        items = []
        for index in request.indices:
            seed_everything(mix_seed(request.seed, index))
            items.append(self.dataset[self.indices[index]])
        images, targets = default_collate(items)
        return images, targets
