"""`python -m mixerzoo.vision.data check`: each kind of problem is listed with its file, and nothing else is."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from mixerzoo.vision.data.__main__ import main, settings_of
from mixerzoo.vision.data.classification import load_image_folder
from mixerzoo.vision.training.settings import load
from PIL import Image


def _save(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 0)).save(path)
    return path


def _folder(root: Path) -> Path:
    for split, first in (("train", 0), ("val", 100)):
        for number, name in enumerate(("cat", "dog")):
            for index in range(3):
                _save(root / split / name / f"{index}.png", first + 10 * number + index)
    return root


def _masks(root: Path) -> Path:
    for split, first in (("training", 0), ("validation", 100)):
        for index in range(3):
            _save(root / "images" / split / f"{index}.png", first + index)
            _save(root / "annotations" / split / f"{index}.png", index, "L")
    (root / "classes.txt").write_text("a\nb\nc\n")
    return root


def _run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[str], str]:
    code = main(["check", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_folder_without_problems(workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, problems, summary = _run(capsys, _folder(tmp_path), "--workers", workers)
    assert (code, problems) == (0, []) and "check: 6 train, 6 val; no problems" in summary


def test_every_problem_of_a_folder_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _folder(tmp_path)
    (root / "train" / "dog" / "1.png").write_bytes(b"")
    (root / "train" / "cat" / "2.jpg").write_bytes(b"some text")
    (root / "train" / "empty").mkdir()
    _save(root / "val" / "fox" / "0.png", 200)
    (root / "val" / "dog" / "9.png").write_bytes((root / "train" / "cat" / "0.png").read_bytes())
    code, problems, summary = _run(capsys, root)
    assert code == 1 and "6 problems" in summary
    assert {line.removeprefix(f"{root}/") for line in problems} == {
        "train/empty: there is no picture of this class",
        "train/cat/2.jpg: cannot be read: no known picture format",
        "train/dog/1.png: cannot be read: the file is empty",
        "val/empty: this class is missing",
        "val/fox: training has no such class",
        f"val/dog/9.png: the same as {root}/train/cat/0.png: val and train must not share pictures",
    }


def test_one_class_is_a_problem_as_it_is_for_training(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        _save(tmp_path / "one" / "cat" / f"{index}.png", index)
    code, problems, _ = _run(capsys, tmp_path / "one")
    assert (code, problems) == (1, [f"{tmp_path / 'one'}: there is one class only (cat); at least 2 are needed"])
    config = load([f"data={tmp_path / 'one'}"], repository / "configs")
    with pytest.raises(ValueError, match="there is one class only"):
        load_image_folder(config.data, config.augment, 0)


@pytest.mark.parametrize("splits", [("test",), ("val",), ("validation", "test")])
def test_a_folder_without_training_pictures_is_named(
    splits: tuple[str, ...], tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its splits are not taken for classes."""
    root = tmp_path / "pictures"
    for split in splits:
        for value, name in enumerate(("cat", "dog")):
            _save(root / split / name / "0.png", value)
    message = f"{root} holds {', '.join(splits)} but no folder train; pictures for training are needed in {root}/train"
    code, problems, error = _run(capsys, root)
    assert (code, problems) == (2, []) and message in error
    config = load([f"data={root}"], repository / "configs")
    with pytest.raises(ValueError, match="but no folder train"):
        load_image_folder(config.data, config.augment, 0)


def test_masks_without_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, problems, summary = _run(capsys, _masks(tmp_path))
    assert (code, problems) == (0, []) and "check: 3 train, 3 val; no problems" in summary


def test_every_problem_of_masks_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    root = _masks(tmp_path)
    annotations = root / "annotations"
    _save(annotations / "training" / "0.png", 3, "L")
    _save(annotations / "training" / "1.png", 7)
    _save(annotations / "training" / "2.png", 1, "L", (16, 24))
    (annotations / "validation" / "0.png").unlink()
    (annotations / "validation" / "1.png").write_bytes(b"")
    (root / "images" / "validation" / "2.png").write_bytes(b"")
    _save(annotations / "validation" / "7.png", 1, "L")
    settings = [f"data.root={root}", "data.classes=3", "data.ignore_zero=false", "--configs", repository / "configs"]
    code, problems, _ = _run(capsys, "data=ade20k", *settings)
    assert code == 1
    assert [line.removeprefix(f"{root}/").split(";")[0] for line in problems] == [
        "annotations/training/0.png: holds label 3, but there are 3 classes, counted from 0",
        "annotations/training/1.png: is RGB, with colours such as (7, 0, 0)",
        "annotations/training/2.png: is [24, 16], its picture [16, 24]",
        "annotations/validation/7.png: this mask has no picture",
        "images/validation/0.png: has no mask",
        "annotations/validation/1.png: cannot be read: the file is empty",
        "images/validation/2.png: cannot be read: the file is empty",
    ]


def test_problems_in_an_archive_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _folder(tmp_path / "set")
    (root / "val" / "dog" / "1.png").write_bytes(b"nothing")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(root, ".")
    code, problems, summary = _run(capsys, tmp_path / "set.tar")
    assert code == 1 and "6 train, 6 val; 1 problem" in summary
    assert [line.split("val/")[1] for line in problems] == ["dog/1.png: cannot be read: no known picture format"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["no/where"], "no/where: there is no such folder or file"),
        (["data=image_folder"], "data.root has no value"),
        (["data=image_folder", "data.root=no/where"], "data.root=no/where: there is no such folder"),
        (["data=digits"], "digits from scikit-learn is not made of files that could be checked one by one"),
        (["data=nothing"], "data=nothing: choose one of"),
    ],
)
def test_what_cannot_be_checked_is_said(
    what: list[str], message: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, problems, error = _run(capsys, *what, "--configs", repository / "configs")
    assert (code, problems) == (2, []) and message in error


def test_masks_of_unknown_classes_need_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _masks(tmp_path)
    (root / "classes.txt").unlink()
    code, _, error = _run(capsys, root)
    assert code == 2 and "add " in error and "classes.txt, or data.classes=" in error


@pytest.mark.parametrize(
    ("folders", "source"),
    [
        (("images", "videos"), "image_folder"),  # classes that happen to be called so
        (("images", "annotations"), "mask_folder"),
        (("images", "masks"), "mask_folder"),
        (("annotations", "masks"), "image_folder"),
        (("train", "val"), "image_folder"),
        ((), "image_folder"),
    ],
)
def test_training_and_check_take_a_folder_for_the_same(
    folders: tuple[str, ...], source: str, tmp_path: Path, repository: Path
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    checked = settings_of([str(tmp_path)], None).data
    trained = load([f"data={tmp_path}"], repository / "configs").data
    assert (checked.source, checked.root) == (trained.source, trained.root) == (source, str(tmp_path))


@pytest.mark.parametrize("place", ["hfds/beans", "Torch/cifar10", "some/where.tar"])
def test_training_and_check_take_a_name_for_the_same(place: str, repository: Path) -> None:
    checked, trained = settings_of([place], None).data, load([f"data={place}"], repository / "configs").data
    located = (checked.source, checked.root, checked.dataset)
    assert located == (trained.source, trained.root, trained.dataset)
    assert located == ("timm", place, None) if place.endswith(".tar") else ("timm", None, place)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    code, _, error = _run(capsys, tmp_path / "notes.txt")
    assert code == 2 and "notes.txt: neither a folder nor a .tar" in error
