"""Losses of segmentation: `SegmentationLoss` and its parts.

Sources: Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining" (CVPR 2016, arXiv
1604.03540); Xu et al., "PIDNet" (CVPR 2023, arXiv 2206.02066), whose losses github.com/maomao0819/BEVANet (MIT) trains
with; Canny, "A Computational Approach to Edge Detection" (PAMI 1986), in the integers of OpenCV.

What is unusual:
* Without any labelled pixel a loss and its gradients are 0, where PyTorch's mean is nan.
* With hard example mining every mean is over pixels, as in the authors' code: class weights scale the loss of a pixel
  without division by their sum, and the mean of an auxiliary head counts ignored pixels as zeros.
* Boundaries are computed from the masks of a batch, after scaling and cropping, so they have the same width at every
  scale. The authors compute them in the whole picture and scale them with it; except in CamVid, they drop those within
  6 pixels of its border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .segmenter import SegmenterOutput

IGNORED = 255
"""Label of ignored pixels."""

_TAN_22 = 13573
"""tan(22.5 degrees) in steps of 2 ** -15."""


def _check(logits: Tensor, masks: Tensor) -> None:
    if logits.ndim != 4 or masks.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            "needed logits [B, classes, H, W] and masks [B, H, W] of the same pictures; got "
            f"{list(logits.shape)} and {list(masks.shape)}"
        )


class PixelCrossEntropy(nn.Module):
    """Mean cross entropy over labelled pixels; with class weights the weighted mean, as in torch.nn.CrossEntropyLoss.

    Args:
        class_weights: one weight per class.
    """

    class_weights: Tensor | None

    def __init__(self, *, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        weights = torch.tensor(list(class_weights), dtype=torch.float) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.label_smoothing = label_smoothing

    def of_pixels(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the weighted loss of each pixel [B, H, W], 0 where ignored, from logits [B, classes, H, W] and
        masks."""
        _check(logits, masks)
        weights, classes = self.class_weights, logits.shape[1]
        if weights is not None and len(weights) != classes:
            raise ValueError(f"needed a class weight for each of the {classes} classes; got {len(weights)}")
        return F.cross_entropy(
            logits.float(),
            masks,
            weights,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def _weight_of_pixels(self, masks: Tensor) -> Tensor:
        labelled = masks != IGNORED
        if self.class_weights is None:
            return labelled.float()
        return self.class_weights[masks.where(labelled, 0)] * labelled

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        losses = self.of_pixels(logits, masks)
        return losses.sum() / self._weight_of_pixels(masks).sum().clamp(min=1e-12)


class OhemCrossEntropy(PixelCrossEntropy):
    """Mean cross entropy of the hard pixels: those whose true class has a probability below `threshold`, and at least
    `kept` per batch.

    If fewer are that hard, the threshold is raised to the probability of the pixel of rank `kept` (from 0, hardest
    first), or of the easiest pixel if there are no more; that pixel itself is not included.

    Args:
        kept: least number of pixels per batch, on one device.
        class_weights: scale the loss of a pixel but do not affect the selection.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.9,
        kept: int = 131_072,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(class_weights=class_weights, label_smoothing=label_smoothing)
        if not 0 <= threshold <= 1 or kept < 1:
            raise ValueError(f"needed a threshold within [0, 1] and at least 1 pixel kept; got {threshold} and {kept}")
        self.threshold, self.kept = threshold, kept

    @torch.no_grad()
    def hard(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the mask of hard pixels, bool [B, H, W]."""
        labelled = masks != IGNORED
        likely = (-F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="none")).exp()
        known = likely[labelled].sort().values
        if not len(known):
            return labelled
        return labelled & (likely < known[min(self.kept, len(known) - 1)].clamp(min=self.threshold))

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        losses = self.of_pixels(logits, masks)
        hard = self.hard(logits, masks)
        return (losses * hard).sum() / hard.sum().clamp(min=1)


def _canny(masks: Tensor) -> Tensor:
    """Detect the edges of label maps, bool [B, H, W]: every change of label, thinned by non-maximum suppression.

    The result equals OpenCV's Canny(label, 0.1, 0.2): Sobel 3 x 3 with replicated border, |dx| + |dy|, four directions.
    """
    padded = F.pad(masks.float().unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1).int()
    smoothed = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dx = smoothed[:, :, 2:] - smoothed[:, :, :-2]
    smoothed = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    dy = smoothed[:, 2:] - smoothed[:, :-2]
    steep = dx.abs() + dy.abs()
    around = F.pad(steep, (1, 1, 1, 1))

    def beside(down: int, right: int) -> Tensor:
        return around[:, 1 + down : around.shape[1] - 1 + down, 1 + right : around.shape[2] - 1 + right]

    x, y = dx.abs(), dy.abs() << 15
    flat, upright = y < x * _TAN_22, y > x * (_TAN_22 + (1 << 16))  # tan(67.5 degrees) is tan(22.5 degrees) + 2
    falling = (steep > beside(-1, -1)) & (steep > beside(1, 1))
    rising = (steep > beside(-1, 1)) & (steep > beside(1, -1))
    ridge = falling.where((dx ^ dy) >= 0, rising)
    ridge = ((steep > beside(-1, 0)) & (steep >= beside(1, 0))).where(upright, ridge)
    ridge = ((steep > beside(0, -1)) & (steep >= beside(0, 1))).where(flat, ridge)
    return ridge & (steep > 0)


def _unpadded(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the padding of masks by replicated labels; return the masks and where they are not padding, both
    [B, H, W].

    Padding is the rows and columns along the border that hold only ignored pixels.
    """
    inside = torch.ones_like(masks, dtype=torch.bool)
    for axis, across in ((1, 2), (2, 1)):
        labelled = (masks != IGNORED).any(across)
        places = torch.arange(labelled.shape[1], device=masks.device).expand_as(labelled)
        first = places.where(labelled, labelled.shape[1] - 1).amin(1, keepdim=True)
        last = places.where(labelled, 0).amax(1, keepdim=True)
        inside = inside & ((places >= first) & (places <= last)).unsqueeze(across)
        masks = masks.gather(axis, places.clamp(first, last).unsqueeze(across).expand_as(masks))
    return masks, inside


def boundary_targets(masks: Tensor) -> Tensor:
    """Map label maps [B, H, W], integers from 0 to 255, to 1 on boundaries and 0 elsewhere, float [B, 1, H, W].

    Boundaries are the edges of OpenCV's Canny, dilated to 4 pixels: one before and two after the edge, along each axis.
    A border with ignored pixels is a boundary; the border between a picture and its padding is not.
    """
    if masks.ndim != 3 or masks.is_floating_point():
        raise ValueError(f"needed integer masks [B, H, W]; got {masks.dtype} {list(masks.shape)}")
    pictures, inside = _unpadded(masks.long())
    edges = (_canny(pictures) & inside).unsqueeze(1).float()
    return F.max_pool2d(F.pad(edges, (2, 1, 2, 1)), 4, stride=1) * inside.unsqueeze(1)


def boundary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross entropy of [B, 1, H, W], with each class weighted by the other's share of the batch."""
    if logits.shape != targets.shape:
        raise ValueError(f"needed logits and targets of one shape; got {list(logits.shape)}, {list(targets.shape)}")
    share = targets.mean()
    weights = share + targets * (1 - 2 * share)  # 1 - share on boundaries, share elsewhere
    return F.binary_cross_entropy_with_logits(logits.float(), targets, weights)


class SegmentationLoss(nn.Module):
    """The loss of a segmenter's output, a tensor or a `SegmenterOutput`, and its parts.

    Args:
        name: the main head's loss, `PixelCrossEntropy` ("ce") or `OhemCrossEntropy` ("ohem").
        auxiliary_weight: weight of the cross entropy of each auxiliary head.
        boundary_weight: weight of `boundary_cross_entropy`.
        boundary_labels_weight: weight of a second term of the main head's loss, restricted to pixels to which the
            boundary head gives a probability above 0.8.
    """

    def __init__(
        self,
        name: Literal["ce", "ohem"] = "ce",
        *,
        ohem_threshold: float = 0.9,
        ohem_kept: int = 131_072,
        auxiliary_weight: float = 0.4,
        boundary_weight: float = 20.0,
        boundary_labels_weight: float = 1.0,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if name not in ("ce", "ohem"):
            raise ValueError(f"needed a loss 'ce' or 'ohem'; got {name!r}")
        self.pixels = PixelCrossEntropy(class_weights=class_weights, label_smoothing=label_smoothing)
        self.main = self.pixels
        if name == "ohem":
            self.main = OhemCrossEntropy(
                threshold=ohem_threshold, kept=ohem_kept, class_weights=class_weights, label_smoothing=label_smoothing
            )
        self.auxiliary_weight = auxiliary_weight
        self.boundary_weight = boundary_weight
        self.boundary_labels_weight = boundary_labels_weight

    def _auxiliary(self, logits: Tensor, masks: Tensor) -> Tensor:
        if self.main is self.pixels:
            return self.pixels(logits, masks)
        return self.pixels.of_pixels(logits, masks).mean()

    def forward(self, output: Tensor | SegmenterOutput, masks: Tensor) -> dict[str, Tensor]:
        """Return the loss as "total" and its unweighted parts: "labels" and, if the output has them, "auxiliary",
        "boundary" and "boundary_labels". Masks [B, H, W] hold class numbers, and 255 for ignored pixels."""
        if isinstance(output, Tensor):
            labels = self.main(output, masks)
            return {"total": labels, "labels": labels}
        labels = self.main(output.logits, masks)
        parts, total = {"labels": labels}, labels
        if output.auxiliary:
            learned = [self._auxiliary(logits, masks) for logits in output.auxiliary]
            parts["auxiliary"] = torch.stack(learned).sum()
            total = total + self.auxiliary_weight * parts["auxiliary"]
        if output.boundary is not None:
            parts["boundary"] = boundary_cross_entropy(output.boundary, boundary_targets(masks))
            sure = output.boundary.detach().squeeze(1).sigmoid() > 0.8
            parts["boundary_labels"] = self.main(output.logits, masks.where(sure, IGNORED))
            total = total + self.boundary_weight * parts["boundary"]
            total = total + self.boundary_labels_weight * parts["boundary_labels"]
        return {"total": total, **parts}
