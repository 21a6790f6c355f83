"""Reproducible batches, the basis of exact resumption.

The order of an epoch is a function of (seed, epoch), the augmentation of a batch one of (seed, epoch, rank, batch).
Unusual:

* A data set implements `__getitems__(request)`, which returns a whole batch. PyTorch's loader calls it if it exists, so
  that pictures in memory are augmented by vectorised operations, and the seed of a batch does not depend on the worker.
* `ResumableLoader` counts the batches that it has returned. Lightning saves the count in the checkpoint and restores it
  before the first batch; otherwise a run resumed within an epoch would see its first batches again. The count also
  allows dead workers to be replaced without a change in the batches.
* Evaluation shards hold each picture once. PyTorch's DistributedSampler repeats some to make the ranks equal, which
  falsifies every metric.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .pictures import CHECK_COMMAND, DataError
from .workers import Crew, WorkerError, outlive_the_step

_log = logging.getLogger(__name__)


class Request(NamedTuple):
    """A sampler's request for a batch: indices, the seed of the augmentation, and the side of the pictures, or None for
    the size of the data set."""

    indices: list[int]
    seed: int
    size: int | None = None


class Batches(Protocol):
    """A data set of this library: it has a length and answers a request with (pictures, targets).

    One whose pictures can be told apart also has `name_of(index)`: the file of a picture, or its row in the original
    data set. A stream has no such method.
    """

    def __len__(self) -> int: ...

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]: ...


def mix_seed(*parts: int) -> int:
    """Mix numbers into one 63-bit seed; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random; timm's transforms, mixup and drop path draw from all three."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class EpochBatches(Sampler[Request]):
    """A batch sampler that yields the requests of one rank for one epoch.

    Training pictures are shuffled, and the incomplete last batch is dropped.

    Args:
        repeats: how many times each picture appears in an epoch, each time with another augmentation. The epoch keeps
            its length and so shows fewer pictures (repeated augmentation: E. Hoffer et al., Augment your batch, CVPR
            2020; the repeats of a picture go to different ranks, as in DeiT).
        sizes: side of the training pictures by the epoch from which it applies; before the first such epoch it is that
            of the data set.
    """

    workers: int | None = None
    """The number of loading processes, if the order of pictures depends on it."""

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
        """The sampler itself: Lightning calls `set_epoch` on the `sampler` attribute of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    @property
    def first(self) -> int:
        """The index of the first request of an iteration."""
        return self.start

    def size_at(self, epoch: int) -> int | None:
        return self.sizes.get(max((first for first in self.sizes if first <= epoch), default=-1))

    def __len__(self) -> int:
        if self.training:
            return self.length // (self.batch_size * self.world_size)
        # The length of the largest shard: a rank with fewer pictures ends with an empty batch.
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Request]:
        return self._requests(self.epoch, self.start)

    def _requests(self, epoch: int, start: int) -> Iterator[Request]:
        order, size = np.arange(self.length), None
        if self.training:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            order = order.repeat(self.repeats)[: len(self) * self.batch_size * self.world_size]
            size = self.size_at(epoch)
        # Every rank gets the same number of batches, so that none waits for another; sizes differ by at most one.
        parts = np.array_split(order[self.rank :: self.world_size], max(len(self), 1))
        for index, part in enumerate(parts):
            if index >= start:
                yield Request(part.tolist(), mix_seed(self.seed, epoch, self.rank, index), size)


class Answer(NamedTuple):
    """A worker's result: a batch and the files that could not be read for it, or an error message."""

    batch: Any
    bad: dict[str, str]
    error: str | None = None


class _Answering:
    """Wraps a data set and returns its errors as values; PyTorch would wrap them in the traceback of a worker."""

    def __init__(self, dataset: Batches) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, request: Request, /) -> Answer:
        if not request.indices:  # fewer pictures than the other processes have: an empty batch of the right shape
            answer = self.__getitems__(request._replace(indices=[0]))
            return answer if answer.error else answer._replace(batch=tuple(part[:0] for part in answer.batch))
        answer = getattr(self.dataset, "answer", None)
        try:
            batch, bad = answer(request) if answer is not None else (self.dataset.__getitems__(request), {})
            return Answer(batch, bad)
        except DataError as error:
            return Answer(None, {}, str(error))


class ResumableLoader(DataLoader):
    """A DataLoader that saves and restores its position by `state_dict` and `load_state_dict`.

    If a worker dies, or returns nothing for `timeout` seconds, all workers are restarted at the same batch, up to
    `restarts` times in an epoch; then it is an error.
    """

    def __init__(
        self,
        dataset: Batches,
        batches: EpochBatches,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 120,
        restarts: int = 0,
    ) -> None:
        super().__init__(
            _Answering(dataset),  # pyright: ignore[reportArgumentType]
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=timeout if workers else 0,
            worker_init_fn=outlive_the_step,
            generator=torch.Generator(),
        )
        self.source, self.batches, self.restarts = dataset, batches, restarts
        self._handed_out = self._first = 0

    def __iter__(self) -> Iterator[Any]:
        self._handed_out = began = self.batches.start
        failures = pictures = 0
        while True:
            crew = Crew(self._begin)
            try:
                for number, answer in enumerate(crew, self._first + 1):
                    batch = self._accept(answer)
                    self._handed_out = max(number, self._handed_out)
                    if batch is not None:
                        pictures += len(batch[0])
                        yield batch
                break
            except WorkerError as error:
                failure = str(error)
            finally:
                crew.dismiss()
            failures += 1
            if failures > self.restarts:
                raise WorkerError(f"{failure}. data.worker_restarts={failures} would start the workers again")
            _log.warning("%s; starting the workers again, at batch %d", failure, self._handed_out)
        self._report()
        if not (self.batches.training or began) and self.batches.world_size == 1 and pictures != len(self.source):
            raise DataError(
                f"{pictures} of {len(self.source)} pictures could be read; what is left out changes a result"
            )

    def _begin(self) -> Iterator[Any]:
        """Start PyTorch's iterator at the first batch that was not returned yet; `batches.start` keeps its value."""
        assert self.generator is not None
        self.generator.manual_seed(mix_seed(self.batches.seed, self.batches.epoch))  # from which workers are seeded
        start, self.batches.start = self.batches.start, self._handed_out
        self._first = self.batches.first
        try:
            return super().__iter__()
        finally:
            self.batches.start = start

    def _accept(self, answer: Answer) -> Any:
        if answer.error is not None:
            raise DataError(answer.error)
        if answer.bad:
            self.source.note(answer.bad)  # pyright: ignore[reportAttributeAccessIssue]  # who answers so takes notes
        return answer.batch

    def _report(self) -> None:
        if self.batches.training and (bad := getattr(self.source, "bad", None)):
            _log.warning(
                "unreadable training pictures so far: %d, each replaced by another; `%s …` lists them",
                len(bad),
                CHECK_COMMAND,
            )

    def state_dict(self) -> dict[str, Any]:
        state = {"epoch": self.batches.epoch, "batches": self._handed_out, "of": len(self.batches)}
        further = {"bad": dict(getattr(self.source, "bad", {})), "workers": self.batches.workers}
        return state | {name: value for name, value in further.items() if value not in (None, {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        count = state.get("of", len(self.batches))
        finished = state["batches"] >= count
        if not finished and state["batches"]:
            self._refuse_other(count, state.get("workers"))
        self.batches.epoch = state["epoch"] + finished
        self.batches.start = 0 if finished else state["batches"]
        if state.get("bad"):
            self.source.note(state["bad"])  # pyright: ignore[reportAttributeAccessIssue]

    def _refuse_other(self, count: int, workers: int | None) -> None:
        """Raise a ValueError if the settings on which the rest of the epoch depends have changed."""
        if count != len(self.batches):
            raise ValueError(
                f"the checkpoint is from inside an epoch of {count} batches a process, which are {len(self.batches)} "
                "now; the number of processes and train.batch_size can change after an epoch, not within"
            )
        if workers != self.batches.workers:
            raise ValueError(
                f"data.workers={self.batches.workers}: this epoch of a stream was begun with {workers}, and its order "
                "depends on that; go on with as many"
            )


def _as_is(batch: Any) -> Any:
    return batch
