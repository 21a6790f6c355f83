"""Projections for attention between two sets of tokens, named as in STViT-R: `q`, `kv`, `proj`."""

import torch
from torch import Tensor, nn


class CrossProjections(nn.Module):
    """Hold the projections of queries, of keys and values, and of the output; the subclass computes the attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim {dim} and num_heads {num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, query: Tensor, key_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split projected tokens [B, N, C] and [B, M, 2 C] into q, k and v of shape [B, heads, N or M, head_dim]."""
        q = query.unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)
        k, v = key_value.unflatten(-1, [2, self.num_heads, self.head_dim]).transpose(1, 3).unbind(2)
        return q, k, v
