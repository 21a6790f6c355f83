"""The settings of a run, as typed dataclasses: the only place where a key, its type, range and words are written.

`option` puts a key's documentation and range beside its default; `python train.py --help` and the checks in
`settings.py` read them from there. YAML files in `configs/` and `key=value` arguments fill this schema through
OmegaConf; the rest of the code sees plain dataclass instances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints


def option(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field with its documentation and range, both ends included. A mutable default is copied (RUF009)."""
    metadata = {"doc": doc, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    name: str = option("nat_mini", "a timm model name: one of mixerzoo's or any other; `model=NAME` for short")
    pretrained: bool = option(False, "begin with the published weights")
    checkpoint: str | None = option(
        None,
        "begin with this file's weights, in the published format; a classifier's head starts anew, a segmenter's if "
        "the file has none or other classes",
    )
    start_from: str | None = option(
        None,
        "begin with the weights of another model wherever the names agree: a timm model's published ones, or those of "
        "a checkpoint of train.py",
    )
    kwargs: dict[str, Any] = option({}, "further arguments of the model, such as model.kwargs.stem_stride=1")  # noqa: RUF009
    head_init_scale: float = option(1.0, "factor of the first weights of a classifier's new head", low=0)


@dataclass
class HeadConfig:
    """What a segmenter has on top of its backbone. Classifiers have their own head."""

    name: str = option(
        "semantic_fpn", "upernet, semantic_fpn, segformer, bevanet, or smp:ARCHITECTURE (segmentation_models_pytorch)"
    )
    channels: int | None = option(None, "width of the head; null is the published one", low=1)
    neck_channels: int | None = option(
        None, "width of the pyramid under semantic_fpn; null is twice the head's, as published", low=1
    )
    dropout: float = option(0.1, "dropout before the head's classifier", low=0, high=1)
    auxiliary: bool | None = option(
        None, "a further head learns on the last map but one; null: with upernet, as published"
    )
    kwargs: dict[str, Any] = option({}, "further arguments of the head")  # noqa: RUF009


@dataclass
class DataConfig:
    name: str = option("fashion_mnist", "a file in configs/data, or a folder of pictures; `data=NAME` for short")
    source: str = option(
        "fashion_mnist",
        "the reader: fashion_mnist, digits, image_folder, timm; of masks fashion_scenes, mask_folder, cityscapes, voc, "
        "camvid, colin27 or mni_tissue",
    )
    dataset: str | None = option(
        None,
        "a data set by timm's name: hfds/NAME (Hugging Face), hfids/NAME (the same, streamed), wds/ (WebDataset), "
        "tfds/NAME, torch/NAME (torchvision); null: data.root, a folder or a .tar (timm)",
    )
    train_split: str = option(
        "train", "the name of the training pictures in the data set (timm, cityscapes, voc, camvid)"
    )
    val_split: str | None = option(
        None, "those of validation; null: validation, val or test if there is one, or else held out (the same)"
    )
    test_split: str | None = option(
        None, "those of the test; null: test if there is one, or else validation's (timm, camvid)"
    )
    sbd: str | None = option(
        None, "SBD's folder, which has cls/ with the masks of train_split=trainaug; null: SegmentationClassAug (voc)"
    )
    root: str | None = option(None, "where the files lie; null looks in the usual places")
    download: bool = option(True, "fetch files that are found nowhere (out of packages, or by torchvision)")
    size: int = option(32, "height and width of the pictures the model sees", low=1)
    short_side: int | None = option(
        None,
        "shorter side of pictures with masks, before a training picture's random resize and whenever one is judged; "
        "null: size; 0: the picture's own (masks in files)",
        low=0,
    )
    crop: float | None = option(
        None,
        "share of the shorter side that is judged; 1 squeezes the whole picture; null: 0.9, or all if small (folder)",
        low=0.1,
        high=1,
    )
    interpolation: Literal["bilinear", "bicubic"] = option("bilinear", "how pictures of a folder are resized")
    held_out: float = option(0.1, "share of the training pictures kept for validation", low=0.001, high=0.9)
    limit: int | None = option(None, "use at most this many training pictures", low=2)
    scenes: int = option(4000, "training scenes to compose (fashion_scenes only)", low=2)
    classes: int | None = option(None, "classes in the masks; null counts ROOT/classes.txt (mask_folder)", low=2)
    ignore_zero: bool = option(False, "label 0 is no class and classes count from 1, as in ADE20K (mask_folder)")
    max_bad: int = option(
        10, "unreadable training pictures that are replaced by others, before they are an error (folders, timm)", low=0
    )
    workers: int = option(0, "processes that load data; 0 loads in the main process", low=0)
    timeout: float = option(120.0, "seconds without data after which the workers hang", low=1)
    worker_restarts: int = option(0, "times in an epoch that dead or hanging workers are started again", low=0)


@dataclass
class AugmentConfig:
    shift: int = option(0, "move by up to this many pixels (pictures held in memory)", low=0)
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    scale: list[float] = option(  # noqa: RUF009
        [0.35, 1.0], "share of the picture that a random crop keeps (image_folder)", low=0, high=1
    )
    resize: list[float] = option(  # noqa: RUF009
        [0.5, 2.0], "sizes before the crop, as factors of data.short_side (masks in files)", low=0.1, high=10
    )
    crop: list[int] | None = option(  # noqa: RUF009
        None, "height and width of training crops that are no squares of data.size (masks in files)", low=1
    )
    cat_max_ratio: float = option(
        1.0,
        "draw a crop again, ten times at most, where one class fills so much of it; published is 0.75, 1 is off (masks "
        "in files)",
        low=0.01,
        high=1,
    )
    photometric: bool = option(False, "change brightness, contrast, saturation and hue by chance (masks in files)")
    random_interpolation: bool = option(
        False,
        "resize training pictures of one label bilinearly or bicubically by chance, not by data.interpolation",
    )
    color_jitter: float = option(0.0, "strength of random brightness, contrast and colour (folders)", low=0, high=1)
    auto_augment: str | None = option(None, "timm's policy, such as rand-m9-mstd0.5-inc1 (image_folder)")
    erasing: float = option(0.0, "probability of erasing a rectangle", low=0, high=1)
    repeats: int = option(
        1, "repeated augmentation: each picture so many times in an epoch, and as much fewer pictures (DeiT: 3)", low=1
    )
    mixup: float = option(0.0, "alpha of mixup; 0 is off", low=0)
    cutmix: float = option(0.0, "alpha of cutmix; 0 is off", low=0)
    mix_off_epochs: int = option(0, "the last so many epochs go without mixup and cutmix", low=0)
    label_smoothing: float = option(0.0, "label smoothing", low=0, high=0.99)
    sizes: dict[int, int] = option(  # noqa: RUF009
        {}, "sizes of the training pictures from an epoch on, such as {0: 128, 5: 160}; before the first, data.size"
    )


@dataclass
class LossConfig:
    """What a segmenter learns from its masks. Classifiers read `augment.label_smoothing` alone."""

    name: Literal["ce", "ohem"] = option(
        "ce", "cross entropy of every pixel, or of the hardest (online hard example mining; segmentation)"
    )
    ohem_threshold: float = option(
        0.9, "ohem: pixels count whose true class has a probability below this, …", low=0, high=1
    )
    ohem_kept: int = option(131_072, "… and no fewer than so many of a batch on a device", low=1)
    auxiliary_weight: float = option(0.4, "weight of the auxiliary head's loss, where there is one", low=0)
    boundary_weight: float | None = option(
        None, "weight of the cross entropy of boundaries; null is 20 where a head draws them (BEVANet)", low=0
    )
    boundary_labels_weight: float | None = option(
        None,
        "weight of the labels' loss once more, on pixels that are taken for a boundary; null is 1 where a head draws "
        "them (BEVANet)",
        low=0,
    )
    class_weights: list[float] = option(  # noqa: RUF009
        [], "weights of the classes in the cross entropy of pixels, one for each; [] weighs all the same", low=0
    )


@dataclass
class EvaluateConfig:
    """How the pixels of a picture are judged. Validation and test have mode and divisor; scales and flip are of the
    final test alone."""

    mode: Literal["whole", "slide"] = option(
        "whole", "a picture in one piece, or in windows that overlap, whose answers are averaged (segmentation)"
    )
    window: list[int] | None = option(  # noqa: RUF009
        None, "slide: height and width of a window; null: data.size, squared", low=1
    )
    stride: list[int] | None = option(  # noqa: RUF009
        None, "slide: rows and columns from one window to the next; null: two thirds of the window", low=1
    )
    scales: list[float] = option(  # noqa: RUF009
        [1.0], "factors of the picture's size whose answers are averaged, in the final test", low=0.1, high=10
    )
    flip: bool = option(False, "average with the answers to the mirror image, in the final test")
    divisor: int = option(1, "stretch a picture to sides that are multiples of this", low=1)


@dataclass
class DistillConfig:
    """A frozen teacher, and what is learned from it beside the labels."""

    teacher: str | None = option(None, "a timm model whose answers are learned beside the labels; null is none")
    checkpoint: str | None = option(
        None, "the teacher's weights, of train.py or published elsewhere; null takes those that timm knows"
    )
    kwargs: dict[str, Any] = option({}, "further arguments of the teacher")  # noqa: RUF009
    labels_weight: float = option(1.0, "weight of the cross entropy with the labels", low=0)
    logits_weight: float = option(0.5, "weight of the divergence (KL) from the teacher's class probabilities", low=0)
    tokens_weight: float = option(
        0.0, "weight of the distance to the teacher's tokens after the last norm, of those that are kept", low=0
    )
    tokens_loss: Literal["mse", "kl"] = option("mse", "that distance: mean squared, or KL of softmax over channels")


@dataclass
class ReductionConfig:
    """How a model that reduces its tokens is trained to do so."""

    ratio_weight: float | None = option(
        None,
        "weight of the squared distance between the share of tokens kept and the model's keep rates (DynamicViT); "
        "null is 2 where a model decides on tokens, and nothing elsewhere",
        low=0,
    )
    shrink_start_epoch: float = option(0.0, "the epoch until which every token is kept (EViT)", low=0)
    shrink_epochs: float | None = option(
        None,
        "epochs over which the keep rate then falls, by a cosine, from 1 to the model's own; null trains at the "
        "model's own from the beginning",
        low=0,
    )


@dataclass
class OptimConfig:
    name: str = option("adamw", "a timm optimiser")
    lr: float = option(1e-3, "highest learning rate", low=0)
    weight_decay: float = option(0.05, "weight decay; biases, norms and what the model names are spared", low=0)
    no_decay: list[str] = option(  # noqa: RUF009
        [], 'more parameters without weight decay, by name, such as ["*.rpb"]'
    )
    layer_decay: float | None = option(
        None, "multiply the rate by this for each layer towards the input", low=0, high=1
    )
    layer_blocks: int = option(
        1, "blocks of a stage that are one layer to layer_decay; more than a stage has: each stage is one", low=1
    )
    lr_scale: dict[str, float] = option(  # noqa: RUF009
        {}, 'factors of the rate by parameter name, such as {"*.conv_offset.*": 0.01}; all that match multiply'
    )
    freeze: list[str] = option([], "parameters that never learn, by name, such as [pos_embed, blocks.0.*]")  # noqa: RUF009
    freeze_epochs: dict[str, float] = option(  # noqa: RUF009
        {}, 'epochs before parameters begin to learn, such as {"*": 5, head.*: 0}; the last pattern that matches counts'
    )
    lr_for_batch: int | None = option(
        None, "all rates are meant for this many pictures a step, and scaled with the real number", low=1
    )
    clip_grad: float | None = option(None, "clip gradients at this value, in the sense of clip_mode", low=0)
    clip_mode: Literal["norm", "value", "agc"] = option(
        "norm", "clip the norm of all gradients, each value, or each unit's norm in proportion to its weights' (agc)"
    )


@dataclass
class ScheduleConfig:
    name: str = option("cosine", "a timm scheduler, moved at every step")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", low=0)
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up", low=0)
    warmup_prefix: bool = option(
        False, "the schedule begins after the warm-up, at the highest rate, and not underneath it (cosine, poly, …)"
    )
    min_lr: float = option(0.0, "learning rate at the end", low=0)
    cooldown_epochs: int = option(0, "epochs at the end, out of all, that stay at min_lr", low=0)
    power: float | None = option(None, "exponent of the poly schedule, which needs one", low=0)
    decay_epochs: float | None = option(
        None, "epochs from one fall of the step schedule to the next, which needs them", low=0.01
    )
    decay_rate: float | None = option(None, "factor of such a fall; null is 0.1 (step)", low=0, high=1)


@dataclass
class EmaConfig:
    """A moving average of the weights, which is then what is validated, tested and exported."""

    decay: float | None = option(
        None, "share of the old average that each update keeps; null: no average", low=0, high=1
    )
    warmup: bool = option(False, "begin with a smaller share, which grows to `ema.decay`")
    every: int = option(1, "optimiser steps to an update", low=1)
    start_epoch: float = option(0.0, "epochs before averaging begins; until then the average is the weights", low=0)


@dataclass
class TrainConfig:
    epochs: int | None = option(10, "passes over the training pictures", low=1)
    steps: int | None = option(None, "optimiser steps instead of epochs, rounded up to whole epochs", low=1)
    batch_size: int = option(128, "pictures in a batch, on each device", low=1)
    accumulate: int = option(1, "batches to an optimiser step", low=1)
    total_batch: int | None = option(None, "pictures to an optimiser step, over all devices: settles accumulate", low=1)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = option("32-true", "Lightning's precision")
    accelerator: str = option("auto", "Lightning's accelerator: auto, cpu, gpu, mps")
    devices: int = option(1, "devices of each machine (processes on a CPU)", low=1)
    nodes: int = option(1, "machines, on each of which torchrun or Slurm starts the command", low=1)
    strategy: Literal["auto", "ddp", "fsdp"] = option(
        "auto", "several devices: ddp (the automatic choice) has the model on each, fsdp a part of every weight"
    )
    sync_batchnorm: bool = option(
        False, "batch norm over the pictures of all GPUs (ddp), as recipes of segmentation have it; alone on a CPU"
    )
    threads: int | None = option(None, "CPU threads of each process; null is torch's own choice", low=1)
    compile: bool = option(False, "run the model through torch.compile")
    channels_last: bool = option(False, "keep tensors in channels-last order")
    save_every: int | None = option(None, "also write last.ckpt every so many steps", low=1)
    save_errors: Literal["stop", "continue"] = option(
        "stop", "when a checkpoint cannot be written, as on a full disk: the last one is kept in either case"
    )
    skip_nonfinite: int = option(
        0, "steps in a row whose loss or gradient may be NaN or infinite: they change nothing; one more stops", low=0
    )
    limit_batches: int | None = option(
        None, "stop each epoch and each evaluation after so many batches: a dry run", low=1
    )
    progress: bool = option(True, "show a progress bar")

    @property
    def processes(self) -> int:
        """Of all machines together."""
        return self.devices * self.nodes


@dataclass
class Config:
    recipe: str = option("classification", "a file in configs/recipes")
    out: str | None = option(None, "run folder; null makes runs/TIME-MODEL-DATA")
    overwrite: bool = option(False, "allow a run folder that holds files already")
    resume: str | None = option(
        None,
        "continue: `last` (the newest run), a run folder or a checkpoint; `auto`: from `out` if it has a checkpoint, "
        "else begin there",
    )
    resume_force: bool = option(False, "continue although settings of the data, the model or the optimiser differ")
    seed: int = option(0, "seed of everything random", low=0)
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
"""Sections that may be given by their name alone: `model=nat_tiny` is `model.name=nat_tiny`."""


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name and what the schema says about it."""

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
        """The type without `None`."""
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
    """Every setting of the schema, in the order of the file."""
    types = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        kind = types[item.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{item.name}.")  # pyright: ignore[reportArgumentType]
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        yield Key(f"{prefix}{item.name}", kind, default, **item.metadata)
