"""HiLo attention: some heads attend within small windows (Hi-Fi), the others to an average-pooled map (Lo-Fi).

Paper: Pan, Cai and Zhuang, "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022, arXiv 2205.13213). Code:
github.com/ziplab/LITv2, `hilo.py` (Apache 2.0), whose parameter names are kept: `h_qkv`, `h_proj`, `l_q`, `l_kv`,
`l_proj`.

What is unusual:
* The paths share nothing: each has its own projections, and their outputs are concatenated, Hi-Fi's channels first.
  There is no positional encoding; in LITv2 the convolution inside the MLP supplies the positions.
* `int(num_heads * alpha)` heads are Lo-Fi, truncated as in the official code: 12 heads at 0.9 give 10, not 11.
* `window_size` 1 is plain attention: pooling over one position is the identity, so every head becomes Lo-Fi and
  `alpha` has no effect.
* A map whose size is not a multiple of the window is zero-padded at the bottom and on the right, as in the official
  segmentation and detection code: the zeros enter the last windows as tokens (with the projection's bias as key and
  value) and the average of the last pooled positions. The official classification code rejects such maps, and with
  alpha 1 silently drops their last rows and columns; that is not reproduced. All variants agree on maps that divide
  evenly.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import is_exporting


class HiLo(nn.Module):
    """Apply HiLo attention to a map [B, H, W, C] of any height and width.

    Args:
        dim: channels C, a multiple of `num_heads`.
        window_size: side of the Hi-Fi windows and of the Lo-Fi pooling.
        alpha: fraction of Lo-Fi heads, from 0 (windows only) to 1 (pooled map only).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim {dim} and num_heads {num_heads}")
        if window_size < 1:
            raise ValueError(f"window_size must be 1 or more, 1 for plain attention; got {window_size}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is the part of the heads that see the pooled map, from 0 to 1; got {alpha}")
        self.dim, self.head_dim, self.window_size = dim, dim // num_heads, window_size
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Module:
            # A path without heads has no parameters; TorchScript requires a placeholder module.
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype) if outputs else nn.Identity()

        h_dim, l_dim = self.h_heads * self.head_dim, self.l_heads * self.head_dim
        self.h_qkv = linear(dim, 3 * h_dim, qkv_bias)
        self.h_proj = linear(h_dim, h_dim, True)
        self.l_q = linear(dim, l_dim, qkv_bias)
        self.l_kv = linear(dim, 2 * l_dim, qkv_bias)
        self.l_proj = linear(l_dim, l_dim, True)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"needed [B, H, W, {self.dim} channels] with H, W >= 1; got shape {list(x.shape)}")
        height, width, side = x.shape[1], x.shape[2], self.window_size
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        below, right = rows * side - height, columns * side - width
        padded = is_exporting() or below > 0 or right > 0
        whole = F.pad(x, [0, 0, 0, right, 0, below]) if padded else x
        paths: list[Tensor] = []
        if self.h_heads > 0:
            high = self._high_frequency(whole)
            paths.append(F.pad(high, [0, 0, 0, -right, 0, -below]) if padded else high)
        if self.l_heads > 0:
            paths.append(self._low_frequency(x, whole))
        return self.proj_drop(torch.cat(paths, dim=-1) if len(paths) > 1 else paths[0])

    def _high_frequency(self, x: Tensor) -> Tensor:
        """Attend within each window of the padded map."""
        batch, height, width, _ = x.shape
        side, heads = self.window_size, self.h_heads
        rows, columns = height // side, width // side
        # Project first: fewer channels then have to be partitioned into windows.
        qkv = self.h_qkv(x).reshape(batch, rows, side, columns, side, 3, heads, self.head_dim)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, side * side, self.head_dim)
        query, key, value = qkv.unbind(0)
        if x.device.type == "cpu":
            # The fused kernel has a fixed cost per window, and windows are many and small.
            scores = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)
            out = scores.softmax(-1) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        out = out.reshape(batch, rows, columns, heads, side, side, self.head_dim)
        return self.h_proj(out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads * self.head_dim))

    def _low_frequency(self, x: Tensor, whole: Tensor) -> Tensor:
        """Attend from every position of `x` to the pooled map; `whole` is the padded `x`."""
        if self.window_size > 1:
            whole = F.avg_pool2d(whole.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        query = self.l_q(x).flatten(1, 2).unflatten(-1, [self.l_heads, self.head_dim]).transpose(1, 2)
        keys_values = self.l_kv(whole).flatten(1, 2).unflatten(-1, [2, self.l_heads, self.head_dim])
        key, value = keys_values.transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.l_proj(out.transpose(1, 2).flatten(2).unflatten(1, [x.shape[1], x.shape[2]]))

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.h_heads} high + {self.l_heads} low, window_size={self.window_size}"


register_notrace_module(HiLo)  # not as a decorator, which would hide the class's type
