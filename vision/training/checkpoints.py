"""Checkpoints that are whole or not there: written beside their name and moved onto it, read without running code.

Unusual: Lightning's own writer goes through $TMPDIR and a copy, which leaves a truncated file when the disk fills up
or the process dies. Here the data is written into the same folder and on the disk before the old file is replaced.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO


def write_atomically(path: Path, write: Any) -> None:
    """Calls `write(file)` on a new file beside `path` and puts it in the place of `path` when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


class AtomicCheckpointIO(CheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = None) -> dict:
        """`weights_only` cannot be turned off: nothing of ours needs it, and it would run code from the file."""
        return load_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def load_checkpoint(path: Path, map_location: Any | None = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, or a ValueError that says in one line why it cannot be used."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint at {path}") from None
    except Exception as error:  # torch.load fails in many ways: EOFError, RuntimeError, UnpicklingError, KeyError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a whole and safe checkpoint ({reason})") from error
