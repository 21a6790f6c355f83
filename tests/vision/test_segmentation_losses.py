"""Losses of segmenters by hand-worked cases, and against loops written from their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from mixerzoo.vision.segmentation.losses import (
    OhemCrossEntropy,
    PixelCrossEntropy,
    SegmentationLoss,
    boundary_cross_entropy,
    boundary_targets,
)
from mixerzoo.vision.segmentation.segmenter import SegmenterOutput
from torch import Tensor
from torch.nn import functional as F

WEIGHTS = [0.5, 2.0, 1.0]


def case(*, ignored: float = 0.2, size: tuple[int, int] = (6, 7)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    masks = torch.randint(0, 3, (2, *size))
    masks[torch.rand(masks.shape) < ignored] = 255
    return 2 * torch.randn(2, 3, *size), masks


def pixels(logits: Tensor, masks: Tensor) -> list[tuple[float, int]]:
    """(probability of its own class, class) of each labelled pixel."""
    likely = logits.double().softmax(1)
    return [
        (float(likely[b, masks[b, y, x], y, x]), int(masks[b, y, x]))
        for b in range(masks.shape[0])
        for y in range(masks.shape[1])
        for x in range(masks.shape[2])
        if masks[b, y, x] != 255
    ]


def ohem_by_loop(logits: Tensor, masks: Tensor, threshold: float, kept: int, weights: Sequence[float]) -> float:
    known = sorted(pixels(logits, masks))
    limit = max(threshold, known[min(kept, len(known) - 1)][0])
    hard = [-weights[label] * math.log(p) for p, label in known if p < limit]
    return sum(hard) / len(hard)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_pytorchs(weights: list[float] | None, smoothing: float) -> None:
    logits, masks = case()
    ours = PixelCrossEntropy(class_weights=weights, label_smoothing=smoothing)
    tensor = None if weights is None else torch.tensor(weights)
    want = F.cross_entropy(logits, masks, tensor, ignore_index=255, label_smoothing=smoothing)
    torch.testing.assert_close(ours(logits, masks), want)


@pytest.mark.parametrize(("threshold", "kept"), [(0.9, 5), (0.2, 30), (0.0, 12), (1.0, 1), (0.5, 10_000)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_hard_examples_by_loop(threshold: float, kept: int, weights: list[float] | None) -> None:
    logits, masks = case()
    loss = OhemCrossEntropy(threshold=threshold, kept=kept, class_weights=weights)(logits, masks)
    assert float(loss) == pytest.approx(ohem_by_loop(logits, masks, threshold, kept, weights or [1.0] * 3), rel=1e-5)


def test_hard_examples_by_hand() -> None:
    """Four pixels whose own class has the probabilities .2, .5, .8 and .95, and one without a label."""
    likely = torch.tensor([0.2, 0.5, 0.8, 0.95, 0.5])
    logits = torch.stack([likely.logit(), torch.zeros(5)]).view(1, 2, 1, 5)
    masks = torch.tensor([[[0, 0, 0, 0, 255]]])

    def loss(threshold: float, kept: int) -> float:
        return math.exp(-float(OhemCrossEntropy(threshold=threshold, kept=kept)(logits, masks)))

    assert loss(0.6, 1) == pytest.approx((0.2 * 0.5) ** (1 / 2)), "below the threshold"
    assert loss(0.1, 1) == pytest.approx(0.2), "one is kept"
    assert loss(0.1, 3) == pytest.approx((0.2 * 0.5 * 0.8) ** (1 / 3)), "three are kept"
    assert loss(0.1, 100) == pytest.approx((0.2 * 0.5 * 0.8) ** (1 / 3)), "the easiest of all does not count"
    assert loss(1.0, 1) == pytest.approx((0.2 * 0.5 * 0.8 * 0.95) ** (1 / 4))


@pytest.mark.parametrize("name", ["ce", "ohem"])
def test_nothing_labelled_is_zero_and_teaches_nothing(name: str) -> None:
    logits, masks = case(ignored=2.0)
    logits.requires_grad_()
    boundary = torch.randn(2, 1, 6, 7, requires_grad=True)
    losses = SegmentationLoss(name, class_weights=WEIGHTS)(SegmenterOutput(logits, (logits,), boundary), masks)
    losses["total"].backward()
    assert losses["labels"] == losses["auxiliary"] == losses["boundary_labels"] == 0
    assert not logits.grad.any() and boundary.grad.isfinite().all()


def edges(rows: Sequence[str]) -> list[str]:
    """Boundary targets of masks written as digits, x for ignored."""
    masks = torch.tensor([[255 if c == "x" else int(c) for c in row] for row in rows])
    targets = boundary_targets(masks[None])
    assert targets.shape == (1, 1, *masks.shape) and targets.dtype == torch.float
    return ["".join("#" if v else "." for v in row) for row in targets[0, 0]]


def test_boundaries_by_hand() -> None:
    """Of two pixels that are as steep the first is the edge; it, one before it and two after become boundary."""
    assert edges(["0000001111"] * 3) == ["....####.."] * 3
    assert "".join(edges(list("0000001111"))) == "....####.."
    assert edges(["11111"] * 4) == ["....."] * 4
    assert edges(["00000x1111"] * 3)[0].count("#") > 0, "a border with ignored pixels is one, too"


def test_borders_of_padding_are_none() -> None:
    plain = ["0000011111"] * 5
    want = edges(plain)
    assert edges([f"xx{row}xxx" for row in plain]) == [f"..{row}..." for row in want]
    assert edges(["x" * 10, *plain, "x" * 10, "x" * 10]) == ["." * 10, *want, "." * 10, "." * 10]
    assert edges(["xxxx"] * 3) == ["...."] * 3


def test_boundaries_as_opencv_draws_them() -> None:
    cv2 = pytest.importorskip("cv2")
    generator = torch.Generator().manual_seed(0)
    for classes, size in ((2, (40, 31)), (19, (25, 64)), (256, (33, 33))):
        coarse = torch.randint(0, classes, (1, 1, 6, 7), generator=generator)
        mask = F.interpolate(coarse.float(), size=size).long()[0, 0]
        canny = cv2.Canny(mask.byte().numpy(), 0.1, 0.2, apertureSize=3)
        wide = cv2.dilate(canny, torch.ones(4, 4, dtype=torch.uint8).numpy()) > 50
        assert torch.equal(boundary_targets(mask[None])[0, 0].bool(), torch.from_numpy(wide))


def test_boundaries_do_not_depend_on_company() -> None:
    masks = torch.randint(0, 4, (3, 12, 10)).repeat_interleave(3, 1).repeat_interleave(3, 2)
    alone = torch.cat([boundary_targets(mask[None]) for mask in masks])
    assert torch.equal(boundary_targets(masks), alone) and 0 < alone.mean() < 1


def test_boundary_loss_by_loop() -> None:
    logits, targets = torch.randn(2, 1, 5, 6), (torch.rand(2, 1, 5, 6) < 0.2).float()
    drawn = float(targets.mean())
    total = 0.0
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        total -= (1 - drawn) * math.log(p) if target else drawn * math.log(1 - p)
    assert float(boundary_cross_entropy(logits, targets)) == pytest.approx(total / targets.numel(), rel=1e-5)


def test_the_whole_loss_is_the_sum_of_its_parts() -> None:
    logits, masks = case(size=(12, 9))
    auxiliary, boundary = torch.randn_like(logits), 3 * torch.randn(2, 1, 12, 9)
    loss = SegmentationLoss("ohem", ohem_threshold=0.7, ohem_kept=20, class_weights=WEIGHTS)
    parts = loss(SegmenterOutput(logits, (auxiliary,), boundary), masks)

    main = ohem_by_loop(logits, masks, 0.7, 20, WEIGHTS)
    of_pixels = [-WEIGHTS[label] * math.log(p) for p, label in pixels(auxiliary, masks)]
    sure = masks.clone()
    sure[boundary[:, 0].sigmoid() <= 0.8] = 255
    want = {
        "labels": main,
        "auxiliary": sum(of_pixels) / masks.numel(),  # ignored pixels count as zeros, as the authors have it
        "boundary": float(boundary_cross_entropy(boundary, boundary_targets(masks))),
        "boundary_labels": ohem_by_loop(logits, sure, 0.7, 20, WEIGHTS),
    }
    assert {name: float(parts[name]) for name in want} == pytest.approx(want, rel=1e-4)
    total = want["labels"] + 0.4 * want["auxiliary"] + 20 * want["boundary"] + want["boundary_labels"]
    assert float(parts["total"]) == pytest.approx(total, rel=1e-4)


def test_one_head_and_several_auxiliary_ones() -> None:
    logits, masks = case()
    plain = PixelCrossEntropy()(logits, masks)
    loss = SegmentationLoss(auxiliary_weight=0.25)
    torch.testing.assert_close(loss(logits, masks), {"total": plain, "labels": plain})
    parts = loss(SegmenterOutput(logits, (logits, logits)), masks)
    torch.testing.assert_close(parts["total"], plain + 0.25 * 2 * plain)
    assert set(parts) == {"total", "labels", "auxiliary"}


def test_bad_input() -> None:
    logits, masks = case()
    with pytest.raises(ValueError, match="needed a loss 'ce' or 'ohem'; got 'dice'"):
        SegmentationLoss("dice")
    with pytest.raises(ValueError, match=r"at least 1 pixel kept; got 0\.9 and 0"):
        OhemCrossEntropy(kept=0)
    with pytest.raises(ValueError, match=r"masks \[B, H, W\].*\[2, 3, 6, 7\] and \[2, 6, 6\]"):
        SegmentationLoss()(logits, masks[..., 1:])
    with pytest.raises(ValueError, match="a class weight for each of the 3 classes; got 2"):
        PixelCrossEntropy(class_weights=[1.0, 2.0])(logits, masks)
    with pytest.raises(ValueError, match="integer masks"):
        boundary_targets(masks.float())
    with pytest.raises(ValueError, match="of one shape"):
        boundary_cross_entropy(logits, logits[:, :1])
