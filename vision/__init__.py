"""Vision backbones for timm: importing this registers every model of `mixerzoo.vision.backbones` with timm."""

from . import backbones
from .backbones import reduce_tokens, restore_tokens

__all__ = ["backbones", "reduce_tokens", "restore_tokens"]
