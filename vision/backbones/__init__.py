"""One file a paper; importing this package registers all of them with timm."""

from . import (
    dinat_s,
    efficientvmamba,
    litv2,
    mobilemamba,
    nat,
    nat_isotropic,
    unireplknet,
    van,
    vig,
    vig_h,
    vim,
    vmamba,
)
from ._hierarchical import HierarchicalBackbone, Stage
from ._isotropic import IsotropicBackbone

__all__ = [
    "HierarchicalBackbone",
    "IsotropicBackbone",
    "Stage",
    "dinat_s",
    "efficientvmamba",
    "litv2",
    "mobilemamba",
    "nat",
    "nat_isotropic",
    "unireplknet",
    "van",
    "vig",
    "vig_h",
    "vim",
    "vmamba",
]
