"""predict with segmenters: pictures of any size through the run's own evaluation, or as the command says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixerzoo.vision._loading import Trained, load_run, load_segmenter
from mixerzoo.vision.label_sets import LABEL_SETS
from mixerzoo.vision.predict import main, parser, seen_as_told
from mixerzoo.vision.predictors import of_run
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.segmentation.inference import Inference, infer
from PIL import Image

HEAD = {"name": "segformer", "channels": 8, "dropout": 0.0}
CITIES = list(LABEL_SETS["cityscapes"].names)


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder of a segmenter of Cityscapes' classes with the weights of seed 0."""

    def write(**facts: Any) -> Path:
        torch.manual_seed(0)
        model = build_segmenter("test_convnext", len(CITIES), head=HEAD)
        known = {"model": "test_convnext", "model_kwargs": {}, "head": HEAD, "classes": CITIES, "in_chans": 3}
        known |= {"size": 48, "mean": [0.5] * 3, "std": [0.25] * 3, **facts}
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        torch.save({"state_dict": state, "mixerzoo": known}, tmp_path / "run" / "checkpoints" / "best.ckpt")
        return tmp_path / "run"

    return write


def _picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def _mask(run: Path, picture: Path, *options: str) -> np.ndarray:
    out = picture.parent / "masks"
    assert main([str(run), str(picture), "--folder", str(out), "--masks", str(out), *options]) == 0
    return np.array(Image.open(out / f"{picture.stem}.png"))


def test_a_run_says_how_its_pictures_are_seen_and_the_command_may_say_otherwise(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    evaluate = {"mode": "slide", "window": [48, 64], "stride": None, "scales": [0.5, 1.0], "flip": True, "divisor": 1}
    run = write_run(evaluate=evaluate, short_side=60)
    _picture(101, 77).save(tmp_path / "a.png")
    trained = load_run(run)
    images = of_run(trained).prepare(Image.open(tmp_path / "a.png"))[None]
    own = Inference("slide", [48, 64], scales=[0.5, 1.0], flip=True, short_side=60, least=32)
    whole = Inference(short_side=40, least=32)
    told = [
        (own, []),
        (whole, ["--mode", "whole", "--no-flip", "--scales", "1", "--input-size", "40"]),
    ]
    masks = [_mask(run, tmp_path / "a.png", *options) for _, options in told]
    for (inference, options), mask in zip(told, masks, strict=True):
        want = infer(trained.model, images, inference)[0].argmax(0).numpy()
        assert mask.shape == (77, 101) and (mask == want).mean() > 0.999, options
    assert not np.array_equal(masks[0], masks[1])


def test_a_run_of_a_vision_transformer_is_loaded_with_the_positions_of_its_size(tmp_path: Path) -> None:
    """It takes any size under a head, but was built for that of its training."""
    kwargs: dict[str, Any] = {"depth": 4, "embed_dim": 24, "num_heads": 2}
    model = build_segmenter("vit_tiny_patch16_224", 2, head=HEAD, img_size=48, **kwargs).eval()
    facts = {"model": "vit_tiny_patch16_224", "model_kwargs": kwargs, "head": HEAD, "classes": ["a", "b"]}
    facts |= {"in_chans": 3, "size": 48, "mean": [0.5] * 3, "std": [0.25] * 3}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "mixerzoo": facts}, tmp_path / "run.ckpt")
    images = torch.randn(1, 3, 48, 70)
    for size in (None, (80, 80)):
        assert torch.equal(load_run(tmp_path / "run.ckpt", image_size=size).model(images), model(images))


def test_lines_of_pixels_and_panoramas_have_answers(write_run: Callable[..., Path], tmp_path: Path) -> None:
    run = write_run()
    sizes = {"line": (2000, 1), "tower": (20, 3000), "dot": (1, 1), "photo": (90, 60)}
    for name, size in sizes.items():
        _picture(*size).save(tmp_path / f"{name}.png")
    names = [str(tmp_path / f"{name}.png") for name in sizes]
    for options in ([], ["--mode", "slide", "--flip"]):
        assert (
            main([str(run), *names, "--folder", str(tmp_path / "out"), "--masks", str(tmp_path / "m"), *options]) == 0
        )
        assert {name: Image.open(tmp_path / "m" / f"{name}.png").size for name in sizes} == sizes


def test_masks_and_overlays_have_the_colours_of_the_data_set(write_run: Callable[..., Path], tmp_path: Path) -> None:
    run = write_run()
    _picture(64, 48).save(tmp_path / "a.png")
    labels = _mask(run, tmp_path / "a.png")
    colours = np.array(LABEL_SETS["cityscapes"].colours)
    assert np.array_equal(np.array(Image.open(tmp_path / "masks" / "a.png").convert("RGB")), colours[labels])
    overlay = np.array(Image.open(tmp_path / "masks" / "a.png.overlay.png"))
    for label in np.unique(labels):  # in the legend, unmixed
        assert (overlay == colours[label]).all(-1).sum() > 100


def test_a_picture_that_cannot_be_segmented_does_not_end_the_others(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run()
    for name, size in (("a", (60, 40)), ("b", (61, 40)), ("c", (60, 40))):
        _picture(*size).save(tmp_path / f"{name}.png")
    ask = "mixerzoo.vision.predictors.label_map"

    def fail_on_odd_widths(model: Any, images: torch.Tensor, inference: Inference) -> torch.Tensor:
        if images.shape[-1] % 2:
            raise RuntimeError("not\nthis one")
        return torch.zeros(1, *images.shape[-2:], dtype=torch.int64)

    monkeypatch.setattr(ask, fail_on_odd_widths)
    assert main([str(run), *(str(tmp_path / f"{name}.png") for name in "abc"), "--format", "csv"]) == 1
    said = capsys.readouterr()
    assert [Path(line.split(",")[0]).name for line in said.out.splitlines()[1:]] == ["a.png", "c.png"]
    [line] = said.err.splitlines()
    assert line.startswith(f"predict: skipped {tmp_path / 'b.png'}: the model fails with 1 of 40 x 61 (not this one)")


def test_a_published_segmenter_is_named_by_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    model = build_segmenter("test_convnext", 21, head=HEAD).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    _picture(80, 60).save(tmp_path / "a.png")
    parts = ["--head", "segformer", "--head-kwargs", "channels=8", "--classes", "voc", "--input-size", "64"]
    command = ["test_convnext", str(tmp_path / "a.png"), *parts, "--masks", str(tmp_path / "m"), "--format", "csv"]
    assert main([*command, "--checkpoint", str(tmp_path / "weights.pth")]) == 0
    assert capsys.readouterr().err == ""
    trained = load_segmenter("test_convnext", LABEL_SETS["voc"].names, head=HEAD, checkpoint=tmp_path / "weights.pth")
    images = of_run(trained).prepare(Image.open(tmp_path / "a.png"))[None]
    assert of_run(trained).inference == Inference(short_side=512, least=32)  # but for --input-size
    want = infer(model, images, Inference(short_side=64, least=32))[0].argmax(0)
    assert np.array_equal(np.array(Image.open(tmp_path / "m" / "a.png")), want.numpy())
    assert main(command) == 0  # without weights
    assert "the weights are random" in capsys.readouterr().err


def test_options_that_contradict_each_other_are_refused(write_run: Callable[..., Path]) -> None:
    run = str(write_run(evaluate={"mode": "slide", "window": [48, 48]}))
    predictor = of_run(load_run(run))
    for options, message in (
        (["--stride", "80"], "from 1 to the window's sides"),
        (["--mode", "whole", "--window", "32"], "are of mode slide"),
        (["--window", "1,2,3"], "--window takes one or two numbers"),
        (["--window", "0"], "two positive sides"),
        (["--scales", "0,1"], "scales must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            seen_as_told(predictor, parser().parse_args([run, "a.png", *options]))
    options = ["--window", "40", "--stride", "20,30"]
    told = seen_as_told(predictor, parser().parse_args([run, "a.png", *options])).inference
    assert told == Inference("slide", (40, 40), (20, 30), short_side=48, least=32)


@pytest.mark.parametrize("evaluate", [{"mode": "slide", "stride": [42, 42]}, {}])
def test_the_input_size_is_the_pictures_and_windows_stay_the_runs(
    evaluate: dict[str, Any], write_run: Callable[..., Path]
) -> None:
    trained = load_run(write_run(evaluate=evaluate, size=64))
    for size in (24, 200):
        told = ["--mode", "slide", "--stride", "42"]
        inference = seen_as_told(of_run(trained, size), parser().parse_args(["run", "a.png", *told])).inference
        assert inference == Inference("slide", (64, 64), (42, 42), short_side=size, least=min(size, 32))


def test_a_model_of_one_size_slides_windows_of_the_size_it_is_built_for() -> None:
    facts: dict[str, Any] = {
        "model": "swin_tiny_patch4_window7_224",
        "model_kwargs": {},
        "head": HEAD,
        "classes": CITIES,
    }
    facts |= {"size": 64, "mean": [0.5] * 3, "std": [0.25] * 3, "evaluate": {"mode": "slide", "stride": [42, 42]}}
    for size, window, stride in ((None, 64, [42, 42]), (64, 64, [42, 42]), (32, 32, None)):
        inference = of_run(Trained(torch.nn.Identity(), facts, None), size).inference
        assert inference == Inference("slide", (window, window), stride, short_side=size or 64, least=32, fixed=True)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--masks", "PHOTOS"], "--masks would write over"),
        (["--masks", "OTHER"], "--masks would write over"),
        (["--output", "PHOTOS/a.png"], "--output would write over"),
    ],
)
def test_no_picture_is_written_over(
    options: list[str], named: str, write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photos = write_run(), tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        _picture(60, 40).save(photos / name)
    (tmp_path / "other").symlink_to(photos)  # the same by another name
    places = {"PHOTOS": str(photos), "OTHER": str(tmp_path / "other")}
    before = _bytes(photos)
    command = [re.sub("|".join(places), lambda match: places[match[0]], word) for word in options]
    assert main([str(run), str(photos), *command]) == 2
    assert named in (err := capsys.readouterr().err) and "a.png, a picture to predict; give another" in err
    assert _bytes(photos) == before  # not even an overlay


def test_masks_among_the_pictures_are_not_predicted(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photos = write_run(), tmp_path / "photos"
    (photos / "m").mkdir(parents=True)
    _picture(60, 40).save(photos / "a.png")
    _picture(60, 40).save(photos / "m" / "c.jpg")  # no mask: those are PNG files
    before: dict[str, bytes] = {}
    for pictures in (photos, photos, photos / "**" / "*.*g"):
        assert main([str(run), str(pictures), "--masks", str(photos / "m"), "--format", "csv"]) == 0
        rows = capsys.readouterr().out.splitlines()[1:]
        assert [Path(row.split(",")[0]).name for row in rows] == ["a.png", "c.jpg"]
        assert _bytes(photos) == (before or _bytes(photos))
        before = _bytes(photos)
    assert {"m/a.png", "m/m/c.png"} < before.keys()
    # A picture of the folder itself is one as ever, and its mask has no place.
    assert main([str(run), str(photos / "m" / "a.png"), "--masks", str(photos / "m")]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["RUN", "--scales", "half"], "needs numbers separated by commas, got 'half'"),
        (["RUN", "--sheet", "all.png"], "--sheet is for classifiers; a segmenter writes an overlay"),
        (["RUN", "--cam", "all.png"], "--cam is for classifiers; a segmenter writes an overlay"),
        (["RUN", "--classes", "voc"], "brings its model, weights and classes"),
        (["test_convnext", "--flip"], "--flip is for segmenters"),
        (["test_convnext", "--classes", "voc"], "belong to --head"),
        (["test_convnext", "--head", "segformer"], "a head needs its classes: ade20k, cityscapes, voc"),
        (["test_convnext", "--head", "segformr", "--classes", "3"], "did you mean segformer?"),
        (["test_convnxt", "--head", "segformer", "--classes", "3"], "did you mean test_convnext"),
        (["test_convnext", "--head", "segformer", "--classes", "3", "--pretrained"], "come from --checkpoint FILE"),
        (["test_convnext", "--head", "segformer", "--classes", "3", "--checkpoint", "BACKBONE"], "of a backbone alone"),
        (["test_convnext", "--head", "smp:FPN", "--classes", "3", "--checkpoint", "BACKBONE"], "of a backbone alone"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    options: list[str], message: str, write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    if "smp:FPN" in options:
        pytest.importorskip("segmentation_models_pytorch")
    run = write_run() if "RUN" in options else tmp_path
    _picture(60, 40).save(tmp_path / "a.png")
    if "BACKBONE" in options:
        torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "backbone.pth")
    words = [{"RUN": str(run), "BACKBONE": str(tmp_path / "backbone.pth")}.get(word, word) for word in options]
    try:
        code: Any = main([words[0], str(tmp_path / "a.png"), *words[1:]])
    except SystemExit as stop:  # of argparse
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
