"""Batches that are the same whenever and wherever they are asked for: the ground under exact resumption.

The order of an epoch is a function of (seed, epoch), the augmentation of a batch a function of (seed, epoch, rank,
batch). Unusual:

* A data set here answers `__getitems__(request)` with a finished batch. PyTorch's loader calls it when it exists,
  which lets pictures in memory be augmented by one vectorised operation, and gives every batch its seed, whatever
  worker makes it.
* `ResumableLoader` counts what it has handed out. Lightning stores that in the checkpoint and gives it back before
  the first batch; without it a run resumed inside an epoch would see the epoch's first batches again. For the same
  reason workers that have died can be replaced, and nothing changes.
* Evaluation shards hold each picture once. PyTorch's DistributedSampler repeats some to make the ranks equal, and so
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

    workers: int | None = None
    """How many processes load, where the order of pictures depends on that."""

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

    @property
    def first(self) -> int:
        """The number of the first request of an iteration."""
        return self.start

    def size_at(self, epoch: int) -> int | None:
        return self.sizes.get(max((first for first in self.sizes if first <= epoch), default=-1))

    def __len__(self) -> int:
        if self.training:
            return self.length // (self.batch_size * self.world_size)
        # The largest share's: of pictures that come one by one, a rank with fewer ends with an empty batch.
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Request]:
        return self._requests(self.epoch, self.start)

    def _requests(self, epoch: int, start: int) -> Iterator[Request]:
        order, size = np.arange(self.length), None
        if self.training:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            order = order.repeat(self.repeats)[: len(self) * self.batch_size * self.world_size]
            size = self.size_at(epoch)
        # As many batches on each rank, so that no rank waits for another; sizes differ by one at most.
        parts = np.array_split(order[self.rank :: self.world_size], max(len(self), 1))
        for index, part in enumerate(parts):
            if index >= start:
                yield Request(part.tolist(), mix_seed(self.seed, epoch, self.rank, index), size)


class Answer(NamedTuple):
    """What comes from a worker: a batch and the files that could not be read for it, or the words of an error."""

    batch: Any
    bad: dict[str, str]
    error: str | None = None


class _Answering:
    """A data set whose errors arrive as what they are: PyTorch would wrap them in the traceback of a worker."""

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
    """A loader that knows how far it is, through `state_dict` and `load_state_dict`.

    A worker that dies, or leaves the others waiting for `timeout` seconds, is an error, or `restarts` times in an epoch
    the reason to start all of them again at the same batch.
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
        """PyTorch's iterator, from the first batch that was not handed out. Where the epoch began stays as it was."""
        assert self.generator is not None
        self.generator.manual_seed(mix_seed(self.batches.seed, self.batches.epoch))  # what workers' own seeds come from
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
        """An epoch goes on only as it was begun."""
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
