"""The private names of timm and torch that the backbones lean on, in one place: when one moves, fix it here."""

from timm.models import vision_transformer
from timm.models._features import feature_take_indices
from torch.fx._symbolic_trace import _wrapped_fns_to_patch

__all__ = ["feature_take_indices"]

# What `torch.fx.wrap("resample_abs_pos_embed")` would do in timm's file: FX has no sizes to compare, and there timm's
# ViTs with dynamic_img_size compare them.
_of_timm = vision_transformer.__dict__
_wrapped_fns_to_patch[(id(_of_timm), "resample_abs_pos_embed")] = _of_timm
