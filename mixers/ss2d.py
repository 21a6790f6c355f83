"""Selective scans over a map (SS2D): a recurrence along several pixel orders with input-dependent coefficients.

    delta_t = softplus(W_dt low_rank_t + b_dt),   low_rank_t, B_t, C_t = W_x x_t
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,   y_t = C_t . h_t + D x_t

Every order has its own weights; the outputs of all orders are summed at each pixel.

Papers: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), the
recurrence and its initialisation; Liu et al., "VMamba: Visual State Space Model" (NeurIPS 2024, arXiv 2401.10166), four
orders; Pei, Huang and Xu, "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba" (arXiv 2403.09977),
four disjoint sub-grids.

What is unusual:
* No sequence is materialised: the orders are data (`ScanPath`) from which the operator computes where to read.
* `A_log`, `D` and `dt_bias` must stay float32: autocast leaves them so, and the operator computes in float32 whatever
  the map's dtype. They should be trained without weight decay, see `VMamba.no_weight_decay`.
* If the orders are disjoint sub-grids, each pixel is projected once, with the weights of its own sub-grid.
* A depth-wise convolution and SiLU precede the scan; a layer norm, which is part of the published mixers, sits between
  scan and gate.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import is_exporting
from ..kernels.cross_scan import ATROUS, CROSS, ScanPath
from ..kernels.selective_scan import selective_scan_2d
from .depthwise_conv import DepthwiseConv2d


def _partition_step(paths: Sequence[ScanPath]) -> int:
    """Return the step of sub-grids that partition the pixels, 1 for all other sets of paths."""
    step = paths[0].step
    corners = {(path.row, path.column) for path in paths if path.step == step}
    all_corners = {(row, column) for row in range(step) for column in range(step)}
    return step if len(paths) == len(all_corners) and corners == all_corners else 1


class SelectiveScan2d(nn.Module):
    """Scan a map [B, H, W, dim] along all paths, including the projections that compute the scan coefficients.

    Args:
        state_dim: state elements per channel.
        dt_rank: rank of the projection that computes the step size of every channel.
        paths: orders in which the map is traversed; their outputs are summed.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int,
        dt_rank: int,
        paths: Sequence[ScanPath] = CROSS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("state_dim", state_dim), ("dt_rank", dt_rank), ("paths", len(paths))):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.dim, self.state_dim, self.dt_rank = dim, state_dim, dt_rank
        self.paths = tuple(paths)
        self.path_fields = [int(field) for path in paths for field in path]  # a type that TorchScript supports
        self.step = _partition_step(paths)
        # Sub-grids in row-major order of their first pixels, the memory order of a step x step square.
        self.order = sorted(range(len(paths)), key=lambda i: (paths[i].row, paths[i].column))

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(len(paths), *shape, device=device, dtype=dtype))

        self.x_proj_weight = parameter(dt_rank + 2 * state_dim, dim)
        self.dt_weight = parameter(dim, dt_rank)
        self.dt_bias = parameter(dim)
        self.A_log = parameter(dim, state_dim)
        self.D = parameter(dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as Mamba does: decay rates 1, 2, … state_dim, step sizes log-uniform between 0.001 and 0.1."""
        nn.init.uniform_(self.x_proj_weight, -(self.dim**-0.5), self.dim**-0.5)
        nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"needed [B, H, W, {self.dim} channels] with H, W >= 1; got shape {list(x.shape)}")
        # Exporters take the dense projection: sub-grids would require proving which sizes are even.
        is_dense = self.step == 1 or is_exporting()
        projected = self._project(x) if is_dense else self._project_sub_grids(x)
        A = self._decay_rates()
        if torch.jit.is_scripting():
            return self._scripted_scan(x, projected, A)
        else:
            return selective_scan_2d(x, projected, self.dt_weight, self.dt_bias, A, self.D, paths=self.paths)

    def _decay_rates(self) -> Tensor:
        """Return A in float32 or wider."""
        A_log = self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float()
        return -A_log.exp()

    def _scripted_scan(self, x: Tensor, projected: Tensor, A: Tensor) -> Tensor:
        """Call the custom operator, which TorchScript supports, on flat maps with a slot axis in `projected`."""
        size = [x.shape[1], x.shape[2]]
        projected = projected.flatten(1, 2) if self.step == 1 else projected.flatten(1, 2).unsqueeze(2)
        y = torch.ops.mixerzoo.selective_scan(
            x.flatten(1, 2).unsqueeze(2),
            None,
            projected,
            self.dt_weight,
            self.dt_bias,
            A,
            self.D,
            size,
            self.path_fields,
            True,
            True,
            torch.is_grad_enabled(),
        )[0]
        return y.unflatten(1, size)

    def _project(self, x: Tensor) -> Tensor:
        """Project every pixel for every scan by one matrix product: [B, H, W, scans, dt_rank + 2 * state_dim]."""
        return F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, self.x_proj_weight.shape[:2])

    def _project_sub_grids(self, x: Tensor) -> Tensor:
        """Project every pixel for the one scan that visits it: [B, H, W, dt_rank + 2 * state_dim]."""
        height, width, step = x.shape[1], x.shape[2], self.step
        # Pad to the maximum that any size needs: `unfold` drops incomplete squares.
        grids = F.pad(x, [0, 0, 0, step - 1, 0, step - 1]).unfold(1, step, step).unfold(2, step, step)
        rows, columns = grids.shape[1], grids.shape[2]
        weight = torch.stack([self.x_proj_weight[i] for i in self.order]).transpose(1, 2)
        projected = grids.permute(4, 5, 0, 1, 2, 3).flatten(2, 4).flatten(0, 1) @ weight
        projected = projected.unflatten(1, [x.shape[0], rows, columns]).unflatten(0, [step, step])
        return projected.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)[:, :height, :width]

    def extra_repr(self) -> str:
        return f"{self.dim}, state_dim={self.state_dim}, dt_rank={self.dt_rank}, scans={len(self.paths)}"


class SS2D(nn.Module):
    """Apply VMamba's mixer to [B, H, W, C]: projection, depth-wise convolution, scans, layer norm, gate, projection.

    Args:
        expand: inner channels of the scans, as a multiple of `dim`.
        dt_rank: see `SelectiveScan2d`; None for a sixteenth of `dim`, rounded up.
        gate: whether to multiply the normalised scan output by SiLU of a second projection of the map.
        conv_bias: whether the depth-wise convolution has a bias; the projections have none.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | None = None,
        paths: Sequence[ScanPath] = CROSS,
        gate: bool = True,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or int(dim * expand) < 1:
            raise ValueError(f"dim and dim * expand must be at least 1; got dim {dim} and expand {expand}")
        self.dim, self.inner_dim, self.gate = dim, int(dim * expand), gate
        rank = -(-dim // 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, self.inner_dim * (2 if gate else 1), bias=False, device=device, dtype=dtype)
        self.conv2d = DepthwiseConv2d(self.inner_dim, 3, bias=conv_bias, device=device, dtype=dtype)
        self.scan = SelectiveScan2d(
            self.inner_dim, state_dim=state_dim, dt_rank=rank, paths=paths, device=device, dtype=dtype
        )
        self.out_norm = nn.LayerNorm(self.inner_dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"needed [B, H, W, {self.dim} channels]; got shape {list(x.shape)}")
        x = self.in_proj(x)
        gate = x[..., self.inner_dim :]
        x = F.silu(self.conv2d(x[..., : self.inner_dim].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = self.out_norm(self.scan(x))
        if self.gate:
            x = x * F.silu(gate)
        return self.out_proj(x)


class AtrousSS2D(SS2D):
    """Apply EfficientVMamba's mixer to [B, H, W, C]: `SS2D` with each scan on one of four interleaved sub-grids.

    All four scans together take as many steps as one scan of the map.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, expand=expand, state_dim=state_dim, dt_rank=dt_rank, paths=ATROUS, device=device, dtype=dtype
        )


for _module in (SelectiveScan2d, SS2D, AtrousSS2D):  # not as a decorator, which would hide the classes' types
    register_notrace_module(_module)
