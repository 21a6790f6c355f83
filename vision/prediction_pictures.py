"""Image files that `… predict` writes: overlays of masks with a legend, masks, and contact sheets,
and the evidence for classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .drawing import MOST_COLOURS, heat, large_regions, overlay, palette_of, picture_grid, short_name
from .predictors import Explanation

SMALL, LARGE = 240, 1200  # pictures are enlarged until a side has about this length, to match the legend's text
MOST_IN_LEGEND = 30
MOST_ON_SHEET = 200
MOST_EXPLAINED = 48
_INK, _PAPER = (32, 33, 36), (255, 255, 255)


_MARK = {"Software": "mixerzoo.vision.predict"}
"""Metadata of the sheets, by which they are told from pictures."""


def is_sheet(path: Path) -> bool:
    """Return whether the file is a sheet that this command has drawn, which it may draw again."""
    try:
        with Image.open(path) as image:
            return _MARK.items() <= image.info.items()
    except OSError:
        return False


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture. `ranked` holds (class, probability), or for segmenters (class, share of pixels)."""

    file: Path
    ranked: list[tuple[int, float]]
    overlay: Path | None = None


def draw_overlay(path: Path, picture: Image.Image, mask: Tensor, classes: Sequence[str]) -> None:
    """Draw the picture, its mask [H, W] as an overlay, and a legend of the classes present, by decreasing area."""
    palette = palette_of(classes)
    pixels = np.asarray(picture.convert("RGB")) / 255
    painted = Image.fromarray((255 * overlay(pixels, mask.numpy(), palette)).round().astype(np.uint8))
    factor = max(1, min(-(-SMALL // min(picture.size)), LARGE // max(picture.size)))
    panels = [
        panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.NEAREST)
        for panel in (picture, painted)
    ]
    width, height = panels[0].size
    unit = max(12, min(width, height) // 30)
    if len(classes) > MOST_COLOURS:
        _name_regions(panels[1], mask.numpy(), classes, factor=factor, unit=unit)
    gap = max(8, width // 80)
    beside = width <= 2 * height  # else the two stand one above the other
    right, below = (width + gap, 0) if beside else (0, height + gap)
    legend = _legend(mask, classes, palette, unit=unit, height=below + height)
    sheet = Image.new("RGB", (right + width + gap + legend.width, max(below + height, legend.height)), _PAPER)
    sheet.paste(panels[0], (0, 0))
    sheet.paste(panels[1], (right, below))
    sheet.paste(legend, (right + width + gap, 0))
    sheet.save(path)


def _name_regions(panel: Image.Image, mask: np.ndarray, classes: Sequence[str], *, factor: int, unit: int) -> None:
    """Write the names of large classes into the picture, because colours of many classes are hard to tell apart."""
    draw, font = ImageDraw.Draw(panel), _font(unit)
    for label, row, column in large_regions(mask):
        half = font.getlength(classes[label]) / 2
        # Inside the picture, where the name is not too long for it.
        place = (
            max(half, min(factor * (column + 0.5), panel.width - half)),
            max(unit, min(factor * (row + 0.5), panel.height - unit)),
        )
        stroke = max(1, unit // 8)
        draw.text(place, classes[label], font=font, fill="white", anchor="mm", stroke_width=stroke, stroke_fill="black")


def _legend(mask: Tensor, classes: Sequence[str], palette: np.ndarray, *, unit: int, height: int) -> Image.Image:
    """Draw the legend in up to three columns, as many as are needed to fit into `height`."""
    labels, pixels = mask.unique(return_counts=True)
    order = pixels.argsort(descending=True, stable=True).tolist()
    lines: list[tuple[int | None, str]] = []
    for index in order[:MOST_IN_LEGEND]:
        share = 100 * float(pixels[index]) / mask.numel()
        lines.append(
            (int(labels[index]), f"{classes[int(labels[index])]}  {'< 0.1' if share < 0.05 else f'{share:.1f}'} %")
        )
    if len(order) > len(lines):
        lines.append((None, f"and {len(order) - len(lines)} more"))
    font, step = _font(unit), round(1.7 * unit)
    columns = min(3, -(-len(lines) // max(1, (height - unit) // step)))
    rows = -(-len(lines) // columns)
    width = round(max(font.getlength(text) for _, text in lines)) + 3 * unit
    sheet = Image.new("RGB", (columns * width, step * rows + unit), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (index, text) in enumerate(lines):
        left, top = place // rows * width, place % rows * step + unit // 2
        if index is not None:
            colour = tuple(round(255 * part) for part in palette[index])
            draw.rectangle((left, top, left + round(1.5 * unit), top + unit), fill=colour)
        draw.text((left + 2 * unit, top + unit // 2), text, font=font, fill=_INK, anchor="lm")
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's default font, which covers more scripts than Pillow's."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def write_mask(path: Path, mask: Tensor, classes: Sequence[str]) -> None:
    """Write a palette PNG of class numbers, which data.source=mask_folder reads and viewers show in colour."""
    if len(classes) > 255:
        raise ValueError(
            f"masks hold class numbers up to 254, 255 being none; there are {len(classes)} classes: leave --masks out"
        )
    image = Image.fromarray(mask.numpy().astype(np.uint8))
    image.putpalette((255 * palette_of(classes)).round().astype(np.uint8).tobytes())
    image.save(path)


def draw_sheet(
    path: Path, pictures: Sequence[Image.Image], predictions: Sequence[Prediction], classes: Sequence[str]
) -> None:
    """Draw a contact sheet of the first pictures with their predicted class, its probability and the file name."""
    shown, count = len(pictures), len(predictions)
    title = f"{shown} picture{'s' * (shown != 1)}" if shown == count else f"the first {shown} of {count} pictures"
    figure, grid = picture_grid(shown, title=title, row_height=1.65, column_width=1.45)
    for axes, picture, prediction in zip(grid, pictures, predictions, strict=False):  # the grid has empty places
        axes.imshow(picture)
        index, probability = prediction.ranked[0]
        axes.set_title(
            f"{short_name(classes[index], 18)} ({100 * probability:.0f} %)\n{short_name(prediction.file.name, 22)}",
            fontsize=7,
            pad=3,
        )
    figure.savefig(path, dpi=130, metadata=_MARK)


def draw_evidence(
    path: Path, explained: Sequence[tuple[Path, Explanation]], classes: Sequence[str], *, total: int, predicted: bool
) -> None:
    """Draw each picture as the model sees it, beside the places that speak for a class.

    Args:
        total: how many pictures there were, of which `explained` are the first.
        predicted: whether the classes are those that the model predicts.
    """
    (_, first), shown = explained[0], len(explained)
    height, width = first.map_size
    which = "the predicted class" if predicted else f"“{short_name(classes[first.index])}”"
    title = f"evidence for {which} on the {height} x {width} map of stage {first.stage}"
    title += "" if shown == total else f"; the first {shown} of {total} pictures"
    figure, grid = picture_grid(2 * shown, title=title, row_height=1.75, column_width=1.45, columns=min(8, 2 * shown))
    for place, (file, one) in enumerate(explained):
        seen, explanation = grid[2 * place], grid[2 * place + 1]
        seen.imshow(one.image)
        seen.set_title(f"{short_name(file.name, 22)}\n", fontsize=7, pad=3)
        explanation.imshow(heat(one.image, one.evidence))
        name = f"{short_name(classes[one.index], 18)} ({100 * one.probability:.0f} %)"
        # If there is only evidence against the class, the picture stays grey.
        explanation.set_title(f"{name}\n{'' if one.evidence.max() > 0 else 'nothing for it'}", fontsize=7, pad=3)
    figure.savefig(path, dpi=130, metadata=_MARK)
