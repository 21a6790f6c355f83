"""Running out of memory gives advice, exit code 1, and a checkpoint to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.training.build import checkpoint_gradients
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.failures import OutOfMemory, memory_advice
from mixerzoo.vision.training.settings import ConfigError
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
        *("train.grad_checkpointing=true", "a data.size below 32", "fewer data.workers than 4"),
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
    config.train.batch_size, config.train.precision, config.train.grad_checkpointing = 1, "bf16-mixed", True
    with pytest.raises(OutOfMemory) as caught, memory_advice(config):
        _cuda()
    assert not any(word in str(caught.value) for word in ("batch_size", "bf16", "checkpointing"))
    with pytest.raises(RuntimeError, match="shape"), memory_advice(config):
        raise RuntimeError("shape mismatch")


def _kept_and_gradients(model: torch.nn.Module, images: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """Return how many numbers autograd keeps for the backward pass, and the gradients of all parameters."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    model.zero_grad()
    torch.manual_seed(1)  # of drop path
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images).square().mean()
    loss.backward()
    return kept, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", ["ours", "timm", pytest.param("segmenter", marks=pytest.mark.slow)])
def test_checkpointing_keeps_fewer_activations_and_the_same_gradients(kind: str) -> None:
    name = "vit_tiny_patch16_224" if kind == "timm" else "nat_mini"
    own: dict[str, Any] = {"img_size": 64, "depth": 3} if kind == "timm" else {"depths": [2, 2, 2, 2], "embed_dim": 16}
    if kind == "segmenter":
        model: torch.nn.Module = build_segmenter(name, 3, head={"name": "semantic_fpn", "channels": 8}, **own)
    else:
        model = timm.create_model(name, num_classes=3, drop_path_rate=0.3, **own)
    images = torch.randn(2, 3, 64, 64)
    before, plain = _kept_and_gradients(model.train(), images)
    checkpoint_gradients(model, name)
    after, recomputed = _kept_and_gradients(model, images)
    assert after < 0.7 * before
    assert len(plain) == len(recomputed)
    for one, two in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "crossvit_9_240"], ids=["no method", "refuses"])
def test_a_model_that_cannot_recompute_activations_is_an_error(model: Any) -> None:
    network = timm.create_model(model) if isinstance(model, str) else model
    with pytest.raises(ConfigError, match=r"grad_checkpointing=true: it cannot recompute.*; set it to false"):
        checkpoint_gradients(network, "it")


def fill(batch: int) -> None:
    """In the process of the run: make it run out of memory in the batch with this number."""
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
