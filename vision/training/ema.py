"""The moving average of the weights: what is validated, tested and exported, while training goes on with its own.

B. Polyak, A. Juditsky: Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 1992; the average
itself is timm's ModelEmaV3. Its warm-up is K. Crowson's: 1 - (1 + updates) ** (-2 / 3), at most `decay`.

Unusual:

* Weights are never exchanged. Validation asks the averaged copy (`Task.judge`), so that no error or signal can
  leave the one in the place of the other; Lightning's own callback, which swaps, then saves them in each other's slots.
* In a checkpoint `state_dict` holds the average, which is what was validated and what every tool reads. The weights
  that training goes on with are beside it, under `raw_weights`.
* Before averaging begins, and with the first update, the average is a copy of the weights: they begin at random, which
  would otherwise be felt for 1 / (1 - decay) updates.
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

_OWN = "model."  # of a task's state dict, the part that is the network


class AveragedWeights(pl.Callback):
    """Averages `model` after every `every`th step but for those that `guard` skipped. State in the checkpoint."""

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
        """The averaged network, in evaluation mode."""
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
        if step == before or self.guard.skipped:  # gradients are still being accumulated, or were not used
            return
        self.update(pl_module.model, step)

    def update(self, model: Any, step: int) -> None:
        """After the optimiser's step number `step`, counted from 1."""
        passed = step - self.start_step
        if passed <= 0:
            self.average.set(model)
        elif passed % self.every == 0:
            self.average.update(model, step=passed // self.every)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Each process has seen other pictures, and has other statistics of them; the first one's are saved."""
        if trainer.world_size > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["state_dict"]
        average = {f"{_OWN}{name}": value for name, value in self.module.state_dict().items()}
        checkpoint["raw_weights"] = {name.removeprefix(_OWN): state[name] for name in average}
        state.update(average)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning has given `state_dict` to the network already."""
        network: Any = pl_module.model
        self.average.set(network)
        if "raw_weights" in checkpoint:  # else the checkpoint is of a run without an average, and it begins now
            network.load_state_dict(checkpoint["raw_weights"])


def make_average(model: nn.Module, config: Config, plan: Plan, guard: StepGuard) -> AveragedWeights | None:
    """What `ema.decay` asks for."""
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
