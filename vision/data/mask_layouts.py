"""Folder layouts of segmentation data sets, one function each: where pictures and masks lie and what masks mean.

    mask_folder    ROOT/images/training/….jpg       ROOT/annotations/training/….png
                   (also `train`, `val` for `validation`, and `masks` for `annotations`)
    cityscapes     ROOT/leftImg8bit/train/CITY/…_leftImg8bit.png
                   ROOT/gtFine/train/CITY/…_gtFine_labelTrainIds.png (or …_gtFine_labelIds.png)
    voc            ROOT/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}
    camvid         ROOT/{train,val,test}/….png with the masks in {train,val,test}annot, or as …_L.png in
                   {train,val,test}_labels; or ROOT/{train,val,trainval,test}.lst with a picture and a mask a line

Sources: B. Zhou et al., Scene parsing through ADE20K (CVPR 2017); M. Cordts et al., The Cityscapes dataset (CVPR 2016),
whose ids and colours are those of https://github.com/mcordts/cityscapesScripts (MIT); M. Everingham et al., The Pascal
VOC challenge (2010), and B. Hariharan et al., Semantic contours from inverse detectors (ICCV 2011: SBD), merged as
DeepLab did it; G. Brostow et al., Semantic object classes in video (2009: CamVid).

Unusual: of CamVid's 32 colours only those of the eleven classes of published comparisons are used, and the others (lane
markings, vans, traffic lights, …) are ignored, as in BEVANet and PIDNet, so that results are comparable. Cityscapes'
ids are mapped to the 19 evaluated classes here, without the data set's own script.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..label_sets import LABEL_SETS
from .classification import split_indices
from .items import SeededItems
from .mask_files import Labels, Pair, PicturesWithMasks, check_all
from .mask_transforms import MaskTransforms
from .pictures import read_lines
from .sources import MASK_FOLDERS
from .splits import IGNORE_INDEX, Augmentation, DataSettings, Splits

_log = logging.getLogger(__name__)

_ADE20K_NAMES = "objectInfo150.txt"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

_COUNTED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES = dict(zip(_COUNTED, LABEL_SETS["cityscapes"].names, strict=True))
"""The 19 evaluated classes of Cityscapes by their ids."""
VOC = LABEL_SETS["voc"].names
CAMVID = dict(zip(LABEL_SETS["camvid"].names, LABEL_SETS["camvid"].colours, strict=True))
_CAMVID_OTHERS = (  # animal, archway, bridge, …, wall, and black for nothing at all
    *((64, 128, 64), (192, 0, 128), (0, 128, 64), (64, 0, 192), (192, 128, 64), (128, 0, 192), (192, 0, 64)),
    *((128, 128, 64), (192, 0, 192), (128, 64, 64), (64, 192, 128), (128, 128, 192), (64, 128, 192), (0, 0, 64)),
    *((0, 64, 64), (192, 64, 128), (192, 128, 192), (64, 0, 64), (192, 192, 0), (64, 192, 0), (0, 0, 0)),
)


@dataclass(frozen=True)
class MaskFiles:
    """The files that a layout lists. Masks are expected paths; their existence is not checked yet.

    Args:
        mask_folders: folders by split in which every PNG is the mask of a picture of the split.
    """

    root: Path
    labels: Labels
    train: list[Pair]
    val: list[Pair]
    test: list[Pair] = field(default_factory=list)
    mask_folders: Mapping[str, Path] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, list[Pair]]:
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {split: pairs for split, pairs in named.items() if pairs}


def load_masks(layout: Layout, config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Load the pictures and masks of a layout. Without validation pictures, training pictures are held out."""
    files = layout(config)
    train, val = files.train, files.val
    if not val:
        chosen, kept = split_indices(len(train), config.held_out, seed)
        train, val = [train[index] for index in chosen], [train[index] for index in kept]
    for name, judged in (("val", val), ("test", files.test)):
        _refuse_shared(train, judged, name, config)
    order = np.random.default_rng(seed).permutation(len(train))[: config.limit]
    train = [train[index] for index in order]
    augmented = MaskTransforms(config.size, augmentation, config.short_side)
    check_all(train, [*val, *files.test], files.labels)

    def whole(pairs: Sequence[Pair]) -> SeededItems:
        return SeededItems(PicturesWithMasks(pairs, files.labels), transforms=MaskTransforms(config.size, None))

    validation = whole(val)
    if not files.test:
        _log.warning("the final numbers are those of the validation pictures: there are no others with public masks")
    return Splits(
        train=SeededItems(PicturesWithMasks(train, files.labels), transforms=augmented, max_bad=config.max_bad),
        val=validation,
        test=whole(files.test) if files.test else validation,
        classes=files.labels.classes,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=config.size,
        origin=f"pictures and masks in {files.root}",
        dense=True,
        whole=True,
    )


def _refuse_shared(train: Sequence[Pair], judged: Sequence[Pair], name: str, config: DataSettings) -> None:
    """Raise a ValueError if the split `name` (val or test) shares pictures with the training split."""
    learned = {picture for picture, _ in train}
    if not (shared := [picture for picture, _ in judged if picture in learned]):
        return
    given = {"val": config.val_split, "test": config.test_split}[name]
    raise ValueError(
        f"{len(shared)} of the {len(judged)} {'validation' if name == 'val' else 'test'} pictures are trained on too, "
        f"such as {shared[0]}: a model would be judged by what it has seen; choose splits that share no picture, by "
        f"data.train_split (now {config.train_split}) and data.{name}_split (now {given or 'null, the usual one'})"
    )


def _root(config: DataSettings, needed: Sequence[str], what: str) -> Path:
    """Return `data.root`, which must contain the folders `needed`. `what` ends the error message."""
    if config.root is None or not Path(config.root).is_dir():
        raise ValueError(f"data.root={config.root}: there is no such folder; {what}")
    for name in needed:
        if not (Path(config.root) / name).is_dir():
            raise ValueError(f"data.root={config.root}: there is no folder {Path(config.root) / name}; {what}")
    return Path(config.root)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def mask_folder(config: DataSettings) -> MaskFiles:
    """List your own pictures in the layout of ADE20K.

    `ROOT/classes.txt` names the classes, one per line; without it (or the list of ADE20K) `data.classes` is their
    number. With `data.ignore_zero`, 0 is ignored and classes count from 1, as in ADE20K.
    """
    root = _root(config, ["images"], "the pictures belong in ROOT/images/training, their masks in ROOT/annotations/…")
    first = int(config.ignore_zero)
    names = class_names(root, config.classes, first)
    of_value = {0: IGNORE_INDEX, **{first + label: label for label in range(len(names))}, 255: IGNORE_INDEX}
    meaning = (
        f"there are {len(names)} classes, counted from {first}; check data.classes and data.ignore_zero (now "
        f"{str(config.ignore_zero).lower()})"
    )
    found, folders = {}, {}
    for split, either in {"train": ("training", "train"), "val": ("validation", "val")}.items():
        folder = next((root / "images" / name for name in either if (root / "images" / name).is_dir()), None)
        if folder is None:
            continue
        masks = next((root / name for name in MASK_FOLDERS if (root / name).is_dir()), None)
        if masks is None:
            raise ValueError(f"{root} has neither annotations/ nor masks/: the masks of images/{folder.name} go there")
        folders[split] = masks / folder.name
        found[split] = [
            (picture, (folders[split] / picture.relative_to(folder)).with_suffix(".png"))
            for picture in _pictures(folder)
        ]
    if not found.get("train"):
        raise ValueError(f"{root / 'images'} needs a folder training (or train) with pictures")
    return MaskFiles(root, Labels(names, of_value, meaning), found["train"], found.get("val", []), mask_folders=folders)


def class_names(root: Path, count: int | None, first: int) -> tuple[str, ...]:
    """Return the class names of a folder whose masks number the classes from `first`."""
    file = root / "classes.txt"
    names = tuple(read_lines(file)) if file.is_file() else None
    if names is None and (root / _ADE20K_NAMES).is_file():
        # A table with a header line; the last column holds a name and its synonyms.
        file = root / _ADE20K_NAMES
        names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in read_lines(file)[1:])
    if names is None and count is None:
        raise ValueError(
            f"data.classes is not set, and there is no {file} with a name a line: how many classes there are is not "
            f"known; add {file.name}, or data.classes=…"
        )
    if names is not None and count not in (None, len(names)):
        raise ValueError(
            f"data.classes={count}, but {file} names {len(names)}; set data.classes=null or correct the file"
        )
    names = names or tuple(str(index) for index in range(count or 0))
    most = IGNORE_INDEX - first
    if not 2 <= len(names) <= most:
        raise ValueError(
            f"masks counted from {first} can hold 2 to {most} classes, as {IGNORE_INDEX} is none; got {len(names)}; "
            f"correct data.classes or {file}"
        )
    return names


def cityscapes(config: DataSettings) -> MaskFiles:
    """Fine masks; those of the test are not public."""
    root = _root(
        config, ["leftImg8bit", "gtFine"], "ROOT is where leftImg8bit_trainvaltest.zip and gtFine_… are unpacked"
    )
    by_id = next(root.glob("gtFine/*/*/*_gtFine_labelTrainIds.png"), None) is None
    numbers = {number: label for label, number in enumerate(CITYSCAPES)} if by_id else {n: n for n in range(19)}
    others = [*range(34), IGNORE_INDEX] if by_id else [IGNORE_INDEX]
    of_value = {**dict.fromkeys(others, IGNORE_INDEX), **numbers}
    meaning = f"{'ids' if by_id else 'train ids'} are 0 to {33 if by_id else 18}, and 255 for none"

    def pairs(split: str) -> list[Pair]:
        pictures = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        if not pictures:
            raise ValueError(f"{root / 'leftImg8bit' / split} has no CITY/…_leftImg8bit.png")
        end = f"_gtFine_{'labelIds' if by_id else 'labelTrainIds'}.png"
        names = [f"{picture.parent.name}/{picture.name.removesuffix('_leftImg8bit.png')}{end}" for picture in pictures]
        return [(picture, root / "gtFine" / split / name) for picture, name in zip(pictures, names, strict=True)]

    labels = Labels(tuple(CITYSCAPES.values()), of_value, meaning)
    return MaskFiles(root, labels, pairs(config.train_split), pairs(config.val_split or "val"))


def voc(config: DataSettings) -> MaskFiles:
    """List Pascal VOC 2012; `data.train_split=trainaug` adds SBD's masks to those of `train`."""
    given = Path(config.root or "")
    places = [given / "VOCdevkit" / "VOC2012", given / "VOC2012", given]
    root = next((place for place in places if (place / "ImageSets" / "Segmentation").is_dir()), None)
    if config.root is None or root is None:
        raise ValueError(
            f"data.root={config.root}: there is no {places[0] / 'ImageSets' / 'Segmentation'}; ROOT is where "
            "VOCtrainval_11-May-2012.tar is unpacked"
        )
    values = {**{number: number for number in range(len(VOC))}, 255: IGNORE_INDEX}
    labels = Labels(VOC, values, f"Pascal VOC has 0 to {len(VOC) - 1}, and 255 for none")

    def pairs(names: Sequence[str]) -> list[Pair]:
        return [(root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png") for name in names]

    val = _voc_names(root, config.val_split or "val")
    if config.train_split != "trainaug":
        return MaskFiles(root, labels, pairs(_voc_names(root, config.train_split)), pairs(val))
    fine = _voc_names(root, "train")
    more = _sbd_masks(root, config.sbd)
    further = [(root / f"JPEGImages/{name}.jpg", more[name]) for name in sorted(more.keys() - {*fine, *val})]
    return MaskFiles(root, labels, [*pairs(fine), *further], pairs(val))


def _voc_names(root: Path, split: str) -> list[str]:
    file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt")))
        raise ValueError(f"there is no {file}; data.train_split and data.val_split are among: {known}, trainaug")
    return read_lines(file)


def _sbd_masks(root: Path, sbd: str | None) -> dict[str, Path]:
    """Return masks by picture: the widely shared SegmentationClassAug/….png, or else SBD's own cls/….mat."""
    converted = root / "SegmentationClassAug"
    if sbd is None and converted.is_dir():
        return {path.stem: path for path in converted.glob("*.png")}
    folders = [Path(sbd or root.parent), *(Path(sbd or root.parent) / name for name in ("dataset", "SBD"))]
    folder = next((folder / "cls" for folder in folders if next(folder.glob("cls/*.mat"), None) is not None), None)
    if folder is None:
        raise ValueError(
            f"data.train_split=trainaug needs SBD's masks: as PNGs in {converted}, or data.sbd="
            f"benchmark_RELEASE/dataset with cls/….mat (now {sbd})"
        )
    if importlib.util.find_spec("scipy") is None:
        raise ValueError(f"{folder}/….mat are read by a package that is not installed: pip install scipy")
    return {path.stem: path for path in folder.glob("*.mat")}


def camvid(config: DataSettings) -> MaskFiles:
    """List CamVid's road scenes; masks hold 0 to 10, with 11 and 255 ignored, or CamVid's colours."""
    root = _root(config, [], "ROOT has the folders train, val and test, or lists such as train.lst")
    values = {**{number: number for number in range(len(CAMVID))}, 11: IGNORE_INDEX, 255: IGNORE_INDEX}
    colours = {
        **dict.fromkeys(_CAMVID_OTHERS, IGNORE_INDEX),
        **{colour: label for label, colour in enumerate(CAMVID.values())},
    }
    labels = Labels(
        tuple(CAMVID), values, "masks hold 0 to 10, with 11 and 255 for none, or CamVid's 32 colours", colours
    )
    names = config.train_split, config.val_split or "val", config.test_split or "test"
    train, val = (_camvid_pairs(root, name) for name in names[:2])
    test = [] if names[1] == names[2] else _camvid_pairs(root, names[2], needed=config.test_split is not None)
    return MaskFiles(root, labels, train, val, test)


def _camvid_pairs(root: Path, split: str, *, needed: bool = True) -> list[Pair]:
    lists = [root / f"{split}.lst", root / "list" / "camvid" / f"{split}.lst"]
    if (file := next((file for file in lists if file.is_file()), None)) is not None:
        lines = [line.split() for line in read_lines(file)]
        if odd := [" ".join(line) for line in lines if len(line) != 2]:
            raise ValueError(
                f"{file}: each line names a picture and its mask, below {root}; this one does not: {odd[0]}"
            )
        return [(root / picture, root / mask) for picture, mask in lines]
    if split == "trainval":
        return [*_camvid_pairs(root, "train"), *_camvid_pairs(root, "val")]
    pictures = _pictures(root / split)
    if not pictures and needed:
        raise ValueError(f"{root} has neither a folder {split} with pictures nor {split}.lst")
    if (root / f"{split}annot").is_dir():
        return [(picture, root / f"{split}annot" / f"{picture.stem}.png") for picture in pictures]
    return [(picture, root / f"{split}_labels" / f"{picture.stem}_L.png") for picture in pictures]


Layout = Callable[[DataSettings], MaskFiles]

LAYOUTS: dict[str, Layout] = {"mask_folder": mask_folder, "cityscapes": cityscapes, "voc": voc, "camvid": camvid}
