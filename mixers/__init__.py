"""Token mixers as modules: [B, *spatial, C] in, the same out. Norm, residual and drop path belong to the block."""

from .neighborhood_attention import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d

__all__ = ["NeighborhoodAttention1d", "NeighborhoodAttention2d", "NeighborhoodAttention3d"]
