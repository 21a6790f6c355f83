"""Dilated re-parameterised depth-wise convolution: trained as a sum of branches, evaluated as a single convolution.

    train:     y = sum_i BN_i(depthwise(x; W_i, dilation d_i))      the large kernel, then small dilated ones
    evaluate:  y = depthwise(x; W, b)       W, b: all branches merged into one kernel, exact up to rounding

Paper: Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series
and Image Recognition" (CVPR 2024, arXiv 2311.15599); code github.com/AILab-CVC/UniRepLKNet, Apache-2.0.

What is unusual:
* The norms determine whether the block runs as branches or merged: merged unless one of them uses batch statistics. So
  `eval()` merges, and so does `train()` with all norms frozen. Branches that user code has modified are never merged:
  pruned, parametrized or wrapped ones, and those with hooks.
* The merged kernel is a differentiable function of the parameters, never a parameter: it is not in the state dict and
  cannot become stale. In evaluation without gradients it is cached until one of its source tensors is replaced or
  written to. Only a write through `.data` goes unnoticed, as it does in autograd; `train()` and `eval()` clear the
  cache.
* `fuse()` returns the merged convolution as a permanent module; `timm.utils.reparameterize_model` calls it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import wants_plain_ops
from ._compat import has_hooks, tensors_of
from .depthwise_conv import DepthwiseConv2d, convolve, odd_sides

# kernel_size -> (kernel size, dilation) of the parallel branches, from the paper.
PUBLISHED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the preceding layer's weight [C, ...] and bias [C]; return both in float32 or wider."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = norm_weight.to(dtype) * (var.to(dtype) + eps).rsqrt()
    offset = -mean.to(dtype) if bias is None else bias.to(dtype) - mean.to(dtype)
    shape = [-1] + [1] * (weight.dim() - 1)
    return weight.to(dtype) * scale.view(shape), norm_bias.to(dtype) + offset * scale


def spread_taps(weight: Tensor, dilation: int, size: int) -> Tensor:
    """Expand a dilated kernel [C, 1, K, K] to a dense one [C, 1, size, size], zero between and around its taps."""
    side = weight.shape[-1] * dilation
    gap = dilation - 1
    dense = F.pad(weight[:, :, :, None, :, None], [0, gap, 0, 0, 0, gap]).reshape(-1, 1, side, side)
    before = (size - side + gap) // 2
    after = size - side - before  # negative if the last gap extends beyond the kernel
    return F.pad(dense, [before, after, before, after])


def statistics_of(norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return the arguments that `fold_norm` takes from a batch norm, including frozen and synchronised ones."""
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps


class _Branch(nn.Module):
    """Apply a bias-free depth-wise convolution and its norm."""

    def __init__(self, dim: int, kernel_size: int, dilation: int, **dd: Any) -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(dim, kernel_size, dilation=dilation, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def is_linear(self) -> bool:
        """Return whether the norm uses running statistics, and user code has not modified the branch."""
        if not torch.jit.is_scripting():
            is_hooked = has_hooks(self) or has_hooks(self.conv) or has_hooks(self.norm)
            if is_hooked or type(self.conv) is not DepthwiseConv2d:  # parametrizations and adapters change the type
                return False
        if not hasattr(self.norm, "track_running_stats"):
            return True  # frozen batch norm of torchvision or timm, regardless of `training`
        return not self.norm.training and self.norm.running_mean is not None

    def dense(self, size: int) -> tuple[Tensor, Tensor]:
        """Return this branch's contribution to the merged kernel and bias."""
        mean, var = self.norm.running_mean, self.norm.running_var
        if mean is None or var is None:
            raise ValueError("merging needs norms with running statistics; this one has track_running_stats=False")
        weight, bias = fold_norm(self.conv.weight, None, self.norm.weight, self.norm.bias, mean, var, self.norm.eps)
        return spread_taps(weight, self.conv.dilation[0], size), bias


@dataclass(frozen=True)
class _Memo:
    """Cache a merged kernel with its sources; the aliases keep their memory from being reused by other tensors."""

    key: list[tuple[int, int]]
    aliases: list[Tensor]
    merged: tuple[Tensor, Tensor]


class DilatedReparamBlock(nn.Module):
    """Apply a large depth-wise convolution and its parallel dilated branches to [B, C, H, W] in any memory format.

    Args:
        kernel_size: side of the large kernel, odd.
        branches: (kernel size, dilation) of each parallel branch; None for the paper's, defined for 5 to 17.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        branches: Sequence[tuple[int, int]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        odd_sides(kernel_size)
        if branches is None and kernel_size not in PUBLISHED_BRANCHES:
            published = ", ".join(map(str, PUBLISHED_BRANCHES))
            raise ValueError(f"branches are known for kernel_size {published}; got {kernel_size}: pass `branches`")
        branches = PUBLISHED_BRANCHES[kernel_size] if branches is None else branches
        if len(set(branches)) < len(branches):
            raise ValueError(f"each branch must be there once; got {tuple(branches)}")
        for side, dilation in branches:
            odd_sides(side)
            if dilation < 1 or (side - 1) * dilation >= kernel_size:
                raise ValueError(
                    f"a branch must lie within the kernel of {kernel_size} x {kernel_size}; got kernel size {side} "
                    f"with dilation {dilation}, which spans {(side - 1) * dilation + 1}"
                )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.kernel_size = dim, kernel_size
        self.large = _Branch(dim, kernel_size, 1, **dd)
        self.small = nn.ModuleDict(
            {f"k{side}_{dilation}": _Branch(dim, side, dilation, **dd) for side, dilation in branches}
        )
        self._memo: _Memo | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._is_linear():
            if torch.jit.is_scripting():
                weight, bias = self._cast_merge()
            else:
                weight, bias = self._remembered_merge()
            return convolve(x, weight, bias, [1, 1])
        if not torch.jit.is_scripting():
            self._memo = None  # norms update their statistics without a version bump; only their batch counter gets one
        out = self.large(x)
        for branch in self.small.values():
            out = out + branch(x)
        return out

    def merge(self) -> tuple[Tensor, Tensor]:
        """Return the kernel [C, 1, K, K] and bias [C] that equal the sum of all branches with running statistics.

        The result is differentiable, and float32 if the parameters are narrower.
        """
        weight, bias = self.large.dense(self.kernel_size)
        for branch in self.small.values():
            branch_weight, branch_bias = branch.dense(self.kernel_size)  # pyright: ignore[reportCallIssue]
            weight, bias = weight + branch_weight, bias + branch_bias
        return weight, bias

    @torch.no_grad()
    def fuse(self, norm: nn.Module | None = None) -> DepthwiseConv2d:
        """Return the merged convolution in the parameters' dtype, with the following batch norm folded in if given."""
        weight, bias = self.merge()
        if norm is not None:
            weight, bias = fold_norm(weight, bias, *statistics_of(norm))
        parameter = self.large.conv.weight
        conv = DepthwiseConv2d.from_weight(weight.to(parameter.dtype), bias.to(parameter.dtype))
        return conv.requires_grad_(parameter.requires_grad).train(self.training)

    def _is_linear(self) -> bool:
        linear = self.large.is_linear()
        for branch in self.small.values():
            linear = linear and branch.is_linear()  # pyright: ignore[reportCallIssue]
        return linear

    def _cast_merge(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.merge()
        dtype = self.large.conv.weight.dtype
        return weight.to(dtype), bias.to(dtype)

    def _remembered_merge(self) -> tuple[Tensor, Tensor]:
        """Return `_cast_merge()`, from the cache if no source has changed and caching is sound."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or wants_plain_ops():
            return self._cast_merge()
        sources = tensors_of(self)
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return self._cast_merge()
        try:
            key = [(source.data_ptr(), source._version) for source in sources]
        except RuntimeError:  # inference tensors have no version counter, wrapper subclasses no address
            return self._cast_merge()

        memo = self._memo
        if memo is None or memo.key != key:
            with torch.inference_mode(False), torch.no_grad():  # the result must be usable outside inference mode
                merged = self._cast_merge()
            memo = _Memo(key, [source.detach() for source in sources], merged)
            is_plain_tensor = type(merged[0]) is Tensor and not merged[0].is_meta
            self._memo = memo if is_plain_tensor else None
        return memo.merged

    def train(self, mode: bool = True) -> Any:
        self._memo = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._memo = None  # otherwise the tensors before .to() and similar calls would stay in memory
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": None}  # for copies and pickles

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={self.kernel_size}"


register_notrace_module(DilatedReparamBlock)  # not as a decorator, which would hide the class's type
