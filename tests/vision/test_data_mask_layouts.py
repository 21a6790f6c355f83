"""Cityscapes, Pascal VOC with SBD and CamVid: which files belong together, and what their values and colours become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mixerzoo.vision.data.__main__ import main
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.data.module import SOURCES
from mixerzoo.vision.data.splits import IGNORE_INDEX, Splits
from mixerzoo.vision.training.config import AugmentConfig, DataConfig
from mixerzoo.vision.training.settings import load
from PIL import Image
from scipy.io import savemat

SIZE = (10, 12)  # height and width of every picture here


def _picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (value, 0, 0)).save(path)


def _mask(path: Path, values: list[int] | list[tuple[int, int, int]], *, palette: bool = False) -> None:
    """The values from left to right, each in as many columns as fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array(values, np.uint8)[np.arange(SIZE[1]) * len(values) // SIZE[1]]
    image = Image.fromarray(np.broadcast_to(row, (SIZE[0], *row.shape)).copy())
    if palette:
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def _load(source: str, root: Path, **settings: object) -> Splits:
    return SOURCES[source](DataConfig(root=str(root), size=8, **settings), AugmentConfig(), 0)


def _labels(part: object, index: int = 0) -> list[int]:
    """The labels of a row of a mask, from left to right, each once."""
    _, masks = part.__getitems__(Request([index], 0))  # type: ignore[attr-defined]
    row = masks[0, 0].tolist()
    assert (masks[0] == masks[0, :1]).all()
    return [label for place, label in enumerate(row) if place == 0 or label != row[place - 1]]


def _cityscapes(root: Path, kind: str, values: list[int]) -> Path:
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau")):
        name = f"{city}_000000_000019"
        _picture(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        for written in (kind, "instanceIds", "color"):  # what lies beside it is no mask
            _mask(root / "gtFine" / split / city / f"{name}_gtFine_{written}.png", values)
    return root


def test_cityscapes_ids_become_the_19_classes_that_count(tmp_path: Path) -> None:
    splits = _load("cityscapes", _cityscapes(tmp_path, "labelIds", [7, 33, 0, 26, 9, 11]))
    assert (len(splits.train), len(splits.val)) == (2, 1) and splits.test is splits.val and splits.whole
    assert len(splits.classes) == 19 and splits.classes[0] == "road" and splits.classes[18] == "bicycle"
    assert _labels(splits.val) == [0, 18, IGNORE_INDEX, 13, IGNORE_INDEX, 2]
    assert splits.classes[13] == "car" and splits.classes[2] == "building"


def test_cityscapes_train_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    splits = _load("cityscapes", _cityscapes(tmp_path, "labelTrainIds", [0, 18, 255, 13]))
    assert _labels(splits.val) == [0, 18, IGNORE_INDEX, 13]
    _mask(tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelTrainIds.png", [0, 19])
    with pytest.raises(ValueError, match=r"lindau.*labelTrainIds\.png holds label 19, but train ids are 0 to 18"):
        _load("cityscapes", tmp_path)


def test_a_missing_mask_of_cityscapes_is_named(tmp_path: Path) -> None:
    root = _cityscapes(tmp_path, "labelIds", [7])
    (root / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match=r"ulm.*leftImg8bit\.png has no mask; it was expected at .*gtFine_labelIds"):
        _load("cityscapes", root)
    with pytest.raises(ValueError, match=r"leftImg8bit/test has no CITY"):
        _load("cityscapes", root, val_split="test")


def _voc(root: Path) -> Path:
    names = {"train": ["a", "b"], "val": ["c"], "trainval": ["a", "b", "c"]}
    for split, pictures in names.items():
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(pictures) + "\n")
    for name in "abcdef":
        _picture(root / "JPEGImages" / f"{name}.jpg")
    for number, name in enumerate("abc"):
        _mask(root / "SegmentationClass" / f"{name}.png", [0, number + 1, 255], palette=True)
    return root


@pytest.mark.parametrize("place", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_read_by_its_lists_and_its_palette_is_numbers(place: str, tmp_path: Path) -> None:
    _voc(tmp_path / place)
    splits = _load("voc", tmp_path)
    assert (len(splits.train), len(splits.val), len(splits.classes)) == (2, 1, 21)
    assert _labels(splits.val) == [0, 3, IGNORE_INDEX] and splits.classes[3] == "bird"
    lists = tmp_path / place / "ImageSets" / "Segmentation"
    (lists / "mine.txt").write_text("d\n")
    _mask(tmp_path / place / "SegmentationClass" / "d.png", [0, 4], palette=True)
    assert len(_load("voc", tmp_path, train_split="trainval", val_split="mine").train) == 3
    with pytest.raises(ValueError, match=r"no .*trainvall\.txt; .* among: mine, train, trainval, val, trainaug"):
        _load("voc", tmp_path, train_split="trainvall")


@pytest.mark.parametrize("form", ["png", "mat"])
def test_sbd_adds_masks_to_voc_but_none_of_validation(form: str, tmp_path: Path) -> None:
    root = _voc(tmp_path / "VOCdevkit" / "VOC2012")
    with pytest.raises(ValueError, match=r"trainaug needs SBD's masks: .*SegmentationClassAug, or data\.sbd="):
        _load("voc", tmp_path, train_split="trainaug")
    for number, name in enumerate("acde"):  # one of training, one of validation, two of neither
        if form == "png":
            _mask(root / "SegmentationClassAug" / f"{name}.png", [20, number])
            continue
        values = np.array([20, number], np.uint8)[None].repeat(SIZE[0], 0).repeat(SIZE[1] // 2, 1)
        (tmp_path / "SBD" / "cls").mkdir(parents=True, exist_ok=True)
        savemat(tmp_path / "SBD" / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": values, "Boundaries": 0}})
    settings = {} if form == "png" else {"sbd": str(tmp_path / "SBD")}
    splits = _load("voc", tmp_path, train_split="trainaug", **settings)
    masks = {picture.stem: mask for picture, mask in splits.train.dataset.pairs}
    assert sorted(masks) == ["a", "b", "d", "e"] and masks["a"].parent.name == "SegmentationClass"
    place = next(index for index, (picture, _) in enumerate(splits.train.dataset.pairs) if picture.stem == "e")
    _, mask = splits.train.dataset[place]
    assert mask[0].unique().tolist() == [3, 20] and len(splits.val) == 1


def test_a_damaged_mat_is_named(tmp_path: Path) -> None:
    root = _voc(tmp_path)
    (root / "cls").mkdir()
    (root / "cls" / "d.mat").write_bytes(b"nothing")
    splits = _load("voc", root, train_split="trainaug", sbd=str(root))  # one unreadable mask: another takes its place
    _, bad = splits.train.answer(Request([0, 1, 2], 0))
    assert [Path(file).name for file in bad] == ["d.mat"]


def _camvid_folders(root: Path) -> None:
    for split in ("train", "val", "test"):
        _picture(root / split / "1.png")
        _mask(root / f"{split}annot" / "1.png", [0, 10, 11, 255])


def _camvid_colours(root: Path) -> None:
    for split in ("train", "val", "test"):
        _picture(root / split / "1.png")
        _mask(root / f"{split}_labels" / "1_L.png", [(0, 128, 192), (128, 128, 0), (0, 0, 0), (128, 0, 192)])


def _camvid_lists(root: Path) -> None:
    (root / "list" / "camvid").mkdir(parents=True)
    for split in ("train", "val", "test"):
        _picture(root / "images" / f"{split}.png")
        _mask(root / "labels" / f"{split}_L.png", [(0, 128, 192), (128, 128, 0), (0, 0, 0), (64, 128, 192)])
        (root / "list" / "camvid" / f"{split}.lst").write_text(f"images/{split}.png labels/{split}_L.png\n")
    (root / "list" / "camvid" / "trainval.lst").write_text(
        "".join((root / "list" / "camvid" / f"{split}.lst").read_text() for split in ("train", "val"))
    )


@pytest.mark.parametrize("lay_out", [_camvid_folders, _camvid_colours, _camvid_lists])
def test_camvid_in_each_of_its_forms(lay_out, tmp_path: Path) -> None:
    lay_out(tmp_path)
    splits = _load("camvid", tmp_path)
    assert len(splits.classes) == 11 and splits.test is not splits.val
    assert _labels(splits.test) == [0, 10, IGNORE_INDEX]  # colours of none of the eleven beside black
    assert (splits.classes[0], splits.classes[10]) == ("bicyclist", "tree")
    both = _load("camvid", tmp_path, train_split="trainval", val_split="test")
    assert len(both.train) == 2 and both.test is both.val


def test_pictures_of_training_are_none_to_judge_by(tmp_path: Path) -> None:
    _voc(tmp_path / "voc")
    message = (
        r"^1 of the 1 validation pictures are trained on too, such as .*c\.jpg: .* data\.train_split \(now trainval\) "
        r"and data\.val_split \(now null, the usual one\)$"
    )
    for limit in (None, 2):  # whether or not the very picture is drawn
        with pytest.raises(ValueError, match=message):
            _load("voc", tmp_path / "voc", train_split="trainval", limit=limit)
    _camvid_lists(tmp_path / "camvid")
    with pytest.raises(ValueError, match=r"1 of the 1 validation .*data\.val_split \(now val\)"):
        _load("camvid", tmp_path / "camvid", train_split="trainval", val_split="val")
    with pytest.raises(ValueError, match=r"1 of the 2 test .*data\.test_split \(now trainval\)"):
        _load("camvid", tmp_path / "camvid", test_split="trainval")


def test_a_list_that_is_not_in_utf8_is_named(tmp_path: Path) -> None:
    _voc(tmp_path / "voc")
    (tmp_path / "voc" / "ImageSets" / "Segmentation" / "val.txt").write_bytes(b"\xe9t\xe9\n")
    with pytest.raises(ValueError, match=r"val\.txt is not in UTF-8 \(.* at byte 0\)"):
        _load("voc", tmp_path / "voc")
    _camvid_lists(tmp_path / "camvid")
    (tmp_path / "camvid" / "list" / "camvid" / "val.lst").write_bytes(b"images/\xe9.png labels/1.png\n")
    with pytest.raises(ValueError, match=r"val\.lst is not in UTF-8"):
        _load("camvid", tmp_path / "camvid")


def test_lists_that_name_what_is_not_there_are_refused(tmp_path: Path) -> None:
    _voc(tmp_path / "voc")
    (tmp_path / "voc" / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"b\.jpg is not there, but a list"):
        _load("voc", tmp_path / "voc")
    _camvid_lists(tmp_path / "camvid")
    (tmp_path / "camvid" / "list" / "camvid" / "val.lst").write_text("images/val.png\n")
    with pytest.raises(ValueError, match=r"val\.lst: each line names a picture and its mask, .* not: images/val\.png"):
        _load("camvid", tmp_path / "camvid")


def test_a_colour_that_is_none_of_camvids_is_named(tmp_path: Path) -> None:
    _camvid_colours(tmp_path)
    _mask(tmp_path / "val_labels" / "1_L.png", [(0, 128, 192), (1, 2, 3), (0, 128, 193)])
    with pytest.raises(ValueError, match=r"1_L\.png holds colours \(0, 128, 193\), \(1, 2, 3\), but masks hold 0"):
        _load("camvid", tmp_path)


def _no_cityscapes(root: Path) -> None:
    (root / "leftImg8bit").mkdir()


@pytest.mark.parametrize(
    ("source", "prepare", "message"),
    [
        ("cityscapes", _no_cityscapes, r"there is no folder .*gtFine; ROOT is where .* unpacked"),
        ("voc", _no_cityscapes, r"there is no .*VOCdevkit/VOC2012/ImageSets/Segmentation"),
        ("camvid", _no_cityscapes, r"neither a folder train with pictures nor train\.lst"),
    ],
)
def test_a_folder_of_another_layout_is_refused(source: str, prepare, message: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        _load(source, tmp_path)
    with pytest.raises(ValueError, match=r"data\.root=None: there is no"):
        SOURCES[source](DataConfig(), AugmentConfig(), 0)


def _spoiled(root: Path, source: str) -> Path:
    """A data set of a layout; one of its masks."""
    if source == "cityscapes":
        _cityscapes(root, "labelIds", [7])
        return root / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"
    if source == "voc":
        return _voc(root) / "SegmentationClass" / "b.png"
    _camvid_folders(root)
    return root / "trainannot" / "1.png"


@pytest.mark.parametrize("source", ["cityscapes", "voc", "camvid"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (5, 4)), r"is \[4, 5\], its picture \[10, 12\]; sizes must agree"),
        (Image.new("L", SIZE[::-1], 99), r"holds label 99, but .* 255"),
        (Image.new("RGB", SIZE[::-1], (9, 8, 7)), r"colours? (such as )?\(9, 8, 7\)"),
        (Image.new("RGBA", SIZE[::-1], (9, 8, 7, 6)), r"is RGBA, with colours such as \(9, 8, 7, 6\)"),
    ],
    ids=["size", "label", "colour", "transparent"],
)
def test_a_wrong_mask_of_any_layout_is_named_before_training(
    source: str, mask: Image.Image, message: str, tmp_path: Path
) -> None:
    file = _spoiled(tmp_path, source)
    _load(source, tmp_path)
    mask.save(file)
    with pytest.raises(ValueError, match=rf"{file} .*{message}"):
        _load(source, tmp_path)


def test_a_path_with_pictures_and_masks_is_known_by_its_folders(tmp_path: Path, repository: Path) -> None:
    _picture(tmp_path / "images" / "train" / "1.png")
    config = load([f"data={tmp_path}"], repository / "configs")
    assert config.data.source == "image_folder"  # a class that is called images
    (tmp_path / "masks").mkdir()
    config = load([f"data={tmp_path}"], repository / "configs")
    assert (config.data.source, config.data.root) == ("mask_folder", str(tmp_path))


def test_check_covers_every_layout(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    city, voc, camvid = tmp_path / "city", tmp_path / "voc", tmp_path / "camvid"
    _cityscapes(city, "labelIds", [7, 40])
    _voc(voc)
    Image.new("RGB", SIZE[::-1]).save(voc / "SegmentationClass" / "b.png")
    _camvid_colours(camvid)
    Image.new("RGB", (3, 4)).save(camvid / "train_labels" / "1_L.png")
    expected = {
        "cityscapes": (city, 3, "labelIds.png: holds label 40, but ids are 0 to 33, and 255 for none"),
        "voc": (voc, 1, "b.png: is RGB, with colours such as (0, 0, 0); a mask holds one class number a pixel"),
        "camvid": (camvid, 1, "1_L.png: is [4, 3], its picture [10, 12]; sizes must agree"),
    }
    for number, picture in enumerate(sorted(tmp_path.rglob("*.*g"))):
        if not any(name in str(picture) for name in ("gtFine", "SegmentationClass", "_labels")):
            _picture(picture, number)  # no two of them the same
    for source, (root, count, message) in expected.items():
        command = ["check", f"data={source}", f"data.root={root}", "--configs", str(repository / "configs")]
        assert main(command) == 1
        found = capsys.readouterr().out.splitlines()
        assert len(found) == count and all(message in line for line in found), source
