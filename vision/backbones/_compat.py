"""The private names of timm that the backbones lean on, in one place: when timm moves one, fix it here."""

from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models._features import feature_take_indices

__all__ = ["InvertedResidual", "SqueezeExcite", "feature_take_indices"]
