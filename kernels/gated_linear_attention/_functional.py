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
    """Attend from each token to itself and all before it, the further back the weaker; in time linear in the tokens.

    Sums are float32 at least. Differentiable once, as its gradient is an operator, too.

    Args:
        query, key: [batch, tokens, heads, head_dim].
        value: [batch, tokens, heads, value_dim].
        log_gate: [batch, tokens, heads, head_dim], at most 0, in any floating-point type: the logarithm of what a
            channel of the state keeps when the token arrives. As strong as one likes, -inf included.
        scale: of the result; head_dim ** -0.5 if None.

    Returns:
        [batch, tokens, heads, value_dim], contiguous, in the data type of `value`, under autocast in that of autocast.

    Raises:
        ValueError: for shapes, devices or data types that do not belong together.
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
    """The mean of attending to the tokens before and to those after, each with gates of its own; both count the token
    itself.

    `log_gate_backward[t]` weakens what comes from the tokens after t. All else as in `gated_linear_attention`.
    """
    _check(query, key, value, log_gate_forward=log_gate_forward, log_gate_backward=log_gate_backward)
    half = 0.5 * (query.shape[-1] ** -0.5 if scale is None else scale)
    return _attend(query, key, value, log_gate_forward, log_gate_backward, half)
