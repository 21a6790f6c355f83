"""How published segmenters are judged, for those that are named by their parts and have no run that would say it.

Sources: the repositories of published.py and https://github.com/maomao0819/BEVANet, as in configs/recipes; pictures of
a data set that no recipe has are judged as in configs/data. A test holds this and those to each other.

Unusual:

* What is published of one backbone may differ by its head: VAN is judged with mirror images under UPerNet alone.
* Pictures of classes that are of no data set known here are taken for photographs, and judged as ADE20K's are.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from ..label_sets import published_name

_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

DATA: Mapping[str, Mapping[str, Any]] = {
    "ade20k": {"size": 512},
    "voc": {"size": 512},
    "cityscapes": {"size": 1024, "short_side": 0},
    "camvid": {"size": 960, "short_side": 0},
}
"""By data set: `data.size` of training, and `data.short_side` where that is another (0: the picture's own)."""

MODELS: Mapping[tuple[str, str, str], Mapping[str, Any]] = {
    ("ade20k", "semantic_fpn", "van_*"): {"evaluate": {"divisor": 32, "scales": _SCALES}},
    ("ade20k", "upernet", "van_*"): {"evaluate": {"divisor": 32, "scales": _SCALES, "flip": True}},
    ("ade20k", "upernet", "unireplknet_[bl]*"): {"size": 640, "evaluate": {"divisor": 32}},
    ("ade20k", "upernet", "unireplknet_*"): {"evaluate": {"divisor": 32}},
    ("ade20k", "upernet", "dinat_large*"): {"size": 640},
    ("ade20k", "upernet", "dinat_s_large*"): {"size": 640},
    ("ade20k", "upernet", "vim_*"): {"evaluate": {"mode": "slide", "stride": [341, 341]}},
    ("ade20k", "bevanet", "bevanet*"): {"short_side": 640},
}
"""What is otherwise by data set, head and pattern of the backbone's name, of which the first that fits counts; and what
the recipes set of `evaluate`."""


def published_evaluation(name: str, head: str, classes: Sequence[str]) -> dict[str, Any]:
    """`size`, `short_side` and `evaluate` of a published segmenter, as a run's checkpoint has them."""
    data = published_name(classes) or "ade20k"
    more = (
        settings
        for (*parts, pattern), settings in MODELS.items()
        if parts == [data, head] and fnmatch.fnmatchcase(name, pattern)
    )
    return {"short_side": None, "evaluate": {}, **DATA[data], **next(more, {})}
