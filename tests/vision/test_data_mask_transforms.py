"""What training does to pictures and masks: labels are never blended, both move alike, and crops are as defined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixerzoo.vision.data.loading import seed_everything
from mixerzoo.vision.data.mask_transforms import BalancedCrop, MaskTransforms, PhotometricDistortion, RandomRescale
from mixerzoo.vision.data.splits import IGNORE_INDEX
from mixerzoo.vision.training.config import AugmentConfig
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors

VALUES = (0, 3, 20, 149, IGNORE_INDEX)
"""Labels far apart: a mean of two of them is none of them."""


def _pair(height: int = 40, width: int = 60, block: int = 10) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Blocks of labels, and a picture whose red is 50 times the place of the label in `VALUES`."""
    places = (torch.arange(height)[:, None] // block * 2 + torch.arange(width)[None] // block) % len(VALUES)
    picture = torch.stack([50 * places, 0 * places, 0 * places + 200]).to(torch.uint8)
    return tv_tensors.Image(picture), tv_tensors.Mask(torch.tensor(VALUES)[places].to(torch.uint8))


def _red(images: Tensor) -> Tensor:
    return (images[0] * IMAGENET_DEFAULT_STD[0] + IMAGENET_DEFAULT_MEAN[0]) * 255


@pytest.mark.parametrize("crop", [None, [24, 48]])
@pytest.mark.parametrize("short_side", [None, 0, 30])
def test_picture_and_mask_move_together_and_labels_are_never_blended(
    crop: list[int] | None, short_side: int | None
) -> None:
    augmentation = AugmentConfig(crop=crop, cat_max_ratio=0.75)
    transform = MaskTransforms(32, augmentation, short_side)(None)
    shape = (32, 32) if crop is None else (24, 48)
    padded = set()
    for seed in range(12):
        seed_everything(seed)
        image, mask = transform(*_pair())
        assert image.shape == (3, *shape) and mask.shape == shape
        assert image.dtype == torch.float32 and mask.dtype == torch.int64
        assert set(mask.unique().tolist()) <= set(VALUES)
        place = torch.tensor([VALUES.index(int(label)) for label in mask.flatten()]).view(shape)
        inside = (image != 0).any(0)  # what is added has the mean, which is 0
        assert (mask[~inside] == IGNORE_INDEX).all()
        # Blocks have sharp edges: only the pixels beside an edge, which the picture blends, may differ.
        assert ((_red(image) - 50 * place).abs() < 1)[inside].float().mean() > 0.6, seed
        padded.add(bool((~inside).any()))
        seed_everything(seed)
        again = transform(*_pair())
        assert torch.equal(again[0], image) and torch.equal(again[1], mask)
    assert padded == {True, False}


def test_what_is_missing_is_added_on_the_right_and_below() -> None:
    transform = MaskTransforms(50, AugmentConfig(resize=[0.5, 0.5], hflip=0.0), 40)(None)
    image, mask = transform(*_pair(40, 40))
    assert (image[:, :20, :20] != 0).any(0).all() and (mask[:20, :20] != IGNORE_INDEX).any()
    image[:, :20, :20], mask[:20, :20] = 0, IGNORE_INDEX
    assert (image == 0).all() and (mask == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    ("size", "short_side", "factor", "expected"),
    [
        ((400, 600), 512, 1.0, (512, 768)),  # the shorter side
        ((600, 400), 512, 0.5, (384, 256)),
        ((100, 600), 512, 1.0, (341, 2048)),  # the longer one, at 4 times the shorter
        ((1024, 2048), 0, 0.7, (717, 1434)),  # the picture's own
        ((375, 500), 512, 1.3, (665, 887)),  # int(665.6) of the shorter side; halves are rounded up
    ],
)
def test_sizes_are_those_of_the_definition(
    size: tuple[int, int], short_side: int, factor: float, expected: tuple[int, int]
) -> None:
    picture, mask = torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    scaled = RandomRescale(short_side, factor, factor)(tv_tensors.Image(picture), tv_tensors.Mask(mask))
    assert [tuple(part.shape[-2:]) for part in scaled] == [expected, expected]


def _halves(share: float) -> tv_tensors.Mask:
    """[20, 100]: class 7 in the left columns, class 1 in the others."""
    mask = torch.ones(20, 100, dtype=torch.uint8)
    mask[:, : round(100 * share)] = 7
    return tv_tensors.Mask(mask)


def _crop(mask: Tensor, most: float, size: tuple[int, int] = (20, 20)) -> Tensor:
    picture = tv_tensors.Image(mask[None].expand(3, -1, -1).clone())
    cut, labels = BalancedCrop(size, most=most)(picture, mask)
    assert torch.equal(cut[0], labels)
    return labels.as_subclass(Tensor)


def test_a_crop_shows_several_classes_and_none_too_much() -> None:
    """A window of 20 columns sees both classes at 19 of 81 places, and 5 to 15 columns of each at 11 or 9 of them."""
    masks = [_crop(_halves(0.5), 0.75) for _ in range(300)]
    shares = np.array([float((mask == 7).float().mean()) for mask in masks])
    balanced = ((shares > 0.25) & (shares < 0.75)).mean()
    # Ten draws that are looked at, of which one in nine fits, and one more that is taken as it is.
    expected = 1 - (1 - 9 / 81) ** 11
    assert abs(balanced - expected) < 0.09
    free = np.array([float((_crop(_halves(0.5), 1.0) == 7).float().mean()) for _ in range(300)])
    assert abs(((free > 0.25) & (free < 0.75)).mean() - 9 / 81) < 0.06


def test_ignored_pixels_are_no_class_of_a_crop() -> None:
    """Without them the share of a class is larger; beside them alone it fills everything and stays one class."""
    mask = _halves(0.5)
    mask[:, 10:90] = IGNORE_INDEX  # of class 7 and of class 1 ten columns each, at the ends
    for _ in range(20):
        assert len(_crop(mask, 0.75).unique()) <= 2  # no place of 20 columns sees both: any is taken in the end
    mask[:, 10:90] = 7
    mask[:10, :] = IGNORE_INDEX
    shares = [float((cut == 7).sum() / (cut != IGNORE_INDEX).sum()) for cut in (_crop(mask, 0.75) for _ in range(100))]
    fits = np.mean([0.25 < share < 0.75 for share in shares])
    assert abs(fits - (1 - (1 - 5 / 81) ** 11)) < 0.16  # class 1 has 6 to 10 of the 20 columns at 5 of 81 places


def test_a_crop_that_cannot_be_better_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = BalancedCrop._draw
    monkeypatch.setattr(BalancedCrop, "_draw", lambda self, *size: drawn.append(size) or draw(self, *size))
    assert _crop(tv_tensors.Mask(torch.full((30, 30), 4, dtype=torch.uint8)), 0.75).unique().tolist() == [4]
    assert len(drawn) == 11
    assert _crop(_halves(0.5), 0.75, (50, 200)).shape == (20, 100)  # of a small picture all there is


def test_colours_are_distorted_by_chance_and_masks_are_not() -> None:
    rng = np.random.default_rng(0)
    picture = tv_tensors.Image(torch.from_numpy(rng.integers(60, 180, (3, 16, 16), dtype=np.uint8)))
    mask = tv_tensors.Mask(torch.from_numpy(rng.integers(0, 5, (16, 16), dtype=np.uint8)))
    distort = PhotometricDistortion()
    results = []
    for seed in range(60):
        seed_everything(seed)
        changed, same = distort(picture, mask)
        assert same is mask and isinstance(changed, tv_tensors.Image) and changed.min() >= 0 and changed.max() <= 1
        results.append(changed)
        seed_everything(seed)
        assert torch.equal(distort(picture, mask)[0], changed)
    untouched = sum(bool((result - picture / 255).abs().max() < 1e-6) for result in results)
    assert 1 <= untouched <= 12  # one in sixteen is expected
    assert len({round(float(result.mean()), 4) for result in results}) > 30


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"brightness": 0.1}, lambda x: (x + 0.1).clamp(0, 1)),
        ({"contrast": 1.5}, lambda x: (1.5 * x).clamp(0, 1)),
        ({"saturation": 1.0, "hue": 0.0}, lambda x: x),
        ({"brightness": 0.1, "contrast": 0.5}, lambda x: 0.5 * (x + 0.1).clamp(0, 1)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_distortion_is_what_it_is_called(change: dict[str, float], expected, first: bool) -> None:
    picture = torch.linspace(0, 1, 48).view(3, 4, 4)
    result = PhotometricDistortion().transform(tv_tensors.Image(picture), {**change, "contrast_first": first})
    torch.testing.assert_close(result.as_subclass(Tensor), expected(picture), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"crop": [32]}, r"augment\.crop=\[32\]: a crop has two sides"),
        ({"crop": [32, 64], "sizes": {0: 16}}, r"augment\.sizes changes the side of square crops"),
        ({"resize": [2.0, 0.5]}, r"augment\.resize=\[2\.0, 0\.5\]: .* two numbers above 0, \[lowest, highest\]"),
        ({"resize": [0.5]}, r"augment\.resize=\[0\.5\]: .* two numbers above 0"),
        ({"resize": [0.5, 1.0, 2.0]}, r"augment\.resize=\[0\.5, 1\.0, 2\.0\]: "),
        ({"resize": [0.0, 1.0]}, r"augment\.resize=\[0\.0, 1\.0\]: "),
        ({"resize": [0.5, float("nan")]}, r"augment\.resize=\[0\.5, nan\]: "),
    ],
)
def test_crops_and_sizes_that_cannot_be_meant_are_refused(augment: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskTransforms(32, AugmentConfig(**augment))
