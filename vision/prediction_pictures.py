"""The pictures of `… predict`: a mask laid over its picture with a legend, a mask as a file, and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALL, LARGE = 240, 1200  # smaller pictures are enlarged to about these sides, to stand up to a legend
MOST_IN_LEGEND = 24
MOST_ON_SHEET = 200
_INK, _PAPER = (32, 33, 36), (255, 255, 255)


@dataclass(frozen=True)
class Prediction:
    """Of one picture: (class number, probability), or of a segmenter (class number, share of the pixels), sorted."""

    file: Path
    found: list[tuple[int, float]]
    overlay: Path | None = None


def draw_overlay(path: Path, picture: Image.Image, mask: Tensor, classes: Sequence[str]) -> None:
    """The picture, the classes of its pixels [H, W] laid over it, and a legend of those that occur, largest first."""
    from .training.pictures import class_colours, overlay

    palette = class_colours(len(classes))
    pixels = np.asarray(picture.convert("RGB")) / 255
    painted = Image.fromarray((255 * overlay(pixels, mask.numpy(), palette)).round().astype(np.uint8))
    factor = max(1, min(-(-SMALL // min(picture.size)), LARGE // max(picture.size)))
    panels = [
        panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.NEAREST)
        for panel in (picture, painted)
    ]
    legend = _legend(mask, classes, palette, unit=max(12, min(panels[0].size) // 30))
    gap = max(8, legend.width // 30)
    beside = panels[0].width <= 2 * panels[0].height  # else the two stand one above the other
    right = (panels[0].width + gap) if beside else 0
    below = 0 if beside else panels[0].height + gap
    size = (right + panels[0].width + gap + legend.width, max(below + panels[0].height, legend.height))
    sheet = Image.new("RGB", size, _PAPER)
    sheet.paste(panels[0], (0, 0))
    sheet.paste(panels[1], (right, below))
    sheet.paste(legend, (right + panels[0].width + gap, 0))
    sheet.save(path)


def _legend(mask: Tensor, classes: Sequence[str], palette: np.ndarray, *, unit: int) -> Image.Image:
    found, pixels = mask.unique(return_counts=True)
    order = pixels.argsort(descending=True, stable=True).tolist()
    lines = [
        (int(found[index]), f"{classes[int(found[index])]}  {100 * float(pixels[index]) / mask.numel():.1f} %")
        for index in order[:MOST_IN_LEGEND]
    ]
    font = _font(unit)
    rest = f"and {len(order) - len(lines)} more" if len(order) > len(lines) else ""
    width = round(max(font.getlength(text) for text in (*(text for _, text in lines), rest)))
    step = round(1.7 * unit)
    sheet = Image.new("RGB", (width + 3 * unit, step * (len(lines) + bool(rest)) + unit), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (index, text) in enumerate(lines):
        top = place * step + unit // 2
        colour = tuple(round(255 * part) for part in palette[index])
        draw.rectangle((0, top, round(1.5 * unit), top + unit), fill=colour)
        draw.text((2 * unit, top + unit // 2), text, font=font, fill=_INK, anchor="lm")
    draw.text((2 * unit, len(lines) * step + unit), rest, font=font, fill=_INK, anchor="lm")
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own font, which knows more alphabets than Pillow's."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def write_mask(path: Path, mask: Tensor, count: int) -> None:
    """A palette PNG: its values are class numbers, as data.source=mask_folder reads them, and viewers show colours."""
    from .training.pictures import class_colours

    if count > 256:
        raise ValueError(f"masks hold class numbers up to 255, and there are {count} classes; leave --masks out")
    image = Image.fromarray(mask.numpy().astype(np.uint8))
    image.putpalette((255 * class_colours(count)).round().astype(np.uint8).tobytes())
    image.save(path)


def draw_sheet(
    path: Path, pictures: Sequence[Image.Image], predictions: Sequence[Prediction], classes: Sequence[str]
) -> None:
    """A grid of the first pictures, each with what it was taken for, how surely, and its file's name."""
    from .training.pictures import picture_grid, short_name

    shown, count = len(pictures), len(predictions)
    title = f"{shown} picture{'s' * (shown != 1)}" if shown == count else f"the first {shown} of {count} pictures"
    figure, grid = picture_grid(shown, title=title, row_height=1.65, column_width=1.45)
    for axes, picture, prediction in zip(grid, pictures, predictions, strict=False):  # the grid has empty places
        axes.imshow(picture)
        index, probability = prediction.found[0]
        axes.set_title(
            f"{short_name(classes[index], 18)} ({100 * probability:.0f} %)\n{short_name(prediction.file.name, 22)}",
            fontsize=7,
            pad=3,
        )
    figure.savefig(path, dpi=130)
