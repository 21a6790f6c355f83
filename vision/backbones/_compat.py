"""The private names of timm that the backbones lean on, in one place: when timm moves one, this file is the one to fix."""

from timm.models._features import feature_take_indices

__all__ = ["feature_take_indices"]
