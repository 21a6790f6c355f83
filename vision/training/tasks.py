"""`Task`, the Lightning module that trains and evaluates image classifiers and segmenters.

Unusual:

* The number of steps comes from the configuration, never from `trainer.estimated_stepping_batches`: reading that
  inside `configure_optimizers` makes Lightning lose the position in the data loader when a run resumes inside an epoch.
* torch, numpy and random are seeded before every step from (seed, epoch, step, rank). Drop path, dropout and mixup are
  therefore the same in a resumed run, without random states in the checkpoint.
* No hyper-parameters are saved, so that a checkpoint holds only tensors, numbers and text and loads with
  `weights_only=True`.
* The objective, with its teacher, is not an nn.Module: Lightning does not train, save or move any of it.
* Segmenters are evaluated through `infer`, at the size of the picture that the data set returns.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from ..data.loading import mix_seed, seed_everything
from ..data.pictures import DataError
from ..data.splits import IGNORE_INDEX, Splits
from ..segmentation import scores
from ..segmentation.inference import infer
from ..segmentation.losses import PixelCrossEntropy
from .callbacks import KeepRateWarmup
from .checkpoints import refuse_another
from .config import Config
from .dense import check_one_picture, loss_parts, make_inference, make_loss, short_side
from .distillation import Objective, Teacher, target_keep_rates
from .distributed import of_all_processes, of_this_process, shard
from .ema import make_average
from .finite import StepGuard
from .optimization import apply_settings, clip_gradients, group_settings, hold_back, make_optimizer, make_scheduler
from .plan import Plan
from .settings import ConfigError


class Answer(NamedTuple):
    """A model's prediction for a batch of pictures, of which each is one label or a map of labels."""

    labels: Tensor
    """The most likely classes, int64 [B] or [B, H, W]."""
    logits: Tensor
    """[B, K] or [B, K, H, W]. Their `softmax(1)` gives the class probabilities, also where those are averages."""


class Task(pl.LightningModule):
    """Trains `model` with cross entropy and the further losses of the settings (dense.py, distillation.py).

    A batch is (pictures [B, C, H, W], integer labels [B] or, for a segmenter, [B, H, W]).
    """

    def __init__(
        self, model: nn.Module, config: Config, splits: Splits, *, plan: Plan, teacher: Teacher | None = None
    ) -> None:
        super().__init__()
        self.model, self.config, self.splits, self.plan = model, config, splits, plan
        self.metric = "mean_iou" if splits.dense else "accuracy"
        augment = config.augment
        mixes = augment.mixup > 0 or augment.cutmix > 0
        if mixes and splits.dense:
            raise ValueError("augment.mixup and augment.cutmix blend whole pictures: set both to 0 for segmentation")
        if mixes and config.train.batch_size % 2:
            raise ValueError(f"mixup pairs pictures: train.batch_size={config.train.batch_size} must be even")
        self.mix = _mixup(config, len(splits.classes)) if mixes else None
        self.dense_loss = make_loss(model, config, splits)
        self.inferences = make_inference(config, splits)
        check_one_picture(model, config, splits)
        self.objective = Objective(model, config, splits, teacher)
        self.keep_rate_warmup = make_keep_rate_warmup(model, config, plan)
        self.guard = StepGuard(skip=config.train.skip_nonfinite)
        self.average = make_average(model, config, plan, self.guard)
        self.train_loss = MeanMetric()
        parts = (*self.objective.weights, *(loss_parts(model) if splits.dense else ()))
        parts = ("labels", *parts) if parts else ()
        self.train_parts = nn.ModuleDict({name: MeanMetric() for name in parts})
        self._resumed_means: Tensor | None = None
        self._group_settings: list[dict[str, Any]] = []
        self.val_loss = MeanMetric()
        ignored = IGNORE_INDEX if splits.dense else None
        self.result = torch.zeros(len(splits.classes), len(splits.classes), dtype=torch.int64)
        """The confusion matrix [truth, prediction] of the latest evaluation, summed over all processes."""
        self.confusion = MulticlassConfusionMatrix(len(splits.classes), ignore_index=ignored, validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def judge(self, images: Tensor, *, final: bool) -> Answer:
        """Return the prediction of the model, which must be in evaluation mode. Maps have the size of the pictures.

        With `final` it is made as in the test: with the weights in `model` and with all scales and flips. Otherwise it
        is made as in validation: with the averaged weights, if there are any.
        """
        network = self.model if final or self.average is None else self.average.module
        if self.inferences is None:
            logits = network(images)
            return Answer(logits.argmax(1), logits)
        inference = self.inferences[final]
        answer = infer(network, images, inference)
        labels = answer.argmax(1)  # before a logarithm makes neighbouring probabilities equal
        if len(inference.views) > 1:  # averaged probabilities
            answer = answer.clamp_(min=torch.finfo(answer.dtype).tiny).log_()
        return Answer(labels, answer)

    def compile_network(self) -> None:
        """Compile the networks in place, so that the names in a checkpoint stay the same."""
        self.model.compile()
        self.objective.compile()
        if self.average is not None:
            self.average.module.compile()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.model, self.device_mesh)

    def on_fit_start(self) -> None:
        self.objective.to(self.device)

    def on_train_start(self) -> None:
        if self._resumed_means is not None:
            [optimizer], scheduler = self.trainer.optimizers, self.trainer.lr_scheduler_configs[0].scheduler
            apply_settings(optimizer, self._group_settings)
            self.lr_scheduler_step(scheduler, None)
            for metric, (value, weight) in zip(
                self._train_means(), of_this_process(self._resumed_means).to(self.device), strict=True
            ):
                metric.mean_value, metric.weight = value, weight
            self._resumed_means = None

    def _train_means(self) -> list[Any]:
        return [self.train_loss, *self.train_parts.values()]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_step(self.current_epoch, batch_idx, rank=self.global_rank)

    def seed_step(self, epoch: int, batch_idx: int, *, rank: int) -> None:
        seed_everything(mix_seed(self.config.seed, epoch, batch_idx, rank))

    def blend(self, images: Tensor, targets: Tensor, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Apply mixup and cutmix to a batch; once they are turned off, only smooth its labels to probabilities."""
        assert self.mix is not None
        self.mix.mixup_enabled = epoch < self.plan.epochs - self.config.augment.mix_off_epochs
        return self.mix(images, targets)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = self._laid_out(batch)
        if self.mix is not None:
            images, targets = self.blend(images, targets, epoch=self.current_epoch)
        output, parts = self.objective(images)
        loss = self.config.distill.labels_weight * self._label_loss(output, targets, parts)
        for name, weight in self.objective.weights.items():
            loss = loss + weight * parts[name]
        counts = loss.detach().isfinite()  # the guard skips or stops at a step whose loss is not
        for metric, value in zip(self._train_means(), (loss, *(parts[name] for name in self.train_parts)), strict=True):
            metric.update(value.detach().where(counts, 0.0), counts.to(value.dtype))
        self.log("loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def _label_loss(self, output: Any, targets: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Return the loss of the output with the labels; its components are added to `parts`."""
        if self.dense_loss is not None:
            losses = self.dense_loss(output, targets)
            total = losses.pop("total")
            parts |= losses
            return total
        if self.mix is not None:
            parts["labels"] = SoftTargetCrossEntropy()(output, targets)
        else:
            parts["labels"] = self._cross_entropy(output, targets)
        return parts["labels"]

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy averaged over pictures or labelled pixels, or 0 if no pixel is labelled."""
        smoothing = self.config.augment.label_smoothing
        if self.dense_loss is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return PixelCrossEntropy(label_smoothing=smoothing)(logits, targets)

    def on_train_epoch_end(self) -> None:
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        values = {"train/loss": self.train_loss.compute().item(), "train/lr": max(rates), "epoch": self.current_epoch}
        self.train_loss.reset()
        for name, metric in self.train_parts.items():
            values[f"train/loss_{name}"] = metric.compute().item()  # pyright: ignore[reportCallIssue]
            metric.reset()  # pyright: ignore[reportCallIssue]
        # self.log would reach the loggers only after last.ckpt is written, and a run that is killed in between would
        # resume without this row.
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, final=False)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._evaluate(batch, final=True)

    def on_validation_epoch_start(self) -> None:
        self._reset_evaluation()

    def on_test_epoch_start(self) -> None:
        self._reset_evaluation()

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], *, final: bool) -> Tensor:
        images, targets = self._laid_out(batch)
        if not len(images):
            # This process has fewer pictures than others, which wait for it in the forward pass: FSDP gathers weights
            # there, DDP broadcasts buffers.
            return self.judge(images.new_zeros(1, *images.shape[1:]), final=final).logits[:0]
        answer = self.judge(images, final=final)
        self.confusion.update(answer.labels, targets)
        counted = (targets != IGNORE_INDEX).sum() if self.dense_loss is not None else len(images)
        self.val_loss.update(self._cross_entropy(answer.logits, targets), counted)
        return answer.logits

    def _reset_evaluation(self) -> None:
        self.val_loss.reset()
        self.confusion.reset()

    def _report(self, stage: str) -> None:
        self.result = self.confusion.compute().cpu()
        if not self.result.any():
            raise DataError(f"{self.splits.origin}: no pixel of the masks of `{stage}` has a class; all are ignored")
        result = scores(self.result)
        self.log(f"{stage}/loss", self.val_loss.compute())
        self.log(f"{stage}/{self.metric}", result[self.metric].float(), prog_bar=True)
        others = ("mean_accuracy", *(("accuracy", "frequency_weighted_iou") if self.splits.dense else ()))
        for name in others:
            self.log(f"{stage}/{name}", result[name].float())

    def _laid_out(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, targets = batch
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val is not None:
            clip_gradients(self.model, gradient_clip_val, self.config.optim.clip_mode)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [part for part in (self.guard, self.average, self.keep_rate_warmup) if part is not None]

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.model, self.config.optim, self.plan)
        scheduler = make_scheduler(optimizer, self.config.schedule, self.plan)
        self._group_settings = group_settings(optimizer)
        hold_back(optimizer, 0, self.plan.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to rebuild the model and prepare its pictures, in plain types."""
        # With the means, an epoch that is interrupted and resumed reports the loss of all its steps.
        means = torch.stack([torch.stack([metric.mean_value, metric.weight]) for metric in self._train_means()])
        checkpoint["train_means"] = of_all_processes(means).cpu()
        checkpoint["mixerzoo"] = self._facts()

    def _facts(self) -> dict[str, Any]:
        splits = self.splits
        return {
            "model": self.config.model.name,
            "model_kwargs": self.config.model.kwargs,
            "head": dataclasses.asdict(self.config.head) if splits.dense else None,
            "evaluate": dataclasses.asdict(self.config.evaluate) if splits.dense else None,
            "short_side": short_side(self.config, splits) if splits.dense else None,
            "classes": list(splits.classes),
            "in_chans": splits.channels,
            "size": splits.size,
            "crop": self.config.data.crop,
            "interpolation": self.config.data.interpolation,
            "framed": splits.framed,
            "mean": list(splits.mean),
            "std": list(splits.std),
            "training_pictures": len(splits.train),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        facts = {name: value for name, value in self._facts().items() if name != "evaluate"}  # settings.py checks that
        refuse_another(checkpoint, self.state_dict(), facts, force=self.config.resume_force)
        self._resumed_means = checkpoint["train_means"]
        # timm's schedules depend on nothing but the step. Their saved state holds the length and the rates of the run
        # that saved it, and loading it would end a run with more epochs on the schedule of the shorter one.
        checkpoint["lr_schedulers"] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step, metric=metric)
        hold_back(scheduler.optimizer, self.global_step, self.plan.steps_per_epoch)


def _mixup(config: Config, num_classes: int) -> Mixup:
    augment = config.augment
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes)


def make_keep_rate_warmup(model: nn.Module, config: Config, plan: Plan) -> KeepRateWarmup | None:
    """Return the keep rate schedule that `reduction.shrink_epochs` asks for, or None."""
    reduction = config.reduction
    if reduction.shrink_epochs is None:
        if reduction.shrink_start_epoch:
            raise ConfigError("reduction.shrink_start_epoch needs a number of epochs to shrink in: give shrink_epochs")
        return None
    key = f"reduction.shrink_epochs={reduction.shrink_epochs:g}"
    backbone: Any = next((module for module in model.modules() if hasattr(module, "set_keep_rate")), None)
    rates = [part.keep_rate for part in getattr(backbone, "reducers", ()) if hasattr(part, "keep_rate")]
    if not rates or target_keep_rates(backbone) is not None:
        raise ConfigError(
            f"{key}: {config.model.name} has no keep rate that can fall while it trains (EViT and EET have); "
            "set it to null"
        )
    if config.train.compile:
        raise ConfigError(
            f"{key} changes the model at each step, so that train.compile=true would compile it each time"
        )
    return KeepRateWarmup(
        backbone.set_keep_rate,
        rates,
        start_epoch=reduction.shrink_start_epoch,
        epochs=reduction.shrink_epochs,
        steps_per_epoch=plan.steps_per_epoch,
    )
