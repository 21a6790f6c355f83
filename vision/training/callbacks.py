"""Callbacks and loggers: checkpoints, stopping on signals, the keep rate schedule, and metrics.csv."""

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
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from .checkpoints import write_text
from .resume import BEST
from .signals import Interrupted, SignalWatch

_log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Saves `path` after every epoch, every `every` steps, and when a signal was received, and then stops training.

    The base class is `Checkpoint`, so that Lightning calls it after the module has logged its epoch.
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
        # After the last step Lightning considers the epoch finished and would resume without its validation. The
        # checkpoint at the end of the epoch follows immediately.
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
        """Return the signal that any process received, or 0. All must stop together, or some would wait forever."""
        number = self.watch.received or 0
        if trainer.world_size == 1:
            return number
        numbers = torch.tensor(number, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(numbers, reduce_op="max"))


class BestCheckpoint(ModelCheckpoint):
    """Saves best.ckpt in `folder` whenever the validation `metric` exceeds its highest value so far.

    Unusual: a saved state refers to the present folder. Lightning's callback forgets its best score if the folder was
    moved or copied, and the next epoch would replace best.ckpt however bad it is.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        super().__init__(
            folder,
            filename=Path(BEST).stem,
            monitor=f"val/{metric}",
            mode="max",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        here = {name: self._here(state_dict[name]) for name in paths}
        scores = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **here, "best_k_models": scores, "dirpath": self.dirpath})

    def _here(self, path: str) -> str:
        """Return the path of the file of this name in the present folder; "", of a file not saved yet, stays."""
        return str(Path(str(self.dirpath)) / Path(path).name) if path else ""


class KeepRateWarmup(Callback):
    """EViT's keep rate schedule: every token is kept until `start_epoch`, then the rates fall along a cosine.

    Y. Liang et al.: Not All Patches are What You Need, ICLR 2022, https://github.com/youweiliang/evit. The rates depend
    only on the step, so that a resumed run continues the schedule. Evaluation always uses the model's own rates.
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
        """`own` holds the final keep rate of each pruning block; `set_rates` is called with lists of its length."""
        super().__init__()
        self.set_rates, self.own = set_rates, list(own)
        self.start_epoch, self.epochs, self.steps_per_epoch = start_epoch, epochs, steps_per_epoch

    def rates_at(self, step: int) -> list[float]:
        """Return the keep rate of each pruning block before optimizer step number `step`."""
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
    """Lightning's progress bar without the version number, which has no meaning here."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class Curves(TensorBoardLogger):
    """Lightning's TensorBoard logger, except that a full disk only logs a warning: metrics.csv has the same numbers."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except (OSError, ValueError) as error:  # Lightning wraps any error of the writer in a ValueError
            _log.warning("warning: %s: TensorBoard's file could not be written (%s)", self.log_dir, str(error).strip())


class EpochTable(Logger):
    """A logger that writes metrics.csv with one row per epoch and floats that read back exactly.

    Lightning's CSVLogger writes a mostly empty row for each call and deletes the table when a run is resumed.
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
        """Do nothing: the settings are in config.yaml."""

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
    """Return the rows of metrics.csv without their empty cells."""
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
