"""Dense prediction: decode heads on timm feature pyramids. Needs torch and timm alone."""

from .fpn import FPNHead
from .metrics import scores
from .segmenter import Segmenter, build_segmenter

__all__ = ["FPNHead", "Segmenter", "build_segmenter", "scores"]
