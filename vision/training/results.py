"""Write the files of a run folder: settings and a batch before training, results and pictures after the test."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from ..data.loading import Request
from ..data.module import ZooData
from ..data.splits import IGNORE_INDEX, Splits
from ..segmentation import scores
from ..summary import Summary
from . import pictures
from .checkpoints import write_text
from .config import Config
from .mistakes import Mistake, shrink
from .settings import to_yaml
from .tasks import Task


def describe_run(folder: Path, config: Config, task: Task, data: ZooData, summary: Summary) -> None:
    """Write config.yaml, summary.txt and batch.png, the first batch of the first process, before training."""
    write_text(folder / "config.yaml", to_yaml(config))
    write_text(folder / "summary.txt", f"{summary}\n")
    _draw_batch(folder / "batch.png", task, data, config.train.processes)


def collect_results(
    config: Config, splits: Splits, summary: Summary, task: Task, test: Any, best: dict[str, Any]
) -> dict[str, Any]:
    return {
        "metric": task.metric,
        "validation": _validated(best),
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


def _validated(best: dict[str, Any]) -> float:
    """Return the validation metric that selected best.ckpt, from the saved state of the `BestCheckpoint` callback."""
    [state] = [state for name, state in best["callbacks"].items() if name.startswith("BestCheckpoint")]
    return float(state["current_score"])


def _by_class(confusion: torch.Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return for each class its count, recall, precision and IoU, and the class it was most often confused with."""
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


def _draw_batch(path: Path, task: Task, data: ZooData, processes: int) -> None:
    """Draw a part of the first batch. All of it is computed, since augmentation depends on the size of the batch."""
    splits = data.splits
    images, targets = splits.train.__getitems__(data.first_request(processes))
    if splits.dense:
        images, targets = (tensor[:6].unbind() for tensor in (images, targets))
        return pictures.draw_masks(path, images, {"truth": targets}, splits.classes, splits.mean, splits.std)
    names = [splits.classes[int(target)] for target in targets]
    if task.mix is not None:
        task.seed_step(0, 0, rank=0)
        images, soft = task.blend(images, targets, epoch=0)
        names = [_blend_name(weights, splits.classes) for weights in soft]
    pictures.draw_batch(path, images[:32], names[:32], splits.mean, splits.std)


def _blend_name(weights: torch.Tensor, classes: tuple[str, ...]) -> str:
    first, second = weights.topk(2).indices.tolist()
    share = float(weights[second] / (weights[first] + weights[second]))
    return classes[first] if share < 0.1 else f"{classes[first]} +\n{100 * share:.0f} % {classes[second]}"


def show_results(
    folder: Path, task: Task, splits: Splits, results: dict[str, Any], mistakes: Sequence[Mistake]
) -> None:
    """Write results.json and then the pictures of the test; the numbers come first because drawing may fail."""
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _draw_results(folder, task, splits, results, mistakes)


def _draw_results(
    folder: Path, task: Task, splits: Splits, results: dict[str, Any], mistakes: Sequence[Mistake]
) -> None:
    _draw_predictions(folder / "predictions.png", task, splits)
    _draw_mistakes(folder / "mistakes.png", mistakes, splits)
    name, value = pictures.in_words(results["metric"]), results["test"][results["metric"]]
    title = f"{results['model']} on {results['data']}\ntest {name} {100 * value:.1f} %"
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
    answer = task.judge(images, final=True)
    confidence = answer.logits.softmax(1).amax(1)
    title = "test pictures: predicted class and confidence"
    pictures.draw_predictions(path, images, truth, answer.labels, confidence, *shown, title=title)


def _predict_mask(task: Task, splits: Splits, index: int) -> tuple[torch.Tensor, ...]:
    """Return a test picture, its mask and the predicted mask, reduced to the size at which they are drawn."""
    images, truth = splits.test.__getitems__(Request([index], 0))
    predicted = task.judge(images, final=True).labels
    return tuple(shrink(tensor[0]) for tensor in (images, truth, predicted))


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
