"""Loads the weights of whole segmenters: published ones in the format of mmsegmentation, and our own.

Unusual: loading is strict. timm does not report missing tensors if the number of classes differs; here every tensor of
the file and of the model must match, or an error lists those that do not. Only the pixel classifiers are initialised
anew if the file has another number of classes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._reading import read_checkpoint

_log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

_WHOLE = ("decode_head.", "network.")
"""Prefixes that only whole segmenters have; `network.` is smp's model in `SmpSegmenter`."""
_CLASSIFIERS = (
    *("decode_head.conv_seg.", "auxiliary_head.conv_seg.", "decode_head.head.conv2.", "auxiliary_head.conv2."),
    *("network.segmentation_head.0.", "network.segmentation_head.head.4."),
)
"""The pixel classifiers of mmsegmentation's heads, of BEVANet's, and of smp's; the last is DPT's."""
_OUR_OWN = ("backbone.", "network.")
_PYRAMIDS = {f"neck.{theirs}.": f"neck.fpn{i + 1}." for i, theirs in enumerate(("upsample_4x", "upsample_2x"))}
"""Names of pyramid parts in mmsegmentation's Feature2Pyramid, and ours, which are Vim's."""


def read_segmenter(file: str | Path) -> StateDict | None:
    """Read the weights of a whole segmenter; return None if the file holds a backbone alone."""
    state, _ = read_checkpoint(Path(file), segmenters=True)
    return state if any(name.startswith(_WHOLE) for name in state) else None


def load_segmenter(model: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load the weights of a whole segmenter into `model`; raise a ValueError unless all match."""
    own = model.state_dict()
    weights = dict(state)
    if not any(name.startswith(_OUR_OWN) and name in own for name in weights):
        weights = _from_published(model, weights, source)
    if getattr(model, "auxiliary_head", None) is None:  # the caller did not ask for one
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("auxiliary_head.")}
    weights = _with_new_classifiers(weights, own, source)
    missing = [name for name in own if name not in weights and not name.endswith(".num_batches_tracked")]
    left_over = [name for name in weights if name not in own]
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    faults = {"missing": missing, "left over": left_over, "of another shape": misshapen}
    if any(faults.values()):
        found = "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)
        raise ValueError(
            f"the weights of {source} do not fit this segmenter. {found}. Build the model, head and widths that the "
            "file was saved from"
        )
    model.load_state_dict(weights, strict=False)  # checked above; old files lack counts of batches


def _from_published(model: nn.Module, state: StateDict, source: str | Path) -> StateDict:
    """Rename published weights: the backbone's by the filter of its family; names of the heads are equal."""
    for theirs, ours in _PYRAMIDS.items():
        state = {name.replace(theirs, ours, 1) if name.startswith(theirs) else name: t for name, t in state.items()}
    state = {name.replace("backbone.fpn", "neck.fpn", 1): tensor for name, tensor in state.items()}
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    network: Any = getattr(model.backbone, "model", None)
    convert: Callable[..., StateDict] | None = getattr(
        sys.modules[type(network).__module__], "checkpoint_filter_fn", None
    )
    if convert is None or not type(network).__module__.startswith(__name__.partition(".")[0]):
        raise ValueError(
            f"{source} is a published segmenter, whose backbone can only be read into the models of mixerzoo; this is "
            f"{type(network if network is not None else model.backbone).__name__}"
        )
    fresh = {tensor.data_ptr() for tensor in network.state_dict().values()}
    try:
        converted = convert(backbone, network)
    except ValueError as error:
        raise ValueError(f"the backbone in {source}: {error}") from error
    # A family's filter fills missing norms with the model's own values; a whole segmenter has them all.
    converted = {f"backbone.model.{name}": t for name, t in converted.items() if t.data_ptr() not in fresh}
    return converted | {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def _with_new_classifiers(state: StateDict, own: Mapping[str, Tensor], source: str | Path) -> StateDict:
    """Replace the file's pixel classifiers by the model's own if the number of classes differs."""
    weight = next((f"{part}weight" for part in _CLASSIFIERS if f"{part}weight" in state), "")
    if weight not in own or len(state[weight]) == len(own[weight]):
        return state
    _log.info("%s has %d classes; those of %d begin anew", source, len(state[weight]), len(own[weight]))
    return {
        name: own[name] if name in own and name.startswith(_CLASSIFIERS) else tensor for name, tensor in state.items()
    }


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
