"""Lookup attention: a few compressed tokens attend to many tokens and write back by the transposed attention.

Paper: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens" (ECCV 2024, arXiv
2407.12753), where the pair is called multi-head bidirectional cross-attention (MHBC). No official code.

What is unusual:
* The write-back has no queries and keys of its own: it swaps those of the gathering attention. Only these have to be
  kept in between, so both steps are ordinary fused attention and no attention matrix is materialised.
* The paper does not state how the transposed weights are normalised, and the reproductions differ. The default is a
  softmax of the transposed logits: a lookup token receives an average of compressed tokens. With `renormalize=False` it
  receives their sum weighted by the attention they paid to it, which is small for a token that none attended to.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ._cross_projections import CrossProjections


class GatherAttention(CrossProjections):
    """Let compressed tokens [B, M, C] attend to lookup tokens [B, N, C]."""

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output [B, M, C], the queries [B, heads, M, head_dim] and the keys [B, heads, N, head_dim]."""
        query, key, value = self._heads(self.q(compressed), self.kv(lookup))
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out)), query, key


class TransposedAttention(nn.Module):
    """Distribute compressed tokens [B, M, C] to lookup tokens [B, N, C] by the transposed gathering attention.

    Args:
        renormalize: whether to normalise the weights of each lookup token to sum to one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        renormalize: bool = True,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim {dim} and num_heads {num_heads}")
        self.num_heads, self.head_dim, self.renormalize = num_heads, dim // num_heads, renormalize
        self.v = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, compressed: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Write back to the lookup tokens; `query` and `key` are those that `GatherAttention` returned."""
        value = self.v(compressed).unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)
        if self.renormalize:
            out = F.scaled_dot_product_attention(key, query, value)
        else:
            weights = (query * self.head_dim**-0.5 @ key.transpose(-2, -1)).softmax(-1)
            out = weights.transpose(-2, -1).to(value.dtype) @ value
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, renormalize={self.renormalize}"


register_notrace_module(GatherAttention)  # not as decorators, which would hide the classes' types
register_notrace_module(TransposedAttention)
