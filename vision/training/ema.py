"""An exponential moving average of the weights, which is validated, tested and exported.

B. Polyak, A. Juditsky: Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 1992; the average
itself is timm's ModelEmaV3. Its warm-up is K. Crowson's: 1 - (1 + updates) ** (-2 / 3), at most `decay`.

Unusual:

* The two sets of weights are never swapped: validation calls the averaged copy (`Task.judge`). Lightning's own
  callback swaps them, and an error or a signal in between makes it save each in the slot of the other.
* In a checkpoint, `state_dict` holds the average, which was validated and which every tool reads. The weights that
  training continues with are stored under `raw_weights`.
* Until averaging begins, the average is a copy of the weights. Otherwise the random initialisation would influence it
  for about 1 / (1 - decay) updates.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from .config import Config
from .finite import StepGuard
from .plan import Plan
from .settings import ConfigError

_PREFIX = "model."  # of the network's tensors in the state dict of a task


class AveragedWeights(pl.Callback):
    """Averages the weights of `model` after every `every`th optimizer step, except those that `guard` skipped."""

    def __init__(
        self,
        model: nn.Module,
        guard: StepGuard,
        *,
        decay: float,
        warmup: bool = False,
        every: int = 1,
        start_step: int = 0,
    ) -> None:
        super().__init__()
        self.average = ModelEmaV3(model, decay=decay, use_warmup=warmup).requires_grad_(False)
        self.guard, self.every, self.start_step = guard, every, start_step
        self._seen = 0

    @property
    def module(self) -> nn.Module:
        """The network with averaged weights, in evaluation mode."""
        return self.average.module

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average.to(pl_module.device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, before = trainer.global_step, self._seen
        self._seen = step
        if step == before or self.guard.skipped:  # gradients are still accumulating, or the step was skipped
            return
        self.update(pl_module.model, step)

    def update(self, model: Any, step: int) -> None:
        """Update the average after optimizer step number `step`, counted from 1."""
        passed = step - self.start_step
        if passed <= 0:
            self.average.set(model)
        elif passed % self.every == 0:
            self.average.update(model, step=passed // self.every)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the buffers of rank 0 to all ranks: batch statistics differ between them, and rank 0 saves its own."""
        if trainer.world_size > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["state_dict"]
        average = {f"{_PREFIX}{name}": value for name, value in self.module.state_dict().items()}
        checkpoint["raw_weights"] = {name.removeprefix(_PREFIX): state[name] for name in average}
        state.update(average)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Split what Lightning has loaded into the network from `state_dict`: that is the average."""
        network: Any = pl_module.model
        self.average.set(network)
        if "raw_weights" in checkpoint:  # otherwise the checkpoint is of a run without averaging, which begins now
            network.load_state_dict(checkpoint["raw_weights"])


def make_average(model: nn.Module, config: Config, plan: Plan, guard: StepGuard) -> AveragedWeights | None:
    """Return the callback that `ema.decay` asks for, or None."""
    ema = config.ema
    if ema.decay is None:
        if ema.warmup or ema.every != 1 or ema.start_epoch:
            raise ConfigError("ema.warmup, ema.every and ema.start_epoch need an average: give ema.decay")
        return None
    if config.train.strategy == "fsdp":
        raise ConfigError(f"ema.decay={ema.decay:g}: needs whole weights; set it to null, or train.strategy=ddp")
    return AveragedWeights(
        model,
        guard,
        decay=ema.decay,
        warmup=ema.warmup,
        every=ema.every,
        start_step=round(ema.start_epoch * plan.steps_per_epoch),
    )
