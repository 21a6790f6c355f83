"""Pictures that explain a mixer, drawn from what the code does and not from what it should do.

    python -m mixerzoo.vision.visualize --output docs/pictures

* Neighborhoods: which keys a query attends to. Values are one-hot vectors of their own position, so each output of the
  operator is its row of the attention matrix.
* Effective receptive fields (Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural
  Networks", NeurIPS 2016): the gradient of the central feature of each stage with respect to the image.

Unusual: with random weights a receptive field shows the architecture alone; give trained ones with `--checkpoint`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.neighborhood_attention import na1d, na2d
from ._loading import load_model, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OTHER, KEY, QUERY, SHARED = "#eef0f3", "#7fb2e5", "#d9480f", "#f0a97c"
SQUARE = "#4dd0e1"
DECADES = 4  # how far below its largest value a receptive field is drawn


@dataclass(frozen=True)
class Example:
    """One panel: a query, and the arguments of `na2d` or `na1d` beside kernel_size."""

    title: str
    note: str
    query: tuple[int, int] = (0, 0)
    arguments: dict[str, Any] = field(default_factory=dict)


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
    """Attention weights of every query on a map of `size`, [positions, positions]; alike scores, so alike weights."""
    positions = torch.Size(size).numel()
    zeros = torch.zeros(1, *size, 1, positions)
    one_hot = torch.eye(positions).view(1, *size, 1, positions)
    operator = na1d if len(size) == 1 else na2d
    return operator(zeros, zeros, one_hot, kernel_size, **arguments).view(positions, positions)


@dataclass(frozen=True)
class ReceptiveField:
    """Mean magnitude [H, W] of the gradient of the central feature of a map of `map_size`."""

    gradient: Tensor
    map_size: tuple[int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """(y, x) of the strongest part, in pixels. Strided convolutions put it up to half a position off the grid's."""
        strong = torch.nonzero(self.gradient >= self.gradient.max() / 10).double() + 0.5
        y, x = strong.mean(0).tolist()
        return y, x


def receptive_fields(model: nn.Module, images: Tensor) -> list[ReceptiveField]:
    """One field for each stage of a timm model, averaged over `images` [B, C, H, W]."""
    network: Any = model
    images = images.clone().requires_grad_()
    fields = []
    for feature in network.forward_intermediates(images, intermediates_only=True):
        height, width = feature.shape[2:]
        central = feature[:, :, height // 2, width // 2]
        # Random signs: a plain sum over channels is constant after a norm, and its gradient zero.
        signs = torch.randint(0, 2, central.shape).to(central) * 2 - 1
        (gradient,) = torch.autograd.grad((central * signs).sum(), images, retain_graph=True)
        fields.append(ReceptiveField(gradient.abs().mean((0, 1)), (height, width)))
    return fields


def side_of_share(field: ReceptiveField, share: float) -> int:
    """Side in pixels of the smallest square around the centre that holds `share` of the gradient."""
    gradient, centre = field.gradient, field.centre
    rows = (torch.arange(gradient.shape[0]) + 0.5 - centre[0]).abs()
    columns = (torch.arange(gradient.shape[1]) + 0.5 - centre[1]).abs()
    distance = torch.maximum(rows[:, None], columns[None]).flatten()
    order = distance.argsort()
    mass = gradient.flatten()[order].double().cumsum(0)
    reached = int((mass < share * mass[-1]).sum())
    return math.ceil(2 * distance[order[reached]].item() + 1)


def draw_neighborhoods_2d() -> Figure:
    """One map for each example: the query, its keys, and the queries that see the very same keys."""
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
    """The whole attention matrix of a line for each example."""
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
    """One row a model, one column a stage; the square holds 90 % of the gradient."""
    from matplotlib.patches import Rectangle

    columns = max(len(stages) for stages in fields.values())
    figure, panels = _figure(len(fields), columns, (9.0, 2.1 * len(fields) + 1.0))
    image = None
    for row, (name, stages) in enumerate(fields.items()):
        panels[row * columns].set_ylabel(name, fontsize=10, fontweight="bold")
        for column, stage in enumerate(stages):
            axes = panels[row * columns + column]
            # Pairs of pixels, which the picture shows as one anyway: half the grain, half the file.
            shown = nn.functional.avg_pool2d(stage.gradient[None], 2)[0]
            relative = (shown / shown.max()).clamp(min=10.0**-DECADES).log10()
            extent = (0, stage.gradient.shape[1], stage.gradient.shape[0], 0)
            image = axes.imshow(
                relative.numpy(), cmap="magma", vmin=-DECADES, vmax=0, interpolation="nearest", extent=extent
            )
            side = side_of_share(stage, 0.9)
            corner = (stage.centre[1] - side / 2, stage.centre[0] - side / 2)
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=SQUARE, linewidth=1.4))
            axes.set_xlabel(f"{side} x {side} pixels", fontsize=9)
            if row == 0:
                height, width = stage.map_size
                axes.set_title(f"stage {column + 1}: {height} x {width}", fontsize=10, fontweight="bold")
    assert image is not None
    bar = figure.colorbar(image, ax=panels, fraction=0.02, pad=0.015, ticks=range(-DECADES, 1))
    bar.ax.set_yticklabels([*(f"1/{10**-tick:,}" for tick in range(-DECADES, 0)), "1"], fontsize=8)
    bar.set_label("gradient, relative to the largest", fontsize=9)
    _title(figure, f"Effective receptive field of the central feature; {subtitle}")
    _legend(figure, [(SQUARE, "square around the feature that holds 90 % of the gradient")])
    return figure


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

    handles = [Patch(facecolor=colour, label=label) for colour, label in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=9)


def _checkpoints(pairs: Sequence[str], models: Sequence[str]) -> dict[str, Path]:
    files = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if name not in models or not file:
            raise ValueError(f"--checkpoint takes MODEL=FILE with one of {', '.join(models)}, got {pair!r}")
        files[name] = Path(file)
    return files


def _run_cli(arguments: argparse.Namespace) -> None:
    checkpoints = _checkpoints(arguments.checkpoint, arguments.models)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    side = arguments.input_size
    fields = {}
    for name in arguments.models:
        label = f"{name}, trained" if name in checkpoints else name
        model: Any = load_model(name, checkpoint=checkpoints.get(name))
        fields[label] = receptive_fields(model, torch.randn(arguments.images, model.in_chans, side, side))
    weights = "random weights, " if not checkpoints else ""
    subtitle = f"{weights}mean over {arguments.images} images of noise, {side} x {side}"
    figures = {
        "neighborhood_attention_2d": draw_neighborhoods_2d(),
        "neighborhood_attention_1d": draw_neighborhoods_1d(),
        "receptive_fields": draw_receptive_fields(fields, subtitle=subtitle),
    }
    for name, figure in figures.items():
        path = arguments.output / f"{name}.png"
        _save(figure, path)
        print(f"wrote {path}")


def _save(figure: Figure, path: Path) -> None:
    """As a PNG with a palette: a third of the bytes, and no difference to the eye."""
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixerzoo.vision.visualize", description="Draw attention neighborhoods and receptive fields."
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("docs/pictures"), help="folder, default %(default)s")
    add("--models", nargs="+", default=["nat_mini", "dinat_mini"], help="whose receptive fields, default %(default)s")
    add("--checkpoint", action="append", default=[], metavar="MODEL=FILE", help="trained weights; may be given again")
    add("--images", type=int, default=8, help="of noise, to average over, default %(default)s")
    add("--input-size", type=int, default=224, help="side of the images, default %(default)s")
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
