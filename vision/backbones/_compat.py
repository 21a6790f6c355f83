"""The private names of timm and torch that the backbones depend on, in one place: if one moves, fix it here."""

from timm.models import vision_transformer
from timm.models._features import feature_take_indices
from torch.fx._symbolic_trace import _wrapped_fns_to_patch

__all__ = ["feature_take_indices"]

# Do what `torch.fx.wrap("resample_abs_pos_embed")` would do in timm's file: timm's ViTs with dynamic_img_size compare
# sizes in that function, which symbolic tracing cannot do.
_of_timm = vision_transformer.__dict__
_wrapped_fns_to_patch[(id(_of_timm), "resample_abs_pos_embed")] = _of_timm
