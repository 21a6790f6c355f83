"""A checksum inside a checkpoint, so that a file that was cut off or changed on the disk is found before it is used.

What torch.save writes is a zip archive, and an archive ends with a comment that every reader passes over: the SHA-256
of all that comes before stands there. The file stays one file, appears with its checksum in one step, and loads
everywhere. Unusual: torch itself checks no checksum; it loads a file with flipped bits without complaint.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_NO_COMMENT = struct.pack("<H", 0)  # the last two bytes of an archive: how long its comment is
_ENDING = len(_NO_COMMENT) + _COMMENT
_CHUNK = 1 << 20


class _Digesting:
    """A file to write to that knows the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_sealed(file: BinaryIO, write: Callable[[Any], Any]) -> None:
    """Lets `write` write a zip archive without a comment to the new file, and gives it the checksum as its comment."""
    digesting = _Digesting(file)
    write(digesting)
    file.seek(-len(_NO_COMMENT), 2)
    file.write(_ending(digesting.digest))


def _ending(digest: hashlib._Hash) -> bytes:
    """The comment of an archive, after its length."""
    return struct.pack("<H", _COMMENT) + _MARK + digest.hexdigest().encode()


def is_sealed(path: Path) -> bool:
    """Whether the file ends with a checksum of ours."""
    with open(path, "rb") as file:
        return path.stat().st_size > _ENDING and _last(file)[len(_NO_COMMENT) :].startswith(_MARK)


def refuse_damage(path: Path) -> None:
    """Raises a `ValueError` if a file, of whatever origin, ends with a checksum that is not its own."""
    if is_sealed(path) and (damage := find_damage(path)) is not None:
        raise ValueError(f"{path} {damage}")


def find_damage(path: Path) -> str | None:
    """What is wrong with a file that was written sealed, as the end of a sentence; None if it is whole."""
    try:
        size = path.stat().st_size
        if size == 0:
            return "is empty"
        if not is_sealed(path):
            return "has no checksum at its end: it was cut off, or train.py has not written it"
        with open(path, "rb") as file:
            digest, left = hashlib.sha256(), size - _ENDING
            while left > 0:
                chunk = file.read(min(_CHUNK, left))
                if not chunk:
                    break
                digest.update(chunk)
                left -= len(chunk)
            digest.update(_NO_COMMENT)
            same = _last(file) == _ending(digest)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "does not have the checksum it was written with: the file has changed"


def _last(file: BinaryIO) -> bytes:
    file.seek(-_ENDING, 2)
    return file.read()
