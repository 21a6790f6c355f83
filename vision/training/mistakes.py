"""Collect the wrong predictions with the highest confidence during the test.

Unusual: they are collected batch by batch, so that no second pass is needed and memory does not grow with the test set;
pictures with masks are stored at the size at which they are drawn. Of several processes each sees its own shard, and
rank 0 shows the mistakes in its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..data.splits import IGNORE_INDEX

SHOWN_SIDE = 640
"""The longer side, in pixels, of pictures with masks as they are drawn in the run folder."""


class Mistake(NamedTuple):
    """A wrong prediction.

    `score` is the confidence of a wrong class; for masks it is the mean over labelled pixels, with 0 for right ones.
    """

    score: float
    image: Tensor  # [C, H, W], as the data set gave it
    truth: Tensor  # a label, or labels [H, W]
    prediction: Tensor  # as truth
    confidence: Tensor  # of the prediction, the same shape


class Mistakes(pl.Callback):
    """Keeps the `most` mistakes of a test with the highest scores. `task.test_step` must return logits."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.found: list[Mistake] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.add(batch[0], batch[1], outputs)

    @torch.no_grad()
    def add(self, images: Tensor, truth: Tensor, logits: Tensor) -> None:
        """Add the mistakes of a batch: pictures [B, C, H, W], labels [B] or [B, H, W], logits with classes second."""
        if not len(images):  # this process has no pictures left
            return
        # One picture at a time: the probabilities of a batch of masks would double the memory of the test.
        likeliest = [answer.float().softmax(0).max(0) for answer in logits]
        confidence, prediction = (torch.stack(parts) for parts in zip(*likeliest, strict=True))
        certainty = torch.where(prediction != truth, confidence, 0.0)
        if truth.ndim > 1:
            judged = truth != IGNORE_INDEX
            certainty = (certainty * judged).flatten(1).sum(1) / judged.flatten(1).sum(1).clamp(min=1)
        scores, order = certainty.topk(min(self.most, len(certainty)))
        least = self.found[-1].score if len(self.found) == self.most else 0.0
        for score, index in zip(scores.tolist(), order.tolist(), strict=True):
            if score > least:
                kept = (
                    shrink(tensor[index].detach()).cpu().clone() for tensor in (images, truth, prediction, confidence)
                )
                self.found.append(Mistake(score, *kept))
        self.found = sorted(self.found, key=lambda mistake: -mistake.score)[: self.most]


def shrink(values: Tensor, longest: int = SHOWN_SIDE) -> Tensor:
    """Subsample [..., H, W] so that no side exceeds `longest`; a tensor without axes is returned unchanged.

    Pixels are skipped, not interpolated: labels stay valid, and a picture stays aligned with its masks.
    """
    height, width = values.shape[-2:] if values.ndim > 1 else (1, 1)
    if max(height, width) <= longest:
        return values
    rows, columns = (
        torch.linspace(0, side - 1, max(round(side * longest / max(height, width)), 1), device=values.device)
        .round()
        .long()
        for side in (height, width)
    )
    return values[..., rows[:, None], columns]
