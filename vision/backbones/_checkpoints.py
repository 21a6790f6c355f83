"""Helpers of every `checkpoint_filter_fn`: convert published files to plain state dicts, refuse those that do not fit.

timm loads strictly only if the number of classes is unchanged; for another head, it drops the classifier and only logs
other missing parameters. Therefore `refuse_mismatch` compares the names first.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from timm.models import get_pretrained_cfg, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

StateDict = dict[str, Tensor]

_ENVELOPES = ("state_dict", "model", "model_ema", "model_state")
_PREFIXES = ("module.", "backbone.")


def unwrap(checkpoint: Mapping[str, Any]) -> StateDict:
    """Extract the state dict from a training checkpoint, and remove the prefixes of wrappers around the model.

    A segmentation or detection model is reduced to its `backbone.`, an mmpretrain classifier to its `backbone.` and
    `head.fc.`.
    """
    state_dict = checkpoint
    for key in _ENVELOPES:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    for prefix in _PREFIXES:
        while any(name.startswith(prefix) for name in state_dict):  # repeated for nested wrappers, module.module.
            inside = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
            state_dict = {
                **inside,
                **{name: tensor for name, tensor in state_dict.items() if name.startswith("head.fc.")},
            }
    return dict(state_dict)


def rename(state_dict: StateDict, rules: Iterable[tuple[str, str]]) -> StateDict:
    """Rename each parameter by the first (pattern, replacement) that matches the start of its name, as in `re.sub`."""
    compiled = [(re.compile("^" + pattern), replacement) for pattern, replacement in rules]

    def renamed(name: str) -> str:
        for pattern, replacement in compiled:
            if pattern.match(name):
                return pattern.sub(replacement, name)
        return name

    return {renamed(name): tensor for name, tensor in state_dict.items()}


def resize_bias_table(table: Tensor, size: Iterable[int]) -> Tensor:
    """Resize a relative position bias [heads, rows, columns] to another window, bicubically as Swin and DiNAT do."""
    return F.interpolate(table[None].float(), list(size), mode="bicubic", align_corners=False)[0].to(table.dtype)


def resize_bias_tables(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Resize every table named `rpb` to the model's windows."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name.endswith(".rpb")}
    fitted = dict(state_dict)
    for name, shape in shapes.items():
        table = state_dict.get(name)
        if table is not None and table.shape != shape and table.shape[0] == shape[0]:
            fitted[name] = resize_bias_table(table, shape[1:])
    return fitted


def keep_fresh_norms(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Complete a file with the model's initial values of the norms that its task does not use.

    The file of a classifier has no `Stage.out_norm`; that of a segmentation or detection backbone has no final norm, or
    no norm in the head.
    """
    out_norms = re.compile(r"stages\.\d+\.out_norm\.")
    is_dense = any(out_norms.match(name) for name in state_dict)
    fresh = re.compile(r"(?:head\.)?norm\.") if is_dense else out_norms
    return {**{name: tensor for name, tensor in model.state_dict().items() if fresh.match(name)}, **state_dict}


def _listing(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:12])}{', …' if len(names) > 12 else ''})"


def refuse_mismatch(state_dict: StateDict, model: nn.Module) -> None:
    """Raise unless the names match the model's, except the classifier, which timm replaces if the classes differ."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    classifiers = cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    expected, actual = model.state_dict().keys(), state_dict.keys()
    missing = [name for name in expected if name not in actual and not name.startswith(heads)]
    unexpected = [name for name in actual if name not in expected and not name.startswith(heads)]
    if missing or unexpected:
        faults = [("missing", missing), ("unexpected", unexpected)]
        differences = "; ".join(f"{kind}: {_listing(names)}" for kind, names in faults if names)
        raise ValueError(
            f"the checkpoint does not belong to {cfg.get('architecture', type(model).__name__)}, or is incomplete. "
            f"{differences}. Create the variant that the file was saved from, or get the file again"
        )


_DRIVE = "https://drive.google.com/file/d/"


def drive_url(file_id: str) -> str:
    """Return the page of a file on Google Drive, which can only be downloaded by hand."""
    return f"{_DRIVE}{file_id}/view"


def refuse_drive(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise if `create_model(name, pretrained=True, **kwargs)` would have to fetch weights from Google Drive."""
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if str(cfg.url).startswith(_DRIVE) and not cfg.file and not cfg.state_dict:
        raise ValueError(
            f"the weights of {name} cannot be fetched by a program; download {cfg.url} and pass "
            "pretrained_cfg_overlay=dict(file='where/it/lies.pth')"
        )


def trained_settings(
    name: str, kwargs: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Look up, by tag in `settings`, the training settings of the weights that `create_model(name, **kwargs)` loads."""
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return settings.get(cfg.tag or "", {})


def timm_cfg(name: str, **settings: Any) -> dict[str, Any]:
    """Return the configuration of timm's model `name`, for a model of ours that uses the same weights."""
    cfg = get_pretrained_cfg(name)
    assert cfg is not None, name
    return {**cfg.to_dict(remove_source=False, remove_null=True), **settings}


def vit_checkpoint_filter(checkpoint: Mapping[str, Any], model: VisionTransformer) -> StateDict:
    """Apply timm's filter for ViTs: resize patches and positions, and rename the parameters of DeiT's files."""
    state_dict: StateDict = vit_filter_fn(unwrap(checkpoint), model)  # type: ignore[assignment]
    refuse_mismatch(state_dict, model)
    return state_dict
