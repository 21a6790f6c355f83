"""The run folder: named, made, and never taken from another run unasked."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path

from .config import Config
from .launch import is_first
from .resume import BEST, LAST, PREVIOUS, has_checkpoint
from .settings import ConfigError

_FOLDER_VARIABLE = "MIXERZOO_RUN_FOLDER"  # tells the processes that Lightning starts where the first one writes
_PICTURES = ("batch", "curves", "predictions", "mistakes", "confusion")
_RESULTS = (
    *("metrics.csv", "results.json", "env.json", "report.html", "error.txt", "nonfinite.json"),
    *(f"{name}.png" for name in _PICTURES),
    *(f"checkpoints/{name}" for name in (BEST, LAST, PREVIOUS)),
)
"""What a run writes and another run would take for its own."""


def make_folder(config: Config) -> Path:
    """The run folder: given, resumed, or named by time. One with files in it needs `overwrite=true`."""
    folder = _name(config)
    if not is_first():
        return folder
    os.environ[_FOLDER_VARIABLE] = str(folder)
    if config.resume in (None, "auto") and folder.exists() and not _is_free(folder, began=config.resume == "auto"):
        if not config.overwrite:
            raise ConfigError(f"out={folder} exists already; choose another, or overwrite=true, or resume={folder}")
        for name in _RESULTS if folder.is_dir() else ():
            (folder / name).unlink(missing_ok=True)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "checkpoints"):
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error}") from error
    return folder


def _name(config: Config) -> Path:
    if config.out is not None:
        return Path(config.out)
    if not is_first() and _FOLDER_VARIABLE in os.environ:
        return Path(os.environ[_FOLDER_VARIABLE])
    return folder_by_time(config)


def folder_by_time(config: Config) -> Path:
    """Where a run goes that was given no folder."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.name}-{config.data.name}"
    return Path("runs") / name.replace("/", "_")


def _is_free(folder: Path, *, began: bool) -> bool:
    """Whether nothing is lost by beginning here. `began`: so it is where a run ended before its first checkpoint."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    ours = "config.yaml" in names or names == {"checkpoints"}
    return not names or (began and ours and not has_checkpoint(folder) and "results.json" not in names)
