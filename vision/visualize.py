"""Draws figures that explain mixers and models, computed by running the code itself.

    python -m mixerzoo.vision.visualize --output docs/pictures
    python -m mixerzoo.vision.visualize effective_receptive_fields --models van_b0 resnet50 --pretrained
    python -m mixerzoo.vision.visualize tokens evit_deit_small_patch16_224 picture.jpg --model-kwargs keep_rate=0.5

* Mixers: the receptive field of one position through every mixer; see mixer_fields.py.
* Neighborhoods: the keys that a query attends to. Values are one-hot vectors of their own position, so each output of
  the operator is its row of the attention matrix.
* Receptive fields: the gradient of the central feature of each stage with respect to the image. Effective receptive
  fields: that of the last stage, for models side by side, with the share of the image that holds most of it.
* HiLo: its two paths over a picture, recorded by hooks; see diagrams.py.
* Scan orders: the paths of the visual state space models over a picture; see scan_orders.py.
* Tokens: the patches that a model merges, keeps and drops; see token_pictures.py.

Unusual: with random weights a receptive field shows the architecture alone, and the figure says so; `--pretrained` or
`--checkpoint` gives trained weights, and `--folder` your own pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.neighborhood_attention import na1d, na2d
from ._loading import KeyValue, load_model
from ._messages import one_line
from .diagrams import hilo_paths
from .mixer_fields import mixer_fields
from .receptive_field import ReceptiveField, open_branches, receptive_fields
from .scan_orders import scan_orders
from .token_pictures import SIDE, example_figures, token_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

OTHER, KEY, QUERY, SHARED = "#eef0f3", "#7fb2e5", "#d9480f", "#f0a97c"
SQUARE, REACH = "#4dd0e1", "#9ccc65"
OUTLINED = {0.5: "#ffffff", 0.99: SQUARE}
SHARES = (0.2, 0.3, 0.5, 0.99)  # as in RepLKNet's table
DECADES = 4  # how far below its largest value a receptive field is drawn


@dataclasses.dataclass(frozen=True)
class Example:
    """One panel of a neighborhood figure: a query, and arguments of `na2d` or `na1d` other than kernel_size."""

    title: str
    note: str
    query: tuple[int, int] = (0, 0)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


MAP, WINDOW = 21, 5
PLANE = (
    Example("in the middle", f"the {WINDOW} x {WINDOW} positions around the query", (10, 10)),
    Example("in a corner", "the window shifts inwards and keeps its size", (1, 19)),
    Example("dilation=3", "every third position, as wide as 13 x 13", (10, 10), {"dilation": 3}),
    Example("dilation=3, at a border", "every third position, shifted inwards", (10, 1), {"dilation": 3}),
    Example("stride=3", "the queries of a 3 x 3 group share one window", (10, 10), {"stride": 3}),
    Example("is_causal=(True, False)", "nothing from rows below the query", (10, 10), {"is_causal": (True, False)}),
)
LENGTH = 24
LINE = (
    Example("plain", "a band that stays full at both ends"),
    Example("dilation=3", "every third key", arguments={"dilation": 3}),
    Example("stride=4", "four queries share their keys", arguments={"stride": 4}),
    Example("is_causal=True", "no key after the query", arguments={"is_causal": True}),
)


def attention_rows(size: Sequence[int], kernel_size: int, **arguments: Any) -> Tensor:
    """Return the attention matrix [positions, positions] of a map of `size`; all keys of a query weigh the same."""
    positions = torch.Size(size).numel()
    zeros = torch.zeros(1, *size, 1, positions)
    one_hot = torch.eye(positions).view(1, *size, 1, positions)
    operator = na1d if len(size) == 1 else na2d
    return operator(zeros, zeros, one_hot, kernel_size, **arguments).view(positions, positions)


def draw_neighborhoods_2d() -> Figure:
    """Draw a map per example: the query, its keys, and the queries with the same keys."""
    figure, panels = _figure(2, 3, (9.0, 6.9))
    for axes, example in zip(panels, PLANE, strict=True):
        rows = attention_rows((MAP, MAP), WINDOW, **example.arguments)
        query = example.query[0] * MAP + example.query[1]
        seen = (rows[query] > 0).view(MAP, MAP)
        alike = (rows == rows[query]).all(1).view(MAP, MAP)
        for y in range(MAP):
            for x in range(MAP):
                _cell(axes, x, y, KEY if seen[y, x] else OTHER)
                if (y, x) == example.query:
                    _cell(axes, x, y, QUERY, inset=0.18)
                elif alike[y, x]:
                    _cell(axes, x, y, SHARED, inset=0.3)
        axes.set(xlim=(-0.1, MAP + 0.1), ylim=(MAP + 0.1, -0.1))
        _caption(axes, example, f"{int(seen.sum())} keys")
    _title(figure, f"Neighborhood attention on a {MAP} x {MAP} map, kernel_size={WINDOW}")
    _legend(figure, [(QUERY, "query"), (KEY, "keys it attends to"), (SHARED, "other queries with the same keys")])
    return figure


def draw_neighborhoods_1d() -> Figure:
    """Draw the attention matrix of a line of tokens per example."""
    figure, panels = _figure(1, 4, (9.0, 3.35))
    for axes, example in zip(panels, LINE, strict=True):
        rows = attention_rows((LENGTH,), WINDOW, **example.arguments)
        for query in range(LENGTH):
            for key in range(LENGTH):
                _cell(axes, key, query, KEY if rows[query, key] > 0 else OTHER)
            _cell(axes, query, query, QUERY, inset=0.25)
        axes.set(xlim=(-0.1, LENGTH + 0.1), ylim=(LENGTH + 0.1, -0.1))
        _caption(axes, example)
    _title(
        figure, f"Attention matrices on a line of {LENGTH} tokens, kernel_size={WINDOW}; rows: queries, columns: keys"
    )
    _legend(figure, [(QUERY, "the query's own position"), (KEY, "keys it attends to")])
    return figure


def draw_receptive_fields(fields: Mapping[str, Sequence[ReceptiveField]], *, subtitle: str) -> Figure:
    """Draw receptive fields, a row per model and a column per stage, with the square of 90 % of the gradient."""
    columns = max(len(stages) for stages in fields.values())
    figure, panels = _figure(len(fields), columns, (9.0, 2.1 * len(fields) + 1.0))
    image = None
    for row, (name, stages) in enumerate(fields.items()):
        panels[row * columns].set_ylabel(name, fontsize=10, fontweight="bold")
        for column, stage in enumerate(stages):
            axes = panels[row * columns + column]
            image = _show_field(axes, stage)
            _outline_share(axes, stage, 0.9, SQUARE)
            side = stage.side(0.9)
            axes.set_xlabel(f"{side} x {side} pixels", fontsize=9)
            if row == 0:
                height, width = stage.map_size
                axes.set_title(f"stage {column + 1}: {height} x {width}", fontsize=10, fontweight="bold")
    _colour_bar(figure, image, panels)
    _title(figure, f"Effective receptive field of the central feature; {subtitle}")
    _legend(figure, [(SQUARE, "square around the feature that holds 90 % of the gradient")])
    return figure


def draw_effective_receptive_fields(rows: Mapping[str, Mapping[str, ReceptiveField]], *, subtitle: str) -> Figure:
    """Draw effective receptive fields and area ratios, a row per kind of weights and a column per model."""
    names = list(dict.fromkeys(name for fields in rows.values() for name in fields))
    figure, panels = _figure(len(rows), len(names), (2.7 * len(names) + 1.3, 3.35 * len(rows) + 0.9))
    image = None
    for row, (weights, fields) in enumerate(rows.items()):
        panels[row * len(names)].set_ylabel(weights, fontsize=10, fontweight="bold")
        for column, name in enumerate(names):
            axes = panels[row * len(names) + column]
            if row == 0:
                axes.set_title(name, fontsize=10, fontweight="bold")
            if name not in fields:
                continue
            field = fields[name]
            image = _show_field(axes, field)
            for share, colour in OUTLINED.items():
                _outline_share(axes, field, share, colour)
            _outline_reach(axes, field)
            areas = [f"{100 * share:g} % in {_percent(field.area(share))}" for share in SHARES]
            axes.set_xlabel(f"{areas[0]} · {areas[1]}\n{areas[2]} · {areas[3]}", fontsize=9, linespacing=1.5)
    _colour_bar(figure, image, panels)
    _title(figure, f"Effective receptive field of the last stage's central feature\n{subtitle}")
    entries = [(colour, f"square with {100 * share:g} % of the gradient") for share, colour in OUTLINED.items()]
    _legend(figure, [*entries, (REACH, "all it depends on, where less than the image")])
    return figure


def _show_field(axes: Axes, field: ReceptiveField) -> AxesImage:
    # 2 x 2 pixels are averaged: the figure cannot show more, and its file halves.
    shown = nn.functional.avg_pool2d(field.gradient[None], 2)[0]
    relative = (shown / shown.max()).clamp(min=10.0**-DECADES).log10()
    extent = (0, field.gradient.shape[1], field.gradient.shape[0], 0)
    return axes.imshow(relative.numpy(), cmap="magma", vmin=-DECADES, vmax=0, interpolation="nearest", extent=extent)


def _outline_share(axes: Axes, field: ReceptiveField, share: float, colour: str) -> None:
    side = field.side(share)
    corner = (field.centre[1] - side / 2, field.centre[0] - side / 2)
    _outline(axes, corner, side, side, colour)


def _outline_reach(axes: Axes, field: ReceptiveField) -> None:
    top, left, height, width = field.reach
    if (height, width) != tuple(field.gradient.shape):
        _outline(axes, (left, top), width, height, REACH)


def _outline(axes: Axes, corner: tuple[float, float], width: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.4))


def _colour_bar(figure: Figure, image: AxesImage | None, panels: Sequence[Axes]) -> None:
    assert image is not None  # there is a field in every figure
    bar = figure.colorbar(image, ax=panels, fraction=0.02, pad=0.015, ticks=range(-DECADES, 1))
    bar.ax.set_yticklabels([*(f"1/{10**-tick:,}" for tick in range(-DECADES, 0)), "1"], fontsize=8)
    bar.set_label("gradient, relative to the largest", fontsize=9)


def _percent(share: float) -> str:
    """Format a share with two significant digits: 0.15 %, 1.5 %, 15 %."""
    digits = max(0, min(3, -math.floor(math.log10(share)) - 1))
    return f"{100 * share:.{digits}f} %"


def _figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.set(xticks=[], yticks=[], aspect="equal")
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, panels


def _cell(axes: Axes, x: float, y: float, colour: str, *, inset: float = 0.05) -> None:
    from matplotlib.patches import Rectangle

    side = 1 - 2 * inset
    axes.add_patch(Rectangle((x + inset, y + inset), side, side, facecolor=colour, edgecolor="none"))


def _caption(axes: Axes, example: Example, extra: str = "") -> None:
    axes.set_title(example.title, fontsize=10, fontweight="bold")
    axes.set_xlabel(example.note + (f"\n{extra}" if extra else ""), fontsize=9, linespacing=1.4)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=11.5)


def _legend(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, edgecolor="#9aa0a6", linewidth=0.5, label=label) for colour, label in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=9)


def _checkpoints(pairs: Sequence[str], models: Sequence[str]) -> dict[str, Path]:
    files = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if name not in models or not file:
            raise ValueError(f"--checkpoint takes MODEL=FILE with one of {', '.join(models)}, got {pair!r}")
        files[name] = Path(file)
    return files


@dataclasses.dataclass(frozen=True)
class Setting:
    """The options of the command about models and images; None is the default of the figure."""

    models: Sequence[str] | None
    checkpoints: Sequence[str]
    pretrained: bool
    images: int | None
    input_size: int | None
    folder: Path | None
    query: tuple[int, int] | None = None
    tokens: Sequence[str] = ()
    """The words after `tokens`: a model and its pictures."""
    model_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load(self, models: Sequence[str], count: int, side: int) -> Iterator[tuple[str, bool, nn.Module, Tensor]]:
        """Yield (name, whether trained, model, images) per model. Random weights and noise come from seed 0."""
        files = _checkpoints(self.checkpoints, models)
        for name in models:
            trained, model = self._load(name, files)
            yield name, trained, model, self._images(model, count, side)

    def load_one(self, name: str) -> tuple[bool, nn.Module]:
        return self._load(name, _checkpoints(self.checkpoints, [name]))

    def _load(self, name: str, files: Mapping[str, Path]) -> tuple[bool, nn.Module]:
        torch.manual_seed(0)
        trained = self.pretrained or name in files
        pretrained = trained and name not in files
        return trained, load_model(name, checkpoint=files.get(name), pretrained=pretrained, **self.model_kwargs)

    def _images(self, model: Any, count: int, side: int) -> Tensor:
        if self.folder is None:
            return torch.randn(count, model.in_chans, side, side)
        return read_images(self.folder, model, count=count, side=side)

    def describe_images(self, count: int, side: int) -> str:
        kind = "noise" if self.folder is None else self.folder.name
        return f"mean over {count} image{'s' * (count > 1)} of {kind}, {side} x {side}"


def find_images(folder: Path, count: int) -> list[Path]:
    """Return the first `count` image files below a folder."""
    from PIL import Image

    known = Image.registered_extensions()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known)[:count]
    if len(files) < count:
        raise ValueError(f"{folder} has {len(files)} image{'s' * (len(files) != 1)}; {count} were asked for (--images)")
    return files


def read_images(folder: Path, model: Any, *, count: int, side: int) -> Tensor:
    """Return the first `count` images below a folder, preprocessed for the model, [count, channels, side, side]."""
    from timm.data import create_transform, resolve_data_config

    from .data.pictures import read_picture

    files = find_images(folder, count)
    size = {"input_size": (model.in_chans, side, side)}
    transform: Any = create_transform(**{**resolve_data_config({}, model=model), **size})
    mode = "L" if model.in_chans == 1 else "RGB"
    return torch.stack([transform(read_picture(file).convert(mode)) for file in files])


def _draw_neighborhoods(_: Setting) -> dict[str, Figure]:
    return {
        "neighborhood_attention_2d": draw_neighborhoods_2d(),
        "neighborhood_attention_1d": draw_neighborhoods_1d(),
    }


def _draw_mixers(_: Setting) -> dict[str, Figure]:
    return {"mixers": mixer_fields()}


def _draw_stages(setting: Setting) -> dict[str, Figure]:
    count, side = setting.images or 8, setting.input_size or 224
    fields, untrained = {}, False
    for name, trained, model, images in setting.load(setting.models or ("nat_mini", "dinat_mini"), count, side):
        fields[f"{name}, trained" if trained else name] = receptive_fields(model, images)
        untrained |= not trained
    subtitle = f"{'random weights, ' * untrained}{setting.describe_images(count, side)}"
    return {"receptive_fields": draw_receptive_fields(fields, subtitle=subtitle)}


def _draw_last_stages(setting: Setting) -> dict[str, Figure]:
    count, side = setting.images or 2, setting.input_size or 512
    rows: dict[str, dict[str, ReceptiveField]] = {}
    models = setting.models or ("resnet50", "unireplknet_t", "van_b2")
    for name, trained, model, images in setting.load(models, count, side):
        (field,) = receptive_fields(model, images, last=1)
        rows.setdefault("trained weights" if trained else "random weights", {})[name] = field
        if not trained:
            open_branches(model, images)
            (field,) = receptive_fields(model, images, last=1)
            rows.setdefault("random weights,\nbranches at full strength", {})[name] = field
    subtitle = f"{setting.describe_images(count, side)}; “50 % in 6 %”: half of the gradient is in 6 % of the image"
    return {"effective_receptive_fields": draw_effective_receptive_fields(rows, subtitle=subtitle)}


def _first_image(setting: Setting) -> Path | None:
    return None if setting.folder is None else find_images(setting.folder, 1)[0]


def _draw_hilo(setting: Setting) -> dict[str, Figure]:
    return {"hilo_paths": hilo_paths(_first_image(setting), setting.query)}


def _draw_scan_orders(setting: Setting) -> dict[str, Figure]:
    return {"scan_orders": scan_orders(_first_image(setting))}


def _draw_tokens(setting: Setting) -> dict[str, Figure]:
    side = setting.input_size or SIDE
    if not setting.tokens:
        return example_figures(side)
    name, *pictures = setting.tokens
    files: list[Path | str] = [*pictures]
    if setting.folder is not None:
        files += find_images(setting.folder, setting.images or 1)
    trained, model = setting.load_one(name)
    weights = "trained weights" if trained else "random weights"
    return {f"tokens_{name}": token_figure(model, name, files or ["china.jpg"], weights=weights, side=side)}


SUBJECTS: dict[str, Callable[[Setting], dict[str, Figure]]] = {
    "mixers": _draw_mixers,
    "neighborhoods": _draw_neighborhoods,
    "receptive_fields": _draw_stages,
    "effective_receptive_fields": _draw_last_stages,
    "hilo": _draw_hilo,
    "scan_orders": _draw_scan_orders,
    "tokens": _draw_tokens,
}


def _run_cli(arguments: argparse.Namespace) -> None:
    setting = Setting(
        models=arguments.models,
        checkpoints=arguments.checkpoint,
        pretrained=arguments.pretrained,
        images=arguments.images,
        input_size=arguments.input_size,
        folder=arguments.folder,
        query=None if arguments.query is None else tuple(arguments.query),
        tokens=arguments.tokens,
        model_kwargs=arguments.model_kwargs,
    )
    for option, value in (("--images", setting.images), ("--input-size", setting.input_size)):
        if value is not None and value < 1:
            raise ValueError(f"{option}={value}: at least one is needed")
    for subject in arguments.subjects or SUBJECTS:
        for name, figure in SUBJECTS[subject](setting).items():
            arguments.output.mkdir(parents=True, exist_ok=True)
            path = arguments.output / f"{name}.png"
            _save(figure, path, photographic=subject == "tokens")
            print(f"wrote {path}")


def _save(figure: Figure, path: Path, *, photographic: bool) -> None:
    """Save as a PNG with a palette, which takes a third of the bytes; the palette method depends on the content."""
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    method = Image.Quantize.MEDIANCUT if photographic else Image.Quantize.MAXCOVERAGE
    Image.open(buffer).convert("RGB").quantize(256, method, dither=Image.Dither.NONE).save(path, optimize=True)


class _Subjects(argparse.Action):
    """Parses subjects; the words after `tokens` are its model and pictures.

    Subjects are checked here because argparse's own choices refuse an empty list in Python 3.11.
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        words: list[str] = [*(values or ())]
        end = words.index("tokens") + 1 if "tokens" in words else len(words)
        for name in words[:end]:
            if name not in SUBJECTS:
                raise argparse.ArgumentError(self, f"choose from {', '.join(SUBJECTS)}; got {name!r}")
        namespace.subjects, namespace.tokens = words[:end], words[end:]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixerzoo.vision.visualize",
        description="Draw every mixer, attention neighborhoods, receptive fields, HiLo's paths, orders of scans, and "
        "where tokens go. After “tokens” may stand a model and pictures: tokens MODEL IMAGE.",
    )
    add = parser.add_argument
    add("subjects", nargs="*", action=_Subjects, metavar="SUBJECT", help=f"{', '.join(SUBJECTS)}; default all")
    add("--output", type=Path, default=Path("docs/pictures"), help="folder, default %(default)s")
    add("--models", nargs="+", help="timm models whose receptive fields to draw; each subject has its own default")
    add("--pretrained", action="store_true", help="published weights, fetched from their authors")
    add("--checkpoint", action="append", default=[], metavar="MODEL=FILE", help="trained weights; may be given again")
    add("--images", type=int, help="to average over, default 8, or 2 for effective_receptive_fields")
    add("--folder", type=Path, help="images instead of noise: better for trained weights; diagrams take the first")
    add("--query", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="of HiLo's map, default 9 5")
    add("--model-kwargs", nargs="+", action=KeyValue, default={}, metavar="KEY=VALUE", help="of the models: r=16")
    add("--input-size", type=int, help="side of the images, default 224, or 512 for effective_receptive_fields")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        _run_cli(parser().parse_args(argv))
    except (OSError, ValueError) as error:
        print(f"visualize: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
