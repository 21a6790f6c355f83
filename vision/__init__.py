"""Vision backbones for timm: importing this registers every model of `mixerzoo.vision.backbones` with timm."""

from . import backbones

__all__ = ["backbones"]
