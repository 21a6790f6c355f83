"""Files of weights, of `train.py` or of anybody, into plain state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor

from ._checksum import refuse_damage


def read_checkpoint(path: Path, *, segmenters: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file, and what `train.py` wrote beside them; nothing in the file is executed.

    Lightning keeps a module's own weights under `model.`, which no timm model uses as its first name.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    refuse_damage(path)
    try:
        state = load_state_dict(str(path), weights_only=True)
        inner = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        facts = torch.load(path, map_location="cpu", weights_only=True).get("mixerzoo", {}) if inner else {}
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"cannot read the checkpoint {path}: {one_line(error)}") from error
    if facts.get("head") is not None and not segmenters:
        raise ValueError(f"{path} holds a segmenter; only classifiers can be loaded here")
    return inner or state, facts


def one_line(error: BaseException) -> str:
    """An error's message, shortened for a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"
