"""Exports models, feature pyramids and segmenters to files that run without this library.

    python -m mixerzoo.vision.export runs/first --format onnx --features 0,1,2,3
    python -m mixerzoo.vision.export nat_mini --format pt2 --checkpoint best.ckpt
    python -m mixerzoo.vision.export van_b0 --head upernet --checkpoint FILE --classes ade20k --format onnx

An exported graph can silently be wrong at other shapes than the traced one, because a size computed in Python becomes a
constant. Each file is therefore loaded back and compared with the model at the traced shape and at three others: ONNX
by onnxruntime, OpenVINO's `.xml` and `.bin` by its CPU plugin in float32, `.pt2` by `torch.export.load` in a process
with neither this library nor timm, a safetensors folder by timm's `local-dir:`. A file with other outputs is not
published, and an earlier export stays in place.

Each file states how pictures are prepared (mean, standard deviation, size, interpolation, crop), what the classes are
called, and which sizes it takes: in the metadata of an ONNX file, in the rt_info of an OpenVINO model, in
`mixerzoo.json` inside a `.pt2` file, in the config.json of a folder. A run with averaged weights is exported with
those. Any timm model can be exported. The file of a segmenter returns logits, or labels, at the size of its input.

Unusual: the program is traced once, for all formats that hold a program, see _programs.py.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.data.model_config import resolve_input_data_config
from timm.models import get_model_input_config, save_for_hf
from torch import Tensor, nn

from ._checked_files import WEIGHTS, Check, Report, Written, outputs_of, publish_if_right
from ._loading import (
    FRAME,
    KeyValue,
    OneLineParser,
    Trained,
    add_head_options,
    find_weights,
    load_model,
    load_run,
    load_under_head,
    numbers,
    path_of,
)
from ._messages import one_line
from ._openvino import run_openvino, write_openvino
from ._programs import AXES, ExportError, Shape, free_axes, raise_bounds, run_onnx, run_pt2, trace, write_onnx

Format = Literal["onnx", "openvino", "pt2", "safetensors"]

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
"""Of the files that hold a program. The weights of an OpenVINO model lie beside it, see _checked_files.py."""
NEEDS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "pt2": (),
    "safetensors": ("safetensors",),
}
FOLDER_FILES = {"config.json", "model.safetensors"}
"""What an export to safetensors writes."""
TOLERANCE = 1e-4


class FeatureExtractor(nn.Module):
    """A timm model that returns the maps [B, C, H, W] at indices of its feature_info; unused layers are removed."""

    def __init__(self, model: nn.Module, features: Sequence[int]) -> None:
        super().__init__()
        network: Any = copy.deepcopy(model)
        count = len(network.feature_info)
        if not features or sorted(set(features)) != list(features) or features[0] < 0 or features[-1] >= count:
            raise ValueError(
                f"features must be rising indices from 0 to {count - 1} for this model, got {list(features)}"
            )
        self.indices = list(network.prune_intermediate_layers(list(features), prune_norm=True))
        self.model = network

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(image, indices=self.indices, intermediates_only=True)


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format,
    features: Sequence[int] | None = None,
    image_size: tuple[int, int] | None = None,
    dynamic: bool = True,
    tolerance: float = TOLERANCE,
) -> Report:
    """Write a timm model to `path`: a file, or for safetensors a folder that `timm.create_model("local-dir:…")` opens.

    An OpenVINO model is two files: `path` ends in .xml, and the weights are in the .bin file beside it.

    With `features` a program holds the feature maps in place of the classifier; a folder holds the whole model, and its
    maps are compared too. `image_size` is (height, width) while tracing, the model's own by default.
    `dynamic` keeps the batch free and, where the model allows it, height and width. Raises ExportError, and writes
    nothing, where file and model differ by more than `tolerance` of the largest output.
    """
    path = Path(path)
    _check_destination(path, format)
    model = copy.deepcopy(model).cpu().float().eval()
    data = _data_config(model, image_size)
    traced: Shape = (2 if dynamic else 1, *data["input_size"])

    def write(draft: Path) -> Written:
        if format == "safetensors":
            return _write_folder(model, draft, features, data, dynamic)
        module, names = (
            (model if features is None else FeatureExtractor(model, features)),
            _output_names(model, features),
        )
        free = [] if not dynamic else list(AXES) if _takes_any_size(model) else [0]
        return _write_graph(module, draft, format, {**_metadata(model, features, names), **data}, traced, free)

    return publish_if_right(path, model, traced, tolerance, write)


def export_segmenter(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format,
    image_size: tuple[int, int],
    channels: int = 3,
    labels: bool = False,
    dynamic: bool = True,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Report:
    """Write a `Segmenter`; the file gives logits [B, K, H, W] at the picture's size, with `labels` int64 [B, H, W].

    `metadata` is what the file says of itself: classes, mean, std and the like. The rest is as in `export_model`;
    labels count as right where the model's own logit of the label is the largest, up to `tolerance`.
    """
    path = Path(path)
    if format == "safetensors":
        raise ValueError(
            "folders of safetensors are timm's, for classifiers; a segmenter goes to onnx, openvino or pt2"
        )
    _check_destination(path, format)
    model = copy.deepcopy(model).cpu().float().eval()
    traced: Shape = (2 if dynamic else 1, channels, *image_size)
    names = ["labels" if labels else "logits"]
    known = {
        "input": "image",
        "outputs": [{"name": name} for name in names],
        "input_size": traced[1:],
        "mixerzoo": importlib.metadata.version("mixerzoo"),
        **(metadata or {}),
    }

    def write(draft: Path) -> Written:
        free = [] if not dynamic else list(AXES) if segments_any_size(model) else [0]
        axes, [check] = _write_graph(_Labels(model) if labels else model, draft, format, known, traced, free)
        return axes, [check._replace(module=model)]

    return publish_if_right(path, model, traced, tolerance, write)


def segments_any_size(model: nn.Module) -> bool:
    """Return whether the program of a segmenter may have free height and width."""
    return all(getattr(part, "exports_free_sizes", True) for part in model.modules())


class _Labels(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image).argmax(1)


def _write_folder(
    model: nn.Module, draft: Path, features: Sequence[int] | None, data: dict[str, Any], dynamic: bool
) -> Written:
    labels = {"label_names": data["label_names"]} if data.get("label_names") else {}
    size = {"input_size": data["input_size"]}
    save_for_hf(model, str(draft), model_config=labels, safe_serialization=True, data_config=size)
    fixed = get_model_input_config(model)["fixed_input_size"]
    free = () if not dynamic else ("batch",) if fixed else AXES.values()

    def run(images: list[Tensor], **arguments: Any) -> list[list[Tensor]]:
        loaded = timm.create_model(f"local-dir:{draft}", pretrained=True, **arguments).eval()
        return [outputs_of(loaded, image) for image in images]

    checks = [Check(model, run, _output_names(model, None))]
    if features is not None:
        extract = lambda images: run(images, features_only=True, out_indices=tuple(features))  # noqa: E731
        checks.append(Check(FeatureExtractor(model, features), extract, _output_names(model, features)))
    return dict.fromkeys(free, (1, None)), checks


def _write_graph(
    module: nn.Module, draft: Path, format: Format, metadata: dict[str, Any], traced: Shape, free: list[int]
) -> Written:
    names = [output["name"] for output in metadata["outputs"]]
    program = trace(module, torch.randn(traced), free)
    axes = raise_bounds(program, traced, free_axes(program))
    metadata = {**metadata, "axes": axes}
    if format == "onnx":
        write_onnx(program, draft, names, axes, metadata)
    elif format == "openvino":
        onnx = draft.with_suffix(".onnx")
        write_onnx(program, onnx, names, axes, {})
        write_openvino(onnx, draft, metadata)
    else:
        torch.export.save(program, draft, extra_files={"mixerzoo.json": json.dumps(metadata)})
    run = {"onnx": run_onnx, "openvino": run_openvino, "pt2": run_pt2}[format]
    return axes, [Check(module, lambda images: run(draft, images), names)]


def _takes_any_size(model: nn.Module | Trained) -> bool:
    """Return whether a program may have free height and width; `exports_free_sizes` is false if tracing never ends."""
    if isinstance(model, Trained):
        return segments_any_size(model.model)
    return not get_model_input_config(model)["fixed_input_size"] and getattr(model, "exports_free_sizes", True)


def _output_names(model: nn.Module, features: Sequence[int] | None) -> list[str]:
    if features is not None:
        return [f"features_{index}" for index in features]
    return ["logits" if getattr(model, "num_classes", 0) else "embedding"]


def _data_config(model: nn.Module, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the preparation of images for this model, and the names of its classes if they are known."""
    size = get_model_input_config(model)["input_size"] if image_size is None else image_size
    channels = get_model_input_config(model)["input_size"][0]
    config = resolve_input_data_config(model, {"input_size": (channels, *size[-2:])})
    labels = getattr(model, "pretrained_cfg", {}).get("label_names")
    keys = ["input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"]
    if config["crop_mode"] == FRAME:  # nothing is cropped
        keys.remove("crop_pct")
    config = {key: config[key] for key in keys}
    return {**config, "label_names": labels} if labels else config


def _metadata(model: nn.Module, features: Sequence[int] | None, names: list[str]) -> dict[str, Any]:
    network: Any = model
    described: list[dict[str, Any]] = [{"name": name} for name in names]
    if features is not None:
        infos = [network.feature_info[index] for index in features]
        for entry, info in zip(described, infos, strict=True):
            entry.update(channels=info["num_chs"], reduction=info["reduction"])
    return {
        "model": network.pretrained_cfg["architecture"],
        "input": "image",
        "outputs": described,
        "mixerzoo": importlib.metadata.version("mixerzoo"),
    }


def _check_destination(path: Path, format: Format) -> None:
    missing = [package for package in NEEDS[format] if importlib.util.find_spec(package) is None]
    if missing:
        extra = "openvino" if format == "openvino" else "export"
        raise ValueError(f"{format} needs {', '.join(missing)}; run: pip install 'mixerzoo[{extra}]'")
    if format == "safetensors" and path.is_file():
        raise ValueError(f"safetensors writes a folder, and {path} is a file; name another output")
    if format == "safetensors" and path.is_dir():
        others = sorted({file.name for file in path.iterdir()} - FOLDER_FILES)
        if others:
            raise ValueError(
                f"safetensors replaces the whole folder {path}, which holds {', '.join(others[:3])}"
                f"{', …' if len(others) > 3 else ''}; name another output"
            )
    if format in SUFFIXES and (path.suffix != SUFFIXES[format] or path.is_dir()):
        raise ValueError(f"{format} writes a file whose name ends in {SUFFIXES[format]}, got {path}")
    weights = path.with_suffix(WEIGHTS)
    if format == "openvino" and (weights.is_dir() or (weights.exists() and not path.exists())):
        raise ValueError(
            f"openvino also writes {weights}, which lies there without {path.name}; delete it, or name another output"
        )


def parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m mixerzoo.vision.export", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("model", help="a run folder of train.py, one of its checkpoints, or a timm name")
    parser.add_argument("--format", choices=get_args(Format), required=True)
    parser.add_argument(
        "--features", type=numbers, metavar="0,1,2,3", help="export these feature maps, not the classifier"
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", type=Path, help="of train.py (or its folder), of timm, or published; else: random weights"
    )
    weights.add_argument("--pretrained", action="store_true", help="the published weights, downloaded by timm")
    add_head_options(parser)
    parser.add_argument("--labels", action="store_true", help="of a segmenter: the most likely class, not the logits")
    parser.add_argument("--output", type=Path, help="default: MODEL.onnx, MODEL.xml, MODEL.pt2, or the folder MODEL")
    parser.add_argument("--input-size", type=numbers, metavar="H,W", help="while tracing; one number is a square")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--dynamic", action="store_true", default=True, help="free batch, height and width (default)")
    shape.add_argument("--static", action="store_false", dest="dynamic", help="batch 1 and the traced size only")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--model-kwargs", nargs="+", action=KeyValue, default={}, metavar="KEY=VALUE")
    return parser


def _load(arguments: argparse.Namespace, image_size: tuple[int, int] | None) -> tuple[str, nn.Module | Trained]:
    """Load the model that the command names; return its timm name and the model, a segmenter as `Trained`."""
    checkpoint = None if arguments.checkpoint is None else find_weights(arguments.checkpoint)
    path = path_of(arguments)
    if path is None:
        if arguments.head is not None:
            if arguments.num_classes is not None:
                raise ValueError("--num-classes is of classifiers; under --head give --classes")
            return arguments.model, load_under_head(arguments, None if image_size is None else min(image_size))
        model = load_model(
            arguments.model,
            checkpoint=checkpoint,
            pretrained=arguments.pretrained,
            num_classes=arguments.num_classes,
            image_size=image_size,
            **arguments.model_kwargs,
        )
        return arguments.model, model
    trained = load_run(path, image_size=image_size)
    return trained.facts["model"], trained if trained.dense else trained.model


def _write(
    arguments: argparse.Namespace, name: str, model: nn.Module | Trained, image_size: tuple[int, int] | None
) -> Report:
    path = arguments.output or Path(f"{name}{SUFFIXES.get(arguments.format, '')}")
    if isinstance(model, nn.Module):
        if arguments.labels:
            raise ValueError("--labels is for segmenters; a classifier's file holds logits")
        return export_model(
            model,
            path,
            format=arguments.format,
            features=arguments.features,
            image_size=image_size,
            dynamic=arguments.dynamic,
        )
    if arguments.features is not None:
        raise ValueError("--features are of classifiers; a segmenter's file holds logits, or --labels")
    facts = model.facts
    known = {key: facts.get(key) for key in ("model", "head", "mean", "std", "short_side", "evaluate")}
    return export_segmenter(
        model.model,
        path,
        format=arguments.format,
        image_size=image_size or (facts["size"], facts["size"]),
        channels=facts["in_chans"],
        labels=arguments.labels,
        dynamic=arguments.dynamic,
        metadata={**known, "label_names": facts["classes"]},
    )


def _run_cli(arguments: argparse.Namespace) -> None:
    size = arguments.input_size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ValueError(f"--input-size takes one or two positive numbers, got {','.join(map(str, size))}")
    image_size = (size[0], size[-1]) if size is not None else None
    name, model = _load(arguments, image_size)
    print(f"tracing {name} and comparing: a minute or more for a large model", flush=True)
    if arguments.dynamic and arguments.format != "safetensors" and not _takes_any_size(model):
        print(f"{name} can only be traced for one size: height and width are fixed; --static fixes the batch, too")
    report = _write(arguments, name, model, image_size)
    print(report)
    free = [f"{axis} from {low}" + (f" to {high}" if high else "") for axis, (low, high) in report.axes.items()]
    print(f"wrote {report.path}; free: {', '.join(free) or 'nothing'}")
    if arguments.dynamic and "height" not in report.axes:
        print("height and width are fixed: this model is built for one size or cannot be traced for others")
    if name == arguments.model and arguments.checkpoint is None and not arguments.pretrained:
        print("the weights are random: give --checkpoint FILE or --pretrained for trained ones")


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Turn SIGTERM into an exit with code 143 that unwinds the stack, so that the draft of the file is deleted."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0, written; 1, failed or outputs differ, nothing written; 2, wrong arguments; 143,
    stopped by SIGTERM, nothing written.
    """
    try:
        with _sigterm_exits():
            _run_cli(parser().parse_args(argv))
    except ExportError as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"export: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
