"""Reads pictures of any format and mode as 8-bit RGB, with clear errors, and the text lists that data sets contain.

Unusual:

* 16-bit pictures are scaled to 8 bits. Pillow's own conversion clips them, which leaves most of a scan white.
* The EXIF orientation is applied, as in every viewer; Pillow and torchvision ignore it.
* A picture of more than twice `PIL.Image.MAX_IMAGE_PIXELS` (178 million) is refused as a decompression bomb. For
  pictures that are really so large, raise that number.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # EXIF's tag

CHECK_COMMAND = "python -m mixerzoo.vision.data check"


class DataError(ValueError):
    """An error in the data that shows only when they are read. The message names the file and the remedy."""


class UnreadableError(DataError):
    """Raised for a file that holds no readable picture."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file} cannot be read: {reason}; `{CHECK_COMMAND} …` lists all such files")
        self.file, self.reason = file, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.file, self.reason)  # exceptions are made again from their arguments


def read_picture(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Read and decode a whole picture, upright, as RGB. `name` identifies it in errors if `source` has no name."""
    called = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "a picture")
    try:
        with Image.open(source) as file:
            return to_rgb(file)
    except MemoryError:
        raise
    except Exception as error:  # decoders answer damaged bytes with any kind of exception
        raise UnreadableError(called, reason_of(source, error)) from error


def picture_size(path: Path) -> tuple[int, int]:
    """Return the height and width of the upright picture, from its header alone."""
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(_ORIENTATION, 1) >= 5  # by a quarter, one way or the other
            width, height = file.size
    except Exception as error:
        raise UnreadableError(str(path), reason_of(path, error)) from error
    return (width, height) if turned else (height, width)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to upright 8-bit RGB."""
    if 0 in picture.size:
        raise ValueError(f"it is {picture.size[0]} x {picture.size[1]} pixels")
    picture.load()
    with contextlib.suppress(Exception):  # damaged metadata do not spoil the pixels
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        values = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file without surrounding white space, leaving out empty ones."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors of Windows begin a file with its mark
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); save it in UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def reason_of(source: object, error: Exception) -> str:
    """Return in one line why a file cannot be read."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.exists():
            return "there is no such file"
        if path.is_file() and path.stat().st_size == 0:
            return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known picture format"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
