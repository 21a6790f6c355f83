"""Backgrounds of composed scenes: photographs of brick, grass and gravel, or noise if these are unavailable.

The photographs are those that scikit-image ships, 512 x 512, grey: brick and gravel of https://cc0textures.com, grass
by linolafett (https://www.deviantart.com), all three under CC0. They are taken from an installed scikit-image, or out
of its wheel, which is fetched for that; see fetching.py.

Unusual: a ground is a piece of a photograph, rotated, scaled and coloured between two random colours. Training pieces
come from the left five eighths of every photograph, validation and test pieces from the upper and lower half of the
rest, so that no pixel is shared: a model is evaluated on unseen grounds of materials that it has seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .fetching import fetch_wheel, folder_of_package, usual_places

_log = logging.getLogger(__name__)

FILES = ("brick.png", "grass.png", "gravel.png")
Part = Literal["train", "val", "test"]
_OCTAVES = (2, 5, 11, 23)  # cells of the noise grids that are summed into a texture, coarse to fine
_COLUMNS = 5 / 8  # of a photograph, for training


class Ground(Protocol):
    """Samples the parameters of a scene's ground, and renders those of a batch at any size."""

    name: str

    def draw(self, rng: np.random.Generator, /) -> Any: ...

    def paint(self, sampled: Sequence[Any], size: int, /) -> Tensor:
        """Return [B, 3, size, size] in 0..1."""
        ...


class Noise:
    """Smooth noise of several scales."""

    name = "noise"

    def draw(self, rng: np.random.Generator, /) -> list[np.ndarray]:
        return [rng.uniform(size=(3, n, n)) for n in _OCTAVES]

    def paint(self, grids_of_scenes: Sequence[list[np.ndarray]], size: int, /) -> Tensor:
        total = torch.zeros(())
        for octave, grids in enumerate(zip(*grids_of_scenes, strict=True)):
            # Fine noise is grey: colour that changes within a few pixels looks like no material.
            grid = torch.from_numpy(np.stack(grids)).float()[:, : 3 if octave < 2 else 1]
            total = total + F.interpolate(grid, (size, size), mode="bilinear", align_corners=False) * 0.75**octave
        return total / sum(0.75**octave for octave in range(len(_OCTAVES)))


class Piece(NamedTuple):
    """A piece of a photograph: its index, the affine map from scene to photograph (both -1 to 1), and two end
    colours."""

    photograph: int
    theta: np.ndarray  # [2, 3]
    colours: np.ndarray  # [2, 3]


class Photographs:
    """Pieces of grey photographs, float [N, H, W] in 0..1."""

    name = "photographs"

    def __init__(self, photographs: Tensor) -> None:
        self.photographs = photographs

    def draw(self, rng: np.random.Generator, /) -> Piece:
        sides = np.array(self.photographs.shape[:0:-1])  # width, height
        extent = rng.uniform(0.35, 0.75) * sides.min() / sides  # of the piece, as a share of each
        angle = rng.uniform(-math.pi, math.pi)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        centre = rng.uniform(-1, 1, 2) * (1 - extent)
        theta = np.concatenate([extent[:, None] * turn, centre[:, None]], 1)
        colours = np.stack([rng.uniform(0, 0.5, 3), rng.uniform(0.4, 1, 3)])
        return Piece(int(rng.integers(len(self.photographs))), theta, colours)

    def paint(self, pieces: Sequence[Piece], size: int, /) -> Tensor:
        theta = torch.from_numpy(np.stack([piece.theta for piece in pieces])).float()
        dark, light = torch.from_numpy(np.stack([piece.colours for piece in pieces], 1)).float()[..., None, None]
        grid = F.affine_grid(theta, [len(pieces), 1, size, size], align_corners=False)
        # Corners of a rotated piece may lie outside the photograph, which is reflected there.
        grey = F.grid_sample(
            self.photographs[[piece.photograph for piece in pieces], None],
            grid,
            padding_mode="reflection",
            align_corners=False,
        )
        return dark + (light - dark) * grey


def load_grounds(*, download: bool) -> dict[Part, Ground]:
    """Return the grounds of each part of a data set; no pixel is shared between parts."""
    folder = _find(download=download)
    if folder is None:
        _log.warning("scikit-image's photographs are nowhere to be had (pip install scikit-image): grounds are noise")
        return {"train": Noise(), "val": Noise(), "test": Noise()}
    parts: dict[Part, list[Tensor]] = {"train": [], "val": [], "test": []}
    for name in FILES:
        photograph = _stretched(folder / name)
        middle, right = photograph.shape[0] // 2, round(photograph.shape[1] * _COLUMNS)
        parts["train"].append(photograph[:, :right])
        parts["val"].append(photograph[:middle, right:])
        parts["test"].append(photograph[middle:, right:])
    return {part: Photographs(torch.stack(pieces)) for part, pieces in parts.items()}


def _find(*, download: bool) -> Path | None:
    installed = folder_of_package("skimage")
    places = usual_places(*([installed / "data"] if installed else []))
    for folder in (below for place in places for below in (place, place / "grounds")):
        if all((folder / name).is_file() for name in FILES):
            return folder
    if not download:
        return None
    return fetch_wheel("scikit-image", [f"skimage/data/{name}" for name in FILES], "grounds", size="14 MB")


def _stretched(file: Path) -> Tensor:
    """Read a photograph and stretch it from its 1st to its 99th percentile to 0..1: some use a third of the range."""
    with Image.open(file) as picture:
        grey = np.asarray(picture.convert("L"), np.float32)
    low, high = np.percentile(grey, [1, 99])
    return torch.from_numpy(((grey - low) / max(high - low, 1)).clip(0, 1)).float()
