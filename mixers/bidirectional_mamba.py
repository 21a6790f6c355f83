"""Bidirectional Mamba, the mixer of Vim: scans of a sequence in both directions, with separate weights.

    x, z = W_in u
    y = scan(SiLU(conv_f x), f) + reverse(scan(SiLU(conv_b reverse x), b))
    out = W_out (y / 2 * SiLU(z))

Papers: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (ICML
2024, arXiv 2401.09417); Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv
2312.00752). Code: github.com/hustvl/Vim, Apache-2.0: `bimamba_type="v2"` with `if_divide_out=True`.

What is unusual:
* The directions share both projections and the gate. They have separate convolutions, each causal in its own direction,
  so the two scans read two sequences.
* No sequence is reversed: a causal convolution of the reversed sequence is an anti-causal convolution of the sequence
  itself, and the operator runs the second scan from the end. Both convolutions are two-dimensional, over a map of one
  row in channels_last: on the CPU this is twice as fast as PyTorch's one-dimensional one or a sum of shifted sequences.
* `A_log`, `D` and `dt_bias` must stay float32; see `SelectiveScan2d`.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import needs_operator, wants_plain_ops
from ..kernels.cross_scan import BIDIRECTIONAL
from ..kernels.selective_scan import selective_scan_2d
from .ss2d import SelectiveScan2d


class _TwoScans(SelectiveScan2d):
    """Scan one sequence from each end, [B, N, 2, dim], and sum the results to [B, N, dim]."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        projected = torch.bmm(x.permute(2, 0, 1, 3).flatten(1, 2), self.x_proj_weight.transpose(1, 2))
        projected = projected.unflatten(1, [batch, length]).permute(1, 2, 0, 3)
        A = self._decay_rates()
        if torch.jit.is_scripting():
            size, keep = [1, length], torch.is_grad_enabled()
            weights = (self.dt_weight, self.dt_bias, A, self.D)
            return torch.ops.mixerzoo.selective_scan(
                x, None, projected, *weights, size, self.path_fields, True, True, keep
            )[0]
        else:
            x, projected = x.unsqueeze(1), projected.unsqueeze(1)  # maps of one row
            y = selective_scan_2d(x, projected, self.dt_weight, self.dt_bias, A, self.D, paths=self.paths)
            return y.squeeze(1)


class BidirectionalMamba(nn.Module):
    """Mix a sequence [B, N, C] of any length with causal convolutions and scans in both directions, in linear time.

    Args:
        dim: channels C.
        expand: inner channels of the scans, as a multiple of `dim`.
        state_dim: state elements per channel of the scans.
        conv_size: kernel size of the causal convolutions.
        dt_rank: see `SelectiveScan2d`; None for a sixteenth of `dim`, rounded up.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        conv_size: int = 4,
        dt_rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or int(dim * expand) < 1 or conv_size < 1:
            raise ValueError(
                f"dim, dim * expand and conv_size must be at least 1; got dim {dim}, expand {expand} and conv_size "
                f"{conv_size}"
            )
        self.dim, self.inner_dim, self.conv_size = dim, int(dim * expand), conv_size
        rank = -(-dim // 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * self.inner_dim, bias=False, device=device, dtype=dtype)
        self.conv_weight = nn.Parameter(torch.empty(2, self.inner_dim, conv_size, device=device, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(2, self.inner_dim, device=device, dtype=dtype))
        self.scan = _TwoScans(
            self.inner_dim, state_dim=state_dim, dt_rank=rank, paths=BIDIRECTIONAL, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the convolutions as PyTorch does; the layers initialise themselves."""
        bound = self.conv_size**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.dim or x.shape[1] == 0:
            raise ValueError(f"needed [B, N, {self.dim} channels] with N >= 1; got shape {list(x.shape)}")
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        y = self.scan(self._convolve(x))
        return self.out_proj(y * (F.silu(gate) * 0.5))

    def _convolve(self, x: Tensor) -> Tensor:
        """Return SiLU of the causal and the anti-causal convolution, [B, N, 2, inner_dim]."""
        length, reach = x.shape[1], self.conv_size - 1
        row = x.unsqueeze(1).permute(0, 3, 1, 2)  # a map of one row, channels_last
        weight, bias = self.conv_weight.unsqueeze(2).unsqueeze(2), self.conv_bias
        past = F.conv2d(row, weight[0], bias[0], padding=[0, reach], groups=self.inner_dim)
        past = past.permute(0, 2, 3, 1).squeeze(1)[:, :length]
        coming = F.conv2d(row, weight[1].flip(-1), bias[1], padding=[0, reach], groups=self.inner_dim)
        coming = coming.permute(0, 2, 3, 1).squeeze(1)[:, reach:]
        if torch.jit.is_scripting():
            return torch.stack([F.silu(past), F.silu(coming)], dim=2)
        else:
            if wants_plain_ops() or needs_operator(past, coming):
                return torch.stack([F.silu(past), F.silu(coming)], dim=2)
            both = past.new_empty(2, *past.shape)  # for long sequences, allocating memory takes a third of the time
            for y, out in zip((past, coming), both, strict=True):
                torch.ops.aten.silu.out(y, out=out)
            return both.permute(1, 2, 0, 3)

    def extra_repr(self) -> str:
        return f"{self.dim}, inner_dim={self.inner_dim}, conv_size={self.conv_size}"


for _module in (_TwoScans, BidirectionalMamba):  # not as a decorator, which would hide the classes' types
    register_notrace_module(_module)
