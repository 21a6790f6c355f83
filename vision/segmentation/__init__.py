"""Dense prediction: decode heads on timm feature pyramids. Needs torch and timm alone."""

from .fpn import FPNHead
from .metrics import scores
from .segmenter import Segmenter

__all__ = ["FPNHead", "Segmenter", "scores"]
