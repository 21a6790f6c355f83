"""One file a paper; importing this package registers all of them with timm."""

from . import nat
from ._hierarchical import HierarchicalBackbone, Stage

__all__ = ["HierarchicalBackbone", "Stage", "nat"]
