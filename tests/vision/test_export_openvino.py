"""OpenVINO's two files answer as the model does, say what they are, and appear together or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mixerzoo.vision._checked_files import _publish
from mixerzoo.vision._openvino import import_openvino, run_openvino, write_openvino
from mixerzoo.vision.export import ExportError, export_model, export_segmenter, load_model, main
from mixerzoo.vision.segmentation import Segmenter
from mixerzoo.vision.segmentation.segformer import SegFormerHead
from torch import Tensor, nn
from torch.nn import functional as F

# importorskip would import it, and it would tell its authors.
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


class _TwoMaps(nn.Module):
    """The smallest backbone that is one; with `wrong`, a little off in the file, and only there."""

    def __init__(self, *, wrong: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.wrong = wrong

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        fine = self.first(images * 1.01 if self.wrong and torch.compiler.is_exporting() else images).relu()
        return [fine, self.second(fine).relu()]


def _segmenter(**options: Any) -> nn.Module:
    return Segmenter(_TwoMaps(**options), SegFormerHead([4, 8], 5, channels=8)).eval()


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _open(file: Path) -> Any:
    """A model as a user opens it, but without what openvino tells its authors of the import."""
    return import_openvino().Core().read_model(file)


def _said(model: Any) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in model.get_rt_info(["mixerzoo"]).value.items()}


def _numbers(model: Any) -> set[str]:
    """The types of the weights."""
    types = [op.get_element_type().to_string() for op in model.get_ops() if op.get_type_name() == "Constant"]
    return {name for name in types if name.startswith(("f", "bf"))}


@needs_openvino
def test_logits_of_pictures_of_any_size(tmp_path: Path) -> None:
    model = _segmenter()
    known = {"label_names": ["a", "b", "<c>", "“d”", "é"], "mean": [0.5] * 3, "short_side": 512, "head": None}
    (tmp_path / "m.xml").write_text("an earlier export")
    (tmp_path / "m.bin").write_text("its weights")
    report = export_segmenter(model, tmp_path / "m.xml", format="openvino", image_size=(40, 56), metadata=known)
    assert set(_files(tmp_path)) == {"m.xml", "m.bin"}
    assert max(row.error for row in report.comparisons) < 1e-5 and set(report.axes) == {"batch", "height", "width"}
    shapes = {row.shape for row in report.comparisons}
    assert len(shapes) == 4 and all(len({shape[axis] for shape in shapes}) > 2 for axis in (0, 2, 3))
    assert "openvino_telemetry" not in sys.modules
    written = _open(tmp_path / "m.xml")
    assert [port.names for port in (*written.inputs, *written.outputs)] == [{"image"}, {"logits"}]
    assert [dim.is_dynamic for dim in written.inputs[0].partial_shape] == [True, False, True, True]
    assert _numbers(written) == {"f32"}
    said = _said(written)
    assert said | known == said and said["outputs"] == [{"name": "logits"}]
    assert said["axes"] == {axis: list(bounds) for axis, bounds in report.axes.items()}
    image = torch.randn(1, 3, 77, 93)
    [[logits]] = run_openvino(tmp_path / "m.xml", [image])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(image), rtol=1e-5, atol=1e-5)


@needs_openvino
def test_labels_are_integers_of_the_pictures_size(tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size": (24, 32), "labels": True, "dynamic": False}
    report = export_segmenter(_segmenter(), tmp_path / "m.xml", format="openvino", **options)
    [out] = _open(tmp_path / "m.xml").outputs
    assert (out.names, out.get_element_type().to_string(), list(out.shape)) == ({"labels"}, "i64", [1, 24, 32])
    assert report.axes == {}


@needs_openvino
def test_features_of_a_run_name_their_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    kwargs = ["--model-kwargs", *(f"{key}={value}" for key, value in small.items())]
    file = tmp_path / "m.xml"
    words = ["vitrpb_small", "--format", "openvino", "--features", "0,1", "--static", "--input-size", "64,96"]
    assert main([*words, "--output", str(file), *kwargs]) == 0
    assert f"wrote {file}; free: nothing" in capsys.readouterr().out
    said = _said(_open(file))
    cfg = timm.get_pretrained_cfg("vitrpb_small")
    assert cfg is not None and said["mean"] == list(cfg.mean) and said["input_size"] == [3, 64, 96]
    assert said["model"] == "vitrpb_small" and {"std", "interpolation", "crop_pct", "crop_mode"} <= set(said)
    assert [out["name"] for out in said["outputs"]] == ["features_0", "features_1"]


class _Resized(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.map = nn.Parameter(torch.randn(1, 2, 14, 14))

    def forward(self, image: Tensor) -> Tensor:
        size = (image.shape[2] // 4, image.shape[3] // 4)
        return F.interpolate(self.map, size=size, mode=self.mode, antialias=True) + image.mean((1, 2, 3), keepdim=True)


@needs_openvino
@pytest.mark.parametrize("sizes", ["free", "fixed"])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@torch.no_grad()
def test_antialiasing_is_that_of_torch(mode: str, sizes: str, tmp_path: Path) -> None:
    free = {axis: torch.export.Dim.DYNAMIC for axis in ((0, 2, 3) if sizes == "free" else (0,))}
    module = _Resized(mode).eval()
    program = torch.export.export(module, (torch.randn(2, 3, 32, 48),), dynamic_shapes=(free,))
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert onnx is not None
    onnx.save(tmp_path / "m.onnx")
    write_openvino(tmp_path / "m.onnx", tmp_path / "m.xml", {})
    untraced = [(1, 3, 24, 80), (3, 3, 100, 20)] if sizes == "free" else [(1, 3, 32, 48)]
    images = [torch.randn(shape) for shape in ((2, 3, 32, 48), *untraced)]
    for image, [got] in zip(images, run_openvino(tmp_path / "m.xml", images), strict=True):
        torch.testing.assert_close(got, module(image), rtol=1e-5, atol=1e-5)


@needs_openvino
def test_wrong_files_leave_the_earlier_ones(tmp_path: Path) -> None:
    earlier = {"m.xml": b"an earlier export", "m.bin": b"its weights"}
    for name, content in earlier.items():
        (tmp_path / name).write_bytes(content)
    options: dict[str, Any] = {"image_size": (24, 32), "dynamic": False}
    with pytest.raises(ExportError, match=r"m\.xml was not written: logits differs by"):
        export_segmenter(_segmenter(wrong=True), tmp_path / "m.xml", format="openvino", **options)
    assert _files(tmp_path) == earlier


@pytest.mark.parametrize("failing", ["aside/m.xml", "aside/m.bin", "m.bin", "m.xml"])
@pytest.mark.parametrize("error", [OSError("no space left"), SystemExit(143)])
def test_two_files_are_replaced_together(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, path = tmp_path / ".export" / "m.xml", tmp_path / "m.xml"
    draft.parent.mkdir()
    for file, words in ((path, "old"), (draft, "new")):
        file.write_text(words)
        file.with_suffix(".bin").write_text(words)
    rename, seen = os.rename, []

    def fail_once(source: Path, target: Path) -> None:
        mixed = {file.read_text() for file in (path, path.with_suffix(".bin")) if file.exists()}
        assert len(mixed) < 2 and (path.with_suffix(".bin").exists() or not path.exists() or len(seen) < 1)
        aside = "aside/" if target.parent.name.startswith(".export-earlier-") else ""
        seen.append(f"{aside}{target.name}")
        if seen.count(failing) == 1 and seen[-1] == failing:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(type(error)):
        _publish(draft, path)
    assert {name: (tmp_path / name).read_text() for name in ("m.xml", "m.bin")} == {"m.xml": "old", "m.bin": "old"}
    _publish(draft, path)
    assert {name: (tmp_path / name).read_text() for name in ("m.xml", "m.bin")} == {"m.xml": "new", "m.bin": "new"}
    assert not list(tmp_path.glob(".export-*"))


def test_an_earlier_export_that_cannot_be_moved_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, path = tmp_path / ".export" / "m.xml", tmp_path / "m.xml"
    draft.parent.mkdir()
    for file, words in ((path, "old"), (draft, "new")):
        file.write_text(words)
        file.with_suffix(".bin").write_text(words)
    rename = os.rename

    def only_aside(source: Path, target: Path) -> None:
        if target.parent == tmp_path:
            raise OSError("read-only file system")
        rename(source, target)

    monkeypatch.setattr(os, "rename", only_aside)
    with pytest.raises(
        ExportError, match=r"could not be moved back \(read-only file system\); it is in (.*)$"
    ) as error:
        _publish(draft, path)
    kept = Path(str(error.value).rsplit(" in ", 1)[1])
    assert {file.name: file.read_text() for file in kept.iterdir()} == {"m.xml": "old", "m.bin": "old"}


@needs_openvino
def test_a_bin_file_of_something_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.bin").write_text("something else")
    assert main(["test_convnext2", "--format", "openvino", "--output", str(tmp_path / "m.xml")]) == 2
    error = capsys.readouterr().err
    assert (
        "m.bin, which lies there without m.xml; delete it, or name another output" in error and error.count("\n") == 1
    )
    assert main(["test_convnext2", "--format", "openvino", "--output", str(tmp_path / "m.onnx")]) == 2
    assert "openvino writes a file whose name ends in .xml, got" in capsys.readouterr().err
    assert _files(tmp_path) == {"m.bin": b"something else"}


def test_without_openvino_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    assert main(["test_convnext2", "--format", "openvino", "--output", str(tmp_path / "m.xml")]) == 2
    said = "export: openvino needs openvino; run: pip install 'mixerzoo[openvino]'\n"
    assert capsys.readouterr().err == said and not list(tmp_path.iterdir())


def test_importing_it_sends_no_statistics(tmp_path: Path) -> None:
    """Stand-ins for both packages: openvino sends statistics where it finds the other."""
    (tmp_path / "openvino_telemetry.py").touch()
    (tmp_path / "openvino.py").write_text(
        "try:\n    import openvino_telemetry\n    sends = True\nexcept ImportError:\n    sends = False\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import importlib.util\n"
        "from mixerzoo.vision._openvino import import_openvino\n"
        "assert not import_openvino().sends\n"
        "assert importlib.util.find_spec('openvino_telemetry') is not None, 'it is hidden for this one import'\n"
        "del sys.modules['openvino']\n"
        "import openvino\n"
        "assert openvino.sends"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_openvino
def test_nat_exports_with_free_sizes(tmp_path: Path) -> None:
    model = load_model("nat_mini", depths=(1, 1), embed_dim=16, num_heads=(1, 2), num_classes=10)
    report = export_model(model, tmp_path / "m.xml", format="openvino", features=(0, 1), image_size=(96, 64))
    assert max(row.error for row in report.comparisons) < 1e-5 and set(report.axes) == {"batch", "height", "width"}
