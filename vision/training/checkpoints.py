"""Checkpoints that are whole or not there: written beside their name and moved onto it, read without running code.

Unusual: Lightning's own writer goes through $TMPDIR and a copy, which leaves a truncated file when the disk fills up
or the process dies. Here the data is written into the same folder and on the disk before the old file is replaced.
last.ckpt is not replaced but renamed to previous.ckpt, so that there are two to go on from (resume.py). Each carries a
checksum (_checksum.py).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from .._checksum import find_damage, write_sealed
from .failures import TrainingError
from .resume import LAST, PREVIOUS
from .settings import ConfigError

_log = logging.getLogger(__name__)


class SaveError(TrainingError):
    """A checkpoint could not be written. The one before it is untouched."""


def write_atomically(path: Path, write: Any, *, keep: Path | None = None) -> None:
    """Calls `write(file)` on a new file beside `path` and puts it in the place of `path` when it is on the disk.

    What was at `path` goes to `keep`, if that is given. A process that is killed meanwhile leaves `.NAME.unfinished`,
    which the next write takes over.
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
    """`on_error`: whether a checkpoint that cannot be written stops the run, or is one less."""

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
            message = f"{path} could not be written ({cause.strerror}); the checkpoint before it is untouched"
            if self.on_error == "stop":
                raise SaveError(f"{message}. Make room and go on with resume={path.parent.parent}") from error
            _log.warning("warning: %s; training goes on without it (train.save_errors=continue)", message)

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
    if (damage := find_damage(path)) is not None:
        raise ValueError(f"{path} {damage}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load fails in many ways: EOFError, RuntimeError, UnpicklingError, KeyError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no safe checkpoint ({reason})") from error


def load_best(path: Path) -> dict[str, Any]:
    """What is tested after training; without it everything was trained, and nothing can be said of it."""
    try:
        return load_checkpoint(path)
    except ValueError as error:
        raise TrainingError(f"training is done, but {error}: there is nothing to test") from error


def refuse_another(
    checkpoint: Mapping[str, Any], own: Mapping[str, Any], facts: Mapping[str, Any], *, force: bool = False
) -> None:
    """Raises if the checkpoint is not of a task with the tensors `own`, or, but for `force`, of other `facts`."""
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
