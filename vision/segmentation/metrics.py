"""Metrics of classification and segmentation from a confusion matrix, which can be summed exactly over processes.

Unusual: a class that is neither present nor predicted has no IoU and is excluded from the mean. Counting it as 0, as
some libraries do, makes the mean too low.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(confusion: Tensor) -> dict[str, Tensor]:
    """Compute metrics from counts [truth, prediction].

    Returns:
        Scalars "accuracy", "mean_accuracy" (over classes), "mean_iou" and "frequency_weighted_iou"; per class "iou",
        "recall" and "precision", nan where the denominator is zero.
    """
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
