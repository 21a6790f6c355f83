"""Where the tokens of a model go, drawn on the picture: which patches are merged, kept and dropped behind its blocks.

    python -m mixerzoo.vision.visualize tokens tome_deit_small_patch16_224 picture.jpg --model-kwargs r=16

All that is drawn comes from `TokenStage.assign` of `model.trace_tokens`, so any method, prefix, patch size and aspect
ratio will do. Patches that share a token are painted with their mean colour and outlined; dropped ones fade to white.

Unusual: weights cannot be shipped with a library, so the gallery's own pictures use random ones, and say so. Keys are
then random projections of the patches, which is enough to merge what looks alike. For pruning by class attention that
would be a search for a random colour; there the class token is the mean of the patches in the middle, and looks for
more of them (`look_for_the_middle`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from .backbones._token_reduction import TokenStage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#343a40"
STAGES = 4  # at most so many are drawn of a picture
FADED = 0.15  # how much of a dropped patch can still be seen
SIDE = 224
MIDDLE = 4  # patches a side


def grid_of(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of so many patches on a picture of this shape."""
    shapes = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


def spread_over(picture: Tensor, values: Tensor) -> Tensor:
    """One value a patch [patches] to one a pixel [H, W] of a picture [3, H, W]."""
    height, width = picture.shape[1:]
    rows, columns = grid_of(len(values), height, width)
    row = torch.arange(height) * rows // height
    column = torch.arange(width) * columns // width
    return values.view(rows, columns)[row[:, None], column]


def group_sizes(places: Tensor) -> Tensor:
    """How many patches share the token of each [patches]; 0 for dropped ones."""
    known = places.clamp(min=0)
    count = torch.zeros(int(known.max()) + 1, dtype=torch.int64).index_add(0, known, (places >= 0).long())
    return torch.where(places >= 0, count[known], 0)


def paint_kept(picture: Tensor, places: Tensor) -> Tensor:
    """The picture [3, H, W] from 0 to 1, faded where patches [patches] are dropped (-1)."""
    return torch.where(spread_over(picture, places) >= 0, picture, FADED * picture + 1 - FADED)


def paint_groups(picture: Tensor, places: Tensor) -> Tensor:
    """The same, and each group of patches at one place with its mean colour inside a line of one pixel."""
    place = spread_over(picture, places)
    group = place.clamp(min=0).flatten()
    pixels = torch.zeros(int(group.max()) + 1).index_add(0, group, torch.ones(group.shape))
    colour = torch.zeros(3, len(pixels)).index_add(1, group, picture.flatten(1)) / pixels.clamp(min=1)
    painted = colour[:, group].view(picture.shape)
    edge = torch.zeros(place.shape, dtype=torch.bool)
    edge[:, 1:] |= place[:, 1:] != place[:, :-1]
    edge[1:] |= place[1:] != place[:-1]
    line = torch.where(painted.mean(0) > 0.4, 0.55 * painted, 0.6 * painted + 0.25)
    return torch.where(place >= 0, torch.where(edge, line, painted), FADED * picture + 1 - FADED)


def shown_stages(stages: Sequence[TokenStage], most: int = STAGES) -> list[TokenStage]:
    """Those behind which tokens are elsewhere than before; if they are many, evenly many of them with the last."""
    changed, before = [], torch.arange(stages[0].assign.shape[1])
    for stage in stages:
        if not torch.equal(stage.assign, before.expand_as(stage.assign)):
            changed.append(stage)
        before = stage.assign
    count = min(most, len(changed))
    return [changed[len(changed) * (i + 1) // count - 1] for i in range(count)]


def _describe(stage: TokenStage, places: Tensor) -> str:
    left, tokens = int((places >= 0).sum()), len(places[places >= 0].unique())
    if tokens < left:
        return f"behind blocks[{stage.block}]: {len(places)} patches in {tokens} tokens"
    return f"behind blocks[{stage.block}]: {left} of {len(places)} patches"


def draw_tokens(pictures: Sequence[Tensor], traces: Sequence[Sequence[TokenStage]], title: str, prefix: int) -> Figure:
    """Two lines of panels for each picture: itself, some stages, and a map of what became of its patches.

    Args:
        pictures: [3, H, W] from 0 to 1 each, of any sizes.
        traces: for each picture what `trace_tokens` gives for it alone.
        prefix: tokens before the patches.
    """
    from matplotlib.figure import Figure

    chosen = [shown_stages(stages) for stages in traces]
    columns = max(math.ceil((len(stages) + 2) / 2) for stages in chosen)
    heights = [picture.shape[1] / picture.shape[2] for picture in pictures for _ in range(2)]
    width = 11.5 / columns
    inches = (11.5, sum(width * height + 0.35 for height in heights) + 0.6)
    figure = Figure(figsize=inches, layout="constrained", facecolor="white")
    panels = figure.subplots(2 * len(pictures), columns, squeeze=False, height_ratios=heights)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, (picture, stages) in enumerate(zip(pictures, chosen, strict=True)):
        row = iter(panels[2 * i : 2 * i + 2].flat)
        _show(next(row), picture, "the picture")
        for stage in stages:
            places = stage.assign[0, prefix:]
            paint = paint_groups if group_sizes(places).max() > 1 else paint_kept
            _show(next(row), paint(picture, places), _describe(stage, places))
        _map(figure, next(row), picture, [stage.assign[0, prefix:] for stage in traces[i]])
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def _show(axes: Axes, picture: Tensor, title: str) -> None:
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=9.5, color=INK)


def _map(figure: Figure, axes: Axes, picture: Tensor, places: Sequence[Tensor]) -> None:
    """Merged: the patches in the token of each, at the end. Pruned: the blocks that each patch went through."""
    from matplotlib.colors import LogNorm

    sizes = group_sizes(places[-1])
    if sizes.max() > 1:
        values, title, norm = sizes.float(), "patches that share a token at the end", LogNorm(1, int(sizes.max()))
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= sizes.max()]
    else:
        values, title, norm = torch.stack([*places]).ge(0).float().sum(0), "blocks behind which a patch is left", None
        ticks = values.unique().tolist()
    image = axes.imshow(spread_over(picture, values).numpy(), cmap="viridis", norm=norm, interpolation="nearest")
    axes.set_title(title, fontsize=9.5, color=INK)
    bar = figure.colorbar(image, cax=axes.inset_axes((0.0, -0.07, 1.0, 0.04)), orientation="horizontal", ticks=ticks)
    bar.ax.set_xticklabels([f"{tick:g}" for tick in ticks], fontsize=8)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)  # pyright: ignore


def read_picture(model: Any, file: Path | str, side: int) -> tuple[Tensor, Tensor]:
    """A picture [3, H, W] from 0 to 1, and [1, C, H, W] as the model wants it.

    The short side has about `side` pixels; what exceeds whole patches is cropped. `file` may also be the name of one
    of scikit-learn's photographs, "china.jpg" or "flower.jpg".
    """
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from timm.data import create_transform, resolve_data_config

    is_sample = file in ("china.jpg", "flower.jpg") and not Path(file).exists()
    image = Image.fromarray(load_sample_image(file)) if is_sample else Image.open(file)
    step = model.feature_info[-1]["reduction"]
    size = [max(1, round(pixels * side / min(image.size) / step)) * step for pixels in (image.height, image.width)]
    config = resolve_data_config({}, model=model)
    config.update(input_size=(model.in_chans, *size), crop_pct=1.0, crop_mode="center")
    transform: Any = create_transform(**config)
    x = transform(image.convert("L" if model.in_chans == 1 else "RGB"))
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (x * std + mean).clamp(0, 1).expand(3, -1, -1), x[None]


@torch.no_grad()
def token_figure(model: nn.Module, name: str, files: Sequence[Path | str], *, weights: str, side: int = SIDE) -> Figure:
    """What a model does with the tokens of pictures.

    Raises:
        ValueError: for a model that has no `trace_tokens`, and for pictures whose tokens stay where they are.
    """
    if not hasattr(model, "trace_tokens"):
        raise ValueError(
            f"{name} tells nothing of its tokens. Take a model that reduces them, such as tome_deit_small_patch16_224 "
            "or evit_deit_small_patch16_224; a vision transformer of timm becomes one by reduce_tokens"
        )
    reducing: Any = model.eval()
    pictures, inputs = zip(*(read_picture(reducing, file, side) for file in files), strict=True)
    traces = [reducing.trace_tokens(x) for x in inputs]
    if not all(shown_stages(stages) for stages in traces):
        raise ValueError(f"with these settings {name} neither merges nor drops a token")
    method = getattr(reducing, "method", None)
    title = f"{name}, {weights}" + (f"\n{method}" if method is not None else "")
    return draw_tokens(pictures, traces, title, getattr(reducing, "num_prefix_tokens", 0))


@torch.no_grad()
def look_for_the_middle(model: Any, x: Tensor) -> None:
    """Make a fresh transformer attend from its class token to what looks like the middle of x [1, 3, H, W].

    Keys get the queries' projection, and the class token is the mean of the patches there.
    """
    tokens = model.patch_embed(x)  # a map, since the model takes pictures of any size
    top, left = (tokens.shape[1] - MIDDLE) // 2, (tokens.shape[2] - MIDDLE) // 2
    model.cls_token.copy_(tokens[:, top : top + MIDDLE, left : left + MIDDLE].mean((1, 2), keepdim=True)[0])
    model.pos_embed.zero_()
    for block in model.blocks:
        dim = block.attn.qkv.weight.shape[1]
        block.attn.qkv.weight[dim : 2 * dim] = block.attn.qkv.weight[:dim]


def example_figures(side: int = SIDE) -> dict[str, Figure]:
    """The gallery's pictures, with weights from seed 0."""
    figures = {}
    for key, name, file in (
        ("token_merging", "tome_deit_small_patch16_224", "china.jpg"),
        ("token_pruning", "evit_deit_small_patch16_224", "flower.jpg"),
    ):
        torch.manual_seed(0)
        model, weights = timm.create_model(name).eval(), "random weights"
        if key == "token_pruning":
            look_for_the_middle(model, read_picture(model, file, side)[1])
            weights += "; the class token is the mean of the patches in the middle"
        figures[key] = token_figure(model, name, [file], weights=weights, side=side)
    return figures
