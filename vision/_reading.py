"""Reads checkpoints of `train.py` and of other libraries into plain state dicts, without executing anything in them.

Unusual: files of other trainers, such as mmengine's, hold more than tensors, and torch's safe reader refuses them as a
whole. Here the classes that are known to be harmless are replaced by an inert one, and the tensors are read.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ._checksum import refuse_damage
from ._messages import one_line


def read_checkpoint(path: Path, *, segmenters: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in a file and the facts that `train.py` stored with them, empty for other files.

    Lightning stores the weights of a task's model under `model.`, a prefix that no timm model uses.

    Raises:
        ValueError: the file is missing, damaged, or a segmenter although `segmenters` is false.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    refuse_damage(path)
    try:
        state = _tensors_of(path)
        inner = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        facts = torch.load(path, map_location="cpu", weights_only=True).get("mixerzoo", {}) if inner else {}
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"cannot read the checkpoint {path}: {one_line(error)}") from error
    if facts.get("head") is not None and not segmenters:
        raise ValueError(f"{path} holds a segmenter; only classifiers can be loaded here")
    return inner or state, facts


class _Nothing:
    """An inert stand-in for classes and functions of other libraries while a file is read."""

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_FOREIGN = ("mmengine.", "mmcv.", "numpy.")


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        return load_state_dict(str(path), weights_only=True)
    except RuntimeError:
        if not zipfile.is_zipfile(path):
            raise
        unknown = get_unsafe_globals_in_checkpoint(path)
        known = [name for name in unknown if name.startswith(_FOREIGN) or name == "builtins.getattr"]
        if not known:
            raise
        with safe_globals([(_Nothing, name) for name in known]):
            return load_state_dict(str(path), weights_only=True)
