"""Errors that end a run whose settings are valid (exit code 1); their messages say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .config import Config
from .resume import has_checkpoint


class TrainingError(RuntimeError):
    """Training cannot continue. The message says what happened, what is saved, and what to do."""


class OutOfMemory(TrainingError):
    """The memory of the device or of the machine is too small for a training step."""


class DiskError(TrainingError):
    """A disk accepts no more data: it is full, a quota is exhausted, or it has become read-only."""


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def disk_advice(config: Config) -> Iterator[None]:
    """Convert the errors of a disk that accepts no more data into `DiskError`, with advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        file = error.filename or f"a file of {config.out or 'the run folder'}"
        reason = os.strerror(error.errno)
        raise DiskError(f"{file} could not be written ({reason}). {after_making_room(config.out)}") from error


def after_making_room(folder: str | Path | None) -> str:
    """Return the advice for a run whose folder could not be written; it names only checkpoints that exist."""
    if folder is not None and has_checkpoint(Path(folder)):
        return f"Make room and go on with resume={folder}"
    return "There is nothing to resume yet: make room and start again"


@contextlib.contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Convert the three kinds of out-of-memory errors that torch raises into `OutOfMemory`, with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        where = _where_memory_ended(error)
        if where is None:
            raise
        raise OutOfMemory(f"the memory of the {where} is too small. {_advice(config)}") from error


def _where_memory_ended(error: BaseException) -> str | None:
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "machine"
    return None


def _advice(config: Config) -> str:
    train = config.train
    total = train.total_batch or train.batch_size * train.accumulate * train.processes
    advice = []
    if train.batch_size > 1:
        # Gradient accumulation keeps the number of pictures in a step, so that the optimisation stays the same.
        smaller = next(size for size in range(train.batch_size // 2, 0, -1) if train.batch_size % size == 0)
        advice.append(f"train.batch_size={smaller} train.total_batch={total} train.accumulate=1")
    if train.precision == "32-true":
        advice.append("train.precision=bf16-mixed")
    if not train.grad_checkpointing:
        advice.append("train.grad_checkpointing=true")
    advice.append(f"a data.size below {config.data.size}")
    if config.data.workers:
        advice.append(f"fewer data.workers than {config.data.workers}")
    return f"Try {', or '.join(advice)}, in a new run; what was saved of this one stays whole"
