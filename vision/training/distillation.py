"""Knowledge distillation, and the loss that trains a model to keep a given share of its tokens.

Y. Rao, W. Zhao, B. Liu, J. Lu, J. Zhou, C.-J. Hsieh: DynamicViT: Efficient Vision Transformers with Dynamic Token
Sparsification, NeurIPS 2021, https://github.com/raoyongming/DynamicViT. The objective is the sum of four losses,
weighted by the settings:

* labels: the cross entropy with the labels;
* ratio: the squared difference between the share of tokens that a stage keeps and its target keep rate, averaged over
  pictures and stages;
* logits: KL(teacher || student) of the class probabilities, averaged over pictures;
* tokens: the distance to the teacher's tokens, averaged over the tokens that the last stage keeps.

The ratio loss needs a model with `forward_decided`. The logits loss works for every model, and the tokens loss for
models with the teacher's token grid and width.

Unusual:

* The teacher is not a sub-module of the task: it is in no checkpoint, optimizer or gradient bucket, and `train()` does
  not reach it. A resumed run builds it again from the settings.
* The teacher sees the student's pictures, after augmentation and mixup. If it was trained with another mean and
  standard deviation, the pictures are normalised again for it.
* The mean over kept tokens is a weighted sum, not an indexed selection, so that shapes do not depend on the decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers import NormMlpClassifierHead
from torch import Tensor, nn
from torch.nn import functional as F

from .._loading import load_model
from ..data.splits import Splits
from .config import Config, DistillConfig
from .settings import ConfigError

RATIO_WEIGHT = 2.0
"""Default weight of the ratio loss, as in DynamicViT for DeiT."""


def logits_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of the class probabilities of logits [B, K], averaged over B."""
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def tokens_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, distance: Literal["mse", "kl"] = "mse"
) -> Tensor:
    """Return the distance between tokens [B, N, C], averaged over those that `mask` [B, N] keeps (1) or over all.

    `distance` is "mse", the mean square over channels, or "kl", KL(teacher || student) of the softmax over channels.
    The mask gets no gradient; otherwise the model could lower the loss by dropping tokens that differ from the
    teacher's. If no token is kept the loss is 0.
    """
    student, teacher = student.float(), teacher.float()
    if distance == "mse":
        each = (student - teacher).square().mean(-1)
    else:
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if mask is None:
        return each.mean()
    mask = mask.detach().float()
    return (each * mask).sum() / mask.sum().clamp(min=1)


def ratio_loss(decisions: Sequence[Tensor], keep_rates: Sequence[float]) -> Tensor:
    """Of each stage's 0/1 decisions [B, N], with gradient, and the share it should keep."""
    if len(decisions) != len(keep_rates):
        raise ValueError(f"{len(decisions)} decisions need as many keep rates; got {len(keep_rates)}")
    shares = torch.stack([decision.float().flatten(1).mean(1) for decision in decisions])
    return (shares - shares.new_tensor(keep_rates)[:, None]).square().mean()


def answer_with_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits [B, K] and the last feature map as tokens [B, N, C] after the final norm.

    ConvNeXt has that norm in its head, after pooling; here it is applied to the tokens before pooling.
    """
    network: Any = model
    features, maps = network.forward_intermediates(images, indices=1, norm=True)
    last = maps[-1]
    if isinstance(getattr(network, "head", None), NormMlpClassifierHead):
        last = network.head.norm(last)
    return network.forward_head(features), last.flatten(2).transpose(1, 2)


def target_keep_rates(model: nn.Module) -> list[float] | None:
    """The share of the tokens that each stage should keep, of a model that decides on tokens; None for all others."""
    return list(getattr(model, "target_keep_rates", ())) or None


class Teacher:
    """A frozen classifier in evaluation mode, called without gradients.

    `normalised_for` is the (mean, std) that it was trained with, if they differ from those of the data.
    """

    def __init__(
        self, model: nn.Module, splits: Splits, *, normalised_for: tuple[Sequence[float], Sequence[float]] | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._answer: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]] = self._both
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (splits.mean, splits.std))
        self._scale, self._shift = torch.ones_like(std), torch.zeros_like(mean)
        if normalised_for is not None and len(normalised_for[0]) == splits.channels:
            own_mean, own_std = (torch.tensor(tuple(values)).view(-1, 1, 1) for values in normalised_for)
            self._scale, self._shift = std / own_std, (mean - own_mean) / own_std
        self._same = bool(torch.allclose(self._scale, torch.ones(())) and torch.allclose(self._shift, torch.zeros(())))

    @torch.no_grad()
    def __call__(self, images: Tensor, *, tokens: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return logits [B, K], and tokens [B, N, C] if `tokens` is set."""
        return self._answer(images if self._same else images * self._scale + self._shift, tokens)

    def _both(self, images: Tensor, tokens: bool) -> tuple[Tensor, Tensor | None]:
        return answer_with_tokens(self.model, images) if tokens else (self.model(images), None)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)

    def compile(self) -> None:
        self._answer = torch.compile(self._both)


def make_teacher(distill: DistillConfig, splits: Splits, sizes: Iterable[int] = ()) -> Teacher | None:
    """Return the teacher that the settings name, with its weights, or None. A forward pass has checked it.

    `sizes` are further sizes of the pictures that it will see.
    """
    name = distill.teacher
    if name is None:
        if distill.checkpoint is not None or distill.kwargs:
            raise ConfigError("distill.checkpoint and distill.kwargs belong to a teacher; give distill.teacher=MODEL")
        return None
    if splits.dense:
        raise ConfigError(f"distill.teacher={name}: teachers are classifiers; set it to null for segmentation")
    size, channels = splits.size, splits.channels
    own: dict[str, Any] = {"checkpoint": distill.checkpoint} if distill.checkpoint is not None else {"pretrained": True}
    if distill.checkpoint is None and "in_chans" not in distill.kwargs:
        own["in_chans"] = channels
    try:
        model = load_model(name, image_size=(size, size), **own, **distill.kwargs)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"distill.teacher={name}: {error}") from error
    facts: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    _check_classes(name, model, facts, splits)
    teacher = Teacher(model, splits, normalised_for=(facts["mean"], facts["std"]) if "mean" in facts else None)
    for each in (size, *sizes):
        try:
            teacher(torch.zeros(1, channels, each, each))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"distill.teacher={name} cannot take pictures of {channels} x {each} x {each} ({error})"
            ) from error
    return teacher


def _check_classes(name: str, model: nn.Module, facts: Mapping[str, Any], splits: Splits) -> None:
    count = getattr(model, "num_classes", len(splits.classes))
    if count != len(splits.classes):
        raise ConfigError(
            f"distill.teacher={name} knows {count} classes, but the data has {len(splits.classes)}; train it on this "
            "data first, with train.py, and give distill.checkpoint=RUN/checkpoints/best.ckpt"
        )
    labels = facts.get("label_names")
    if labels and list(labels) != list(splits.classes):
        at = next(index for index, pair in enumerate(zip(labels, splits.classes, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"distill.teacher={name}: class {at} is {labels[at]} to the teacher and {splits.classes[at]} in the data"
        )


class Objective:
    """Computes the student's output for a batch and the unweighted losses beside the cross entropy, by name.

    `weights` maps those of "ratio", "logits" and "tokens" whose weight is not 0 to their weights.
    """

    def __init__(self, model: nn.Module, config: Config, splits: Splits, teacher: Teacher | None = None) -> None:
        self.model, self.teacher = model, teacher
        self.distance: Literal["mse", "kl"] = config.distill.tokens_loss
        self.keep_rates = target_keep_rates(model)
        self.weights = _weights(config, decides=self.keep_rates is not None, teaches=teacher is not None)
        if teacher is not None and "tokens" in self.weights:
            _check_tokens(model, teacher, config, splits)
        self._answer = self._ask_student

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, tokens, decisions, mask = self._answer(images)
        parts = {}
        if self.keep_rates is not None and "ratio" in self.weights:
            parts["ratio"] = ratio_loss(decisions, self.keep_rates)
        if self.teacher is not None:
            teacher_logits, teacher_tokens = self.teacher(images, tokens="tokens" in self.weights)
            if "logits" in self.weights:
                parts["logits"] = logits_loss(logits, teacher_logits)
            if teacher_tokens is not None and tokens is not None:
                parts["tokens"] = tokens_loss(tokens, teacher_tokens, mask, distance=self.distance)
        return logits, parts

    def _ask_student(self, images: Tensor) -> tuple[Tensor, Tensor | None, Sequence[Tensor], Tensor | None]:
        network: Any = self.model
        if self.keep_rates is not None:
            return tuple(network.forward_decided(images))
        if "tokens" in self.weights:
            return *answer_with_tokens(network, images), (), None
        return network(images), None, (), None

    def to(self, device: torch.device) -> None:
        if self.teacher is not None:
            self.teacher.to(device)

    def compile(self) -> None:
        """Compile the teacher, and the student's pass unless it is `forward`, which is compiled with the model."""
        if self.keep_rates is not None or "tokens" in self.weights:
            self._answer = torch.compile(self._ask_student)
        if self.teacher is not None:
            self.teacher.compile()


def _weights(config: Config, *, decides: bool, teaches: bool) -> dict[str, float]:
    given = config.reduction.ratio_weight
    if given and not decides:
        raise ConfigError(
            f"reduction.ratio_weight={given:g}, but {config.model.name} decides on no tokens (DynamicViT does); "
            "set it to null"
        )
    weights = {"ratio": (RATIO_WEIGHT if given is None else given) if decides else 0.0}
    distill = config.distill
    if teaches:
        weights |= {"logits": distill.logits_weight, "tokens": distill.tokens_weight}
    elif distill.tokens_weight:
        raise ConfigError(
            f"distill.tokens_weight={distill.tokens_weight:g} needs a teacher; give distill.teacher=MODEL"
        )
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights and not distill.labels_weight:
        raise ConfigError("distill.labels_weight=0 and no other loss has a weight: there is nothing to learn")
    return weights


@torch.no_grad()
def _check_tokens(model: nn.Module, teacher: Teacher, config: Config, splits: Splits) -> None:
    """Raise if the last feature maps of student and teacher differ in grid or width."""
    picture = torch.zeros(1, splits.channels, splits.size, splits.size)
    name, own = config.distill.teacher, config.model.name
    was_training = model.training
    shapes = []
    for each, network in ((own, model.eval()), (name, teacher.model)):
        if not (hasattr(network, "forward_intermediates") and hasattr(network, "forward_head")):
            raise ConfigError(f"distill.tokens_weight: {each} gives no tokens; set distill.tokens_weight=0")
        shapes.append(tuple(answer_with_tokens(network, picture)[1].shape[1:]))
    model.train(was_training)
    if shapes[0] != shapes[1]:
        (tokens, width), (wanted, teacher_width) = shapes
        raise ConfigError(
            f"distill.tokens_weight: {own} ends with {tokens} tokens of width {width}, its teacher {name} with "
            f"{wanted} of width {teacher_width}; take a teacher of the same kind, or set distill.tokens_weight=0"
        )
