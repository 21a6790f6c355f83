"""Draws the receptive field of one position through each mixer alone, a panel per class of `mixerzoo.mixers`.

    python -m mixerzoo.vision.visualize mixers --output docs/pictures

A field is the magnitude of the gradient of the central output with respect to the input, averaged over channels and
several inputs of noise. It shows a module before training.

Unusual: for mixers with two sets of tokens the gradient is taken with respect to the set that provides keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..mixers import (
    BGAF,
    CKS,
    DLKPPM,
    LSKA,
    SDLSKA,
    SS2D,
    AtrousSS2D,
    BidirectionalMamba,
    CrossAttention,
    DepthwiseConv2d,
    DilatedReparamBlock,
    GatedLinearAttention2d,
    GatherAttention,
    HiLo,
    InceptionDWConv,
    LargeKernelAttention,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    PredictorLG,
    SelectiveScan2d,
    TransposedAttention,
    WaveletSS2D,
    WindowCrossAttention,
    pool_to_tokens,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, DIM, INPUTS = 24, 16, 16
TOKENS = 6  # side of the maps of compressed or semantic tokens
DECADES = 5  # how far below its largest value a field is drawn
INK = "#343a40"


@dataclass(frozen=True)
class Subject:
    """A mixer by its name in `mixerzoo.mixers`. `field` computes its receptive field, [rows, columns]."""

    name: str
    note: str
    field: Callable[[], Tensor]


def gradient(run: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    """Return the mean magnitude [*shape] of the gradient of the central output of `run`, for x [INPUTS, *shape,
    DIM]."""
    x = torch.randn(INPUTS, *shape, DIM).mul_(2).requires_grad_()
    out = run(x)
    middle = tuple(length // 2 for length in out.shape[1:-1])
    sent = torch.randn(INPUTS, out.shape[-1])
    (got,) = torch.autograd.grad(out[(slice(None), *middle)], x, sent)
    return got.abs().mean((0, -1))


def of_map(mixer: nn.Module) -> Tensor:
    return gradient(mixer.eval(), SIDE, SIDE)


def of_channels_first(mixer: nn.Module) -> Tensor:
    mixer = mixer.eval()
    return gradient(lambda x: mixer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), SIDE, SIDE)


def of_sequence(mixer: nn.Module) -> Tensor:
    """Return the field of a mixer of sequences over a map that is flattened row by row."""
    mixer = mixer.eval()
    return gradient(lambda x: mixer(x.flatten(1, 2)).unflatten(1, (SIDE, SIDE)), SIDE, SIDE)


def _line() -> Tensor:
    field = torch.zeros(SIDE, SIDE)
    field[SIDE // 2] = gradient(NeighborhoodAttention1d(DIM, 2, 7), SIDE)
    return field


def _slice_of_volume() -> Tensor:
    return gradient(NeighborhoodAttention3d(DIM, 2, 5), 8, SIDE, SIDE)[4]


def _cross_attention() -> Tensor:
    mixer, tokens = CrossAttention(DIM, 2), torch.randn(INPUTS, TOKENS, TOKENS, DIM)
    return gradient(lambda x: mixer(tokens, x), SIDE, SIDE)


def _window_cross_attention() -> Tensor:
    """Return the field of STViT-R's first semantic tokens: windows of 3 x 3 tokens attend to windows of 10 x 10
    positions."""
    mixer = WindowCrossAttention(DIM, 2, window_size=3, key_window_size=10)
    tokens = torch.randn(INPUTS, SIDE // 2, SIDE // 2, DIM)
    return gradient(lambda x: mixer(tokens, x), SIDE, SIDE)


def _gather() -> Tensor:
    mixer, compressed = GatherAttention(DIM, 2), torch.randn(INPUTS, TOKENS**2, DIM)
    return gradient(lambda x: mixer(compressed, x.flatten(1, 2))[0].unflatten(1, (TOKENS, TOKENS)), SIDE, SIDE)


def _transposed() -> Tensor:
    """Return the field over compressed tokens; queries and keys are those of the gather attention before, per head."""
    gather, mixer = GatherAttention(DIM, 2), TransposedAttention(DIM, 2)
    lookup = torch.randn(INPUTS, SIDE * SIDE, DIM)

    def run(x: Tensor) -> Tensor:
        compressed = x.flatten(1, 2)
        _, query, key = gather(compressed.detach(), lookup)
        return mixer(compressed, query, key).unflatten(1, (SIDE, SIDE))

    return gradient(run, TOKENS, TOKENS)


def _selected() -> Tensor:
    """Return the field of a selection among small convolutions of the input."""
    mixer = CKS(DIM).eval()
    bands = nn.ModuleList([DepthwiseConv2d(DIM, sides) for sides in (3, (1, 9), (9, 1))])
    return of_channels_first(_Joined(mixer, bands))


def _guided() -> Tensor:
    """Return the field of BGAF with the input as detail, its 9 x 9 means as context and a band as boundary."""
    bands = nn.ModuleList([nn.Identity(), nn.AvgPool2d(9, 1, 4), DepthwiseConv2d(DIM, (1, 15))])
    return of_channels_first(_Joined(BGAF(DIM), bands))


class _Joined(nn.Module):
    """A mixer of several maps, which other modules make of one."""

    def __init__(self, mixer: nn.Module, makers: nn.ModuleList) -> None:
        super().__init__()
        self.mixer, self.makers = mixer, makers

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(*(maker(x) for maker in self.makers))


def subjects() -> list[Subject]:
    """Every name of `mixerzoo.mixers`, small, with fresh weights."""
    branches = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
    return [
        Subject("NeighborhoodAttention1d", "7 of a line", _line),
        Subject(
            "NeighborhoodAttention2d",
            "7 x 7, dilation 2",
            lambda: of_map(NeighborhoodAttention2d(DIM, 2, 7, dilation=2)),
        ),
        Subject("NeighborhoodAttention3d", "5 x 5 x 5: the middle slice", _slice_of_volume),
        Subject(
            "DepthwiseConv2d",
            "7 x 7, dilation 3",
            lambda: of_channels_first(DepthwiseConv2d(DIM, 7, dilation=3)),
        ),
        Subject(
            "DilatedReparamBlock",
            "13 x 13 and five dilated branches",
            lambda: of_channels_first(DilatedReparamBlock(DIM, 13, branches=branches)),
        ),
        Subject(
            "InceptionDWConv",
            "a square and two bands",
            lambda: of_channels_first(InceptionDWConv(DIM)),
        ),
        Subject(
            "LargeKernelAttention",
            "5 x 5, then 7 x 7 dilated",
            lambda: of_channels_first(LargeKernelAttention(DIM)),
        ),
        Subject("LSKA", "23 x 23 from bands, one after another", lambda: of_channels_first(LSKA(DIM, 23))),
        Subject("SDLSKA", "5 x 5, then two bands, selected", lambda: of_channels_first(SDLSKA(DIM, 23))),
        Subject("CKS", "selects from 3 x 3 and two bands", _selected),
        Subject("DLKPPM", "means of all sizes, and LSKA", lambda: of_channels_first(DLKPPM(DIM, DIM, DIM))),
        Subject("BGAF", "a point, its 9 x 9 mean, a band", _guided),
        Subject("HiLo", "a window of 2 x 2, and pooled keys", lambda: of_map(HiLo(DIM, 4, window_size=2))),
        Subject("GatedLinearAttention2d", "row by row, both ways", lambda: of_map(GatedLinearAttention2d(DIM, 2))),
        Subject(
            "BidirectionalMamba",
            "row by row, both ways",
            lambda: of_sequence(BidirectionalMamba(DIM, state_dim=4)),
        ),
        Subject(
            "SelectiveScan2d",
            "rows and columns, both ways",
            lambda: of_map(SelectiveScan2d(DIM, state_dim=4, dt_rank=2)),
        ),
        Subject("SS2D", "a 3 x 3 convolution before the scans", lambda: of_map(SS2D(DIM, state_dim=4))),
        Subject("AtrousSS2D", "four sub-grids, each scanned one way", lambda: of_map(AtrousSS2D(DIM, state_dim=4))),
        Subject(
            "WaveletSS2D",
            "a scan beside convolutions of wavelets",
            lambda: of_map(WaveletSS2D(DIM, kernel_size=5)),
        ),
        Subject("CrossAttention", "tokens look at a whole map", _cross_attention),
        Subject("WindowCrossAttention", "3 x 3 tokens look at 10 x 10", _window_cross_attention),
        Subject("pool_to_tokens", "3 x 3 maxima of each 7 x 7 window", lambda: gradient(_pooled, SIDE, SIDE)),
        Subject("GatherAttention", "a compressed token looks at the map", _gather),
        Subject("TransposedAttention", "a position gets 6 x 6 tokens back", _transposed),
        Subject("PredictorLG", "itself, and the mean of all", lambda: of_sequence(PredictorLG(DIM))),
    ]


def _pooled(x: Tensor) -> Tensor:
    return pool_to_tokens(x, 7, 3)


def draw_mixers(columns: int = 5) -> Figure:
    """Draw a panel per mixer with the logarithm of its field."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    shown = subjects()
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.35 * columns, 2.6 * rows + 0.8), layout="constrained", facecolor="white")
    title = f"What the middle of a map of {SIDE} x {SIDE} gets through each mixer, with fresh weights"
    figure.suptitle(title, fontsize=13, color=INK)
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes, subject in zip(panels, shown, strict=False):
        field = subject.field()
        field = (field / field.max()).clamp_min(10**-DECADES)
        axes.imshow(field.numpy(), cmap="magma", norm=LogNorm(10**-DECADES, 1), interpolation="nearest")
        axes.set_title(subject.name, fontsize=9.5, fontweight="bold", color=INK)
        axes.set_xlabel(subject.note, fontsize=8.5, color=INK)
        axes.set(xticks=[], yticks=[])
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    shades = "white: as much as any position, each shade darker a tenth of it; black: less than a hundred thousandth"
    figure.supxlabel(f"{shades}, or nothing", fontsize=9.5, color=INK)
    return figure


def mixer_fields() -> Figure:
    torch.manual_seed(0)
    return draw_mixers()
