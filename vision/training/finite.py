"""Detect NaN or infinite losses and gradients before the optimizer step, record them, and skip the step or stop.

Unusual:

* The check runs once per optimizer step, and all processes share its result: if one stopped alone, the others would
  wait for it in a collective.
* A skipped step also restores the running statistics of batch norm, which the forward pass has changed already. It
  still counts as a step of the learning rate schedule.
* Under float16, gradients overflow regularly and the gradient scaler handles that, so only the loss is checked.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoints import write_text
from .distributed import local_shard
from .failures import TrainingError
from .resume import has_checkpoint

_log = logging.getLogger(__name__)


class NonFiniteLossError(TrainingError):
    """The loss or a gradient is NaN or infinite: training cannot go on."""


class StepGuard(pl.Callback):
    """Checks every optimizer step and skips those that are not finite, at most `skip` in a row; one more raises.

    Details are appended to nonfinite.json in the run folder, which is the trainer's `default_root_dir`.
    """

    def __init__(self, *, skip: int = 0) -> None:
        super().__init__()
        self.skip = skip
        self.skipped = False
        """Whether the latest step was skipped."""
        self.in_row = self.in_epoch = 0
        self._losses: list[tuple[int, Tensor]] = []
        self._buffers: list[Tensor] = []
        self._batch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_row": self.in_row, "in_epoch": self.in_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_row, self.in_epoch = state_dict["in_row"], state_dict["in_epoch"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch_idx
        if self.skip and not self._losses:
            self._buffers = [buffer.detach().clone() for buffer in _network(pl_module).buffers()]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append((self._batch, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        finite = torch.stack([loss.isfinite() for _, loss in losses]).all()
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            finite = finite & _largest_gradient(_network(pl_module), finite.device).isfinite()
        good = bool(finite)
        if trainer.world_size > 1:
            good = trainer.strategy.reduce_boolean_decision(good, all=True)
        self.skipped = not good
        if good:
            self.in_row = 0
            return
        self.in_row += 1
        self.in_epoch += 1
        problem = _describe(trainer, losses)
        path, named = _write_down(trainer, losses)
        if self.in_row > self.skip:
            listed = "pictures" if named else "batches"
            saved = has_checkpoint(Path(trainer.default_root_dir))
            saved = "last.ckpt is from before that" if saved else "no checkpoint was saved before that"
            raise NonFiniteLossError(
                f"{problem}; {path} lists the {listed}, {saved}. Try a lower optim.lr, "
                f"optim.clip_grad=1 or train.skip_nonfinite={max(2 * self.skip, 5)}"
            )
        _log.warning(
            "warning: %s: the step is skipped (%d of %d in a row); see %s", problem, self.in_row, self.skip, path
        )
        optimizer.zero_grad(set_to_none=True)  # optimizers ignore parameters without a gradient
        with torch.no_grad():
            for buffer, before in zip(_network(pl_module).buffers(), self._buffers, strict=True):
                buffer.copy_(before)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.skip:
            for logger in trainer.loggers:
                values = {"train/skipped": float(self.in_epoch), "epoch": trainer.current_epoch}
                logger.log_metrics(values, step=trainer.global_step)
        self.in_epoch = 0


def _network(task: Any) -> nn.Module:
    return task.model


def _largest_gradient(network: nn.Module, device: torch.device) -> Tensor:
    """Return the largest absolute value in all gradients; of a sharded network, in the local shards."""
    gradients: list[Any] = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    shards = [shard for shard in (local_shard(gradient) for gradient in gradients) if shard.numel()]
    if not shards:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm(shards, norm_type=float("inf"))


def _describe(trainer: pl.Trainer, losses: list[tuple[int, Tensor]]) -> str:
    where = f"at epoch {trainer.current_epoch}, batch {losses[-1][0]}"
    bad = next((loss.item() for _, loss in losses if not loss.isfinite()), None)
    if bad is not None:
        return f"the loss is {bad} {where}"
    others = " (the loss of another process, or a gradient)" if trainer.world_size > 1 else ""
    return f"a gradient is not finite {where}{others}"


def _write_down(trainer: pl.Trainer, losses: list[tuple[int, Tensor]]) -> tuple[Path, bool]:
    """Append the batches of the step to the JSON file of this process.

    Returns the path of the file and whether it names the pictures: those of a stream have no names.
    """
    rank = trainer.global_rank
    path = Path(trainer.default_root_dir) / (f"nonfinite-{rank}.json" if rank else "nonfinite.json")
    events = json.loads(path.read_text()) if path.exists() else []
    batches = []
    for index, loss in losses:
        batch: dict[str, Any] = {"batch": index, "loss": str(loss.item() * len(losses))}
        if (names := _pictures(trainer, index)) is not None:
            batch["pictures"] = names
        batches.append(batch)
    events.append({"epoch": trainer.current_epoch, "step": trainer.global_step, "batches": batches})
    write_text(path, json.dumps(events, indent=1, ensure_ascii=False) + "\n")
    return path, "pictures" in batches[-1]


def _pictures(trainer: pl.Trainer, index: int) -> list[str | int] | None:
    """Name the pictures of batch `index` of this epoch by file or by row of the data set; None for a stream."""
    loader: Any = trainer.train_dataloader
    name_of = getattr(loader.source, "name_of", None)
    if name_of is None:
        return None
    batches = copy.copy(loader.batches)
    batches.epoch, batches.start = trainer.current_epoch, index
    return [name_of(number) for number in next(iter(batches)).indices]
