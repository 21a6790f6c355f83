"""Name and create the run folder, without overwriting another run unless the user asks for it."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path

from .config import Config
from .launch import is_first
from .resume import BEST, LAST, PREVIOUS, has_checkpoint
from .settings import ConfigError

_FOLDER_VARIABLE = "MIXERZOO_RUN_FOLDER"  # how the other processes learn the folder of rank 0
_PICTURES = ("batch", "curves", "predictions", "mistakes", "confusion")
_RESULTS = (
    *("metrics.csv", "results.json", "env.json", "report.html", "summary.txt"),
    *("error.txt", "error-[0-9]*.txt", "nonfinite.json", "nonfinite-[0-9]*.json", "tensorboard/events.out.tfevents.*"),
    *(f"{name}.png" for name in _PICTURES),
    "curves.svg",
    *(f"checkpoints/{name}" for name in (BEST, LAST, PREVIOUS)),
)
"""The files of a run, as shell patterns, that must be deleted before another run starts in its folder."""

_ROOM = 2**20
"""Bytes that are written on trial: a full disk accepts an empty file."""


def make_folder(config: Config) -> Path:
    """Create the run folder and return it. One that holds files needs `overwrite=true`, unless a run is resumed."""
    folder = _name(config)
    if not is_first():
        return folder
    os.environ[_FOLDER_VARIABLE] = str(folder)
    new = config.resume in (None, "auto") and folder.exists()
    if new and not config.overwrite and not _is_free(folder, began=config.resume == "auto"):
        raise ConfigError(f"out={folder} exists already; choose another, or overwrite=true, or resume={folder}")
    try:
        if new and folder.is_dir():
            _clear(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "checkpoints"):
            _try_to_write(place)
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error}") from error
    return folder


def _clear(folder: Path) -> None:
    """Delete what an earlier run left in the folder, also one that ended before its first checkpoint."""
    for pattern in _RESULTS:
        for path in folder.glob(pattern):
            path.unlink()


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_ROOM))
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk or an exceeded quota only now


def _name(config: Config) -> Path:
    if config.out is not None:
        return Path(config.out)
    if not is_first() and _FOLDER_VARIABLE in os.environ:
        return Path(os.environ[_FOLDER_VARIABLE])
    return folder_by_time(config)


def folder_by_time(config: Config) -> Path:
    """Return the default run folder, runs/TIME-MODEL-DATA."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.name}-{config.data.name}"
    return Path("runs") / name.replace("/", "_")


def _is_free(folder: Path, *, began: bool) -> bool:
    """Return whether a run can start in this folder without overwriting results.

    With `began`, a folder is also free if a run ended in it before its first checkpoint.
    """
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    ours = "config.yaml" in names or names == {"checkpoints"}
    return not names or (began and ours and not has_checkpoint(folder) and "results.json" not in names)
