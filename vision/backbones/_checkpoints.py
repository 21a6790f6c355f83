"""What every `checkpoint_filter_fn` shares: published files into plain state dicts, and refusing those that do not fit.

timm loads strictly only while the number of classes is unchanged; with another head it drops the classifier and
merely logs whatever else is missing. So `refuse_mismatch` looks at the names first.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from timm.models import resolve_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F

StateDict = dict[str, Tensor]

_ENVELOPES = ("state_dict", "model", "model_ema", "model_state")
_PREFIXES = ("module.", "backbone.")


def unwrap(checkpoint: Mapping[str, Any]) -> StateDict:
    """The state dict inside a training checkpoint: out of its envelope, without the names of wrappers around the model.

    Of a whole segmentation or detection model only its `backbone.` is kept, of an mmpretrain classifier its `head.fc.`
    besides.
    """
    state_dict = checkpoint
    for key in _ENVELOPES:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    for prefix in _PREFIXES:
        while any(name.startswith(prefix) for name in state_dict):  # module.module.: a wrapper around a wrapper
            inside = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
            state_dict = {
                **inside,
                **{name: tensor for name, tensor in state_dict.items() if name.startswith("head.fc.")},
            }
    return dict(state_dict)


def rename(state_dict: StateDict, rules: Iterable[tuple[str, str]]) -> StateDict:
    """Rewrite each name by the first (pattern, replacement) that matches its beginning, as `re.sub` would."""
    compiled = [(re.compile("^" + pattern), replacement) for pattern, replacement in rules]

    def renamed(name: str) -> str:
        for pattern, replacement in compiled:
            if pattern.match(name):
                return pattern.sub(replacement, name)
        return name

    return {renamed(name): tensor for name, tensor in state_dict.items()}


def resize_bias_table(table: Tensor, size: Iterable[int]) -> Tensor:
    """A relative position bias [heads, rows, columns] for another window, bicubically as Swin and DiNAT do."""
    return F.interpolate(table[None].float(), list(size), mode="bicubic", align_corners=False)[0].to(table.dtype)


def resize_bias_tables(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Fit every table named `rpb` to the model's windows."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name.endswith(".rpb")}
    fitted = dict(state_dict)
    for name, shape in wanted.items():
        table = state_dict.get(name)
        if table is not None and table.shape != shape and table.shape[0] == shape[0]:
            fitted[name] = resize_bias_table(table, shape[1:])
    return fitted


def keep_fresh_norms(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Let the norms start from the model's own values that the other kind of file lacks.

    A classifier's file knows no `Stage.out_norm`, a segmentation or detection backbone's no final norm, or
    no norm in the head.
    """
    taps = re.compile(r"stages\.\d+\.out_norm\.")
    downstream = any(taps.match(name) for name in state_dict)
    fresh = re.compile(r"(?:head\.)?norm\.") if downstream else taps
    return {**{name: tensor for name, tensor in model.state_dict().items() if fresh.match(name)}, **state_dict}


def _listing(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:12])}{', …' if len(names) > 12 else ''})"


def refuse_mismatch(state_dict: StateDict, model: nn.Module) -> None:
    """Raise unless the names are the model's; the classifier may lack, since timm replaces it when classes differ."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    classifiers = cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    wanted, given = model.state_dict().keys(), state_dict.keys()
    missing = [name for name in wanted if name not in given and not name.startswith(heads)]
    unexpected = [name for name in given if name not in wanted and not name.startswith(heads)]
    if missing or unexpected:
        faults = [("missing", missing), ("unexpected", unexpected)]
        found = "; ".join(f"{kind}: {_listing(names)}" for kind, names in faults if names)
        raise ValueError(
            f"the checkpoint does not belong to {cfg.get('architecture', type(model).__name__)}, or is incomplete. "
            f"{found}. Create the variant that the file was saved from, or get the file again"
        )


_DRIVE = "https://drive.google.com/file/d/"


def drive_url(file_id: str) -> str:
    """The page of a file on Google Drive, which wants a person to press a button."""
    return f"{_DRIVE}{file_id}/view"


def refuse_drive(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise if the weights that `create_model(name, pretrained=True, **kwargs)` would fetch are on Google Drive."""
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if str(cfg.url).startswith(_DRIVE) and not cfg.file and not cfg.state_dict:
        raise ValueError(
            f"the weights of {name} cannot be fetched by a program; download {cfg.url} and pass "
            "pretrained_cfg_overlay=dict(file='where/it/lies.pth')"
        )
