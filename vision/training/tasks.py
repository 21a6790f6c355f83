"""What Lightning trains: a classifier of pictures, or of their pixels. Both are `Task`; only the model differs.

Unusual:

* The number of steps comes from the configuration, never from `trainer.estimated_stepping_batches`: asking for that
  inside `configure_optimizers` makes Lightning lose the loader's place when a run is resumed inside an epoch.
* torch, numpy and random are seeded anew before every step, from (seed, epoch, step, rank). Drop path, dropout and
  mixup are then the same in a resumed run, without random states in the checkpoint.
* No hyper-parameters are saved, so that a checkpoint holds tensors, numbers and text and loads with
  `weights_only=True`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytorch_lightning as pl
import torch
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from ..data.loading import mix_seed, seed_everything
from ..data.splits import IGNORE_INDEX, Splits
from ..segmentation import scores
from .config import Config
from .optimization import make_optimizer, make_scheduler
from .plan import Plan


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite: training cannot go on."""


class Task(pl.LightningModule):
    """Trains `model` on batches (pictures, integer labels of pictures or pixels) with cross entropy."""

    def __init__(self, model: nn.Module, config: Config, splits: Splits, *, plan: Plan) -> None:
        super().__init__()
        self.model, self.config, self.splits, self.plan = model, config, splits, plan
        self.metric = "mean_iou" if splits.dense else "accuracy"
        augment = config.augment
        mixes = augment.mixup > 0 or augment.cutmix > 0
        if mixes and splits.dense:
            raise ValueError("augment.mixup and augment.cutmix blend whole pictures: set both to 0 for segmentation")
        if mixes and config.train.batch_size % 2:
            raise ValueError(f"mixup pairs pictures: train.batch_size={config.train.batch_size} must be even")
        if splits.dense and config.optim.layer_decay is not None:
            raise ValueError("optim.layer_decay knows the layers of a classifier: set it to null for segmentation")
        self.mix = _mixup(config, len(splits.classes)) if mixes else None
        smoothing = augment.label_smoothing
        self.hard_loss = nn.CrossEntropyLoss(
            ignore_index=IGNORE_INDEX if splits.dense else -100, label_smoothing=smoothing
        )
        # Kept in the checkpoint: an epoch that is interrupted and resumed reports the loss of all its steps.
        self.train_loss = MeanMetric()
        self.train_loss.persistent(True)
        self.val_loss = MeanMetric()
        ignored = IGNORE_INDEX if splits.dense else None
        self.result = torch.zeros(len(splits.classes), len(splits.classes), dtype=torch.int64)
        """Counts [truth, prediction] of the latest evaluation, over all processes."""
        self.confusion = MulticlassConfusionMatrix(len(splits.classes), ignore_index=ignored, validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_everything(mix_seed(self.config.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = self._laid_out(batch)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
            loss = SoftTargetCrossEntropy()(self.model(images), targets)
        else:
            loss = self.hard_loss(self.model(images), targets)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at epoch {self.current_epoch}, batch {batch_idx}; last.ckpt is from before "
                f"that. Try a lower optim.lr (now {self.config.optim.lr:g}) or optim.clip_grad=1"
            )
        self.train_loss.update(loss.detach())
        self.log("loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def on_train_epoch_end(self) -> None:
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        values = {"train/loss": self.train_loss.compute().item(), "train/lr": max(rates), "epoch": self.current_epoch}
        self.train_loss.reset()
        # Not through self.log: that reaches the loggers after last.ckpt is written, and a run that ends in between
        # would resume without this row.
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_start(self) -> None:
        self._reset_evaluation()

    def on_test_epoch_start(self) -> None:
        self._reset_evaluation()

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> None:
        images, targets = self._laid_out(batch)
        logits = self.model(images)
        self.val_loss.update(self.hard_loss(logits, targets), len(images))
        self.confusion.update(logits.argmax(1), targets)

    def _reset_evaluation(self) -> None:
        self.val_loss.reset()
        self.confusion.reset()

    def _report(self, stage: str) -> None:
        self.result = self.confusion.compute().cpu()
        result = scores(self.result)
        self.log(f"{stage}/loss", self.val_loss.compute())
        self.log(f"{stage}/{self.metric}", result[self.metric].float(), prog_bar=True)
        self.log(f"{stage}/mean_accuracy", result["mean_accuracy"].float())

    def _laid_out(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, targets = batch
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.model, self.config.optim, self.plan)
        scheduler = make_scheduler(optimizer, self.config.schedule, self.plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What it takes to build the model again and to prepare its pictures, in plain types."""
        splits = self.splits
        checkpoint["mixerzoo"] = {
            "model": self.config.model.name,
            "model_kwargs": self.config.model.kwargs,
            "head": dataclasses.asdict(self.config.head) if splits.dense else None,
            "classes": list(splits.classes),
            "in_chans": splits.channels,
            "size": splits.size,
            "mean": list(splits.mean),
            "std": list(splits.std),
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step, metric=metric)


def _mixup(config: Config, num_classes: int) -> Mixup:
    augment = config.augment
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes)
