"""Stopping and recording: the last checkpoint, what Ctrl-C does, and a table with a row an epoch."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, TQDMProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from .checkpoints import write_text
from .signals import Interrupted, SignalWatch

_log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Writes `path` after every epoch, every `every` steps, and when a signal has come, after which training stops.

    A `Checkpoint` by base class, so that Lightning calls it after the module has logged its epoch.
    """

    def __init__(self, path: Path, watch: SignalWatch, *, every: int | None = None) -> None:
        super().__init__()
        self.path, self.watch, self.every = path, watch, every

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.watch()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.watch()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # gradients are not in a checkpoint
        # After the last step Lightning takes the epoch for finished and would resume without its validation; the
        # checkpoint of the epoch's end follows at once.
        if not stepped or batch_idx + 1 == trainer.num_training_batches:
            return
        number = self._signal(trainer)
        if number or (self.every is not None and trainer.global_step % self.every == 0):
            trainer.save_checkpoint(self.path)
        if number:
            raise Interrupted(number, self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        self._stop_if_asked(trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if number := self._signal(trainer):
            raise Interrupted(number, self.path)

    def _signal(self, trainer: pl.Trainer) -> int:
        """The signal that any process got, or 0: if some stopped alone, the others would wait for them for ever."""
        number = self.watch.received or 0
        if trainer.world_size == 1:
            return number
        numbers = torch.tensor(number, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(numbers, reduce_op="max"))


class KeepRateWarmup(Callback):
    """EViT's warm start: every token is kept until an epoch, then the rates fall to the model's own, by a cosine.

    Y. Liang et al.: Not All Patches are What You Need, ICLR 2022, https://github.com/youweiliang/evit. The rates depend
    on the step alone, so that a resumed run goes on where it was. Evaluation is at the model's own rates, always.
    """

    def __init__(
        self,
        set_rates: Callable[[list[float]], None],
        own: Sequence[float],
        *,
        start_epoch: float,
        epochs: float,
        steps_per_epoch: int,
    ) -> None:
        """`own`: the rate of each pruning block; `set_rates` takes as many."""
        super().__init__()
        self.set_rates, self.own = set_rates, list(own)
        self.start_epoch, self.epochs, self.steps_per_epoch = start_epoch, epochs, steps_per_epoch

    def rates_at(self, step: int) -> list[float]:
        """Of each pruning block, before the optimiser's step number `step`."""
        passed = step / self.steps_per_epoch - self.start_epoch
        if passed < 0:
            return [1.0] * len(self.own)
        if passed >= self.epochs:
            return self.own
        share = (1 + math.cos(math.pi * passed / self.epochs)) / 2
        return [rate + (1 - rate) * share for rate in self.own]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.set_rates(self.rates_at(trainer.global_step))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.set_rates(self.own)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.set_rates(self.own)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.set_rates(self.own)


class Progress(TQDMProgressBar):
    """Lightning's bar without the version number, which names nothing here."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class Curves(TensorBoardLogger):
    """Lightning's, but that a full disk does not end the run here: metrics.csv has the same numbers."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except (OSError, ValueError) as error:  # Lightning makes the second of whatever went wrong
            _log.warning("warning: %s: TensorBoard's file could not be written (%s)", self.log_dir, str(error).strip())


class EpochTable(Logger):
    """metrics.csv: one row an epoch, whole numbers and floats that read back exactly.

    Lightning's CSVLogger writes a row for each call, mostly empty, and deletes the table of the run that is resumed.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        if resume and path.is_file():
            self.rows = {int(row["epoch"]): {**row, "epoch": int(row["epoch"])} for row in read_table(path)}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The settings are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {name: value for name, value in metrics.items() if name.startswith(("train/", "val/"))}
        if not values:
            return
        epoch = int(metrics["epoch"])
        self.rows = {known: row for known, row in self.rows.items() if known <= epoch}
        self.rows.setdefault(epoch, {"epoch": epoch}).update(values)
        names = ["epoch", *sorted({name for row in self.rows.values() for name in row} - {"epoch"})]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator=os.linesep)
        writer.writeheader()
        writer.writerows(self.rows[known] for known in sorted(self.rows))
        try:
            write_text(self.path, text.getvalue())
        except OSError as error:  # on a full disk the run's own setting decides (train.save_errors), at the checkpoint
            _log.warning("warning: %s could not be written (%s); the next epoch writes all rows", self.path, error)


def read_table(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv; an empty cell is left out."""
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
