"""Exported segmenters answer as the model does, at the size of any picture; and are not written where they do not."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.vision._checked_files import Check, Report, _publish, publish_if_right
from mixerzoo.vision.export import ExportError, export_segmenter, main, segments_any_size
from mixerzoo.vision.segmentation import Segmenter, build_segmenter
from mixerzoo.vision.segmentation.segformer import SegFormerHead
from torch import Tensor, nn


class _TwoMaps(nn.Module):
    """The smallest backbone that is one: maps at a half and a quarter of the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        fine = self.first(images).relu()
        return [fine, self.second(fine).relu()]


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Segmenter(_TwoMaps(), SegFormerHead([4, 8], 5, channels=8)).eval()


def _check(report: Report) -> None:
    assert max(row.error for row in report.comparisons) < 1e-5
    assert set(report.axes) == {"batch", "height", "width"}
    shapes = {row.shape for row in report.comparisons}
    assert len(shapes) == 4 and all(len({shape[axis] for shape in shapes}) > 2 for axis in (0, 2, 3))


@pytest.mark.slow
def test_labels_of_pictures_of_any_size(tiny: nn.Module, tmp_path: Path) -> None:
    """The ONNX file's labels are the model's; it says what they mean."""
    onnxruntime = pytest.importorskip("onnxruntime")
    known = {"label_names": list("abcde"), "mean": [0.5] * 3, "short_side": 512}
    report = export_segmenter(
        tiny, tmp_path / "m.onnx", format="onnx", image_size=(40, 56), labels=True, metadata=known
    )
    _check(report)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    [out] = session.get_outputs()
    assert (out.name, out.type, out.shape) == ("labels", "tensor(int64)", ["batch", "height", "width"])
    image = torch.randn(1, 3, 77, 93)
    [labels] = session.run(None, {"image": image.numpy()})
    assert (torch.from_numpy(labels) == tiny(image).argmax(1)).float().mean() > 0.999
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said | known == said and said["outputs"] == [{"name": "labels"}]


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("name", "head", "kwargs"),
    [
        ("test_convnext", {"name": "upernet", "channels": 16}, {}),
        ("test_convnext", {"name": "segformer", "channels": 16}, {}),
        (
            "nat_mini",
            {"name": "semantic_fpn", "channels": 16},
            {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "kernel_size": 3},
        ),
    ],
)
def test_every_head_keeps_sizes_free(
    name: str, head: dict[str, Any], kwargs: dict[str, Any], format: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build_segmenter(name, 5, head=head, **kwargs)
    _check(export_segmenter(model, tmp_path / f"m.{format}", format=format, image_size=(160, 128)))


@pytest.mark.exhaustive
def test_bevanet_keeps_sizes_free_within_bounds(tmp_path: Path) -> None:
    """Its poolings of the map of 1/64 have as many positions as in the traced picture, or not."""
    torch.manual_seed(0)
    model = build_segmenter("bevanet_s", 5, head={"name": "bevanet"}, embed_dim=8, depths=(1, 1, 1, 1, 1))
    report = export_segmenter(model, tmp_path / "m.pt2", format="pt2", image_size=(160, 192))
    assert max(row.error for row in report.comparisons) < 1e-5 and "batch" in report.axes


def test_transformers_of_timm_are_exported_for_one_size() -> None:
    """They count patches in a way that no file can hold; those of the zoo do not."""
    kwargs: dict[str, Any] = {"embed_dim": 24, "depth": 4, "num_heads": 2}
    head = {"name": "segformer", "channels": 8}
    with torch.device("meta"):
        theirs = build_segmenter("vit_tiny_patch16_224", 2, head=head, **kwargs)
        ours = build_segmenter("evit_deit_small_patch16_224", 2, head=head, **kwargs)
    assert not segments_any_size(theirs) and segments_any_size(ours)


def _as_file(module: nn.Module, answer: Any) -> Check:
    return Check(module, lambda images: [[answer(image)] for image in images], ["labels"])


@pytest.mark.parametrize(
    "answer",
    [
        lambda logits: logits.argmax(1).roll(1, -1),  # somewhere a label of a neighbour
        lambda logits: logits.argmax(1) + 5,  # no class at all
        lambda logits: logits.argmax(1)[:, :-1],  # a row is missing
        lambda logits: logits * 1.01,
    ],
)
def test_wrong_labels_are_not_written(answer: Any, tiny: nn.Module, tmp_path: Path) -> None:
    def write(draft: Path) -> Any:
        draft.touch()
        return {"height": (1, None)}, [_as_file(tiny, lambda image: answer(tiny(image)))]

    with pytest.raises(ExportError, match="was not written: labels differs"):
        publish_if_right(tmp_path / "m.onnx", tiny, (1, 3, 16, 24), 1e-4, write)
    assert not list(tmp_path.iterdir())


def test_right_labels_are_written(tiny: nn.Module, tmp_path: Path) -> None:
    def write(draft: Path) -> Any:
        draft.touch()
        return {}, [_as_file(tiny, lambda image: tiny(image).argmax(1))]

    report = publish_if_right(tmp_path / "m.onnx", tiny, (1, 3, 16, 24), 1e-4, write)
    assert {row.error for row in report.comparisons} == {0.0} and (tmp_path / "m.onnx").exists()


def test_run_folders_and_parts_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a segmenter's file will say, and the program that is traced, up to the tracing itself."""
    head = {"name": "segformer", "channels": 8}
    model = build_segmenter("test_convnext", 2, head=head)
    facts = {"model": "test_convnext", "model_kwargs": {}, "head": head, "classes": ["a", "b"], "in_chans": 3}
    facts |= {"size": 48, "mean": [0.5] * 3, "std": [0.25] * 3, "short_side": 40, "evaluate": {"mode": "whole"}}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, "mixerzoo": facts}, tmp_path / "run" / "checkpoints" / "best.ckpt")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, draft: Path, format: str, metadata: dict[str, Any], traced: Any, free: Any) -> None:
        seen.append((traced, metadata))
        raise ExportError("stopped by the test")

    monkeypatch.setattr("mixerzoo.vision.export._write_graph", stop)
    monkeypatch.chdir(tmp_path)
    parts = ["--head", "segformer", "--head-kwargs", "channels=8", "--classes", "2", "--checkpoint", "weights.pth"]
    assert main(["run", "--format", "onnx"]) == 1
    assert main(["test_convnext", "--format", "pt2", *parts, "--labels", "--input-size", "64,96"]) == 1
    (run, of_run), (named, of_name) = seen
    assert run == (2, 3, 48, 48) and named == (2, 3, 64, 96)
    assert of_run["label_names"] == ["a", "b"] and of_run["evaluate"] == {"mode": "whole"}
    assert of_run["outputs"] == [{"name": "logits"}] and of_name["outputs"] == [{"name": "labels"}]
    assert of_name["head"] == head and of_name["label_names"] == ["0", "1"]
    wrong = {
        ("run", "--format", "safetensors"): "a segmenter goes to onnx, openvino or pt2",
        ("run", "--format", "onnx", "--features", "0"): "--features are of classifiers",
        ("run", "--format", "onnx", "--head", "upernet"): "brings its model, weights and classes; leave out --head",
        ("test_convnext", "--format", "onnx", "--labels"): "--labels is for segmenters",
        ("test_convnext", "--format", "onnx", *parts, "--num-classes", "3"): "give --classes",
    }
    capsys.readouterr()
    for command, message in wrong.items():
        assert main(command) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


class _Right(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_folder_takes_the_place_of_an_earlier_one_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "stale").touch()

    def write(draft: Path) -> Any:
        draft.mkdir()
        (draft / "config.json").write_text("new")
        return {}, [Check(_Right(), lambda images: [[image] for image in images], ["x"])]

    publish_if_right(tmp_path / "folder", _Right(), (1, 3, 8, 8), 1e-4, write)
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")} == {"folder", "folder/config.json"}


def test_a_folder_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("old")
    draft = tmp_path / ".export" / "folder"
    draft.mkdir(parents=True)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if source == draft:
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no space left"):
        _publish(draft, tmp_path / "folder")
    assert (tmp_path / "folder" / "config.json").read_text() == "old"
