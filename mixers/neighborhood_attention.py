"""Neighborhood attention modules for sequences, maps and volumes.

Papers: Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143); Hassani and Shi, "Dilated Neighborhood
Attention Transformer" (2209.15001). Parameters have NATTEN's names (github.com/SHI-Labs/NATTEN): `qkv`, `proj`, `rpb`.

What is unusual:
* A map too small for its window is zero-padded at the end of each axis *before* the projection to query, key and value,
  and cropped after the attention: the padded keys and values equal the projection's bias and take part in the
  attention. NATTEN did so up to 0.15, the version that trained the published checkpoints; later releases raise an error
  instead.
* There is no dropout on the attention weights: the fused operators never materialise them, and no published model used
  it.
"""

import torch
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import is_exporting
from ..kernels.neighborhood_attention import Axes, make_windows, na1d, na2d, na3d


def _shortfall(length: int, needed: int) -> int:
    """Return how much an axis is too short, without branching: the length may be symbolic while exporting."""
    if torch.jit.is_scripting():
        return max(length, needed) - length
    else:
        return torch.sym_max(length, needed) - length  # pyright: ignore[reportReturnType]


class _NeighborhoodAttention(nn.Module):
    """Apply multi-head neighborhood attention to [B, *spatial, C], with spatial axes of any size.

    Args:
        dim: channels C, a multiple of `num_heads`.
        kernel_size: keys per window, for all axes or one value per axis.
        stride: queries that share a window, from 1 to `kernel_size`; one value or one per axis.
        dilation: step between the keys of a window; one value or one per axis.
        is_causal: whether a query sees no later position; one value or one per axis.
        rpb: whether to add a learned bias per head and relative position; the windows must then be odd.
        qk_scale: factor on the scores, (dim / num_heads) ** -0.5 if None.
    """

    rank: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Axes[int],
        *,
        stride: Axes[int] = 1,
        dilation: Axes[int] = 1,
        is_causal: Axes[bool] = False,
        rpb: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim {dim} and num_heads {num_heads}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else float(qk_scale)
        windows = make_windows(self.rank, kernel_size, stride, dilation, is_causal)
        even = [window.size for window in windows if window.size % 2 == 0]
        if rpb and even:
            raise ValueError(
                f"rpb needs odd windows, with a centre; kernel_size is {even[0]}: take {even[0] + 1}, or rpb=False"
            )
        self.kernel_size = [window.size for window in windows]
        self.stride = [window.stride for window in windows]
        self.dilation = [window.dilation for window in windows]
        self.is_causal = [window.is_causal for window in windows]

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        if rpb:
            table = [num_heads, *(2 * size - 1 for size in self.kernel_size)]
            self.rpb = nn.Parameter(torch.empty(table, device=device, dtype=dtype))
        else:
            self.register_parameter("rpb", None)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table; the two projections initialise themselves."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        rank = len(self.kernel_size)
        if x.dim() != rank + 2 or x.shape[-1] != self.dim:
            raise ValueError(f"needed [B, {rank} spatial axes, {self.dim} channels]; got shape {list(x.shape)}")
        lacking = [_shortfall(x.shape[i + 1], self.kernel_size[i] * self.dilation[i]) for i in range(rank)]
        too_small = is_exporting() or max(lacking) > 0
        ends = [0, 0]  # last axis first, as F.pad takes them
        for i in range(rank):
            ends += [0, lacking[rank - 1 - i]]
        if too_small:
            x = F.pad(x, ends)

        query, key, value = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).unbind(-3)
        out = self._attend(query, key, value).flatten(-2)
        if too_small:
            out = F.pad(out, [-end for end in ends])
        return self.proj_drop(self.proj(out))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # call the operator itself, which always has three axes
            missing = 3 - len(self.kernel_size)
            rpb = self.rpb
            for _ in range(missing):
                query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
                rpb = None if rpb is None else rpb.unsqueeze(1)
            ones = [1] * missing
            out = torch.ops.mixerzoo.neighborhood_attention(
                query,
                key,
                value,
                rpb,
                ones + self.kernel_size,
                ones + self.stride,
                ones + self.dilation,
                [False] * missing + self.is_causal,
                self.scale,
            )[0]
            return out.flatten(1, 1 + missing)
        attend = (na1d, na2d, na3d)[self.rank - 1]
        return attend(
            query,
            key,
            value,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            rpb=self.rpb,
        )

    def extra_repr(self) -> str:
        window = f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"
        return (
            f"{self.dim}, num_heads={self.num_heads}, {window}, is_causal={self.is_causal}, rpb={self.rpb is not None}"
        )


@register_notrace_module
class NeighborhoodAttention1d(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "L", 1)
    rank = 1


@register_notrace_module
class NeighborhoodAttention2d(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "H, W", 1)
    rank = 2


@register_notrace_module
class NeighborhoodAttention3d(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "D, H, W", 1)
    rank = 3
