"""One file a paper; importing this package registers all of them with timm."""

from . import (
    dinat_s,
    dynamicvit_convnext,
    dynamicvit_swin,
    eet,
    efficientvmamba,
    evit,
    litv2,
    mobilemamba,
    nat,
    nat_isotropic,
    spatten,
    stvitr,
    tome,
    unireplknet,
    van,
    vig,
    vig_h,
    vim,
    vmamba,
)
from ._hierarchical import HierarchicalBackbone, Stage
from ._isotropic import IsotropicBackbone
from ._token_reduction import TokenReducedViT, reduce_tokens, restore_tokens

__all__ = [
    "HierarchicalBackbone",
    "IsotropicBackbone",
    "Stage",
    "TokenReducedViT",
    "dinat_s",
    "dynamicvit_convnext",
    "dynamicvit_swin",
    "eet",
    "efficientvmamba",
    "evit",
    "litv2",
    "mobilemamba",
    "nat",
    "nat_isotropic",
    "reduce_tokens",
    "restore_tokens",
    "spatten",
    "stvitr",
    "tome",
    "unireplknet",
    "van",
    "vig",
    "vig_h",
    "vim",
    "vmamba",
]
