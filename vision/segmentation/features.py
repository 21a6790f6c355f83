"""Feature maps of timm models for segmenters, and the parameter groups of these models.

Unusual: of timm's ways to extract features only `feature_cls="getter"` leaves the model intact. It is used if a model
supports it, since the others hide the layers from layer decay, and some return maps with channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.models import FeatureListNet, group_parameters
from torch import nn

LEVELS = 4
"""The number of maps that a segmenter takes. If all maps have one size, these are the maps after each quarter of the
blocks; of a pyramid, the last map of each of the four coarsest strides, so that ResNet's map of stride 2 is not used,
as in all published models."""


def make_features(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build timm's feature extractor with four maps; a model whose maps have one size then takes any input size."""
    outline = sketch(name, arguments)
    blocks: Sequence[Mapping[str, Any]] = outline.feature_info.info
    more: dict[str, Any] = {}
    if type(outline) is FeatureListNet and _has_getter(name, arguments):
        more["feature_cls"] = "getter"
    if is_isotropic(blocks):
        quarters = [len(blocks) * (i + 1) // LEVELS - 1 for i in range(LEVELS)]
        more["out_indices"] = quarters if len(blocks) >= LEVELS else [len(blocks) - 1]
        if getattr(getattr(outline, "model", None), "dynamic_img_size", True) is False:
            more |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    elif len(blocks) > LEVELS:
        last = {level["reduction"]: index for index, level in enumerate(blocks)}  # BEVANet has two maps at 1/32
        more["out_indices"] = list(last.values())[-LEVELS:]
    features: Any = timm.create_model(name, features_only=True, **(more | dict(arguments)))
    if "dynamic_img_pad" in more:
        features.exports_free_sizes = False  # timm counts patches by math.ceil, which cannot be exported
    return features


def sketch(name: str, arguments: Mapping[str, Any]) -> Any:
    """Build the feature extractor on the meta device, to read the `feature_info` of all maps."""
    plain = {key: value for key, value in arguments.items() if not key.startswith("pretrained")}
    plain |= {"out_indices": (0,), "features_only": True}
    try:
        with torch.device("meta"):
            return timm.create_model(name, **plain)
    except (NotImplementedError, RuntimeError):  # some models compute with tensors while they are built
        return timm.create_model(name, **plain)


def takes_any_size(name: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether `make_features` lets a model that timm builds for one input size take any size."""
    if "dynamic_img_size" in arguments:
        return bool(arguments["dynamic_img_size"])
    outline = sketch(name, arguments)
    return is_isotropic(outline.feature_info.info) and hasattr(getattr(outline, "model", None), "dynamic_img_size")


def _has_getter(name: str, arguments: Mapping[str, Any]) -> bool:
    try:
        sketch(name, {**arguments, "feature_cls": "getter"})
    except (AttributeError, TypeError):
        return False
    return True


def is_isotropic(maps: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all maps have the same size."""
    return len({level["reduction"] for level in maps}) == 1


def feature_info(backbone: nn.Module) -> Any:
    """Return timm's `feature_info` of a features_only backbone."""
    info: Any = getattr(backbone, "feature_info", None)
    if info is None:
        raise ValueError(f"{type(backbone).__name__} has no feature_info; make it with features_only=True")
    return info


def spared_of(backbone: nn.Module, name: str) -> set[str]:
    """Return the parameters that a features_only backbone excludes from weight decay; `name` is its name in the
    segmenter."""
    if not hasattr(backbone, "no_weight_decay"):
        backbone, name = getattr(backbone, "model", backbone), f"{name}.model"
    spared: Callable[[], Any] = getattr(backbone, "no_weight_decay", set)
    return {f"{name}.{parameter}" for parameter in spared()}


def layers_of(backbone: nn.Module, name: str, *, coarse: bool) -> Callable[[str], tuple[int, int]]:
    """Return a function from a segmenter's parameter to its layer, for layer decay: the backbone's, then all else."""
    inner = getattr(backbone, "model", None)
    matcher: Callable[..., Any] | None = getattr(inner, "group_matcher", None)
    if inner is None or matcher is None:
        raise ValueError(
            f"{type(inner or backbone).__name__} does not tell the layers of its features apart (timm's group_matcher)"
        )
    prefix = f"{name}.model."
    layers = cast("dict[str, int]", group_parameters(inner, matcher(coarse=coarse), reverse=True))
    return lambda parameter: (0, layers[parameter[len(prefix) :]]) if parameter.startswith(prefix) else (1, 0)
