"""What a run folder shows: the settings and a batch before training; numbers and pictures after it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from ..data.loading import EpochBatches, Request, seed_everything
from ..data.splits import IGNORE_INDEX, Splits
from ..segmentation import scores
from . import pictures
from .checkpoints import write_text
from .config import Config
from .mistakes import Mistake, shrink
from .settings import to_yaml
from .summary import Summary
from .tasks import Task


def describe_run(folder: Path, config: Config, task: Task, splits: Splits, summary: Summary) -> None:
    """Writes what is known before the first step: config.yaml, summary.txt and a batch as the model sees it."""
    write_text(folder / "config.yaml", to_yaml(config))
    write_text(folder / "summary.txt", f"{summary}\n")
    _draw_batch(folder / "batch.png", task, splits, config)


def collect_results(
    config: Config, splits: Splits, summary: Summary, task: Task, test: Any, best: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model": config.model.name,
        "model_kwargs": config.model.kwargs,
        "data": splits.origin,
        "unreadable": sorted(getattr(splits.train, "bad", ())),
        "test": {name.removeprefix("test/"): value for name, value in test.items()},
        "test_by_class": _by_class(task.result, splits.classes),
        "best_epoch": best["epoch"] + 1,
        "epochs": task.plan.epochs,
        "parameters": summary.parameters,
        "gmacs": summary.macs / 1e9,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {task.device}",
    }


def _by_class(confusion: torch.Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of each class how many pictures or pixels there were, its numbers, and for what other class it was taken most."""
    result = scores(confusion)
    others = confusion.clone().fill_diagonal_(0)
    most, taken_for = others.max(1)
    return [
        {
            "class": name,
            "count": int(confusion[index].sum()),
            **{key: _number(result[key][index]) for key in ("recall", "precision", "iou")},
            "taken_for": classes[int(taken_for[index])] if most[index] > 0 else None,
            "taken_for_count": int(most[index]),
        }
        for index, name in enumerate(classes)
    ]


def _number(value: torch.Tensor) -> float | None:
    return None if value.isnan() else round(float(value), 6)


def _draw_batch(path: Path, task: Task, splits: Splits, config: Config) -> None:
    count = 6 if splits.dense else 32
    batches = EpochBatches(len(splits.train), config.train.batch_size, seed=config.seed, training=True)
    request = next(iter(batches))
    images, targets = splits.train.__getitems__(request._replace(indices=request.indices[: count - count % 2]))
    if splits.dense:
        images, targets = (tensor.unbind() for tensor in (images, targets))
        return pictures.draw_masks(path, images, {"truth": targets}, splits.classes, splits.mean, splits.std)
    names = [splits.classes[int(target)] for target in targets]
    if task.mix is not None and len(images) % 2 == 0:
        seed_everything(request.seed)
        images, soft = task.mix(images, targets)
        names = [_blend_name(weights, splits.classes) for weights in soft]
    pictures.draw_batch(path, images, names, splits.mean, splits.std)


def _blend_name(weights: torch.Tensor, classes: tuple[str, ...]) -> str:
    first, second = weights.topk(2).indices.tolist()
    share = float(weights[second] / (weights[first] + weights[second]))
    return classes[first] if share < 0.1 else f"{classes[first]} +\n{100 * share:.0f} % {classes[second]}"


def show_results(
    folder: Path, task: Task, splits: Splits, results: dict[str, Any], mistakes: Sequence[Mistake]
) -> None:
    """Writes results.json and the pictures that need a trained model; the numbers first, since drawing may fail."""
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _draw_results(folder, task, splits, results, mistakes)


def _draw_results(
    folder: Path, task: Task, splits: Splits, results: dict[str, Any], mistakes: Sequence[Mistake]
) -> None:
    _draw_predictions(folder / "predictions.png", task, splits)
    _draw_mistakes(folder / "mistakes.png", mistakes, splits)
    name, value = ("mean IoU", "mean_iou") if splits.dense else ("accuracy", "accuracy")
    title = f"{results['model']} on {results['data']}\ntest {name} {100 * results['test'][value]:.1f} %"
    pictures.draw_confusion(folder / "confusion.png", task.result, splits.classes, title)


@torch.no_grad()
def _draw_predictions(path: Path, task: Task, splits: Splits) -> None:
    count = min(6 if splits.dense else 32, len(splits.test))
    spread = torch.linspace(0, len(splits.test) - 1, count).long().tolist()
    task.model.eval().cpu()
    shown = (splits.classes, splits.mean, splits.std)
    if splits.dense:
        answered = [_predict_mask(task, splits, index) for index in spread]
        images, truth, predicted = (list(parts) for parts in zip(*answered, strict=True))
        return pictures.draw_masks(path, images, {"truth": truth, "prediction": predicted}, *shown)
    images, truth = splits.test.__getitems__(Request(spread, 0))
    confidence, predicted = task.judge(images, final=True).softmax(1).max(1)
    title = "test pictures: predicted class and confidence"
    pictures.draw_predictions(path, images, truth, predicted, confidence, *shown, title=title)


def _predict_mask(task: Task, splits: Splits, index: int) -> tuple[torch.Tensor, ...]:
    """A test picture, its mask and the model's, no larger than they are drawn."""
    images, truth = splits.test.__getitems__(Request([index], 0))
    found = (images, truth, task.judge(images, final=True).argmax(1))
    return tuple(shrink(tensor[0]) for tensor in found)


def _draw_mistakes(path: Path, mistakes: Sequence[Mistake], splits: Splits) -> None:
    if not mistakes:
        return
    images = [mistake.image for mistake in mistakes]
    truth = [mistake.truth for mistake in mistakes]
    predicted = [mistake.prediction for mistake in mistakes]
    confidence = [mistake.confidence for mistake in mistakes]
    shown = (splits.classes, splits.mean, splits.std)
    if splits.dense:
        errors = [
            torch.where((guess != label) & (label != IGNORE_INDEX), certainty, 0.0)
            for label, guess, certainty in zip(truth, predicted, confidence, strict=True)
        ]
        return pictures.draw_masks(path, images, {"truth": truth, "prediction": predicted}, *shown, errors=errors)
    title = "the most confident mistakes of the test"
    labels, guesses = torch.stack(truth), torch.stack(predicted)
    pictures.draw_predictions(path, torch.stack(images), labels, guesses, torch.stack(confidence), *shown, title=title)
