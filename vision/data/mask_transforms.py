"""Transforms of pictures together with their masks.

The steps of training are those of mmsegmentation (https://github.com/open-mmlab/mmsegmentation, Apache-2.0), for which
the published recipes are written: resize by a random factor, crop, flip, colour distortion, normalisation, and padding
to the right and below with the mean and with `IGNORE_INDEX`. Colour operations are torchvision's. Unusual:

* Pictures are resized without antialiasing, as by OpenCV, with which the published segmenters were trained and
  evaluated. Masks are resized by nearest neighbour.
* A crop that one class fills too far is sampled again, at most ten times; the last one is used as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .._sizes import resized
from .splits import IGNORE_INDEX, Augmentation

_MOST_CROPS = 10


@dataclass(frozen=True)
class MaskTransforms:
    """Makes the transform of a picture and its mask for a crop size.

    Args:
        augmentation: None for evaluation, which keeps the size of the picture.
        short_side: shorter side of the resized picture; 0 keeps the picture's own, None takes the crop's.
    """

    size: int
    augmentation: Augmentation | None
    short_side: int | None = None

    def __post_init__(self) -> None:
        augmentation = self.augmentation
        if augmentation is None:
            return
        factors = augmentation.resize
        if len(factors) != 2 or not 0 < factors[0] <= factors[1] < float("inf"):
            raise ValueError(
                f"augment.resize={list(factors)}: pictures are resized by a factor between two numbers above 0, "
                "[lowest, highest], such as [0.5, 2.0]"
            )
        if augmentation.crop is None:
            return
        if len(augmentation.crop) != 2:
            raise ValueError(f"augment.crop={augmentation.crop}: a crop has two sides, [height, width]")
        if augmentation.sizes:
            raise ValueError("augment.sizes changes the side of square crops: set it to {}, or augment.crop to null")

    def __call__(self, size: int | None) -> MaskTransform:
        if self.augmentation is None:
            return MaskTransform(v2.Compose(_normalised()))
        size = size or self.size
        crop = self.augmentation.crop or [size, size]
        short_side = size if self.short_side is None else self.short_side
        return MaskTransform(_training((crop[0], crop[1]), short_side, self.augmentation))


@dataclass(frozen=True)
class MaskTransform:
    """Transforms picture and mask together, to tensors [3, height, width] and int64 [height, width]."""

    of_both: v2.Transform

    def __call__(self, picture: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[Tensor, Tensor]:
        picture, mask = self.of_both(picture, mask)
        return picture.as_subclass(Tensor), mask.as_subclass(Tensor).long()


def _training(crop: tuple[int, int], short_side: int, augmentation: Augmentation) -> v2.Transform:
    strength, fill = augmentation.color_jitter, {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}
    low, high = augmentation.resize
    steps = [
        RandomRescale(short_side, low, high),
        BalancedCrop(crop, most=augmentation.cat_max_ratio),
        v2.RandomHorizontalFlip(augmentation.hflip),
        *([v2.ColorJitter(strength, strength, strength)] if strength else []),
        *([PhotometricDistortion()] if augmentation.photometric else []),
        *_normalised(),
        PadTo(crop, fill),  # the mean of a normalised picture is 0
    ]
    return v2.Compose(steps)


def _normalised() -> list[v2.Transform]:
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return [to_float, v2.Normalize(list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))]


class RandomRescale(v2.Transform):
    """Resizes to the size of evaluation at `short_side`, times a random factor between `low` and `high`."""

    def __init__(self, short_side: int, low: float, high: float) -> None:
        super().__init__()
        self.short_side, self.low, self.high = short_side, low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"size": resized(*_size(flat_inputs), self.short_side, _between(self.low, self.high))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # torchvision resizes masks by nearest neighbour.
        return self._call_kernel(F.resize, inpt, size=list(params["size"]), antialias=False)


class BalancedCrop(v2.Transform):
    """Crops at random to at most `size`, so that no class has a share of `most` of the labelled pixels.

    A crop must also show more than one class. After ten rejected crops the next one is used whatever it shows.
    """

    def __init__(self, size: tuple[int, int], *, most: float = 1.0) -> None:
        super().__init__()
        self.size, self.most = size, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        place = self._draw(*_size(flat_inputs))
        if self.most < 1:
            [mask] = (part for part in flat_inputs if isinstance(part, tv_tensors.Mask))
            for _ in range(_MOST_CROPS):
                if _is_balanced(F.crop(mask, *place), self.most):
                    break
                place = self._draw(*mask.shape[-2:])
        return {"place": place}

    def _draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        rows, columns = min(height, self.size[0]), min(width, self.size[1])
        top = int(torch.randint(height - rows + 1, ()))
        left = int(torch.randint(width - columns + 1, ()))
        return top, left, rows, columns

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, *params["place"])


def _is_balanced(mask: Tensor, most: float) -> bool:
    counts = torch.bincount(mask.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return bool((counts > 0).sum() > 1 and counts.max() < most * counts.sum())


class PhotometricDistortion(v2.Transform):
    """Changes brightness, contrast, saturation and hue, each with probability 0.5 (mmsegmentation's
    PhotoMetricDistortion).

    Contrast, a factor on all values, is changed before saturation and hue or after them. Unlike torchvision's
    `RandomPhotometricDistort`, brightness is added and channels are not permuted.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        chosen = torch.rand(5) < 0.5
        values = {
            "brightness": _between(-32 / 255, 32 / 255),
            "contrast": _between(0.5, 1.5),
            "saturation": _between(0.5, 1.5),
            "hue": _between(-0.1, 0.1),
        }
        used = {name: value for (name, value), use in zip(values.items(), chosen[:4], strict=True) if use}
        return {**used, "contrast_first": bool(chosen[4])}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        picture: Tensor = F.to_dtype(inpt, torch.float32, scale=True)
        if "brightness" in params:
            picture = (picture + params["brightness"]).clamp(0, 1)
        if "contrast" in params and params["contrast_first"]:
            picture = F.adjust_brightness(picture, params["contrast"])
        if "saturation" in params:
            picture = F.adjust_saturation(picture, params["saturation"])
        if "hue" in params:
            picture = F.adjust_hue(picture, params["hue"])
        if "contrast" in params and not params["contrast_first"]:
            picture = F.adjust_brightness(picture, params["contrast"])
        return tv_tensors.Image(picture)


def _between(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


class PadTo(v2.Transform):
    """Pads to at least `size`, to the right and below, with a fill value by type of input."""

    def __init__(self, size: tuple[int, int], fill: dict[Any, int]) -> None:
        super().__init__()
        self.size, self.fill = size, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size(flat_inputs)
        return {"padding": [0, 0, max(self.size[1] - width, 0), max(self.size[0] - height, 0)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.pad, inpt, padding=params["padding"], fill=self.fill[type(inpt)])


def _size(inputs: list[Any]) -> tuple[int, int]:
    """Return the height and width of a picture and its mask."""
    height, width = inputs[0].shape[-2:]
    return int(height), int(width)
