"""The layers of attention between two sets of tokens, in the names of STViT-R: `q`, `kv`, `proj`."""

import torch
from torch import Tensor, nn


class CrossProjections(nn.Module):
    """Queries of one set, keys and values of another, and what goes out; how they meet is the subclass's business."""

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
        """Projected tokens [B, N, C] and [B, M, 2 C] to queries, keys and values [B, heads, N or M, head_dim]."""
        q = query.unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)
        k, v = key_value.unflatten(-1, [2, self.num_heads, self.head_dim]).transpose(1, 3).unbind(2)
        return q, k, v
