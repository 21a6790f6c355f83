"""Very small and unusual data sets either train or end with one line that says what is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixerzoo.vision.data.module import SOURCES
from mixerzoo.vision.data.splits import Splits
from mixerzoo.vision.training import cli
from mixerzoo.vision.training.config import AugmentConfig, DataConfig
from PIL import Image


def _folder(root: Path, counts: dict[str, int]) -> Path:
    """Write a folder with `counts` pictures by split/class."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 20), (40 * number, 10 * index, 0)).save(root / name / f"{index}.png")
    return root


def _load(root: Path, **settings: object) -> Splits:
    return SOURCES["image_folder"](DataConfig(root=str(root), size=16, **settings), AugmentConfig(), 0)


@pytest.fixture
def run(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]):
    """Run train.py in this process; return its exit code and the lines that begin with `error`."""

    def start(*settings: str) -> tuple[int, list[str]]:
        out = tmp_path / "out"
        given = [setting for setting in tiny if setting.split("=")[0] not in {name.split("=")[0] for name in settings}]
        code = cli.main([*given, "train.epochs=1", f"out={out}", *settings], configs=repository / "configs")
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]

    return start


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 4, "b": 0}, "b"),
        ({"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 0}, "b"),
        ({"a": 4}, r"there is one class only \(a\), and nothing to tell it from; at least 2 are needed"),
        ({"a": 1}, "1 picture cannot be divided: one at least is needed for training and another for validation"),
        ({}, "needs a sub-folder with pictures for each class"),
    ],
    ids=["empty_class", "empty_class_of_validation", "one_class", "one_picture", "no_class"],
)
def test_a_folder_that_cannot_be_learned_from_is_named(counts: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _load(_folder(tmp_path, counts))


def test_the_smallest_data_set_is_divided(tmp_path: Path) -> None:
    splits = _load(_folder(tmp_path, {"a": 1, "b": 1}))
    assert (len(splits.train), len(splits.val)) == (1, 1)


@pytest.mark.slow
def test_one_picture_of_each_class_trains(tmp_path: Path, run) -> None:
    root = _folder(tmp_path / "set", {f"{split}/{name}": 1 for split in ("train", "val") for name in ("a", "b")})
    code, errors = run(f"data={root}", "data.size=32", "data.workers=0", "train.batch_size=1")
    assert (code, errors) == (0, [])
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["train.batch_size=100"],
            "64 training pictures do not fill one batch of 100 on 1 device(s); use train.batch_",
        ),
        (["train.batch_size=15", "augment.mixup=0.8"], "mixup pairs pictures: train.batch_size=15 must be even"),
    ],
    ids=["batch_larger_than_data_set", "odd_batch_with_mixup"],
)
def test_a_batch_that_cannot_be_made_is_an_error_of_one_line(settings: list[str], message: str, run) -> None:
    code, errors = run(*settings)
    assert code == 2 and len(errors) == 1 and message in errors[0]
