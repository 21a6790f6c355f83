"""The architectures of segmentation_models_pytorch as heads: `head.name=smp:Unet`, `smp:FPN`, `smp:PSPNet`, …

P. Iakubovskii: Segmentation Models Pytorch, https://github.com/qubvel-org/segmentation_models.pytorch; version 0.6 is
tested. This optional dependency is imported when it is needed.

Unusual:

* smp needs pictures whose sides are multiples of 32: others are padded below and to the right with zeros, the mean
  colour of a normalised picture, and the logits are cropped.
* Its encoders need maps of strides 4, 8, 16 and 32 (and may have 2). Isotropic backbones do not have them.
* DeepLabV3, DeepLabV3Plus and PAN dilate the last stages of a backbone (timm's `output_stride`), which some of timm's
  models support and none of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .._messages import did_you_mean
from .features import layers_of, sketch, spared_of

MULTIPLE = 32
STRIDE = "output_stride"


class SmpSegmenter(nn.Module):
    """A model of segmentation_models_pytorch that takes pictures of any size and returns logits at that size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, C, H, W] to logits [B, num_classes, H, W]."""
        height, width = images.shape[-2:]
        padded = F.pad(images, [0, -width % MULTIPLE, 0, -height % MULTIPLE])
        return self.network(padded)[:, :, :height, :width]

    def no_weight_decay(self) -> set[str]:
        """Return the encoder's parameters without weight decay, as `Segmenter` does."""
        return spared_of(self._features, "network.encoder.model")

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int, int]]:
        """Return the function from a parameter to its layer, as `Segmenter` does."""
        return layers_of(self._features, "network.encoder.model", coarse=coarse)

    @property
    def _features(self) -> nn.Module:
        return self.network.get_submodule("encoder.model")


def build_smp(
    architecture: str,
    name: str,
    num_classes: int,
    *,
    dropout: float,
    kwargs: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
) -> SmpSegmenter:
    """Build an architecture of smp on the timm model `name`; `kwargs` go to the architecture, `model_kwargs` to
    timm."""
    if kwargs.get("aux_params") is not None:
        raise ValueError(
            "head.kwargs.aux_params adds a classifier of whole pictures, but a segmenter answers for pixels alone; "
            "leave it out"
        )
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ValueError(
            f"head.name=smp:{architecture} needs segmentation_models_pytorch; pip install segmentation-models-pytorch"
        ) from error
    known = {kind.lower(): kind for kind in dir(smp) if _is_architecture(getattr(smp, kind))}
    if architecture.lower() not in known:
        hint = did_you_mean(f"smp:{architecture}", [f"smp:{kind}" for kind in known.values()], cutoff=0.75) or "."
        raise ValueError(f"no architecture of smp is called {architecture}{hint} There are {', '.join(known.values())}")
    kind = getattr(smp, known[architecture.lower()])
    encoder = dict(model_kwargs)
    settings = {
        "encoder_name": f"tu-{name}",
        "encoder_weights": True if encoder.pop("pretrained", False) else None,
        "in_channels": encoder.pop("in_chans", 3),
        "classes": num_classes,
    }
    if "decoder_dropout" in _parameters(kind):
        settings["decoder_dropout"] = dropout
    _check_strides(architecture, name, encoder)
    try:
        return SmpSegmenter(kind(**(settings | dict(kwargs) | encoder)))
    except TypeError as error:
        if STRIDE not in str(error):
            raise ValueError(f"smp:{architecture} around {name}: {error}; see head.kwargs and model.kwargs") from error
        free = [other for other in known.values() if f"encoder_{STRIDE}" not in _parameters(getattr(smp, other))]
        raise ValueError(
            f"smp:{architecture} needs a backbone whose last stages can be dilated ({STRIDE}), which {name} is not; "
            f"take one of {', '.join(free)}"
        ) from error


def _is_architecture(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, nn.Module) and "encoder_name" in _parameters(kind)


def _parameters(kind: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(kind).parameters.keys()


def _check_strides(architecture: str, name: str, encoder: Mapping[str, Any]) -> None:
    """Check the strides of the maps with the given arguments; smp inspects the model without them."""
    strides = list(dict.fromkeys(level["reduction"] for level in sketch(name, encoder).feature_info.info))
    if strides[-4:] != [4, 8, 16, 32]:
        raise ValueError(
            f"smp:{architecture} needs maps of strides 4, 8, 16 and 32; those of {name} are {strides}; take one of our "
            "heads (upernet, semantic_fpn, segformer), or leave out arguments that change the stem"
        )
