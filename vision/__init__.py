"""Vision backbones for timm: importing this registers every model of `mixerzoo.vision.backbones` under its timm name."""

from . import backbones

__all__ = ["backbones"]
