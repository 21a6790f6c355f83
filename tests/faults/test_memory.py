"""Memory that is too small: words that say what to change, exit code 1, and a checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.failures import OutOfMemory, memory_advice
from mixerzoo.vision.training.tasks import Task
from warm import WarmServer


def _real_cpu_error() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def _cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "where"),
    [(_real_cpu_error, "machine"), (_cuda, "device"), (_python, "machine")],
    ids=["cpu", "cuda", "python"],
)
def test_each_kind_of_error_becomes_advice(fail: Any, where: str) -> None:
    config = Config()
    config.train.batch_size, config.train.accumulate, config.data.workers = 64, 2, 4
    with pytest.raises(OutOfMemory) as caught, memory_advice(config):
        fail()
    message = str(caught.value)
    assert f"the memory of the {where} is too small" in message and "\n" not in message
    for advice in (
        *("train.batch_size=32 train.total_batch=128 train.accumulate=1", "train.precision=bf16-mixed"),
        *("a data.size below 32", "fewer data.workers than 4"),
    ):
        assert advice in message


@pytest.mark.parametrize(("batch_size", "smaller"), [(64, 32), (15, 5), (7, 1)])
def test_the_batch_that_is_advised_divides_the_step(batch_size: int, smaller: int) -> None:
    config = Config()
    config.train.batch_size = batch_size
    advice = f"train.batch_size={smaller} train.total_batch={batch_size} "
    with pytest.raises(OutOfMemory, match=advice), memory_advice(config):
        _cuda()


def test_advice_gives_what_can_still_be_given_and_other_errors_pass() -> None:
    config = Config()
    config.train.batch_size, config.train.precision = 1, "bf16-mixed"
    with pytest.raises(OutOfMemory) as caught, memory_advice(config):
        _cuda()
    assert "batch_size" not in str(caught.value) and "bf16" not in str(caught.value)
    with pytest.raises(RuntimeError, match="shape"), memory_advice(config):
        raise RuntimeError("shape mismatch")


def fill(batch: int) -> None:
    """In the run's process: memory ends in the batch of that number."""
    original = Task.training_step
    left = batch

    def training_step(*arguments: Any) -> Any:
        nonlocal left
        if left == 0:
            torch.empty(1 << 60, dtype=torch.uint8)
        left -= 1
        return original(*arguments)

    Task.training_step = training_step


@pytest.mark.slow
def test_a_run_without_memory_ends_with_advice_and_its_checkpoint(
    warm: WarmServer, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = (*tiny, "train.epochs=2", "train.save_every=1", f"out={tmp_path / 'run'}")
    done = warm.train(*arguments, prepare=fill, prepare_with={"batch": 2}).wait()
    assert done.code == 1 and "Traceback" not in done.err
    assert "error: the memory of the machine is too small. Try train.batch_size=8 train.total_batch=16" in done.err
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2
