"""Register `mixerzoo::gated_linear_attention` with its backward operator, and choose the implementation of each.

Only the inputs are saved for the backward pass: the states are recomputed, at the cost of one product per chunk.
"""

import torch
from torch import Tensor

from .. import _runtime
from . import _plain


def gates(log_gate: Tensor, log_gate_backward: Tensor | None) -> _plain.Gates:
    """Pair one or two log gates with their directions, in the form that `_plain` takes."""
    return list(zip(_log_gates(log_gate, log_gate_backward), (_plain.LATER, _plain.EARLIER), strict=False))


def _log_gates(log_gate: Tensor, log_gate_backward: Tensor | None) -> tuple[Tensor, ...]:
    return (log_gate,) if log_gate_backward is None else (log_gate, log_gate_backward)


def attend(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, log_gate_backward: Tensor | None, scale: float
) -> Tensor:
    """Implement the operator: sum over the directions and multiply by `scale`."""
    if value.numel() == 0 or query.numel() == 0:
        return value.new_zeros(value.shape)
    with torch.autocast(query.device.type, enabled=False):
        if _runtime.runs_triton(query):
            from . import _triton  # imported on use: importing Triton is slow, and not every platform has it

            if _triton.supports(query, value):
                return _triton.forward(query, key, value, _log_gates(log_gate, log_gate_backward), scale)
        return _plain.forward(query, key, value, gates(log_gate, log_gate_backward), scale).contiguous()


@torch.library.custom_op("mixerzoo::gated_linear_attention", mutates_args=())
def _gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, log_gate_backward: Tensor | None, scale: float
) -> Tensor:
    return attend(query, key, value, log_gate, log_gate_backward, scale)


@_gated_linear_attention.register_fake
def _(query, key, value, log_gate, log_gate_backward, scale):
    return value.new_empty(value.shape)


@torch.library.custom_op("mixerzoo::gated_linear_attention_backward", mutates_args=())
def _gated_linear_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    log_gate_backward: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of query, key, value and one or two log gates."""
    log_gates = _log_gates(log_gate, log_gate_backward)
    if value.numel() == 0 or query.numel() == 0:
        return [x.new_zeros(x.shape) for x in (query, key, value, *log_gates)]
    if _runtime.runs_triton(query):
        from . import _triton

        if _triton.supports(query, value):
            return _triton.backward(grad, query, key, value, log_gates, scale)
    directions = gates(log_gate, log_gate_backward)
    *grads, grad_gates = _plain.backward(grad, query, key, value, directions, scale)
    return [x.contiguous() for x in (*grads, *grad_gates)]


@_gated_linear_attention_backward.register_fake
def _(grad, query, key, value, log_gate, log_gate_backward, scale):
    return [x.new_empty(x.shape) for x in (query, key, value, *_log_gates(log_gate, log_gate_backward))]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    grads = torch.ops.mixerzoo.gated_linear_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    needed = [grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad[: len(grads)], strict=True)]
    return *needed, *[None] * (6 - len(needed))


_gated_linear_attention.register_autograd(_differentiate, setup_context=_save)
