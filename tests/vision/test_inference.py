"""Whole pictures: what mmsegmentation defines, written out here a second time, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mixerzoo.vision.segmentation.inference import Inference, infer, label_map, of_settings, windows
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture
def model() -> nn.Module:
    """Its answers depend on the borders of what it sees, as those of any network with padding do."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 5, 5, padding=2)).eval()


def _picture(*size: int, count: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def _slide(model: Callable[[Tensor], Tensor], images: Tensor, window: list[int], stride: list[int]) -> Tensor:
    """The definition: sums on a map padded with zeros, divided by how often each pixel was seen."""
    (height, width), (tall, wide), (down, right) = images.shape[2:], window, stride
    sums, counts = torch.zeros(len(images), 5, height, width), torch.zeros(1, 1, height, width)
    for row in range(max(height - tall + down - 1, 0) // down + 1):
        for column in range(max(width - wide + right - 1, 0) // right + 1):
            bottom, edge = min(row * down + tall, height), min(column * right + wide, width)
            top, left = max(bottom - tall, 0), max(edge - wide, 0)
            borders = (left, width - edge, top, height - bottom)
            part = images[:, :, top:bottom, left:edge]
            sums += F.pad(model(part), borders)
            counts += F.pad(torch.ones(1, 1, bottom - top, edge - left), borders)
    assert counts.min() >= 1
    return sums / counts


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((40, 40), [16, 16], [11, 11]),
        ((41, 67), [16, 24], [11, 16]),  # neither divides
        ((40, 48), [8, 24], [8, 24]),  # no overlap, all divide
        ((10, 50), [16, 16], [11, 11]),  # lower than a window
        ((9, 7), [16, 16], [16, 16]),  # smaller than a window
        ((17, 16), [16, 16], [1, 16]),
        ((1, 100), [32, 32], [21, 21]),
    ],
)
@torch.no_grad()
def test_sliding_is_the_published_definition(
    size: tuple[int, int], window: list[int], stride: list[int], model: nn.Module
) -> None:
    images = _picture(*size, count=2)
    got = infer(model, images, Inference("slide", window=window, stride=stride))
    assert torch.equal(got, _slide(model, images, window, stride))


def _bilinear(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False)


@torch.no_grad()
def test_scales_and_flips_average_probabilities_at_the_size_of_the_picture(model: nn.Module) -> None:
    """512 becomes 24 here: 30 x 50 at scale 1.5 has a shorter side of 36, and a side of 60."""
    images = _picture(30, 50)
    want = []
    for sizes in ((24, 40), (36, 60)):
        for mirrored in (False, True):
            view = _bilinear(images, *sizes)
            logits = _slide(model, view.flip(3) if mirrored else view, [20, 16], [13, 10])
            logits = logits.flip(3) if mirrored else logits
            want.append(_bilinear(logits, 30, 50).softmax(1))
    settings = Inference("slide", [20, 16], [13, 10], scales=[1.0, 1.5], flip=True, short_side=24)
    got = infer(model, images, settings)
    assert torch.equal(got, (want[0] + want[1] + want[2] + want[3]) / 4)
    torch.testing.assert_close(got.sum(1), torch.ones(1, 30, 50))


@torch.no_grad()
def test_whole_pictures_are_resized_to_a_multiple_in_a_second_step(model: nn.Module) -> None:
    images = _picture(45, 80)
    view = _bilinear(_bilinear(images, 20, 36), 32, 64)
    got = infer(model, images, Inference(short_side=20, divisor=32))
    assert torch.equal(got, _bilinear(model(view), 45, 80))
    assert torch.equal(infer(model, images, Inference()), model(images))


@pytest.mark.parametrize(
    ("settings", "size", "want"),
    [
        (Inference(short_side=512), (683, 1024), (512, 768)),
        (Inference(short_side=512), (300, 400), (512, 683)),  # enlarged; 682.67 is rounded
        (Inference(short_side=512), (100, 1000), (205, 2048)),  # the longer side counts
        (Inference(short_side=512, scales=[1.75]), (500, 4000), (448, 3584)),
        (Inference(scales=[0.5]), (333, 500), (167, 250)),
        (Inference(short_side=64), (1, 5000), (1, 256)),
        (Inference(short_side=64, fixed=True), (30, 5000), (64, 64)),
        (Inference("slide", [64, 64], short_side=64, fixed=True), (30, 5000), (64, 256)),
        (Inference(short_side=64, least=32), (1, 5000), (32, 256)),
    ],
)
def test_sizes(settings: Inference, size: tuple[int, int], want: tuple[int, int]) -> None:
    assert settings.size(*size, settings.scales[0]) == want


def test_windows_overlap_by_a_third_unless_told() -> None:
    seen: list[tuple[int, ...]] = []

    def model(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return images

    infer(model, _picture(512, 512 + 341), Inference("slide", [512, 512]))
    assert seen == [(1, 3, 512, 512)] * 2
    assert [(part.start, part.stop) for part in windows(854, 512, 341)] == [(0, 512), (341, 853), (342, 854)]


@pytest.mark.parametrize("most", [1, 3000, 10**9])
@pytest.mark.parametrize("settings", [Inference(short_side=20), Inference(scales=[0.5, 1.0, 2.0], flip=True)])
def test_labels_need_not_all_classes_at_once(
    most: int, settings: Inference, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixerzoo.vision.segmentation.inference._MOST_AT_ONCE", most)
    images = _picture(31, 45)
    assert torch.equal(label_map(model, images, settings), infer(model, images, settings).argmax(1))


def test_settings_of_a_run() -> None:
    evaluate = {"mode": "slide", "scales": [0.5, 1.0], "flip": True, "stride": [10, 16], "window": [32, 64]}
    want = Inference("slide", [32, 64], [10, 16], scales=(0.5, 1.0), flip=True, short_side=48, least=32)
    assert of_settings(evaluate, size=40, short_side=48) == want
    assert of_settings({"mode": "slide"}, size=40).window == (40, 40)
    assert of_settings({}, size=40) == Inference(short_side=40, least=32)  # a checkpoint of before
    assert of_settings({}, size=16).least == 16  # a model that is trained on less takes less
    assert of_settings({"divisor": 32}, size=40, short_side=0).size(33, 47) == (33, 47)


def test_what_has_no_gradient_keeps_none(model: nn.Module) -> None:
    assert not infer(model, _picture(8, 8).requires_grad_(), Inference(flip=True)).requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sliding"}, "is whole or slide, not 'sliding'"),
        ({"mode": "slide"}, "needs a window"),
        ({"mode": "slide", "window": [16]}, "needs a window"),
        ({"mode": "slide", "window": [0, 16]}, "needs a window"),
        ({"mode": "slide", "window": [16, 16], "stride": [16, 17]}, r"from 1 to the window's sides \[16, 16\]"),
        ({"mode": "slide", "window": [16, 16], "stride": [0, 4]}, "from 1 to"),
        ({"scales": []}, "at least one"),
        ({"scales": [1.0, 0.0]}, "positive"),
        ({"scales": [float("nan")]}, "positive"),
        ({"short_side": -1}, "at least 0"),
        ({"divisor": 0}, "at least 1"),
        ({"fixed": True}, "needs short_side"),
        ({"stride": [4, 4]}, "are of mode slide"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inference(**settings)


def test_a_model_that_answers_at_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="sizes must agree"):
        infer(lambda images: images[..., ::4, ::4], _picture(16, 16), Inference())
