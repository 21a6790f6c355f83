"""Exported files do what the model does, say what they are, and are not written when they are wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mixerzoo.vision._loading import path_of, weights_overlay
from mixerzoo.vision.export import ExportError, Report, _data_config, export_model, load_model, main
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn


def _errors(report: Report) -> list[float]:
    return [row.error for row in report.comparisons]


def _logits(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_features_at_untraced_shapes(format: Any, tmp_path: Path) -> None:
    model = timm.create_model("test_convnext2")
    report = export_model(model, tmp_path / f"model.{format}", format=format, features=(1, 3), image_size=(96, 128))
    assert [path.name for path in tmp_path.iterdir()] == [f"model.{format}"]
    assert max(_errors(report)) < 1e-5
    shapes = [row.shape for row in report.comparisons if row.output == "features_3"]
    assert [row.traced for row in report.comparisons] == [True] * 2 + [False] * 6
    assert shapes[0] == (2, 3, 96, 128) and len(set(shapes)) == 4
    for axis in (0, 2, 3):
        assert len({shape[axis] for shape in shapes}) > 2, f"axis {axis} was checked at too few sizes"
    assert set(report.axes) == {"batch", "height", "width"}
    _, *lines = str(report).splitlines()
    assert len(lines) == 4 and lines[0].startswith("2 x 3 x 96 x 128 (traced)")


@pytest.mark.slow
def test_onnx_file_describes_itself(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = timm.create_model("test_convnext2")
    export_model(model, tmp_path / "model.onnx", format="onnx", features=(0, 2), image_size=(64, 64))
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto)
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert metadata["model"] == "test_convnext2"
    assert metadata["mean"] == list(model.pretrained_cfg["mean"])
    expected = [model.feature_info[index] for index in (0, 2)]
    assert [(out["name"], out["channels"], out["reduction"]) for out in metadata["outputs"]] == [
        ("features_0", expected[0]["num_chs"], expected[0]["reduction"]),
        ("features_2", expected[1]["num_chs"], expected[1]["reduction"]),
    ]
    (image,) = proto.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim]
    assert (image.name, dims) == ("image", ["batch", 3, "height", "width"])
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [20]


@pytest.mark.slow
def test_pt2_needs_torch_alone_and_describes_itself(tmp_path: Path) -> None:
    model = timm.create_model("test_convnext2").eval()
    export_model(model, tmp_path / "model.pt2", format="pt2", image_size=(64, 64))
    extra = {"mixerzoo.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    image = torch.randn(1, 3, 80, 72)
    torch.testing.assert_close(program(image), _logits(model, image))
    metadata = json.loads(extra["mixerzoo.json"])
    assert metadata["outputs"] == [{"name": "logits"}] and set(metadata["axes"]) == {"batch", "height", "width"}


def test_safetensors_folder_opens_in_timm(tmp_path: Path) -> None:
    model = timm.create_model("test_convnext2", num_classes=7, in_chans=1).eval()
    report = export_model(model, tmp_path / "folder", format="safetensors", features=(0, 3))
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert {row.output for row in report.comparisons} == {"logits", "features_0", "features_3"}
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    image = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)


@pytest.mark.slow
def test_fixed_size_model_keeps_its_size_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vit.pt2"
    small = ["--input-size", "96,64", "--model-kwargs", "depth=1", "embed_dim=48"]
    assert main(["vit_tiny_patch16_224", "--format", "pt2", "--output", str(file), *small]) == 0
    assert "height and width are fixed" in capsys.readouterr().out
    program = torch.export.load(file).module()
    assert program(torch.randn(4, 3, 96, 64)).shape == (4, 1000)


@pytest.mark.slow
def test_static_export_has_one_shape(tmp_path: Path) -> None:
    model = timm.create_model("test_convnext2")
    report = export_model(model, tmp_path / "m.pt2", format="pt2", image_size=(64, 64), dynamic=False)
    assert report.axes == {} and {row.shape for row in report.comparisons} == {(1, 3, 64, 64)}


class _OtherWhenExported(nn.Module):
    """Stands in for a model that the exporter gets wrong: a little off in the file, and only there."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.001 if torch.compiler.is_exporting() else x


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_wrong_file_is_not_written(format: Any, tmp_path: Path) -> None:
    model = timm.create_model("test_convnext2")
    file = tmp_path / f"model.{format}"
    file.write_bytes(b"an earlier export")
    model.head.fc = nn.Sequential(model.head.fc, _OtherWhenExported())
    with pytest.raises(ExportError, match="was not written"):
        export_model(model, file, format=format, image_size=(64, 64), tolerance=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == b"an earlier export"


@pytest.mark.slow
def test_sigterm_leaves_an_earlier_export_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(b"an earlier export")
    command = [sys.executable, "-m", "mixerzoo.vision.export", "test_convnext2", "--format", "pt2", "--output", file]
    process = subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob(".export-*")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143 and "Traceback" not in error, error
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"an earlier export"


@pytest.mark.parametrize("kind", ["lightning", "timm", "ema", "safetensors"])
def test_checkpoints_of_all_kinds(kind: str, tmp_path: Path) -> None:
    model = timm.create_model("test_convnext2", num_classes=5, in_chans=1).eval()
    state = model.state_dict()
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.ckpt")
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, file)
    elif kind == "lightning":
        kept = {f"model.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(5)}
        torch.save({"state_dict": kept, "pytorch-lightning_version": "2.6.6"}, file)
    else:
        torch.save({"state_dict": state} if kind == "timm" else {"state_dict": {}, "state_dict_ema": state}, file)
    loaded = load_model("test_convnext2", checkpoint=file)
    image = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)


def test_checkpoint_of_our_trainer_knows_its_model_and_its_images(tmp_path: Path) -> None:
    arguments = {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 2], "stem_stride": 2}
    model = timm.create_model("nat_mini", **arguments, num_classes=3, in_chans=1).eval()
    facts = {"model": "nat_mini", "model_kwargs": arguments, "head": None, "classes": ["a", "b", "c"], "in_chans": 1}
    facts |= {"size": 32, "mean": [0.3], "std": [0.4]}
    file = tmp_path / "best.ckpt"
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}, "mixerzoo": facts}, file)
    loaded = load_model("nat_mini", checkpoint=file)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(_logits(loaded, image), _logits(model, image), rtol=0, atol=0)
    export_model(loaded, tmp_path / "folder", format="safetensors")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32] and config["pretrained_cfg"]["mean"] == [0.3]
    assert config["label_names"] == ["a", "b", "c"] and config["num_classes"] == 3
    with pytest.raises(ValueError, match="holds a nat_mini, not a nat_tiny"):
        load_model("nat_tiny", checkpoint=file)
    torch.save({"state_dict": {"model.x": torch.ones(1)}, "mixerzoo": {**facts, "head": {"channels": 8}}}, file)
    with pytest.raises(ValueError, match="segmenter"):
        load_model("nat_mini", checkpoint=file)


def _run_folder(folder: Path, **facts: Any) -> nn.Module:
    """A run of train.py as it is on the disk: the weights that were validated in `best.ckpt`, others beside them."""
    arguments = {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 2], "stem_stride": 2}
    model = timm.create_model("nat_mini", **arguments, num_classes=2, in_chans=1).eval()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    raw = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    known = {"model": "nat_mini", "model_kwargs": arguments, "head": None, "classes": ["cat", "dog"], "in_chans": 1}
    known |= {"size": 32, "crop": None, "interpolation": "bilinear", "mean": [0.3], "std": [0.4]}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(
        {"state_dict": state, "raw_weights": raw, "mixerzoo": known | facts}, folder / "checkpoints" / "best.ckpt"
    )
    return model


def test_run_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its weights are the averaged ones, which stand in `state_dict`; its name is that of the timm model."""
    monkeypatch.chdir(tmp_path)
    model = _run_folder(tmp_path / "runs/first")
    assert main(["runs/first", "--format", "safetensors"]) == 0
    assert "random" not in capsys.readouterr().out
    again = timm.create_model("local-dir:nat_mini", pretrained=True).eval()
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(_logits(again, image), _logits(model, image), rtol=0, atol=0)
    cfg = again.pretrained_cfg
    assert ([*cfg["mean"]], [*cfg["std"]], cfg["input_size"]) == ([0.3], [0.4], (1, 32, 32))
    assert (cfg["crop_pct"], cfg["interpolation"]) == (1.0, "bilinear")
    # The folder that was written does not hide the name.
    assert main(["nat_mini", "--format", "safetensors", "--checkpoint", "runs/first", "--output", "again"]) == 0
    first, second = (Path(name, "model.safetensors").read_bytes() for name in ("nat_mini", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("facts", "arguments", "message"),
    [
        ({}, ["--num-classes", "3"], "brings its model, weights and classes"),
        ({"head": {"channels": 8}}, [], "cannot build the segmenter"),
    ],
)
def test_run_folder_that_cannot_be_exported(
    facts: dict[str, Any], arguments: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    _run_folder(tmp_path / "run", **facts)
    assert main([str(tmp_path / "run"), "--format", "pt2", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_name_of_a_folder_too_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`export` and `predict` take one rule: a separator makes a path, and options of a timm name a timm name."""
    from mixerzoo.vision.predict import main as predict
    from mixerzoo.vision.predict import parser

    monkeypatch.chdir(tmp_path)
    _run_folder(tmp_path / "nat_mini")
    for command, words in ((main, ["--format", "pt2"]), (predict, ["x.png"])):
        assert command(["nat_mini", *words]) == 2
        error = capsys.readouterr().err
        assert "nat_mini is a timm model and also a folder here; write ./nat_mini" in error and error.count("\n") == 1
    for words, want in (
        (["./nat_mini"], Path("nat_mini")),
        ([str(tmp_path / "nat_mini")], tmp_path / "nat_mini"),
        (["nat_mini", "--pretrained"], None),
        (["nat_tiny"], None),
    ):
        assert path_of(parser().parse_args([*words[:1], "x.png", *words[1:]])) == want


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match=r"replaces the whole folder .*, which holds notes\.md; name another output"):
        export_model(timm.create_model("test_convnext2"), tmp_path, format="safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.md"]


@pytest.mark.slow
def test_onnx_of_a_run_names_classes_and_preparation(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    _run_folder(tmp_path / "run", size=96, crop=0.8, interpolation="bicubic", framed=False)
    file = tmp_path / "model.onnx"
    assert main([str(tmp_path / "run"), "--format", "onnx", "--static", "--output", str(file)]) == 0
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    assert metadata["label_names"] == ["cat", "dog"] and metadata["input_size"] == [1, 96, 96]
    assert (metadata["mean"], metadata["std"], metadata["crop_pct"]) == ([0.3], [0.4], 0.8)
    assert metadata["interpolation"] == "bicubic" and metadata["axes"] == {} and metadata["crop_mode"] == "center"


def test_what_is_exported_says_that_pictures_are_framed(tmp_path: Path) -> None:
    """Grey pictures of 28 x 28 are judged inside a black frame, which no transform of timm makes."""
    pytest.importorskip("safetensors")
    _run_folder(tmp_path / "run", framed=True)
    model = load_model("nat_mini", checkpoint=tmp_path / "run" / "checkpoints" / "best.ckpt")
    stated = _data_config(model, None)
    assert stated["crop_mode"] == "frame" and "crop_pct" not in stated
    assert main([str(tmp_path / "run"), "--format", "safetensors", "--output", str(tmp_path / "folder")]) == 0
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["pretrained_cfg"]["crop_mode"] == "frame"


@pytest.mark.parametrize(("crop", "size"), [(None, 32), (None, 224), (0.8, 96), (1.0, 64)])
def test_checkpoint_knows_the_crop_of_its_evaluation(crop: float | None, size: int, tmp_path: Path) -> None:
    """timm's transform of the loaded model is that of the run's own evaluation."""
    classification = pytest.importorskip("mixerzoo.vision.data.classification")
    config = SimpleNamespace(size=size, crop=crop, interpolation="bilinear")
    facts = {"in_chans": 3, "size": size, "crop": crop, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    overlay = weights_overlay("nat_mini", {}, {**facts, "classes": ["a"]}, 1, {})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8))
    keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    timms: Any = create_transform(**{key: overlay[key] for key in keys})
    ours = classification.PictureTransforms(config, None)(None).of_picture(picture)
    torch.testing.assert_close(timms(picture), ours, rtol=0, atol=0)


@pytest.mark.parametrize("tracing_ends", [True, False])
def test_model_whose_tracing_does_not_end_keeps_its_size(
    tracing_ends: bool, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("test_convnext2").eval()
    if not tracing_ends:
        model.exports_free_sizes = False
    free: list[list[int]] = []

    def trace(module: nn.Module, image: Tensor, axes: list[int]) -> None:
        free.append(axes)
        raise ExportError("stopped by the test")

    monkeypatch.setattr("mixerzoo.vision.export.load_model", lambda *_, **__: model)
    monkeypatch.setattr("mixerzoo.vision.export.trace", trace)
    assert main(["test_convnext2", "--format", "onnx", "--output", str(tmp_path / "m.onnx")]) == 1
    said = capsys.readouterr().out
    assert ("can only be traced for one size: height and width are fixed; --static" in said) != tracing_ends
    assert free == [[0, 2, 3] if tracing_ends else [0]]


def test_published_layout_is_renamed_by_the_models_filter(tmp_path: Path) -> None:
    """ConvNeXt's authors call the stages' downsampling `downsample_layers`; timm's filter knows that layout."""
    model = timm.create_model("test_convnext2").eval()
    published = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (("stem.", "downsample_layers.0."), ("head.norm.", "norm."), ("head.fc.", "head.")):
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        parts = key.split(".")
        if parts[0] == "stages" and parts[2] == "downsample":
            key = ".".join(["downsample_layers", parts[1], *parts[3:]])
        elif parts[0] == "stages":
            names = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
            key = ".".join([*parts[:2], *parts[3:]])
            for ours, theirs in names.items():
                key = key.replace(f".{ours}.", f".{theirs}.")
        published[key] = value
    assert not set(published) & {"stem.0.weight", "head.fc.weight"}
    torch.save({"model": published}, tmp_path / "published.pth")
    image = torch.randn(1, 3, 64, 64)
    loaded = load_model("test_convnext2", checkpoint=tmp_path / "published.pth")
    torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-executed"),))


def test_bad_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Payload()}, "code.ckpt")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        load_model("test_convnext2", checkpoint="code.ckpt")
    assert not Path("was-executed").exists()
    state = timm.create_model("test_convnext2", num_classes=5).state_dict()
    torch.save({key: value for key, value in state.items() if "stages.2" not in key}, "part.ckpt")
    with pytest.raises(ValueError, match=r"Missing key.*stages\.2"):
        load_model("test_convnext2", checkpoint="part.ckpt")
    torch.save(state, "whole.ckpt")
    with pytest.raises(ValueError, match="has 5 classes, not 6"):
        load_model("test_convnext2", checkpoint="whole.ckpt", num_classes=6)
    Path("cut.ckpt").write_bytes(Path("whole.ckpt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        load_model("test_convnext2", checkpoint="cut.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_convnxt2", "--format", "pt2"], "did you mean test_convnext2"),
        (["test_convnext2", "--format", "tflite"], "invalid choice"),
        (["test_convnext2"], "--format"),
        (["test_convnext2", "--format", "pt2", "--features", "3,9"], "indices from 0 to 3"),
        (["test_convnext2", "--format", "pt2", "--features", "a"], "whole numbers"),
        (["test_convnext2", "--format", "pt2", "--output", "model.onnx"], "ends in .pt2"),
        (["test_convnext2", "--format", "pt2", "--checkpoint", "none.ckpt"], "there is no checkpoint"),
        (["test_convnext2", "--format", "pt2", "--model-kwargs", "depth=3"], "unexpected keyword argument 'depth'"),
        (["test_convnext2", "--format", "pt2", "--model-kwargs", "depth"], "takes key=value"),
        (["test_convnext2", "--format", "pt2", "--input-size", "1,2,3"], "one or two"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


class _PatchesOfTheMap(nn.Module):
    """A layer whose exported program refuses maps of one patch: a bound on a product of sizes, which no axis shows."""

    def forward(self, x: Tensor) -> Tensor:
        torch._check(((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2) >= 6)
        return x


@pytest.mark.slow
def test_smallest_size_is_one_that_the_file_takes(tmp_path: Path) -> None:
    model = timm.create_model("test_convnext2").eval()
    model.stages = nn.Sequential(*model.stages, _PatchesOfTheMap())  # at 1/32 of the image
    report = export_model(model, tmp_path / "model.pt2", format="pt2", image_size=(192, 224))
    (height, _), (width, _) = report.axes["height"], report.axes["width"]
    program = torch.export.load(tmp_path / "model.pt2").module()
    program(torch.zeros(1, 3, height, width))
    assert 64 < height < 192 and 64 < width < 224
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.zeros(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("nat_mini", "onnx"),
        pytest.param("dinat_mini", "pt2", marks=pytest.mark.exhaustive),
        ("nat_mini", "safetensors"),
    ],
)
def test_our_models_export_with_free_sizes(name: str, format: Any, tmp_path: Path) -> None:
    dilations = {"dilations": ((2,), (1,))} if name == "dinat_mini" else {}
    model = load_model(name, depths=(1, 1), embed_dim=16, num_heads=(1, 2), num_classes=10, **dilations)
    path = tmp_path / ("folder" if format == "safetensors" else f"model.{format}")
    report = export_model(model, path, format=format, features=(0, 1), image_size=(96, 64))
    assert max(_errors(report)) < 1e-4 and set(report.axes) == {"batch", "height", "width"}
