"""The size to which a picture is resized before a segmenter sees it, in training and in evaluation.

The rule is mmsegmentation's `Resize` with `keep_ratio=True` (https://github.com/open-mmlab/mmsegmentation): the shorter
side gets the stated length, unless the longer one would then exceed a limit.
"""

from __future__ import annotations

LONGEST = 4
"""The longer side may become at most this many times `short_side`, as in the published 2048 x 512."""


def resized(height: int, width: int, short_side: int, scale: float = 1.0) -> tuple[int, int]:
    """Return the height and width that a picture of `height` x `width` gets.

    Args:
        short_side: length of the shorter side at scale 1; 0 keeps the size of the picture.
        scale: multiplies the resulting size.
    """
    factor = scale
    if short_side:
        short = max(1, int(short_side * scale))
        factor = min(int(LONGEST * short_side * scale) / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
