"""Write checkpoints atomically and read them without executing code.

Unusual: Lightning writes to $TMPDIR and copies the file, which leaves a truncated checkpoint when the disk is full or
the process dies. Here the new file is written to the same folder and flushed to disk before it replaces the old one.
The old last.ckpt is renamed to previous.ckpt, so that a run can resume from either (resume.py). Each checkpoint carries
a checksum (_checksum.py).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from .._checksum import find_damage, write_sealed
from .failures import TrainingError, after_making_room
from .resume import LAST, PREVIOUS
from .settings import ConfigError

_log = logging.getLogger(__name__)


class SaveError(TrainingError):
    """A checkpoint could not be written; the previous one, if there is one, is intact."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to disk, and rename it to `path`.

    If `keep` is given, the old file is renamed to it first. A process that is killed meanwhile leaves
    `.NAME.unfinished`, which the next write overwrites.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint reader and writer on top of this module's functions.

    `on_error` says what happens when a checkpoint cannot be written: "stop" ends the run, "continue" logs a warning.
    """

    def __init__(self, *, on_error: Literal["stop", "continue"] = "stop") -> None:
        super().__init__()
        self.on_error = on_error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        try:
            write_atomically(
                path,
                lambda file: write_sealed(file, lambda archive: torch.save(checkpoint, archive)),
                keep=path.with_name(PREVIOUS) if path.name == LAST else None,
            )
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a write that fails
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            message = f"{path} could not be written ({cause.strerror})"
            if path.exists():
                message += "; the checkpoint before it is untouched"
            if self.on_error == "stop":
                raise SaveError(f"{message}. {after_making_room(path.parent.parent)}") from error
            _log.warning("warning: %s; training goes on without it (train.save_errors=continue)", message)

    def load_checkpoint(self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = None) -> dict:
        """Load a checkpoint. `weights_only` is always on, since unpickling can execute code from the file."""
        return load_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def load_checkpoint(path: Path, map_location: Any | None = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint. Raise a one-line `ValueError` if it is damaged or unsafe."""
    if (damage := find_damage(path)) is not None:
        raise ValueError(f"{path} {damage}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load fails in many ways: EOFError, RuntimeError, UnpicklingError, KeyError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no safe checkpoint ({reason})") from error


def load_best(path: Path) -> dict[str, Any]:
    """Load the best checkpoint for the test after training; raise a `TrainingError` if it cannot be read."""
    try:
        return load_checkpoint(path)
    except ValueError as error:
        raise TrainingError(f"training is done, but {error}: there is nothing to test") from error


def refuse_another(
    checkpoint: Mapping[str, Any], own: Mapping[str, Any], facts: Mapping[str, Any], *, force: bool = False
) -> None:
    """Raise a `ConfigError` if the checkpoint has other tensors than `own` or, unless `force`, other `facts`."""
    saved = checkpoint.get("state_dict", own)  # FSDP's strategy has taken it out, into the model, and checked it
    resized = [
        f"{name} {list(saved[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    parts = (("lacks", own.keys() - saved.keys()), ("has besides", saved.keys() - own.keys()), ("has", resized))
    if found := [f"{verb} {_some(names)}" for verb, names in parts if names]:
        raise ConfigError(f"the checkpoint is of another model: it {'; it '.join(found)}")
    known = checkpoint.get("mixerzoo", {})
    if not force and (changed := [name for name, value in facts.items() if known.get(name, value) != value]):
        words = ", ".join(f"{name} was {_short(known[name])} and is now {_short(facts[name])}" for name in changed)
        raise ConfigError(f"the checkpoint is of a run with other data: {words}; go on with it by resume_force=true")


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return f"{', '.join(shown)}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
