"""Dense prediction: decode heads on timm feature pyramids. Needs torch and timm alone."""

from .metrics import scores
from .segmenter import Segmenter, SegmenterOutput, build_segmenter

__all__ = ["Segmenter", "SegmenterOutput", "build_segmenter", "scores"]
