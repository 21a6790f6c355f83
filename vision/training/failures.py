"""What can end a run although its settings are right: each is told in words that say what to do, and exit code 1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .config import Config


class TrainingError(RuntimeError):
    """Training cannot go on; last.ckpt is from before that. The message says what happened and what to do."""


class OutOfMemory(TrainingError):
    """The memory of the device, or of the machine, is too small for a step."""


@contextlib.contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Makes errors about memory, of the three kinds that torch raises, into one with advice."""
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
        # The steps stay the same: as many pictures in each, in more and smaller batches.
        smaller = next(size for size in range(train.batch_size // 2, 0, -1) if train.batch_size % size == 0)
        advice.append(f"train.batch_size={smaller} train.total_batch={total} train.accumulate=1")
    if train.precision == "32-true":
        advice.append("train.precision=bf16-mixed")
    advice.append(f"a data.size below {config.data.size}")
    if config.data.workers:
        advice.append(f"fewer data.workers than {config.data.workers}")
    return f"Try {', or '.join(advice)}, in a new run; what was saved of this one stays whole"
