"""Bidirectional gated linear attention over the pixels of a map in row-major order, gated against a convolution.

    local = act(depthwise3x3(x))
    out = gate * rms_norm(attention(local)) + (1 - gate) * rms_norm(local),   gate = sigmoid(W local + b)

Paper: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention" (AAAI 2025, arXiv
2405.18425). Code: github.com/hustvl/ViG (MIT).

What is unusual:
* All projections read the convolution's output; `x` enters in no other way.
* The paper calls the last line 2-D gating: attention sees a sequence, the convolution sees rows and columns.
* Both directions share query, key and value, and have separate gates, computed by one low-rank projection. The log gate
  is divided by 16, so that a newly initialised layer forgets half in 16 steps.
* Queries and keys have half the channels of values.
* The official evaluation code of plain ViG halves the mean of the directions once more. The norm cancels that except
  for its epsilon, and the official training code does not do it; neither does this module.
"""

from functools import partial

import torch
from timm.layers import RmsNorm, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.gated_linear_attention import bidirectional_gated_linear_attention
from .depthwise_conv import DepthwiseConv2d


class GatedLinearAttention2d(nn.Module):
    """Mix a map [B, H, W, C] in time linear in H W.

    Args:
        dim: channels C; a head has dim / num_heads value channels, and half as many query and key channels.
        gate_rank: hidden channels of the low-rank projection of the gates.
        act_layer: activation after the convolution and before the last projection: SiLU in plain ViG, none in the
            hierarchical variant.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gate_rank: int = 16,
        act_layer: type[nn.Module] = nn.SiLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"dim must be a multiple of 2 * num_heads; got dim {dim} and num_heads {num_heads}")
        if gate_rank < 1:
            raise ValueError(f"gate_rank must be at least 1; got {gate_rank}")
        self.dim, self.num_heads, self.gate_divisor = dim, num_heads, 16
        linear = partial(nn.Linear, device=device, dtype=dtype)
        self.conv = DepthwiseConv2d(dim, 3, bias=False, device=device, dtype=dtype)
        self.conv_act = act_layer()
        self.qkv = linear(dim, 2 * dim, bias=False)
        self.decay = nn.Sequential(linear(dim, gate_rank, bias=False), linear(gate_rank, dim))
        self.gate = linear(dim, dim)
        self.norm = RmsNorm(dim // num_heads, device=device, dtype=dtype)
        self.local_norm = RmsNorm(dim // num_heads, device=device, dtype=dtype)
        self.act = act_layer()
        self.proj = linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as in the published code: small projections, since a norm or a sigmoid follows each."""
        for module in (self.conv, self.qkv, *self.decay, self.gate, self.proj):
            nn.init.xavier_uniform_(module.weight, gain=2**-2.5)  # pyright: ignore[reportArgumentType]
            if module.bias is not None:
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"needed [B, H, W, {self.dim} channels] with H, W >= 1; got shape {list(x.shape)}")
        local = self.conv_act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        tokens = local.flatten(1, 2)
        wide = self.norm.weight.dtype  # float32 under autocast, so that only the last projection rounds its input
        attended = self.norm(self._attend(tokens).to(wide))
        neighbours = self.local_norm(tokens.unflatten(-1, [self.num_heads, -1]).to(wide))
        gate = self.gate(tokens).to(wide).sigmoid().unflatten(-1, [self.num_heads, -1])
        mixed = torch.lerp(neighbours, attended, gate)
        return self.proj(self.act(mixed.flatten(-2))).unflatten(1, [x.shape[1], x.shape[2]])

    def _attend(self, tokens: Tensor) -> Tensor:
        """Attend over tokens [B, N, C]; return [B, N, heads, head channels]."""
        query, key, value = self.qkv(tokens).split([self.dim // 2, self.dim // 2, self.dim], dim=-1)
        log_gates = F.logsigmoid(self.decay(tokens).to(self.norm.weight.dtype)) / self.gate_divisor
        forward, backward = log_gates.chunk(2, dim=-1)
        heads = [t.unflatten(-1, [self.num_heads, -1]) for t in (query, key, value, forward, backward)]
        if torch.jit.is_scripting():
            scale = (self.dim // self.num_heads // 2) ** -0.5 / 2
            return torch.ops.mixerzoo.gated_linear_attention(heads[0], heads[1], heads[2], heads[3], heads[4], scale)
        else:
            return bidirectional_gated_linear_attention(heads[0], heads[1], heads[2], heads[3], heads[4])

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"


register_notrace_module(GatedLinearAttention2d)  # not as a decorator, which would hide the class's type
