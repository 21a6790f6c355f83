"""All numbers of a classifier of pictures or of pixels from one confusion matrix, which adds up exactly over processes.

Unusual: a class that is neither present nor predicted has no IoU and stays out of the mean. Per-class results that
report 0 for it, as some libraries do, make a mean that is too low.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(confusion: Tensor) -> dict[str, Tensor]:
    """Of counts [truth, prediction]: accuracy, its mean over classes, mean IoU, and IoU weighed with how often a class
    is the truth; by class `iou`, `recall`, `precision` (nan where there is nothing to divide by)."""
    counts = confusion.double()
    hits, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = hits / (truth + predicted - hits)  # 0 / 0 is nan: the class does not occur
    recall = hits / truth
    return {
        "accuracy": hits.sum() / counts.sum(),
        "mean_accuracy": torch.nanmean(recall),
        "mean_iou": torch.nanmean(iou),
        "frequency_weighted_iou": torch.nansum(truth * iou) / counts.sum(),
        "iou": iou,
        "recall": recall,
        "precision": hits / predicted,
    }
