"""Draws on a picture which patches a model merges, keeps and drops, block by block.

    python -m mixerzoo.vision.visualize tokens tome_deit_small_patch16_224 picture.jpg --model-kwargs r=16

The figures use only `TokenStage.assign` of `model.trace_tokens`, so they work for any method, number of prefix tokens,
patch size and aspect ratio. Patches that share a token are painted with their mean colour and outlined; dropped ones
fade to grey.

Unusual: the library ships no weights, so the figures of the gallery use random ones, and say so. Keys are then random
projections of the patches, which is enough to merge similar ones. Pruning by class attention would select a random
colour; there the class token is set to the mean of the central patches (`look_for_the_middle`).
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
from .drawing import denormalised

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

INK = "#343a40"
STAGES = 4  # the most stages drawn of a picture
FADED = 0.15  # opacity of a dropped patch
GROUND = 0.86  # grey behind dropped patches: on white, a white picture would look the same whatever is dropped
SIDE = 224
LONGEST = 4  # sides of the drawn picture: what is longer is scaled down
MIDDLE = 4  # patches along each side of the central square


def grid_of(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of a grid of `patches` whose aspect ratio is closest to the picture's."""
    shapes = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


def spread_over(picture: Tensor, values: Tensor) -> Tensor:
    """Expand values per patch [patches] to values per pixel [H, W] of a picture [3, H, W]."""
    height, width = picture.shape[1:]
    rows, columns = grid_of(len(values), height, width)
    row = torch.arange(height) * rows // height
    column = torch.arange(width) * columns // width
    return values.view(rows, columns)[row[:, None], column]


def group_sizes(places: Tensor) -> Tensor:
    """Return how many patches share the token of each patch [patches]; 0 for dropped ones."""
    known = places.clamp(min=0)
    count = torch.zeros(int(known.max()) + 1, dtype=torch.int64).index_add(0, known, (places >= 0).long())
    return torch.where(places >= 0, count[known], 0)


def _fade(picture: Tensor) -> Tensor:
    return FADED * picture + (1 - FADED) * GROUND


def _edges(values: Tensor) -> Tensor:
    """Return where a pixel's value [H, W] differs from that of its left or upper neighbour."""
    edge = torch.zeros(values.shape, dtype=torch.bool)
    edge[:, 1:] |= values[:, 1:] != values[:, :-1]
    edge[1:] |= values[1:] != values[:-1]
    return edge


def paint_kept(picture: Tensor, places: Tensor) -> Tensor:
    """Fade the picture [3, H, W] in 0..1 where `places` [patches] is -1, that is, where patches are dropped."""
    return torch.where(spread_over(picture, places) >= 0, picture, _fade(picture))


def paint_groups(picture: Tensor, places: Tensor) -> Tensor:
    """Paint each group of patches with its mean colour and a one-pixel outline, and fade dropped patches."""
    place = spread_over(picture, places)
    group = place.clamp(min=0).flatten()
    pixels = torch.zeros(int(group.max()) + 1).index_add(0, group, torch.ones(group.shape))
    colour = torch.zeros(3, len(pixels)).index_add(1, group, picture.flatten(1)) / pixels.clamp(min=1)
    painted = colour[:, group].view(picture.shape)
    line = torch.where(painted.mean(0) > 0.4, 0.55 * painted, 0.6 * painted + 0.25)
    return torch.where(place >= 0, torch.where(_edges(place), line, painted), _fade(picture))


def shown_stages(stages: Sequence[TokenStage], most: int = STAGES) -> list[TokenStage]:
    """Return stages that change the assignment of tokens: at most `most`, evenly spaced, including the last."""
    changed, before = [], torch.arange(stages[0].assign.shape[1])
    for stage in stages:
        if not torch.equal(stage.assign, before.expand_as(stage.assign)):
            changed.append(stage)
        before = stage.assign
    count = min(most, len(changed))
    return [changed[len(changed) * (i + 1) // count - 1] for i in range(count)]


def _describe(stage: TokenStage, places: Tensor) -> str:
    left, tokens = int((places >= 0).sum()), len(places[places >= 0].unique())
    if stage.stage is not None:
        return f"stages[{stage.stage}].blocks[{stage.block}]: {left} of {len(places)} positions get the MLP"
    if tokens < left:
        return f"after blocks[{stage.block}]: {len(places)} patches in {tokens} tokens"
    return f"after blocks[{stage.block}]: {left} of {len(places)} patches"


def draw_tokens(pictures: Sequence[Tensor], traces: Sequence[Sequence[TokenStage]], title: str, prefix: int) -> Figure:
    """Draw two rows of panels per picture: the picture, some stages, and a map of the fate of its patches.

    Args:
        pictures: [3, H, W] from 0 to 1 each, of any sizes.
        traces: the result of `trace_tokens` for each picture.
        prefix: number of tokens before those of the patches.
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
        _map(figure, next(row), picture, traces[i], prefix)
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def _show(axes: Axes, picture: Tensor, title: str) -> None:
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=9.5, color=INK)


def _map(figure: Figure, axes: Axes, picture: Tensor, stages: Sequence[TokenStage], prefix: int) -> None:
    """Map the final group size of each patch if tokens are merged, or else the number of stages that keep it."""
    from matplotlib.colors import LogNorm

    places = [stage.assign[0, prefix:] for stage in stages]
    sizes = group_sizes(places[-1])
    if sizes.max() > 1:
        values, title, norm = sizes.float(), "patches that share a token at the end", LogNorm(1, int(sizes.max()))
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= sizes.max()]
    else:
        routed = stages[-1].stage is not None
        title = "decisions that give a position the MLP" if routed else "blocks that keep a patch"
        values, norm = torch.stack([*places]).ge(0).float().sum(0), None
        ticks = values.unique().tolist()
    image = axes.imshow(spread_over(picture, values).numpy(), cmap="viridis", norm=norm, interpolation="nearest")
    axes.set_title(title, fontsize=9.5, color=INK)
    bar = figure.colorbar(image, cax=axes.inset_axes((0.0, -0.07, 1.0, 0.04)), orientation="horizontal", ticks=ticks)
    bar.ax.set_xticklabels([f"{tick:g}" for tick in ticks], fontsize=8)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)  # pyright: ignore


def prepare_picture(model: Any, file: Path | str, side: int) -> tuple[Tensor, Tensor]:
    """Read a picture; return it as [3, H, W] in 0..1 and as the model's input [1, C, H, W].

    The short side has about `side` pixels, or less if the long one would have more than `LONGEST` times as many; what
    exceeds whole patches is cropped. A model of one size gets its size. `file` may also be the name of one of
    scikit-learn's photographs, "china.jpg" or "flower.jpg".
    """
    from PIL.Image import fromarray
    from sklearn.datasets import load_sample_image
    from timm.data import create_transform, resolve_data_config

    from .data.pictures import read_picture

    if model.in_chans not in (1, 3):
        raise ValueError(f"pictures are grey or in colour; the model has in_chans={model.in_chans}")
    is_sample = file in ("china.jpg", "flower.jpg") and not Path(file).exists()
    image = fromarray(load_sample_image(file)) if is_sample else read_picture(file)
    config = resolve_data_config({}, model=model)
    config.update(input_size=(model.in_chans, *_drawn_size(model, image, side)), crop_pct=1.0, crop_mode="center")
    if model.in_chans == 1 and len(config["mean"]) == 3:
        config.update({key: (sum(config[key]) / 3,) for key in ("mean", "std")})
    transform: Any = create_transform(**config)
    x = transform(image.convert("L") if model.in_chans == 1 else image)
    return torch.from_numpy(denormalised(x, config["mean"], config["std"])).permute(2, 0, 1), x[None]


def _drawn_size(model: Any, image: Image, side: int) -> list[int]:
    """Return the height and width in whole patches."""
    if not getattr(model, "dynamic_img_size", True):
        return list(model.patch_embed.img_size)
    scale = min(side / min(image.width, image.height), LONGEST * side / max(image.width, image.height))
    step = model.feature_info[-1]["reduction"]
    return [max(1, round(pixels * scale / step)) * step for pixels in (image.height, image.width)]


@torch.no_grad()
def token_figure(model: nn.Module, name: str, files: Sequence[Path | str], *, weights: str, side: int = SIDE) -> Figure:
    """Draw what a model does with the tokens of pictures.

    Raises:
        ValueError: the model has no `trace_tokens`, or neither merges nor drops a token.
    """
    if not hasattr(model, "trace_tokens"):
        raise ValueError(
            f"{name} tells nothing of its tokens. Take a model that reduces them, such as tome_deit_small_patch16_224 "
            "or evit_deit_small_patch16_224; a vision transformer of timm becomes one by reduce_tokens"
        )
    reducing: Any = model.eval()
    pictures, inputs = zip(*(prepare_picture(reducing, file, side) for file in files), strict=True)
    traces = [reducing.trace_tokens(x) for x in inputs]
    if not all(shown_stages(stages) for stages in traces):
        raise ValueError(f"with these settings {name} neither merges nor drops a token")
    method = getattr(reducing, "method", None)
    title = f"{name}, {weights}" + (f"\n{method}" if method is not None else "")
    return draw_tokens(pictures, traces, title, getattr(reducing, "num_prefix_tokens", 0))


@torch.no_grad()
def look_for_the_middle(model: Any, x: Tensor) -> None:
    """Make the class token of an untrained transformer attend to patches similar to the middle of x [1, 3, H, W].

    Keys get the projection of the queries, and the class token becomes the mean of the central patches.
    """
    tokens = model.patch_embed(x)  # a map, since the model takes pictures of any size
    top, left = (tokens.shape[1] - MIDDLE) // 2, (tokens.shape[2] - MIDDLE) // 2
    model.cls_token.copy_(tokens[:, top : top + MIDDLE, left : left + MIDDLE].mean((1, 2), keepdim=True)[0])
    model.pos_embed.zero_()
    for block in model.blocks:
        dim = block.attn.qkv.weight.shape[1]
        block.attn.qkv.weight[dim : 2 * dim] = block.attn.qkv.weight[:dim]


def example_figures(side: int = SIDE) -> dict[str, Figure]:
    """Draw the figures of the gallery, with weights from seed 0."""
    figures = {}
    for key, name, file in (
        ("token_merging", "tome_deit_small_patch16_224", "china.jpg"),
        ("token_pruning", "evit_deit_small_patch16_224", "flower.jpg"),
    ):
        torch.manual_seed(0)
        model, weights = timm.create_model(name).eval(), "random weights"
        if key == "token_pruning":
            look_for_the_middle(model, prepare_picture(model, file, side)[1])
            weights += "; the class token is the mean of the patches in the middle"
        figures[key] = token_figure(model, name, [file], weights=weights, side=side)
    return figures
