"""Predicts the classes of pictures as a table, or segments them into masks and overlays.

    python -m mixerzoo.vision.predict runs/first path/to/pictures
    python -m mixerzoo.vision.predict nat_tiny --pretrained 'photos/**/*.jpg' --format csv --output classes.csv
    python -m mixerzoo.vision.predict runs/first path/to/pictures --cam evidence.png
    python -m mixerzoo.vision.predict van_b0 --head upernet --checkpoint FILE --classes ade20k path/to/pictures

The model is a run folder or checkpoint of `train.py`, a timm name with `--pretrained` or `--checkpoint`, under a
segmentation head with `--head`, or a folder that `… export --format safetensors` wrote. Pictures may have any size,
shape and colour mode; each is prepared as in the model's evaluation. A segmenter predicts at the picture's own size,
with the settings by which its run was tested (`evaluate.…`), or those published for a timm name. `--mode`, `--window`,
`--stride`, `--scales` and `--flip` override them. `--cam` draws where a classifier finds its evidence for the predicted
class, or for `--cam-class`; see class_activation.py.

Unusual:

* A picture that cannot be read or segmented is reported and skipped, and the exit code is 1.
* All output paths are checked before the first prediction; none may be that of an input picture.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import glob
import io
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from ._loading import (
    KeyValue,
    OneLineParser,
    add_head_options,
    factors,
    load_model,
    load_run,
    load_under_head,
    numbers,
    path_of,
)
from ._messages import did_you_mean, one_line
from .data.pictures import UnreadableError, read_picture
from .prediction_pictures import (
    MOST_EXPLAINED,
    MOST_ON_SHEET,
    Prediction,
    draw_evidence,
    draw_overlay,
    draw_sheet,
    is_sheet,
    write_mask,
)
from .predictors import Explanation, Predictor, of_run, of_timm

Format = Literal["table", "csv", "json"]

OVERLAY = ".overlay.png"
"""Suffix of overlays, added to the picture's name. Files with this suffix are not predicted."""
WIDEST_NAME = 30  # characters of a class name in the table


def find_pictures(
    arguments: Sequence[str], *, masks: Path | None = None, sheets: Collection[Path] = ()
) -> list[tuple[Path, Path]]:
    """Find the pictures that files, folders and patterns name; return each once, as (file, output name).

    The output name is the path below the folder or pattern that found the file. Folders are searched recursively for
    the suffixes of torchvision's ImageFolder. The tool's own output is skipped: overlays, PNG files in `masks` if that
    lies in a searched folder, and the `sheets` of an earlier call, unless an argument names them.
    """
    own = {path.resolve() for path in sheets if is_sheet(path)}
    found: dict[Path, Path] = {}
    taken: set[Path] = set()
    for argument in arguments:
        path, root = Path(argument), Path(argument).parent
        if path.is_dir():
            root = path
            files = [file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS]
        elif path.exists() or not glob.has_magic(argument):
            files = [path]  # one that is not there is reported with those that cannot be read
        else:
            root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
            files = [Path(file) for file in glob.glob(argument, recursive=True)]
        files = sorted(file for file in files if not file.name.endswith(OVERLAY) and not file.is_dir())
        if files != [path]:
            files = [file for file in files if file.resolve() not in own]
        if masks is not None and _lies_in(masks, root) and masks.resolve() != root.resolve():
            files = [file for file in files if file.suffix != ".png" or not _lies_in(file.parent, masks)]
        if not files:
            raise ValueError(
                f"{argument}: there are no pictures; give files, folders or patterns such as 'photos/*.jpg'"
            )
        for file in files:
            if file not in found:
                found[file] = _new_name(file.relative_to(root), taken)
                taken.add(found[file].with_suffix(""))
    return list(found.items())


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _new_name(name: Path, taken: Collection[Path]) -> Path:
    """Return `name`, with a number added if it is taken up to its suffix, as different folders may hold equal names."""
    names = itertools.chain([name], (name.with_name(f"{name.stem}-{n}{name.suffix}") for n in itertools.count(2)))
    return next(new for new in names if new.with_suffix("") not in taken)


def predict(
    predictor: Predictor, files: Sequence[tuple[Path, Path]], *, batch: int = 16, on_error: Callable[[str], None]
) -> Iterator[tuple[Path, Path, Image.Image, Tensor]]:
    """Yield (file, output name, picture, answer) per readable picture: probabilities [classes] or a mask [H, W]."""
    waiting: list[tuple[Path, Path, Image.Image]] = []
    for place, (file, name) in enumerate(files):
        try:
            waiting.append((file, name, read_picture(file)))
        except UnreadableError as error:
            on_error(f"{file}: {error.reason}")
        full = len(waiting) == (1 if predictor.dense else batch)
        if waiting and (full or place == len(files) - 1):
            pictures = [picture for *_, picture in waiting]
            try:
                answers = [predictor.segment(pictures[0])] if predictor.dense else predictor.classify(pictures)
            except ValueError as error:
                if not predictor.dense:  # all pictures have one size there: none will do
                    raise
                on_error(f"{waiting[0][0]}: {one_line(error)}")
                answers = []
            for item, answer in zip(waiting, answers, strict=False):
                yield *item, answer
            waiting = []


def most_likely(probabilities: Tensor, count: int) -> list[tuple[int, float]]:
    """Return (class, probability) of the `count` most likely of [classes]."""
    values, indices = probabilities.topk(min(count, len(probabilities)))
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def largest(mask: Tensor, count: int) -> list[tuple[int, float]]:
    """Return (class, share of the pixels) of the `count` classes that cover most of a mask [H, W]."""
    labels, pixels = mask.unique(return_counts=True)
    order = pixels.argsort(descending=True, stable=True)[:count]
    return [(int(labels[index]), float(pixels[index] / mask.numel())) for index in order]


def write_rows(predictions: Sequence[Prediction], classes: Sequence[str], format: Format, *, dense: bool) -> str:
    """Format the predictions as an aligned table, as CSV with a row per picture, or as JSON."""
    value = "share" if dense else "probability"
    if format == "json":
        rows = [
            {
                "file": str(item.file),
                **({"overlay": str(item.overlay)} if item.overlay else {}),
                "classes": [{"class": classes[k], "index": k, value: round(v, 6)} for k, v in item.ranked],
            }
            for item in predictions
        ]
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    if format == "csv":
        most = max((len(item.ranked) for item in predictions), default=1)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", *(f"{name}_{rank}" for rank in range(1, most + 1) for name in ("class", value))])
        for item in predictions:
            writer.writerow([item.file, *(cell for k, v in item.ranked for cell in (classes[k], f"{v:.6f}"))])
        return text.getvalue()
    return _table(predictions, classes)


def _table(predictions: Sequence[Prediction], classes: Sequence[str]) -> str:
    """Align the file names and, per rank, a column of class names and one of percentages."""
    rows = [
        [str(item.file), *(cell for k, v in item.ranked for cell in (_shorten(classes[k]), f"{100 * v:.1f} %"))]
        for item in predictions
    ]
    padded = []
    for place, column in enumerate(itertools.zip_longest(*rows, fillvalue="")):
        width, percent = max(map(len, column)), place > 0 and place % 2 == 0
        padded.append([cell.rjust(width) if percent else cell.ljust(width) for cell in column])
    return "".join(f"{'  '.join(row).rstrip()}\n" for row in zip(*padded, strict=True))


def _shorten(name: str) -> str:
    return name if len(name) <= WIDEST_NAME else f"{name[: WIDEST_NAME - 1]}…"


def parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m mixerzoo.vision.predict", description="Say what a model sees in pictures.")
    add = parser.add_argument
    add("model", help="a run folder or checkpoint of train.py, a timm name, or a folder of exported safetensors")
    add("images", nargs="+", metavar="IMAGES", help="files, folders (searched to the bottom) or 'patterns/*.jpg'")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="of a timm name: the published weights")
    weights.add_argument("--checkpoint", type=Path, help="of a timm name: weights in a file")
    add("--model-kwargs", nargs="+", action=KeyValue, default={}, metavar="KEY=VALUE", help="of a timm name")
    add_head_options(parser)
    add("--input-size", type=int, metavar="N", help="side of what the model sees, of segmenters the shorter side")
    views = parser.add_argument_group("how a segmenter sees a picture", "as in the test of its run, but for these")
    views.add_argument("--mode", choices=("whole", "slide"), help="in one piece, or in windows that overlap")
    views.add_argument("--window", type=numbers, metavar="H,W", help="of --mode slide; one number is a square")
    views.add_argument("--stride", type=numbers, metavar="H,W", help="from window to window; default: 2/3 of it")
    views.add_argument("--scales", type=factors, metavar="S,S", help="average over factors of the size: 0.75,1,1.25")
    views.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=None, help="average with the mirror image"
    )
    add("--top-k", type=int, default=3, metavar="K", help="classes a picture, default %(default)s")
    add("--format", choices=get_args(Format), default="table", help="default %(default)s")
    add("--output", type=Path, metavar="FILE", help="write the table there, not to the screen")
    add(
        "--sheet", type=Path, metavar="FILE.png", help="classifiers: all pictures on one, with what they were taken for"
    )
    add("--cam", type=Path, metavar="FILE.png", help="classifiers: where the evidence for the class is (HiResCAM)")
    add("--cam-class", metavar="CLASS", help="of --cam: a class by name or number, in place of the predicted one")
    add(
        "--cam-stage", type=int, metavar="N", help="of --cam: an index into the model's feature_info; default: the last"
    )
    add("--folder", type=Path, help="segmenters: where overlays go; without it they lie beside the pictures")
    add("--masks", type=Path, metavar="FOLDER", help="segmenters: where masks go, PNG files of class numbers")
    add("--batch-size", type=int, default=16, metavar="N", help="pictures at a time, default %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s here")
    return parser


def _load(arguments: argparse.Namespace) -> Predictor:
    path, size = path_of(arguments), arguments.input_size
    if path is None:
        predictor = _load_name(arguments)
    elif (path / "config.json").is_file() or arguments.model.startswith("local-dir:"):
        predictor = of_timm(_load_folder(path), size=size)
    else:
        predictor = of_run(load_run(path, image_size=_square(size)), size)
    try:
        predictor.model.to(arguments.device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {arguments.device}: {one_line(error)}") from error
    return predictor


def _square(size: int | None) -> tuple[int, int] | None:
    return None if size is None else (size, size)


def _load_name(arguments: argparse.Namespace) -> Predictor:
    if arguments.head is not None:
        return of_run(load_under_head(arguments, arguments.input_size), arguments.input_size)
    if arguments.classes is not None or arguments.head_kwargs:
        raise ValueError("--classes and --head-kwargs belong to --head; a classifier knows its classes")
    model = load_model(
        arguments.model,
        checkpoint=arguments.checkpoint,
        pretrained=arguments.pretrained,
        image_size=_square(arguments.input_size),
        **arguments.model_kwargs,
    )
    trained = arguments.pretrained or arguments.checkpoint is not None
    return of_timm(model, size=arguments.input_size, trained=trained)


def seen_as_told(predictor: Predictor, arguments: argparse.Namespace) -> Predictor:
    """Override the evaluation settings of a segmenter by the options of the command."""
    names = ("mode", "window", "stride", "scales", "flip")
    told = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    own = predictor.inference
    if not told:
        return predictor
    if own is None:
        raise ValueError(f"--{next(iter(told))} is for segmenters; a classifier sees what its evaluation saw")
    for name in told.keys() & {"window", "stride"}:
        if len(told[name]) > 2:
            raise ValueError(f"--{name} takes one or two numbers, got {','.join(map(str, told[name]))}")
        told[name] = (told[name][0], told[name][-1])
    if told.get("mode", own.mode) == "whole":
        own = dataclasses.replace(own, mode="whole", window=None, stride=None)
    elif "window" in told or own.window is None:
        told = {"mode": "slide", "window": (predictor.side, predictor.side), "stride": None, **told}
    return dataclasses.replace(predictor, inference=dataclasses.replace(own, **told))


def _load_folder(path: Path) -> nn.Module:
    """Load a folder that `… export --format safetensors`, or timm's `save_for_hf`, wrote."""
    try:
        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load {path}: {one_line(error)}") from error


def _check(arguments: argparse.Namespace, predictor: Predictor) -> None:
    for option in ("top_k", "batch_size", "input_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: at least 1 is needed")
    for option in ("sheet", "cam"):
        if predictor.dense and getattr(arguments, option) is not None:
            raise ValueError(
                f"--{option} is for classifiers; a segmenter writes an overlay for each picture (--folder)"
            )
    if arguments.cam is None and (arguments.cam_class is not None or arguments.cam_stage is not None):
        raise ValueError("--cam-class and --cam-stage belong to --cam FILE.png")
    if not predictor.dense and (arguments.folder is not None or arguments.masks is not None):
        raise ValueError("--folder and --masks are for segmenters; a classifier writes a table, and --sheet")


def find_class(word: str, classes: Sequence[str]) -> int:
    """Return the number of the class that is named or numbered `word`; ImageNet's have several names, with commas."""
    wanted = word.casefold()
    named = [index for index, name in enumerate(classes) if name.casefold() == wanted]
    named = named or [
        index for index, name in enumerate(classes) if wanted in map(str.strip, name.casefold().split(","))
    ]
    if len(named) == 1:
        return named[0]
    if named:
        numbers = " or ".join(map(str, named))
        raise ValueError(f"--cam-class {word}: several classes have this name; give the number, {numbers}")
    if word.isdecimal() and int(word) < len(classes):
        return int(word)
    hint = did_you_mean(word, classes)
    raise ValueError(f"--cam-class {word}: no class has this name, nor this number of 0 to {len(classes) - 1}{hint}")


def _check_outputs(arguments: argparse.Namespace, files: Sequence[tuple[Path, Path]], *, dense: bool) -> None:
    """Raise a ValueError for a file that could not be written, or would take the place of a picture or of another."""
    pictures = {file.resolve() for file, _ in files}
    written = [("--output", arguments.output), ("--sheet", arguments.sheet), ("--cam", arguments.cam)]
    named: dict[Path, str] = {}
    for option, path in written:
        if path is None:
            continue
        if option != "--output" and path.suffix.lower() != ".png":
            raise ValueError(f"{option} {path}: the picture is a PNG file; give a name that ends in .png")
        if (other := named.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{other} and {option} both name {path}; give two files")
        if path.is_dir() or any(parent.is_file() for parent in path.parents):
            raise ValueError(f"{option} {path} cannot be written: a folder has this name, or a file that of its folder")
    for file, name in files if dense else ():
        overlay, mask = _places(arguments, file, name)
        written += [("--folder", overlay), ("--masks", mask)]
    for option, path in written:
        if path is not None and path.resolve() in pictures:
            raise ValueError(f"{option} would write over {path}, a picture to predict; give another place")


def _places(arguments: argparse.Namespace, file: Path, name: Path) -> tuple[Path, Path | None]:
    """Return the paths of a picture's overlay and of its mask, None if no masks are wanted."""
    # The whole name, suffix included: a.jpg and a.png may lie side by side.
    base = file if arguments.folder is None else arguments.folder / name
    mask = None if arguments.masks is None else (arguments.masks / name).with_suffix(".png")
    return base.with_name(f"{base.name}{OVERLAY}"), mask


def _run_cli(arguments: argparse.Namespace) -> int:
    predictor = _load(arguments)
    _check(arguments, predictor)
    predictor = seen_as_told(predictor, arguments)
    sheets = [path for path in (arguments.sheet, arguments.cam) if path is not None]
    files = find_pictures(arguments.images, masks=arguments.masks, sheets=sheets)
    _check_outputs(arguments, files, dense=predictor.dense)
    sheet: Path | None = arguments.sheet
    cam: Path | None = arguments.cam
    failures: list[str] = []
    predictions: list[Prediction] = []
    thumbnails: list[Image.Image] = []
    explained: list[tuple[Path, Explanation]] = []
    chosen = None if arguments.cam_class is None else find_class(arguments.cam_class, predictor.classes)
    answers = predict(predictor, files, batch=arguments.batch_size, on_error=failures.append)
    for file, name, picture, answer in answers:
        overlay = None
        if cam is not None and len(explained) < MOST_EXPLAINED:
            stage = explained[0][1].stage if explained else arguments.cam_stage
            explained.append((file, predictor.explain(picture, chosen, stage=stage)))
        if predictor.dense:
            overlay = _write_pictures(arguments, predictor, file, name, picture, answer)
        elif sheet is not None and len(thumbnails) < MOST_ON_SHEET:
            picture.thumbnail((256, 256))
            thumbnails.append(picture)
        find = largest if predictor.dense else most_likely
        predictions.append(Prediction(file, find(answer, arguments.top_k), overlay))
    text = write_rows(predictions, predictor.classes, arguments.format, dense=predictor.dense)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    if sheet is not None and thumbnails:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(sheet, thumbnails, predictions, predictor.classes)
    if cam is not None and explained:
        cam.parent.mkdir(parents=True, exist_ok=True)
        draw_evidence(cam, explained, predictor.classes, total=len(predictions), predicted=chosen is None)
    for failure in failures:
        print(f"predict: skipped {failure}", file=sys.stderr)
    if not predictor.trained:
        print("predict: the weights are random: give --checkpoint FILE or --pretrained", file=sys.stderr)
    return 1 if failures else 0


def _write_pictures(
    arguments: argparse.Namespace, predictor: Predictor, file: Path, name: Path, picture: Image.Image, mask: Tensor
) -> Path:
    overlay, path = _places(arguments, file, name)
    overlay.parent.mkdir(parents=True, exist_ok=True)
    draw_overlay(overlay, picture, mask, predictor.classes)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mask(path, mask, predictor.classes)
    return overlay


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0, all pictures predicted; 1, some skipped; 2, wrong arguments."""
    try:
        return _run_cli(parser().parse_args(argv))
    except (OSError, ValueError) as error:
        print(f"predict: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
