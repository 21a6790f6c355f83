"""The numbers of a segmenter: one matrix of counts, exact for any number of pixels and of processes."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from mixerzoo.vision.data.loading import EpochBatches
from mixerzoo.vision.segmentation import scores
from mixerzoo.vision.segmentation.inference import Inference, infer
from torch import Tensor, distributed
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

SIZES = ((9, 14), (20, 7), (1, 30), (16, 16), (13, 5))
SETTINGS = Inference("slide", [8, 8], [5, 5], scales=[1.0, 0.5], flip=True)


def _model(images: Tensor) -> Tensor:
    """Five classes by brightness, blurred so that windows matter."""
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    return -(blurred - torch.linspace(-1, 1, 5).view(1, 5, 1, 1)).square()


def _judge(indices: list[int]) -> MulticlassConfusionMatrix:
    metric = MulticlassConfusionMatrix(5, ignore_index=255, validate_args=False)
    for index in indices:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(1, 1, *SIZES[index], generator=generator)
        truth = torch.randint(0, 5, (1, *SIZES[index]), generator=generator)
        truth[:, :1, :4] = 255
        metric.update(infer(_model, image, SETTINGS).argmax(1), truth)
    return metric


def _process(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = EpochBatches(len(SIZES), 1, seed=0, training=False, rank=rank, world_size=2)
    metric = _judge([index for request in batches for index in request.indices])
    torch.save(metric.compute(), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    """Five pictures of five sizes: one process has three of them, the other two and an empty batch."""
    start = multiprocessing.get_context("fork")  # the test's own process has imported torch
    processes = [start.Process(target=_process, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    alone = _judge(list(range(len(SIZES)))).compute()
    assert alone.sum() == sum(height * width - min(width, 4) for height, width in SIZES)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)


def test_billions_of_pixels_are_counted_exactly() -> None:
    """A float32 count stops at 2^24, an int32 at 2^31."""
    metric = MulticlassConfusionMatrix(2, ignore_index=255, validate_args=False)
    metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    metric.confmat += torch.tensor([[2**53, 0], [0, 2**40]])
    metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 255, 1]))
    assert metric.compute().tolist() == [[2**53 + 2, 1], [0, 2**40 + 2]]


def test_scores_by_hand() -> None:
    # Three classes in use, a fourth that never occurs.
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
    result = scores(confusion)
    assert result["accuracy"] == pytest.approx(9 / 14)
    assert result["iou"][:3].tolist() == pytest.approx([6 / 9, 3 / 8, 0.0])
    assert math.isnan(result["iou"][3]) and math.isnan(result["recall"][3])
    assert result["mean_iou"] == pytest.approx((6 / 9 + 3 / 8 + 0) / 3)
    assert result["mean_accuracy"] == pytest.approx((6 / 8 + 3 / 4 + 0) / 3)
    assert result["frequency_weighted_iou"] == pytest.approx((8 * 6 / 9 + 4 * 3 / 8 + 2 * 0) / 14)


def test_scores_ignore_255_and_agree_with_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (3, 20, 20), generator=generator)
    prediction = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, (truth + 1) % 4)
    truth[:, :5] = 255
    confusion = MulticlassConfusionMatrix(6, ignore_index=255)
    reference = MulticlassJaccardIndex(6, average="macro", ignore_index=255)
    for metric in (confusion, reference):
        metric.update(prediction, truth)
    assert confusion.compute().sum() == 3 * 15 * 20
    assert scores(confusion.compute())["mean_iou"] == pytest.approx(float(reference.compute()), abs=1e-6)
