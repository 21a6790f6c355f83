"""Dispatch MLPs with a depth-wise convolution inside to `kernels.conv_mlp`."""

from typing import Any

from torch import Tensor, nn

from ...kernels.conv_mlp import conv_mlp, goes_by_parts
from ...mixers import DepthwiseConv2d
from ...mixers._compat import has_hooks
from ...mixers.row_conv import RowConv2d

_ORDINARY = (nn.Linear, nn.Conv2d, RowConv2d, DepthwiseConv2d)


def _is_ordinary(layer: nn.Module) -> bool:
    """Return whether `layer` computes exactly what its weights define: no adapter, no quantisation, no hook."""
    return type(layer) in _ORDINARY and not has_hooks(layer)


def evaluate_by_parts(mlp: Any, x: Tensor) -> Tensor | None:
    """Compute `mlp(x)` for x [B, H, W, C] in parts, or return None if its layers must be called one by one.

    The layers are `fc1`, `dwconv`, `act` and `fc2`; 1 x 1 convolutions and linear layers are equivalent here.
    """
    layers = (mlp.fc1, mlp.dwconv, mlp.fc2)
    if mlp.training or has_hooks(mlp.act) or not all(_is_ordinary(layer) for layer in layers):
        return None
    if not goes_by_parts(x):
        return None
    fc1, dwconv, fc2 = layers
    return conv_mlp(x, fc1.weight.flatten(1), fc1.bias, dwconv.weight, dwconv.bias, fc2.weight.flatten(1), fc2.bias)
