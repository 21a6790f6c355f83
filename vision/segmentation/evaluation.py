"""Evaluation settings of published segmenters, for models that are named by backbone and head and have no run folder.

Sources: the repositories of published.py and https://github.com/maomao0819/BEVANet, as in configs/recipes; data sets
without a recipe use the settings of configs/data. A test keeps this file and those equal.

Unusual:

* Published settings may depend on the head: VAN is evaluated with mirror images under UPerNet alone.
* Classes of an unknown data set are evaluated with the settings of ADE20K.
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
"""By data set: `data.size` of training, and `data.short_side` if it differs (0 keeps the picture's own size)."""

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
"""Deviations by data set, head and pattern of the backbone's name, and the `evaluate` settings of the recipes. The
first match applies."""


def published_evaluation(name: str, head: str, classes: Sequence[str]) -> dict[str, Any]:
    """Return `size`, `short_side` and `evaluate` of a published segmenter, with the keys of a run's checkpoint."""
    data = published_name(classes) or "ade20k"
    more = (
        settings
        for (*parts, pattern), settings in MODELS.items()
        if parts == [data, head] and fnmatch.fnmatchcase(name, pattern)
    )
    return {"short_side": None, "evaluate": {}, **DATA[data], **next(more, {})}
