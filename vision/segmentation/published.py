"""The arguments by which published segmentation backbones differ from the classifiers of their family.

`build_segmenter` applies them unless the caller sets others. Sources: the configurations of
https://github.com/Visual-Attention-Network/VAN-Segmentation, https://github.com/ziplab/LITv2,
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, https://github.com/MzeroMiko/VMamba,
https://github.com/AILab-CVC/UniRepLKNet and https://github.com/hustvl/Vim.

Unusual:

* Dilations of DiNAT are not part of its weights. They grow with the picture, so that the widest window of a stage spans
  its map: these are for 512 pixels, those of the large models for 640. They are not applied to other depths, or if the
  caller sets dilations.
* ViG-H and EfficientVMamba publish no segmentation; they are built as their detectors are, and as VMamba is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

_NORMS = {"out_norms": True}
_SIX = (1, 2, 1, 3, 1, 4)
_LARGE = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
_DINAT = {"out_norms": True, "dilations": ((1, 16, 1), (1, 4, 1, 8), _SIX, (1, 2))}
_DINAT_LARGE = {"out_norms": True, "dilations": ((1, 20, 1), (1, 5, 1, 10), _LARGE, (1, 2))}
_DINAT_S = {"out_norms": True, "dilations": ((1, 16), (1, 8), _SIX, (1, 2))}
_DINAT_S_LARGE = {"out_norms": True, "dilations": ((1, 20), (1, 10), _LARGE, (1, 2))}

KWARGS: Mapping[str, Mapping[str, Any]] = {
    "van_*": {"norm_eps": 1e-5},
    "litv2_*": _NORMS,
    "unireplknet_*": _NORMS,
    "vmamba*": _NORMS,
    "vig_h_*": _NORMS,
    "efficientvmamba_*": _NORMS,
    **{f"nat_{size}": _NORMS for size in ("mini", "tiny", "small", "base")},
    **{f"dinat_{size}": _DINAT for size in ("mini", "tiny", "small", "base")},
    **{f"dinat_{size}": _DINAT_LARGE for size in ("large", "large_384")},
    "dinat_large_11x11*": _NORMS,  # trained for other tasks alone
    **{f"dinat_s_{size}": _DINAT_S for size in ("tiny", "small", "base")},
    "dinat_s_large*": _DINAT_S_LARGE,
}
"""Arguments by pattern of the model name without its tag; one pattern matches a model."""


def backbone_kwargs(name: str, set_by_caller: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the published segmentation backbone that the caller does not set."""
    model = name.partition(".")[0]
    published = next((kwargs for pattern, kwargs in KWARGS.items() if fnmatch.fnmatchcase(model, pattern)), {})
    other_depths = "depths" in set_by_caller
    return {k: v for k, v in published.items() if k not in set_by_caller and not (k == "dilations" and other_depths)}


def upernet_width(name: str, channels: Sequence[int]) -> int:
    """Return the published width of UPerNet over maps of `channels`: Vim's token width, else 512."""
    return channels[-1] if name.startswith("vim_") else 512
