"""What a model got wrong and was most sure of: of all pictures of a test those that say most about data and model.

Unusual: they are collected while the test runs, a handful at a time, so that no second pass is needed and a test of any
length takes no more memory; of pictures with masks no more is kept than will be drawn. Of several processes each sees
its own share, and the first one shows what it saw.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..data.splits import IGNORE_INDEX

SHOWN_SIDE = 640
"""The longer side, in pixels, of a picture with a mask in the run folder."""


class Mistake(NamedTuple):
    """`score` is the certainty of the wrong answer; of pixels the share that is wrong, weighed with the certainty."""

    score: float
    image: Tensor  # [C, H, W], as the data set gave it
    truth: Tensor  # a label, or labels [H, W]
    prediction: Tensor  # the same
    confidence: Tensor  # of the prediction, the same shape


class Mistakes(pl.Callback):
    """Keeps the `most` mistakes with the highest score of a test. `task.test_step` must return logits."""

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
        """Pictures [B, C, H, W], labels [B] or [B, H, W], and logits with the classes in axis 1."""
        if not len(images):  # of a process without pictures
            return
        # One by one: the probabilities of a batch of scenes would take as much memory as the test itself.
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
    """[..., H, W] with neither side above `longest`, by leaving out pixels: labels stay what they are, and a picture
    and its masks stay on top of each other. A lone label stays too."""
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
