"""One file a paper; importing this package registers all of them with timm."""

from . import dinat_s, nat, nat_isotropic
from ._hierarchical import HierarchicalBackbone, Stage
from ._isotropic import IsotropicBackbone

__all__ = ["HierarchicalBackbone", "IsotropicBackbone", "Stage", "dinat_s", "nat", "nat_isotropic"]
