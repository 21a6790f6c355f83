"""The custom operator `mixerzoo::gated_linear_attention`, its backward, and which implementation each takes.

Nothing is kept for the backward but the inputs: the states are computed again, which takes one product a chunk.
"""

import torch
from torch import Tensor

from .. import _runtime
from . import _plain


def gates(log_gate: Tensor, log_gate_backward: Tensor | None) -> _plain.Gates:
    """One direction or two, as `_plain` takes them."""
    return list(zip(_given(log_gate, log_gate_backward), (_plain.LATER, _plain.EARLIER), strict=False))


def _given(log_gate: Tensor, log_gate_backward: Tensor | None) -> tuple[Tensor, ...]:
    return (log_gate,) if log_gate_backward is None else (log_gate, log_gate_backward)


def attend(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, log_gate_backward: Tensor | None, scale: float
) -> Tensor:
    """What the operator does: the sum over the directions, times `scale`."""
    if value.numel() == 0 or query.numel() == 0:
        return value.new_zeros(value.shape)
    with torch.autocast(query.device.type, enabled=False):
        if _runtime.runs_triton(query):
            from . import _triton  # only where it runs: importing Triton takes a while, and not every platform has it

            if _triton.supports(query, value):
                return _triton.forward(query, key, value, _given(log_gate, log_gate_backward), scale)
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
    """Gradients of query, key, value, and one or two log gates."""
    given = _given(log_gate, log_gate_backward)
    if value.numel() == 0 or query.numel() == 0:
        return [x.new_zeros(x.shape) for x in (query, key, value, *given)]
    if _runtime.runs_triton(query):
        from . import _triton

        if _triton.supports(query, value):
            return _triton.backward(grad, query, key, value, given, scale)
    directions = gates(log_gate, log_gate_backward)
    *grads, grad_gates = _plain.backward(grad, query, key, value, directions, scale)
    return [x.contiguous() for x in (*grads, *grad_gates)]


@_gated_linear_attention_backward.register_fake
def _(grad, query, key, value, log_gate, log_gate_backward, scale):
    return [x.new_empty(x.shape) for x in (query, key, value, *_given(log_gate, log_gate_backward))]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    grads = torch.ops.mixerzoo.gated_linear_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    needed = [grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad[: len(grads)], strict=True)]
    return *needed, *[None] * (6 - len(needed))


_gated_linear_attention.register_autograd(_differentiate, setup_context=_save)
