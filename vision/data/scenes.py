"""Segmentation scenes composed of photos: Fashion-MNIST items, rotated, scaled and tinted, on photographed grounds.

Scene i of a seed is always the same picture, independent of the batch and of the number of scenes; a batch is rendered
at once. The mask holds 0 for the ground, 1 + class for an item, and `IGNORE_INDEX` on the outline of every item, as
Pascal VOC's masks do.

Unusual: items of the training scenes come from training pictures, those of the validation and test scenes from held-out
pictures and test files, and their grounds from other parts of the photographs (grounds.py), so that a model is
evaluated on unseen clothes and grounds.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import fashion_mnist
from .classification import digits, split_indices
from .grounds import Ground, Noise, Part, load_grounds
from .loading import Request
from .splits import IGNORE_INDEX, Augmentation, DataSettings, Splits

_log = logging.getLogger(__name__)

MOST_ITEMS = 4
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass
class Layout:
    """The random choices of a batch of scenes. Axis 0 is the scene, axis 1 its items; later items lie in front."""

    item: Tensor  # int64 [B, K], an index of the item pictures
    shown: Tensor  # bool [B, K]
    theta: Tensor  # [B, K, 2, 3], from scene to item coordinates, both -1 to 1
    tint: Tensor  # [B, K, 3]
    ground: list[Any]  # one per scene, as `Ground.draw` returns it


class FashionScenes:
    """A data set of `count` scenes: (pictures float [B, 3, size, size], masks int64 [B, size, size])."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        count: int,
        size: int,
        seed: int,
        ground: Ground | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels = torch.from_numpy(np.ascontiguousarray(labels))
        self.count, self.size, self.seed, self.augmentation = count, size, seed, augmentation
        self.ground = ground or Noise()

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]:
        scenes, masks = self.render(request.indices, request.size)
        if self.augmentation is not None:
            generator = torch.Generator().manual_seed(request.seed)
            flip = torch.rand(len(scenes), generator=generator) < self.augmentation.hflip
            scenes[flip], masks[flip] = scenes[flip].flip(-1), masks[flip].flip(-1)
        return (scenes - MEAN[0]) / STD[0], masks

    def name_of(self, index: int) -> int:
        """The number of a scene, which with the seed determines all of it."""
        return index

    def render(self, indices: list[int], size: int | None = None) -> tuple[Tensor, Tensor]:
        """Render scenes in 0..1, float [B, 3, size, size], and masks int64 [B, size, size]."""
        size = size or self.size
        layout = self._draw(indices)
        scene, mask = self.ground.paint(layout.ground, size), torch.zeros(len(indices), size, size, dtype=torch.int64)
        pictures, shapes = self._place(layout, size)
        labels = 1 + self.labels[layout.item]
        for k in range(MOST_ITEMS):
            inside = shapes[:, k] & layout.shown[:, k, None, None]
            coloured = pictures[:, k, None] * layout.tint[:, k, :, None, None]
            scene = torch.where(inside[:, None], coloured, scene)
            mask = torch.where(inside, labels[:, k, None, None], mask)
            mask = torch.where(_outline(inside), IGNORE_INDEX, mask)
        return scene, mask

    def _draw(self, indices: list[int]) -> Layout:
        items, shown, theta, tint, ground = [], [], [], [], []
        for index in indices:
            rng = np.random.default_rng((self.seed, index))
            items.append(rng.integers(len(self.images), size=MOST_ITEMS))
            shown.append(np.arange(MOST_ITEMS) < rng.integers(1, MOST_ITEMS + 1))
            theta.append(_placement(rng))
            tint.append(rng.uniform(0.45, 1.0, (MOST_ITEMS, 3)))
            ground.append(self.ground.draw(rng))
        return Layout(
            torch.from_numpy(np.stack(items)),
            torch.from_numpy(np.stack(shown)),
            torch.from_numpy(np.stack(theta)).float(),
            torch.from_numpy(np.stack(tint)).float(),
            ground,
        )

    def _place(self, layout: Layout, size: int) -> tuple[Tensor, Tensor]:
        """Place every item on its own canvas; return brightness, float, and shape, bool, both [B, K, size, size]."""
        items = self.images[layout.item.flatten()][:, None].float() / 255
        # Dark spots inside an item belong to it: morphological closing fills them.
        shape = (items > 0.06).float()
        shape = -F.max_pool2d(-F.max_pool2d(shape, 5, 1, 2), 5, 1, 2)
        grid = F.affine_grid(layout.theta.flatten(0, 1), [len(items), 1, size, size], align_corners=False)
        placed = F.grid_sample(torch.cat([items, shape], 1), grid, align_corners=False)
        placed = placed.unflatten(0, layout.item.shape)
        return placed[:, :, 0], placed[:, :, 1] > 0.5


def _placement(rng: np.random.Generator) -> np.ndarray:
    """Sample affine maps [K, 2, 3]: items of 0.45 to 0.75 of the scene's size, rotated, mirrored and shifted at
    random."""
    extent = rng.uniform(0.45, 0.75, MOST_ITEMS)
    angle = rng.uniform(-math.pi / 7, math.pi / 7, MOST_ITEMS)
    mirror = rng.choice([-1.0, 1.0], MOST_ITEMS)
    centre = rng.uniform(-0.75, 0.75, (MOST_ITEMS, 2))
    cos, sin = np.cos(angle) / extent, np.sin(angle) / extent
    linear = np.stack([np.stack([mirror * cos, mirror * sin], -1), np.stack([-sin, cos], -1)], -2)
    return np.concatenate([linear, -linear @ centre[..., None]], -1)


def _outline(inside: Tensor) -> Tensor:
    """Return the pixels on both sides of a shape's edge, bool [B, S, S]. The border of the scene is no edge."""
    edge = torch.zeros_like(inside)
    rows, columns = inside[:, 1:] != inside[:, :-1], inside[:, :, 1:] != inside[:, :, :-1]
    edge[:, 1:] |= rows
    edge[:, :-1] |= rows
    edge[:, :, 1:] |= columns
    edge[:, :, :-1] |= columns
    return edge


def load_fashion_scenes(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Make training scenes, and a quarter as many for validation and for test; no item is in two of the splits."""
    arrays = fashion_mnist.load(config.root, download=config.download)
    names = fashion_mnist.CLASSES
    if arrays is None:
        _log.warning(
            "Fashion-MNIST is nowhere to be had (apt-get install %s): using digits", fashion_mnist.DEBIAN_PACKAGE
        )
        arrays, names = digits(), tuple("0123456789")
    train, val = split_indices(len(arrays.train_images), config.held_out, seed, config.limit)
    pixels, labels, grounds = arrays.train_images, arrays.train_labels, load_grounds(download=config.download)
    size, fewer = config.size, max(config.scenes // 4, 1)

    def held_out(part: Part, images: np.ndarray, classes: np.ndarray, offset: int) -> FashionScenes:
        return FashionScenes(images, classes, count=fewer, size=size, seed=seed + offset, ground=grounds[part])

    return Splits(
        train=FashionScenes(
            pixels[train],
            labels[train],
            count=config.scenes,
            size=size,
            seed=seed,
            ground=grounds["train"],
            augmentation=augmentation,
        ),
        val=held_out("val", pixels[val], labels[val], 1),
        test=held_out("test", arrays.test_images, arrays.test_labels, 2),
        classes=("ground", *names),
        mean=MEAN,
        std=STD,
        size=size,
        origin=f"scenes of items on {grounds['train'].name}, {arrays.origin}",
        dense=True,
    )
