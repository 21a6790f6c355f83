"""Losses and gradients that are NaN or infinite: found before the optimiser sees them, written down, skipped or fatal.

Unusual:

* Nothing is raised while a batch is computed. The verdict falls once a step, before the weights change, and all
  processes share it: if one stopped alone the others would wait for it.
* A skipped step leaves the network as it was, with the statistics of its normalisation, which the forward pass had
  changed already. It counts as a step of the schedule.
* Under float16 gradients overflow as a matter of course and the scaler deals with them, so only the loss is judged.
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
from .distributed import own_part
from .failures import TrainingError

_log = logging.getLogger(__name__)


class NonFiniteLossError(TrainingError):
    """The loss or a gradient is NaN or infinite: training cannot go on."""


class StepGuard(pl.Callback):
    """Judges every step; at most `skip` in a row are skipped. What went wrong is in nonfinite.json of the run folder,
    which is the trainer's `default_root_dir`."""

    def __init__(self, *, skip: int = 0) -> None:
        super().__init__()
        self.skip = skip
        self.skipped = False
        """Whether the latest step was."""
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
        fine = torch.stack([loss.isfinite() for _, loss in losses]).all()
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            fine = fine & _largest_gradient(_network(pl_module), fine.device).isfinite()
        good = bool(fine)
        if trainer.world_size > 1:
            good = trainer.strategy.reduce_boolean_decision(good, all=True)
        self.skipped = not good
        if good:
            self.in_row = 0
            return
        self.in_row += 1
        self.in_epoch += 1
        what = _describe(trainer, losses)
        path = _write_down(trainer, losses)
        if self.in_row > self.skip:
            raise NonFiniteLossError(
                f"{what}; {path} lists the pictures, last.ckpt is from before that. Try a lower optim.lr, "
                f"optim.clip_grad=1 or train.skip_nonfinite={max(2 * self.skip, 5)}"
            )
        _log.warning("warning: %s: the step is skipped (%d of %d in a row); see %s", what, self.in_row, self.skip, path)
        optimizer.zero_grad(set_to_none=True)  # optimisers pass over what has no gradient
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
    """The largest magnitude of a gradient; of a network in parts, of the parts that are here, which may be empty."""
    gradients: list[Any] = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    here = [part for part in (own_part(gradient) for gradient in gradients) if part.numel()]
    if not here:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm(here, norm_type=float("inf"))


def _describe(trainer: pl.Trainer, losses: list[tuple[int, Tensor]]) -> str:
    where = f"at epoch {trainer.current_epoch}, batch {losses[-1][0]}"
    bad = next((loss.item() for _, loss in losses if not loss.isfinite()), None)
    if bad is not None:
        return f"the loss is {bad} {where}"
    others = " (the loss of another process, or a gradient)" if trainer.world_size > 1 else ""
    return f"a gradient is not finite {where}{others}"


def _write_down(trainer: pl.Trainer, losses: list[tuple[int, Tensor]]) -> Path:
    """Adds the batches of the step, with the numbers of their training pictures, to a file of this process."""
    rank = trainer.global_rank
    path = Path(trainer.default_root_dir) / (f"nonfinite-{rank}.json" if rank else "nonfinite.json")
    events = json.loads(path.read_text()) if path.exists() else []
    batches = [
        {"batch": index, "loss": str(loss.item() * len(losses)), "pictures": _pictures(trainer, index)}
        for index, loss in losses
    ]
    events.append({"epoch": trainer.current_epoch, "step": trainer.global_step, "batches": batches})
    write_text(path, json.dumps(events, indent=1) + "\n")
    return path


def _pictures(trainer: pl.Trainer, index: int) -> list[int]:
    """The positions in the training set of what batch `index` of this epoch is made of."""
    loader: Any = trainer.train_dataloader
    batches = copy.copy(loader.batches)
    batches.epoch, batches.start = trainer.current_epoch, index
    return list(next(iter(batches)).indices)
