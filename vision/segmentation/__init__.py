"""Dense prediction: decode heads on timm feature pyramids. Needs torch and timm alone."""

from .build import build_segmenter
from .metrics import scores
from .segmenter import Segmenter, SegmenterOutput

__all__ = ["Segmenter", "SegmenterOutput", "build_segmenter", "scores"]
