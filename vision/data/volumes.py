"""Segmentation of brain slices from volumes that packages contain: one person's head, and the mean of 152.

    colin27       C. Holmes et al., Enhancement of MR images using registration for signal averaging (1998): one head,
                  scanned 27 times; with the atlas of N. Tzourio-Mazoyer et al., Automated anatomical labeling (2002),
                  whose 116 regions are merged to the eight groups that begin its own numbers. Debian's mricron-data.
    mni_tissue    V. Fonov et al., Unbiased nonlinear average age-appropriate brain templates (2009): the mean of 152
                  brains, and how likely grey and white matter are. Carried by nilearn's wheel.

Unusual: each data set is a single volume. Slices are held out in blocks, and slices between a block and the training
slices are dropped because neighbours look alike; still, scores hold for this brain only and do not transfer to other
people. The sets show training on real anatomy without a download and are no benchmark.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import tv_tensors

from .fetching import fetch_debian_package, fetch_wheel, folder_of_package, usual_places
from .items import SeededItems
from .mask_transforms import MaskTransforms
from .nifti import read_nifti
from .pictures import read_lines
from .splits import Augmentation, DataSettings, Splits

_log = logging.getLogger(__name__)

LOBES = {  # the thousands of the atlas's own numbers
    **{2: "frontal lobe", 3: "insula", 4: "limbic lobe", 5: "occipital lobe", 6: "parietal lobe"},
    **{7: "deep grey nuclei", 8: "temporal lobe", 9: "cerebellum"},
}
TISSUES = ("background", "fluid and other", "grey matter", "white matter")
_COLIN_FOLDER = "usr/share/mricron/templates"
_COLIN_FILES = ("ch2.nii.gz", "aal.nii.gz", "aal.nii.txt")
_MNI_FILES = tuple(f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm"))

LEAST_LABELLED = 500  # pixels; slices with fewer are not used
BLOCK, GAP = 10, 3  # consecutive slices of a part, and slices dropped next to validation and test blocks
_PARTS = ("train", "train", "val", "train", "train", "test")  # of consecutive blocks, cyclically


class Volume(NamedTuple):
    """A volume with labels; brightness and labels are [right, front, up]."""

    brightness: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    origin: str


class Slices:
    """A data set of (RGB picture, mask) of the horizontal slices of uint8 volumes, lowest first, face at the top."""

    def __init__(self, brightness: np.ndarray, labels: np.ndarray) -> None:
        self.pictures, self.masks = (np.ascontiguousarray(np.flip(part.T, 1)) for part in (brightness, labels))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        picture = torch.from_numpy(self.pictures[index]).expand(3, -1, -1)
        return tv_tensors.Image(picture), tv_tensors.Mask(torch.from_numpy(self.masks[index]))


def load_colin27(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Load slices of Colin27, one head, with the lobes of its brain."""
    installed = Path("/") / _COLIN_FOLDER
    folder = _find(config.root, _COLIN_FILES, [installed], "colin27")
    if folder is None and config.root is None and config.download:
        folder = fetch_debian_package("mricron-data", _COLIN_FOLDER, "colin27", size="16 MB")
    if folder is None:
        raise _missing(config.root, _COLIN_FILES, "apt-get install mricron-data")
    return _splits(_read_colin27(folder), config, augmentation, seed)


def load_mni_tissue(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Load slices of the mean brain of MNI with its tissues."""
    package = folder_of_package("nilearn")
    folder = _find(config.root, _MNI_FILES, [package / "datasets" / "data"] if package else [], "mni_tissue")
    if folder is None and config.root is None and config.download:
        inside = [f"nilearn/datasets/data/{name}" for name in _MNI_FILES]
        folder = fetch_wheel("nilearn", inside, "mni_tissue", size="12 MB")
    if folder is None:
        raise _missing(config.root, _MNI_FILES, "pip install nilearn")
    return _splits(_read_mni(folder), config, augmentation, seed)


def _find(root: str | None, files: Sequence[str], further: Sequence[Path], name: str) -> Path | None:
    places = [Path(root)] if root is not None else usual_places(*further)
    folders = (below for place in places for below in (place, place / name))
    return next((folder for folder in folders if all((folder / file).is_file() for file in files)), None)


def _missing(root: str | None, files: Sequence[str], command: str) -> ValueError:
    place = f"data.root={root}" if root is not None else "the usual places ($MIXERZOO_DATA, the package, the cache)"
    return ValueError(f"{', '.join(files)} are not in {place}, and were not fetched; `{command}` brings them")


def _read_colin27(folder: Path) -> Volume:
    head, atlas = read_nifti(folder / _COLIN_FILES[0]), read_nifti(folder / _COLIN_FILES[1])
    of_region = np.zeros(256, np.uint8)
    numbers = list(LOBES)
    for line in read_lines(folder / _COLIN_FILES[2]):
        region, _, number = line.split()[:3]
        of_region[int(region)] = 1 + numbers.index(int(number) // 1000)
    known = np.flatnonzero(of_region)
    if unknown := sorted(set(np.unique(atlas).tolist()) - {0, *known.tolist()}):
        raise ValueError(
            f"{folder / _COLIN_FILES[1]} holds regions {unknown[:8]}, which {_COLIN_FILES[2]} does not name"
        )
    classes = ("background", *LOBES.values())
    return Volume(head, of_region[atlas], classes, f"Colin27 with its atlas, from {folder}")


def _read_mni(folder: Path) -> Volume:
    head, grey, white = (read_nifti(folder / name) for name in _MNI_FILES)
    labels = (head > 0).astype(np.uint8)
    for label, likely in ((2, grey), (3, white)):
        labels[likely > likely.max() / 2] = label
    return Volume(head, labels, TISSUES, f"the mean brain of MNI, from {folder}")


def _splits(volume: Volume, config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    if volume.brightness.shape != volume.labels.shape:
        raise ValueError(f"{volume.origin}: {volume.brightness.shape} and {volume.labels.shape} are no pair of volumes")
    light = np.percentile(volume.brightness[volume.brightness > 0], 99.5)
    slices = Slices((volume.brightness * (255 / light)).clip(0, 255).astype(np.uint8), volume.labels)
    parts = parts_of_slices(np.flatnonzero((slices.masks > 0).sum((1, 2)) >= LEAST_LABELLED))
    _log.warning(
        "%s: one volume, of which blocks of slices are held out; the numbers say nothing about other people",
        volume.origin,
    )

    chosen = np.random.default_rng(seed).permutation(parts["train"])[: config.limit]

    def judged(part: str) -> SeededItems:
        return SeededItems(slices, parts[part], transforms=MaskTransforms(config.size, None))

    transforms = MaskTransforms(config.size, augmentation, config.short_side)
    return Splits(
        train=SeededItems(slices, sorted(chosen.tolist()), transforms=transforms),
        val=judged("val"),
        test=judged("test"),
        classes=volume.classes,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=config.size,
        origin=volume.origin,
        dense=True,
        whole=True,
    )


def parts_of_slices(usable: np.ndarray) -> dict[str, list[int]]:
    """Assign the usable slices to parts, block by block, and drop training slices next to other parts."""
    roles = {int(place): _PARTS[(int(place) - int(usable[0])) // BLOCK % len(_PARTS)] for place in usable}
    held = np.array([place for place, role in roles.items() if role != "train"])
    parts: dict[str, list[int]] = {part: [] for part in ("train", "val", "test")}
    for place, role in roles.items():
        if role != "train" or not len(held) or np.abs(held - place).min() > GAP:
            parts[role].append(place)
    return parts
