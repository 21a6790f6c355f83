"""predict: what it says of a picture is what the model's own evaluation says of it; whatever the file is like."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from mixerzoo.vision import predict as predict_module
from mixerzoo.vision._loading import load_model, load_run
from mixerzoo.vision.data.classification import PicturesInMemory, PictureTransforms, load_digits
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.data.mask_files import read_mask
from mixerzoo.vision.data.mask_layouts import LAYOUTS, load_masks
from mixerzoo.vision.drawing import heat
from mixerzoo.vision.export import main as export
from mixerzoo.vision.predict import find_class, find_pictures, main, of_run
from mixerzoo.vision.prediction_pictures import MOST_EXPLAINED
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.training.settings import load
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

Write = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> Write:
    """A run folder, as train.py leaves it, of a model with the weights of seed 0."""

    def write(
        classes: list[str], *, in_chans: int = 3, size: int = 64, head: dict[str, Any] | None = None, **more: Any
    ):
        torch.manual_seed(0)
        if head is None:
            model = timm.create_model("test_convnext", num_classes=len(classes), in_chans=in_chans)
        else:
            model = build_segmenter("test_convnext", len(classes), head=head, in_chans=in_chans)
        facts = {"model": "test_convnext", "model_kwargs": {}, "head": head, "classes": classes, "in_chans": in_chans}
        facts |= {"size": size, "mean": [0.5] * in_chans, "std": [0.25] * in_chans, **more}
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        folder = tmp_path / "run"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": state, "mixerzoo": facts}, folder / "checkpoints" / "best.ckpt")
        return folder

    return write


@pytest.fixture
def photo() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).resize((213, 142))


def _rows(text: str) -> list[dict[str, Any]]:
    return json.loads(text)


def test_digits_are_prepared_as_in_their_evaluation(
    write_run: Write, tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(["data=digits"], repository / "configs")
    splits = load_digits(config.data, config.augment, 0)
    images, _ = splits.test.__getitems__(Request([3, 5, 8], 0))
    assert splits.framed  # which checkpoints state; without it, as in older ones, a single channel says so
    folder = write_run(list("0123456789"), in_chans=1, size=32, mean=list(splits.mean), std=list(splits.std))
    for place, index in enumerate((3, 5, 8)):
        original = splits.test.originals[index].numpy()  # pyright: ignore[reportAttributeAccessIssue]
        Image.fromarray(original).save(tmp_path / f"{place}.png")
    assert main([str(folder), str(tmp_path / "*.png"), "--format", "json", "--top-k", "10"]) == 0
    want = load_run(folder).model(images).softmax(1)
    for row, probabilities in zip(_rows(capsys.readouterr().out), want, strict=True):
        got = {entry["index"]: entry["probability"] for entry in row["classes"]}
        assert [got[k] for k in range(10)] == pytest.approx(probabilities.tolist(), abs=2e-6)
        assert row["classes"][0]["class"] == str(int(probabilities.argmax()))


def test_every_route_to_grey_weights_prepares_them_as_judged(
    write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28 x 28 pixels are framed to 32 x 32: by the run, by its checkpoint under a timm name, by an exported folder."""
    pytest.importorskip("safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (1, 28, 28), dtype=np.uint8)
    judged = PicturesInMemory(pixels, np.zeros(1, np.int64), size=32, mean=0.286, std=0.353)
    want = judged.__getitems__(Request([0], 0))[0][0]
    run = write_run(["a", "b"], in_chans=1, size=32, mean=[0.286], std=[0.353], framed=True)
    assert export([str(run), "--format", "safetensors", "--output", str(tmp_path / "folder")]) == 0
    weights = ["--checkpoint", str(run / "checkpoints" / "best.ckpt")]
    for words in ([str(run)], ["test_convnext", *weights], [str(tmp_path / "folder")]):
        predictor = predict_module._load(predict_module.parser().parse_args([*words, "x.png", "--device", "cpu"]))
        assert torch.equal(predictor.prepare(Image.fromarray(pixels[0])), want), words
        assert list(predictor.classes) == ["a", "b"]


@pytest.mark.parametrize(("crop", "interpolation"), [(None, "bilinear"), (1.0, "bicubic"), (0.5, "bilinear")])
def test_photographs_are_prepared_as_in_the_evaluation_of_folders(
    crop: float | None, interpolation: str, write_run: Write, repository: Path, photo: Image.Image
) -> None:
    stated = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    trained = load_run(write_run(["a", "b"], size=96, crop=crop, interpolation=interpolation, **stated))
    settings = [f"data.crop={crop or 'null'}", f"data.interpolation={interpolation}", "data.size=96"]
    config = load(settings, repository / "configs")
    want, _ = PictureTransforms(config.data, None)(None)(photo, 0)
    assert torch.equal(of_run(trained).prepare(photo), want)


def test_masks_are_those_of_the_evaluation(
    write_run: Write, tmp_path: Path, repository: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    """A square picture at the evaluation's own size, where both see the same pixels."""
    square = photo.crop((0, 0, 64, 64))
    for kind, picture in (("images", square), ("masks", Image.new("L", (64, 64)))):
        (tmp_path / "data" / kind / "train").mkdir(parents=True)
        for name in ("0", "1"):
            picture.save(tmp_path / "data" / kind / "train" / f"{name}.png")
    arguments = ["recipe=segmentation", f"data.root={tmp_path / 'data'}", "data.size=64", "data.classes=5"]
    config = load([*arguments, "data=ade20k", "data.ignore_zero=false"], repository / "configs")
    splits = load_masks(LAYOUTS["mask_folder"], config.data, config.augment, 0)
    classes = ["sky", "tree", "wall", "floor", "road"]
    head = {"name": "semantic_fpn", "channels": 16, "dropout": 0.0}
    folder = write_run(classes, head=head, mean=list(splits.mean), std=list(splits.std))
    images, _ = splits.val.__getitems__(Request([0], 0))
    [want] = load_run(folder).model(images).argmax(1)

    square.save(tmp_path / "square.png")
    command = [str(folder), str(tmp_path / "square.png"), "--masks", str(tmp_path / "out")]
    assert main([*command, "--format", "json", "--top-k", "5"]) == 0
    mask = np.array(Image.open(tmp_path / "out" / "square.png"))
    assert np.array_equal(read_mask(tmp_path / "out" / "square.png", splits.val.dataset.labels), mask)
    assert np.array_equal(mask, want.numpy())
    [row] = _rows(capsys.readouterr().out)
    shares = {entry["class"]: entry["share"] for entry in row["classes"]}
    assert shares == {
        name: pytest.approx((mask == k).mean(), abs=1e-6) for k, name in enumerate(classes) if (mask == k).any()
    }
    assert row["overlay"] == str(tmp_path / "square.png.overlay.png")


def test_overlays_have_the_size_of_the_picture_and_a_legend(
    write_run: Write, tmp_path: Path, photo: Image.Image
) -> None:
    folder = write_run(
        [f"<{k}>" for k in range(40)], head={"name": "segformer", "channels": 16, "dropout": 0.0}, size=48
    )
    pictures = tmp_path / "pictures"
    (pictures / "below").mkdir(parents=True)
    photo.resize((500, 300)).save(pictures / "wide.jpg")
    photo.resize((900, 130)).save(pictures / "below" / "panorama.jpg")
    photo.resize((7, 1100)).save(pictures / "line.png")
    assert main([str(folder), str(pictures)]) == 0
    assert (pictures / "wide.jpg.overlay.png").exists()  # which is no picture for the next one
    out, masks = tmp_path / "out", tmp_path / "masks"
    assert main([str(folder), str(pictures), "--folder", str(out), "--masks", str(masks)]) == 0
    names = ("wide.jpg", "below/panorama.jpg", "line.png")
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {
        f"{name}.overlay.png" for name in names
    }
    found = {path.relative_to(masks).as_posix(): Image.open(path).size for path in masks.rglob("*.png")}
    assert found == {"wide.png": (500, 300), "below/panorama.png": (900, 130), "line.png": (7, 1100)}
    wide, panorama = (Image.open(tmp_path / f"out/{name}.overlay.png") for name in names[:2])
    assert wide.size[0] > 1000 and wide.size[1] >= 300  # side by side
    assert 900 < panorama.size[0] < 1800 and panorama.size[1] > 2 * 130  # one above the other
    original = np.array(Image.open(pictures / "wide.jpg"))
    assert np.array_equal(np.array(wide)[:300, :500], original)


def test_files_of_all_kinds(
    write_run: Write, tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    """One picture in many modes gets one answer; what is no picture is named, and the others are still predicted."""
    folder, pictures = write_run(["a", "b", "c"]), tmp_path / "pictures"
    pictures.mkdir()
    grey = photo.convert("L")
    grey.save(pictures / "0_grey.png")
    Image.fromarray(np.array(grey).astype(np.uint16) * 257).save(pictures / "1_sixteen.png")
    grey.convert("RGBA").save(pictures / "2_alpha.png")
    grey.convert("P").save(pictures / "3_palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    grey.rotate(90, expand=True).save(pictures / "4_exif.png", exif=turned)
    photo.convert("CMYK").save(pictures / "5_cmyk.jpg")
    (pictures / "6_text.jpg").write_text("no picture")
    (pictures / "7_empty.PNG").touch()
    (pictures / "notes.txt").write_text("no picture, and not called so")
    assert main([str(folder), str(pictures), str(tmp_path / "missing.jpg"), "--format", "json"]) == 1
    out, err = capsys.readouterr()
    rows = _rows(out)
    assert [Path(row["file"]).name[0] for row in rows] == list("012345")
    assert all(row["classes"] == rows[0]["classes"] for row in rows[1:5])
    lines = err.splitlines()
    assert lines == [
        f"predict: skipped {pictures / '6_text.jpg'}: no known picture format",
        f"predict: skipped {pictures / '7_empty.PNG'}: the file is empty",
        f"predict: skipped {tmp_path / 'missing.jpg'}: there is no such file",
    ]


def test_tables_and_sheets(
    write_run: Write, tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(["a, b", "$c$", "a class with a name that is longer than a column", "d"])
    for index in range(3):
        photo.resize((50 + 30 * index, 60)).save(tmp_path / f"{index}.jpg")
    arguments = [str(folder), *(str(tmp_path / f"{index}.jpg") for index in range(3)), "--batch-size", "2"]
    assert main([*arguments, "--sheet", str(tmp_path / "new" / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len(set(map(len, lines))) == 1  # aligned
    assert all(re.match(rf"{tmp_path}/\d\.jpg( +\S.* +\d+\.\d %){{3}}$", line) for line in lines)
    assert Image.open(tmp_path / "new" / "sheet.png").size[0] > 300

    assert main([*arguments, "--format", "csv", "--top-k", "9", "--output", str(tmp_path / "table.csv")]) == 0
    assert capsys.readouterr().out == ""
    [head, *rows] = csv.reader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert head == ["file", *(f"{name}_{rank}" for rank in range(1, 5) for name in ("class", "probability"))]
    assert {row[1] for row in rows} <= {"a, b", "$c$", "a class with a name that is longer than a column", "d"}
    assert all(sum(map(float, row[2::2])) == pytest.approx(1, abs=1e-5) for row in rows)


def test_evidence_is_drawn_over_what_the_model_sees(
    write_run: Write, tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(["first", "second", "1"], size=64, crop=1.0)
    photo.save(tmp_path / "photo.jpg")
    predictor = of_run(load_run(run))
    own = predictor.explain(photo)
    probabilities = predictor.classify([photo])[0]
    assert own.index == probabilities.argmax() and own.probability == pytest.approx(float(probabilities.max()))
    assert own.image.shape == (64, 64, 3) and own.evidence.shape == (64, 64) and own.map_size == (2, 2)
    seen = (predictor.prepare(photo) * 0.25 + 0.5).permute(1, 2, 0)  # the mean and deviation of the run
    np.testing.assert_allclose(own.image, seen.clamp(0, 1), atol=1e-6)
    other = predictor.explain(photo, 1 - own.index % 2, stage=1)
    assert other.map_size == (8, 8) and other.index != own.index and not np.allclose(other.evidence, own.evidence)

    Image.new("L", (9, 9)).save(tmp_path / "grey.png")
    words = [
        str(run),
        str(tmp_path / "photo.jpg"),
        str(tmp_path / "grey.png"),
        "--cam",
        str(tmp_path / "new" / "c.png"),
    ]
    assert main(words) == 0
    assert main([*words[:-1], str(tmp_path / "named.png"), "--cam-class", "1", "--cam-stage", "-2"]) == 0
    capsys.readouterr()
    assert all(Image.open(path).size[0] > 300 for path in (tmp_path / "new" / "c.png", tmp_path / "named.png"))


def test_heat_is_relative_to_the_strongest_evidence_for_the_class() -> None:
    picture = np.full((1, 4, 3), (0.9, 0.6, 0.3))
    shown = heat(picture, np.array([[4.0, 1.0, 0.0, -9.0]]))
    grey = np.full(3, 0.6)
    np.testing.assert_allclose(shown[0, 2:], [grey, grey])
    yellow, weaker = shown[0, :2]
    assert yellow[0] > 0.8 and yellow[1] > 0.8 and yellow[2] < 0.3
    assert np.abs(weaker - grey).max() > 0.1 and not np.allclose(weaker, yellow, atol=0.1)
    np.testing.assert_allclose(heat(picture, np.array([[8.0, 2.0, 0.0, -1.0]])), shown)
    np.testing.assert_allclose(heat(picture, np.array([[-1.0, -2.0, 0.0, -1.0]]))[0], [grey] * 4)


def test_the_first_pictures_are_explained_and_the_page_says_so(
    write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, drawn = tmp_path / "photos", []
    photos.mkdir()
    for index in range(MOST_EXPLAINED + 1):
        Image.new("RGB", (20, 20), (5 * index, 90, 30)).save(photos / f"{index:02}.png")
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    run = write_run(["a", "b", "tench, Tinca tinca"])
    assert main([str(run), str(photos), "--cam", str(tmp_path / "seen.png"), "--cam-class", "tinca tinca"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == MOST_EXPLAINED + 1
    title = drawn[-1].get_suptitle()
    assert f"the first {MOST_EXPLAINED} of {MOST_EXPLAINED + 1} pictures" in title and "“tench, Tinca tinca”" in title
    assert len([axes for axes in drawn[-1].axes if axes.images]) == 2 * MOST_EXPLAINED


@pytest.mark.parametrize("option", ["--cam", "--sheet"])
def test_sheets_among_the_pictures_are_drawn_again_and_pictures_are_not_written_over(
    option: str, write_run: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photos = write_run(["a", "b"]), tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), "gold").save(photos / name)
    before = (photos / "a.png").read_bytes()
    for _ in range(2):
        assert main([str(run), str(photos), option, str(photos / "sheet.png")]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
    assert main([str(run), str(photos), option, str(photos / "a.png")]) == 2
    assert f"{option} would write over" in capsys.readouterr().err and (photos / "a.png").read_bytes() == before
    assert main([str(run), str(photos / "sheet.png"), option, str(photos / "sheet.png")]) == 2, "named as a picture"


def test_classes_are_found_by_any_of_their_names() -> None:
    classes = ["tench, Tinca tinca", "crane", "Crane", "7", "bee"]
    assert [find_class(word, classes) for word in ("tench", "TINCA TINCA", "tench, tinca tinca", "7", "4")] == [
        0,
        0,
        0,
        3,
        4,
    ]
    with pytest.raises(ValueError, match="several classes have this name; give the number, 1 or 2"):
        find_class("crane", classes)


def test_timm_models_know_the_classes_of_imagenet(
    tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.save(tmp_path / "photo.jpg")
    model = timm.create_model("test_convnext")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    command = ["test_convnext", str(tmp_path / "photo.jpg"), "--format", "json"]
    assert main([*command, "--checkpoint", str(tmp_path / "weights.pth"), "--top-k", "1000"]) == 0
    out, err = capsys.readouterr()
    names = {entry["index"]: entry["class"] for entry in _rows(out)[0]["classes"]}
    assert names[0] == "tench, Tinca tinca" and len(names) == 1000 and err == ""
    assert main([*command, "--input-size", "64"]) == 0
    assert "the weights are random" in capsys.readouterr().err


def test_an_exported_folder_is_a_model(
    write_run: Write, tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    from timm.models import save_for_hf

    photo.save(tmp_path / "photo.jpg")
    run = write_run(["first", "second"], size=64, crop=1.0)
    model = load_model("test_convnext", checkpoint=run / "checkpoints" / "best.ckpt")
    save_for_hf(model, str(tmp_path / "hub"), model_config={"label_names": ["first", "second"]})
    answers = []
    for name in (str(tmp_path / "hub"), f"local-dir:{tmp_path / 'hub'}"):
        assert main([name, str(tmp_path / "photo.jpg"), "--format", "json"]) == 0
        answers.append(_rows(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert {entry["class"] for entry in answers[0][0]["classes"]} == {"first", "second"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convnext_atoo", "x.jpg"], "did you mean convnext_atto"),
        (["nowhere/run", "x.jpg"], "there is no run folder or checkpoint nowhere/run"),
        (["EMPTY", "x.jpg"], "is no run folder of train.py"),
        (["RUN", "EMPTY"], "there are no pictures"),
        (["RUN", "EMPTY/*.jpg"], "there are no pictures"),
        (["RUN", "x.jpg", "--folder", "out"], "--folder and --masks are for segmenters"),
        (["RUN", "PHOTO", "--cam", "c.png", "--cam-class", "bb"], "0 to 1; did you mean b?"),
        (["RUN", "PHOTO", "--cam", "c.png", "--cam-class", "2"], "--cam-class 2: no class has this name"),
        (["RUN", "PHOTO", "--cam", "c.png", "--cam-stage", "4"], "there is no stage 4; the model has 4"),
        (["RUN", "PHOTO", "--cam-stage", "1"], "--cam-class and --cam-stage belong to --cam"),
        (["RUN", "PHOTO", "--cam", "PHOTO"], "--cam would write over"),
        (["RUN", "PHOTO", "--cam", "EMPTY/photo"], "give a name that ends in .png"),
        (["RUN", "PHOTO", "--sheet", "EMPTY/photo.jpg"], "give a name that ends in .png"),
        (["RUN", "PHOTO", "--cam", "EMPTY/a.png", "--sheet", "EMPTY/../empty/a.png"], "--sheet and --cam both name"),
        (["RUN", "PHOTO", "--cam", "PHOTO/a.png"], "a folder has this name, or a file that of its folder"),
        (["RUN", "x.jpg", "--pretrained"], "leave out --pretrained, meant for timm names"),
        (["RUN", "PHOTO", "--input-size", "2"], "try another --input-size"),
        (["RUN", "x.jpg", "--top-k", "0"], "--top-k 0: at least 1 is needed"),
        (["RUN", "x.jpg", "--device", "cuda:99"], "--device cuda:99"),
        (["test_convnext", "x.jpg", "--model-kwargs", "num_classes=0"], "there is nothing to predict"),
        (["FOREIGN", "x.jpg"], "its model is unknown"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], message: str, write_run: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    places = {
        "RUN": str(write_run(["a", "b"])),
        "EMPTY": str(tmp_path / "empty"),
        "FOREIGN": str(tmp_path / "foreign.pth"),
        "PHOTO": str(tmp_path / "photo.png"),
    }
    words = [re.sub("|".join(places), lambda match: places[match[0]], word) for word in arguments]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1 and "Traceback" not in err


def test_names_below_folders_are_kept_and_never_meet(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/b/1.png", "c/1.jpg", "c/1.png", "c/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_pictures([str(tmp_path / "a"), str(tmp_path / "c"), str(tmp_path / "**" / "1.png")])
    assert [(file.relative_to(tmp_path).as_posix(), name.as_posix()) for file, name in found] == [
        ("a/1.png", "1.png"),
        ("a/b/1.png", "b/1.png"),
        ("c/1.jpg", "1-2.jpg"),
        ("c/1.png", "1-3.png"),
    ]


def test_an_interrupted_run_is_predicted_with_its_last_weights(write_run: Write) -> None:
    folder = write_run(["a", "b"])
    (folder / "checkpoints" / "best.ckpt").rename(folder / "checkpoints" / "last.ckpt")
    assert load_run(folder).checkpoint.name == "last.ckpt"


def test_parser_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predict_module.parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("format", "sheet", "folder", "masks", "top-k", "pretrained"))
