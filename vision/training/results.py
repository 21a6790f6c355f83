"""What a run folder shows: the settings and a batch before training; numbers and pictures after it."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import timm
import torch

from ..data.loading import EpochBatches, Request, seed_everything
from ..data.splits import Splits
from ..segmentation import scores
from . import pictures
from .callbacks import read_table
from .config import Config
from .settings import to_yaml
from .summary import Summary
from .tasks import Task


def describe_run(folder: Path, config: Config, task: Task, splits: Splits, summary: Summary) -> None:
    """Writes what is known before the first step: config.yaml, summary.txt and a batch as the model sees it."""
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "summary.txt").write_text(f"{summary}\n")
    _draw_batch(folder / "batch.png", task, splits, config)


def collect_results(
    config: Config, splits: Splits, summary: Summary, task: Task, test: Any, best: dict[str, Any]
) -> dict[str, Any]:
    result = scores(task.result)
    each = result["iou" if splits.dense else "recall"]
    per_class = {name: _number(value) for name, value in zip(splits.classes, each, strict=True)}
    return {
        "model": config.model.name,
        "model_kwargs": config.model.kwargs,
        "data": splits.origin,
        "test": {name.removeprefix("test/"): value for name, value in test.items()},
        ("test_iou_by_class" if splits.dense else "test_recall_by_class"): per_class,
        "best_epoch": best["epoch"] + 1,
        "epochs": task.plan.epochs,
        "parameters": summary.parameters,
        "gmacs": summary.macs / 1e9,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {task.device}",
    }


def _number(value: torch.Tensor) -> float | None:
    return None if value.isnan() else round(float(value), 6)


def _draw_batch(path: Path, task: Task, splits: Splits, config: Config) -> None:
    count = 6 if splits.dense else 32
    batches = EpochBatches(len(splits.train), config.train.batch_size, seed=config.seed, training=True)
    request = next(iter(batches))
    images, targets = splits.train.__getitems__(request._replace(indices=request.indices[: count - count % 2]))
    if splits.dense:
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


def show_results(folder: Path, task: Task, splits: Splits, results: dict[str, Any]) -> None:
    """Writes results.json and the pictures that need a trained model."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _draw_results(folder, task, splits, results)


@torch.no_grad()
def _draw_results(folder: Path, task: Task, splits: Splits, results: dict[str, Any]) -> None:
    title = f"{results['model']} on {results['data']}"
    pictures.draw_curves(folder / "curves.png", read_table(folder / "metrics.csv"), task.metric, title)
    count = min(6 if splits.dense else 32, len(splits.test))
    spread = torch.linspace(0, len(splits.test) - 1, count).long().tolist()
    images, truth = splits.test.__getitems__(Request(spread, 0))
    model = task.model.eval().cpu()
    logits = model(images)
    value = 100 * results["test"][task.metric]
    if splits.dense:
        masks = {"truth": truth, "prediction": logits.argmax(1)}
        pictures.draw_masks(folder / "predictions.png", images, masks, splits.classes, splits.mean, splits.std)
    else:
        shown = (images, truth, logits.softmax(1), splits.classes, splits.mean, splits.std)
        pictures.draw_predictions(folder / "predictions.png", *shown)
    title = f"{title}\ntest {'mean IoU' if splits.dense else 'accuracy'} {value:.1f} %"
    pictures.draw_confusion(folder / "confusion.png", task.result, splits.classes, title)
