"""Draws HiLo's two paths as a diagram, with shapes and attention recorded by hooks on a running module.

    python -m mixerzoo.vision.visualize hilo --output docs/pictures

Unusual: no trained weights are needed. Tokens are patches of a picture and weights are random, but the keys of each
path share the projection of its queries: attention then falls on similar patches, which can be checked by eye.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor
from torch.nn import functional as F

from ..mixers import HiLo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HIGH, LOW, INK = "#d9480f", "#1864ab", "#343a40"
SIDE, DIM, QUERY = 14, 96, (9, 5)
SHARPNESS = 6.0  # gain of the shared projection, as the scores of an untrained model are too flat


@dataclass(frozen=True)
class Trace:
    """The recorded attention of a HiLo for a picture [3, H, W], averaged over heads, and the output shapes by
    projection."""

    picture: Tensor
    query: tuple[int, int]
    window: Tensor  # [tokens, tokens], of the window around the query
    pooled: Tensor  # [rows, columns], from the query to the pooled map
    shapes: dict[str, tuple[int, ...]]
    mixer: HiLo

    @property
    def side(self) -> int:
        """The side of the map of tokens."""
        return self.shapes["l_q"][0]


def make_mixer() -> HiLo:
    """Make a HiLo with LITv2's split of twelve heads, in which queries and keys share their projection."""
    mixer = HiLo(DIM, 12, window_size=2, alpha=0.9, qkv_bias=False).eval()
    h_dim, l_dim = mixer.h_heads * mixer.head_dim, mixer.l_heads * mixer.head_dim
    weights: Any = mixer
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim > 1:
                trunc_normal_(parameter, std=SHARPNESS**0.5 * DIM**-0.5)
        weights.h_qkv.weight[h_dim : 2 * h_dim] = weights.h_qkv.weight[:h_dim]
        weights.l_kv.weight[:l_dim] = weights.l_q.weight
    return mixer


def make_tokens(picture: Tensor) -> Tensor:
    """Turn a picture [3, H, W] into tokens [1, SIDE, SIDE, DIM]: 4 x 4 colours per patch, projected at random,
    normalised."""
    patches = F.interpolate(picture[None], (4 * SIDE, 4 * SIDE), mode="area")
    patches = F.unfold(patches, 4, stride=4).transpose(1, 2)
    patches = patches - patches.mean(1, keepdim=True)
    spread = torch.randn(patches.shape[-1], DIM) / patches.shape[-1] ** 0.5
    return F.layer_norm(patches @ spread, (DIM,)).view(1, SIDE, SIDE, DIM)


@torch.no_grad()
def trace_hilo(mixer: HiLo, picture: Tensor, tokens: Tensor, query: tuple[int, int]) -> Trace:
    """Run the module and compute its attention from the recorded outputs of its projections."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, layer in mixer.named_children()
    ]
    mixer(tokens)
    for hook in hooks:
        hook.remove()
    scale, size = mixer.head_dim**-0.5, mixer.window_size
    row, column = (place // size * size for place in query)
    inside = seen["h_qkv"][0, row : row + size, column : column + size].flatten(0, 1)
    queries, keys = inside.unflatten(-1, (3, mixer.h_heads, -1))[:, :2].permute(1, 2, 0, 3)
    window = (queries @ keys.transpose(-2, -1) * scale).softmax(-1).mean(0)
    asked = seen["l_q"][0, query[0], query[1]].view(mixer.l_heads, -1, 1)
    keys = seen["l_kv"][0].unflatten(-1, (2, mixer.l_heads, -1))[..., 0, :, :]  # [rows, columns, heads, head_dim]
    pooled = (keys.permute(2, 0, 1, 3).flatten(1, 2) @ asked * scale).softmax(1).mean(0).view(keys.shape[:2])
    shapes = {name: tuple(out.shape[1:]) for name, out in seen.items()}
    return Trace(picture, query, window, pooled, shapes, mixer)


def draw_hilo(trace: Trace) -> Figure:
    """Draw the map on the left, windows above, the pooled map below, and the concatenated outputs on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 6.2), facecolor="white")
    mixer, shapes = trace.mixer, trace.shapes
    heads = mixer.h_heads + mixer.l_heads
    note = "Random weights; the keys have the queries' projection, so attention falls on what looks alike."
    figure.text(0.5, 0.035, note, ha="center", fontsize=9.5, style="italic", color=INK)
    figure.text(0.5, 0.955, "HiLo attention: the heads are split", ha="center", fontsize=15, weight="bold", color=INK)
    split = f"{mixer.l_heads} of {heads} heads see the pooled map, {mixer.h_heads} see windows"
    figure.text(0.5, 0.915, split, ha="center", color=INK)
    _map(figure, (0.02, 0.30, 0.20, 0.40), trace)
    _high_row(figure, trace)
    _low_row(figure, trace)
    _output(figure, (0.875, 0.24, 0.05, 0.52), shapes)
    for start, end, colour in [
        ((0.225, 0.56), (0.272, 0.66), HIGH),
        ((0.225, 0.44), (0.272, 0.34), LOW),
        ((0.472, 0.66), (0.588, 0.66), HIGH),
        ((0.472, 0.30), (0.588, 0.30), LOW),
        ((0.795, 0.66), (0.865, 0.66), HIGH),
        ((0.795, 0.30), (0.865, 0.40), LOW),
    ]:
        _arrow(figure, start, end, colour)
    return figure


def _high_row(figure: Figure, trace: Trace) -> None:
    mixer, size, side = trace.mixer, trace.mixer.window_size, trace.side
    axes = _panel(figure, (0.28, 0.52, 0.185, 0.30), "Hi-Fi: windows", HIGH)
    _show(axes, trace.picture, side)
    _grid(axes, side // size, HIGH, 1.3)
    corner = tuple(place // size * size for place in trace.query)
    _box(axes, corner, size, side, HIGH, 2.8)
    windows = (side // size) ** 2
    axes.set_xlabel(f"{windows} windows of {size} x {size} tokens", fontsize=9.5, color=INK)
    figure.text(0.53, 0.68, f"h_qkv\n{mixer.dim} → {trace.shapes['h_qkv'][-1]}", ha="center", fontsize=9, color=HIGH)
    axes = _panel(figure, (0.60, 0.52, 0.185, 0.30), f"attention in one window, mean of {mixer.h_heads} heads", HIGH)
    axes.imshow(trace.window.numpy(), cmap="Oranges", vmin=0, vmax=1)
    for i, row in enumerate(trace.window.tolist()):
        for j, weight in enumerate(row):
            axes.text(
                j, i, f"{weight:.2f}", ha="center", va="center", fontsize=9, color="white" if weight > 0.6 else INK
            )
    axes.set_xlabel(f"{size**2} queries (rows) x {size**2} keys", fontsize=9.5, color=INK)


def _low_row(figure: Figure, trace: Trace) -> None:
    mixer, rows, side = trace.mixer, trace.pooled.shape[0], trace.side
    axes = _panel(figure, (0.28, 0.13, 0.185, 0.30), "Lo-Fi: pooled map", LOW)
    _show(axes, F.interpolate(trace.picture[None], (rows, rows), mode="area")[0], rows)
    _grid(axes, rows, LOW, 1.0)
    axes.set_xlabel(
        f"{mixer.window_size} x {mixer.window_size} averages: {rows} x {rows} keys", fontsize=9.5, color=INK
    )
    projections = f"l_q {mixer.dim} → {trace.shapes['l_q'][-1]}\nl_kv {mixer.dim} → {trace.shapes['l_kv'][-1]}"
    figure.text(0.53, 0.32, projections, ha="center", fontsize=9, color=LOW)
    axes = _panel(figure, (0.60, 0.13, 0.185, 0.30), f"attention of one query, mean of {mixer.l_heads} heads", LOW)
    # Square roots, so that weights of a tenth of the largest remain visible.
    axes.imshow(trace.pooled.sqrt().numpy(), cmap="Blues", extent=(0, side, side, 0), interpolation="nearest")
    _grid(axes, rows, "white", 0.8)
    _box(axes, trace.query, 1, side, LOW, 2.8)
    axes.set_xlabel(f"each of {side**2} queries asks all {rows**2} keys", fontsize=9.5, color=INK)


def _map(figure: Figure, place: tuple[float, float, float, float], trace: Trace) -> None:
    side, size = trace.side, trace.mixer.window_size
    axes = _panel(figure, place, f"map [{side}, {side}, {trace.mixer.dim}]", INK)
    _show(axes, trace.picture, side)
    _grid(axes, side, "white", 0.4)
    _box(axes, [p // size * size for p in trace.query], size, side, HIGH, 2.6)
    _box(axes, trace.query, 1, side, LOW, 2.6)
    axes.set_xlabel("orange: a window; blue: a query", fontsize=9.5, color=INK)


def _output(figure: Figure, place: tuple[float, float, float, float], shapes: dict[str, tuple[int, ...]]) -> None:
    from matplotlib.patches import Rectangle

    axes = figure.add_axes(place)
    high, low = shapes["h_proj"][-1], shapes["l_proj"][-1]
    axes.set(xlim=(0, 1), ylim=(0, high + low), xticks=[], yticks=[])
    axes.add_patch(Rectangle((0, low), 1, high, color=HIGH, alpha=0.85))
    axes.add_patch(Rectangle((0, 0), 1, low, color=LOW, alpha=0.85))
    axes.text(1.15, low + high / 2, f"h_proj\n{high}", va="center", color=HIGH, fontsize=10)
    axes.text(1.15, low / 2, f"l_proj\n{low}", va="center", color=LOW, fontsize=10)
    axes.set_title("concatenated", fontsize=10.5, weight="bold", color=INK)
    axes.set_xlabel(f"{high} + {low} = {high + low}\nchannels", fontsize=9.5, color=INK)


def _panel(figure: Figure, place: tuple[float, float, float, float], title: str, colour: str) -> Axes:
    axes = figure.add_axes(place)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10.5, weight="bold", color=colour)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.2)
    return axes


def _show(axes: Axes, picture: Tensor, side: int) -> None:
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), extent=(0, side, side, 0), interpolation="nearest")


def _grid(axes: Axes, parts: int, colour: str, width: float) -> None:
    right = axes.get_xlim()[1]
    for part in range(1, parts):
        axes.axhline(part * right / parts, color=colour, linewidth=width, alpha=0.8)
        axes.axvline(part * right / parts, color=colour, linewidth=width, alpha=0.8)


def _box(axes: Axes, corner: Sequence[int], size: int, side: int, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((corner[1], corner[0]), size, size, fill=False, edgecolor="white", linewidth=width + 2))
    axes.add_patch(Rectangle((corner[1], corner[0]), size, size, fill=False, edgecolor=colour, linewidth=width))
    axes.set(xlim=(0, side), ylim=(side, 0))


def _arrow(figure: Figure, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    from matplotlib.patches import FancyArrowPatch

    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 16, "linewidth": 2, "color": colour}
    figure.add_artist(FancyArrowPatch(start, end, transform=figure.transFigure, **style))


def load_picture(file: Path | None) -> Tensor:
    """Read the central square of a picture, [3, 224, 224] in 0..1; scikit-learn's flower by default."""
    import numpy as np
    from PIL import Image

    if file is None:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(load_sample_image("flower.jpg"))
    else:
        image = Image.open(file).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((224, 224))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def hilo_paths(file: Path | None, query: tuple[int, int] | None) -> Figure:
    """Draw the diagram for a picture and a query (row, column) of its map; weights come from seed 0."""
    query = QUERY if query is None else query
    if not all(0 <= place < SIDE for place in query):
        raise ValueError(f"the query needs a row and a column from 0 to {SIDE - 1}; got {query}")
    torch.manual_seed(0)
    picture = load_picture(file)
    return draw_hilo(trace_hilo(make_mixer(), picture, make_tokens(picture), query))
