"""Files of weights, of `train.py` or of anybody, into plain state dicts.

Unusual: files of other trainers (mmengine's) hold more than tensors, and torch's reader, which executes nothing,
refuses them whole. Here what is known to be harmless beside the tensors is read as nothing at all.
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


def read_checkpoint(path: Path, *, segmenters: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file, and what `train.py` wrote beside them; nothing in the file is executed.

    Lightning keeps a module's own weights under `model.`, which no timm model uses as its first name.
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
    """Stands for classes and functions of other libraries while a file is read; does nothing with what it is given."""

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


def one_line(error: BaseException) -> str:
    """An error's message, shortened for a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"
