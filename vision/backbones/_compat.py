"""The private names of timm that the backbones lean on, in one place: when timm moves one, fix it here."""

from timm.models._features import feature_take_indices

__all__ = ["feature_take_indices"]
