"""Checksums inside checkpoints, which reveal truncated and corrupted files before they are used.

torch.save writes a zip archive, and a zip archive ends with a comment that readers ignore. The comment holds the
SHA-256 of everything before it, so a checkpoint remains a single file that any reader can load. Unusual: torch verifies
no checksum itself and loads a file with flipped bits without complaint.
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
    """A writable file that computes the SHA-256 of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_sealed(file: BinaryIO, write: Callable[[Any], Any]) -> None:
    """Write a zip archive by `write`, which must leave its comment empty, and store the checksum as the comment."""
    digesting = _Digesting(file)
    write(digesting)
    file.seek(-len(_NO_COMMENT), 2)
    file.write(_ending(digesting.digest))


def _ending(digest: hashlib._Hash) -> bytes:
    """Return the end of a sealed archive: the length of the comment, and the comment."""
    return struct.pack("<H", _COMMENT) + _MARK + digest.hexdigest().encode()


def is_sealed(path: Path) -> bool:
    """Return whether the file ends with a checksum written by `write_sealed`."""
    with open(path, "rb") as file:
        return path.stat().st_size > _ENDING and _last(file)[len(_NO_COMMENT) :].startswith(_MARK)


def refuse_damage(path: Path) -> None:
    """Raise a ValueError if the file ends with a checksum that does not match. Files without a checksum pass."""
    if is_sealed(path) and (damage := find_damage(path)) is not None:
        raise ValueError(f"{path} {damage}")


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a file written by `write_sealed`, as the end of a sentence, or None if it is intact."""
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
