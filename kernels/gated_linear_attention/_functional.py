"""The public functions of `mixerzoo.kernels.gated_linear_attention`."""

import torch
from torch import Tensor

from .. import _runtime
from . import _operator, _traceable


def _check(query: Tensor, key: Tensor, value: Tensor, **log_gates: Tensor) -> None:
    if query.ndim != 4 or not query.is_floating_point():
        raise ValueError(
            "query must be [batch, tokens, heads, head_dim], floating-point; "
            f"got shape {tuple(query.shape)}, {query.dtype}"
        )
    if value.ndim != 4 or value.shape[:3] != query.shape[:3]:
        raise ValueError(
            f"value must be [batch, tokens, heads, value_dim] with the first three of query {tuple(query.shape)}; "
            f"got {tuple(value.shape)}"
        )
    for name, tensor in {"key": key, **log_gates}.items():
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must have query's shape {tuple(query.shape)}; got {tuple(tensor.shape)}")
    for name, tensor in {"key": key, "value": value, **log_gates}.items():
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device} and query on {query.device}; move one to the other's device"
            )
    for name, tensor in {"key": key, "value": value}.items():
        if tensor.dtype != query.dtype and not _runtime.is_autocast(query):
            raise ValueError(f"{name} is {tensor.dtype} and query {query.dtype}; convert one, or use torch.autocast")
    for name, tensor in log_gates.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, of any precision; got {tensor.dtype}")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, log_gate_backward: Tensor | None, scale: float
) -> Tensor:
    query, key, value = (_runtime.as_autocast_wants(x) for x in (query, key, value))  # the gates keep their precision
    inputs = query, key, value, log_gate, log_gate_backward
    if _runtime.wants_plain_ops():
        return _traceable.forward(query, key, value, _operator.gates(log_gate, log_gate_backward), scale)
    if _runtime.needs_operator(*inputs):
        return torch.ops.mixerzoo.gated_linear_attention(*inputs, scale)
    return _operator.attend(*inputs, scale)


def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend causally from each token to itself and all earlier ones, with decaying weights, in linear time.

    Sums are accumulated in float32 at least. The result is differentiable once, because its backward pass is itself a
    custom operator.

    Args:
        query, key: [batch, tokens, heads, head_dim].
        value: [batch, tokens, heads, value_dim].
        log_gate: [batch, tokens, heads, head_dim], at most 0, in any floating-point dtype: the logarithm of the decay
            of each state channel when the token arrives. Any strength is supported, including -inf.
        scale: factor of the result; head_dim ** -0.5 if None.

    Returns:
        [batch, tokens, heads, value_dim], contiguous, in the dtype of `value`, or of autocast if that is enabled.

    Raises:
        ValueError: if shapes, devices or dtypes are inconsistent.
    """
    _check(query, key, value, log_gate=log_gate)
    return _attend(query, key, value, log_gate, None, query.shape[-1] ** -0.5 if scale is None else scale)


def bidirectional_gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate_forward: Tensor,
    log_gate_backward: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Return the mean of causal and anti-causal attention, each with its own gates; both include the token itself.

    `log_gate_backward[t]` weakens contributions of the tokens after t. The other arguments, the result and the errors
    are those of `gated_linear_attention`.
    """
    _check(query, key, value, log_gate_forward=log_gate_forward, log_gate_backward=log_gate_backward)
    half = 0.5 * (query.shape[-1] ** -0.5 if scale is None else scale)
    return _attend(query, key, value, log_gate_forward, log_gate_backward, half)
