"""The custom operators of token reduction, their gradients, and the choice of the implementation of each.

* The operators are `mixerzoo::match_tokens`, `merge_tokens`, `keep_tokens`, `unmerge_tokens`, and
  `attention_with_evidence`, where the evidence is either the first row or the column sums of the attention matrix. The
  backward passes of merging and keeping gather rows, and that of unmerging merges, so no operator needs atomics.
* The operators call the Triton or the native CPU kernels. Where neither is available, the public functions call
  `_plain`, whose PyTorch operators autograd and exporters can trace.
"""

import torch
from torch import Tensor

from .. import _runtime
from . import _native, _plain


def runs_triton(x: Tensor) -> bool:
    """Return whether the Triton kernels support `x` and no exporter or transform needs standard operators."""
    return _runtime.runs_triton(x) and not _runtime.wants_plain_ops()


def runs_native(x: Tensor) -> bool:
    """Return whether the compiled CPU kernels support `x`.

    While compiling, the answer does not depend on the availability of the library: the operator tests it at run time.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or _runtime.wants_plain_ops():
        return False
    if torch.compiler.is_compiling():
        return True
    return not (_runtime.INTERPRET and _runtime.runs_triton(x)) and _native.is_available()


def match(metric: Tensor, r: int, num_prefix: int) -> Tensor:
    """Compute `_plain.match` with the fastest kernel, for r from 1 to half of the tokens after the prefix."""
    if metric.numel() and _runtime.runs_triton(metric):
        from . import _triton  # imported only where it runs: Triton imports slowly and is not available everywhere

        if _triton.can_match(metric):
            return _triton.match(metric, r, num_prefix)
    elif metric.numel() and runs_native(metric):
        return _native.match(metric, r, num_prefix)
    return _plain.match(metric, r, num_prefix)


@torch.library.custom_op("mixerzoo::match_tokens", mutates_args=())
def _match_tokens(metric: Tensor, r: int, num_prefix: int) -> Tensor:
    return match(metric, r, num_prefix)


@_match_tokens.register_fake
def _(metric, r, num_prefix):
    return metric.new_empty(metric.shape[0], metric.shape[-2], dtype=torch.int64)


def merge(x: Tensor, slot: Tensor, length: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `_plain.merge` with the fastest kernel."""
    if x.numel() and length:
        if _runtime.runs_triton(x):
            from . import _triton

            return _triton.merge(x, slot, length, size)
        if runs_native(x) and (size is None or size.dtype == torch.float32):
            return _native.merge(x, slot, length, size)
    merged, total = _plain.merge(x, slot, length, size)
    return merged.contiguous(), total.contiguous()


@torch.library.custom_op("mixerzoo::merge_tokens", mutates_args=())
def _merge_tokens(x: Tensor, slot: Tensor, length: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    return merge(x, slot, length, size)


@_merge_tokens.register_fake
def _(x, slot, length, size):
    dtype = torch.promote_types(x.dtype, torch.float32) if size is None else size.dtype
    return x.new_empty(x.shape[0], length, x.shape[2]), x.new_empty(x.shape[0], length, dtype=dtype)


def _save_merge(ctx, inputs, output) -> None:
    x, slot, _, size = inputs
    needs_size = ctx.needs_input_grad[3]
    ctx.save_for_backward(slot, size, output[1], *((x, output[0]) if needs_size else ()))


def _differentiate_merge(ctx, grad, grad_total):
    """Differentiate merged[s] = sum(size * x) / sum(size), with both sums over the tokens of slot s."""
    slot, size, total, *values = ctx.saved_tensors
    at_tokens = _plain.unmerge(grad, slot)
    of_slot = torch.where(slot < 0, 1.0, total.gather(1, slot.clamp(min=0)))
    weight = (1 / of_slot) if size is None else size / of_slot
    grad_x = at_tokens * weight.unsqueeze(2).to(grad.dtype) if ctx.needs_input_grad[0] else None
    if size is None or not values:
        return grad_x, None, None, None
    x, merged = values
    away = (x - _plain.unmerge(merged, slot)).to(total.dtype)
    grad_size = (at_tokens * away).sum(2) / of_slot + _plain.unmerge(grad_total.unsqueeze(2), slot).squeeze(2)
    return grad_x, None, None, grad_size.to(size.dtype)


_merge_tokens.register_autograd(_differentiate_merge, setup_context=_save_merge)


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Compute `_plain.unmerge` with a gradient whose sums have a fixed order, unlike those of PyTorch's gradient."""
    if runs_triton(x) and torch.is_grad_enabled() and x.requires_grad:
        return torch.ops.mixerzoo.unmerge_tokens(x, slot)
    return _plain.unmerge(x, slot)


@torch.library.custom_op("mixerzoo::unmerge_tokens", mutates_args=())
def _unmerge_tokens(x: Tensor, slot: Tensor) -> Tensor:
    return _plain.unmerge(x, slot)


@_unmerge_tokens.register_fake
def _(x, slot):
    return x.new_empty(x.shape[0], slot.shape[1], x.shape[2])


def _save_unmerge(ctx, inputs, output) -> None:
    x, slot = inputs
    ctx.length = x.shape[1]
    ctx.save_for_backward(slot)


def _differentiate_unmerge(ctx, grad):
    (slot,) = ctx.saved_tensors
    mean, count = torch.ops.mixerzoo.merge_tokens(grad, slot, ctx.length, None)
    return (mean * count.unsqueeze(2)).to(grad.dtype), None


_unmerge_tokens.register_autograd(_differentiate_unmerge, setup_context=_save_unmerge)


def select(x: Tensor, score: Tensor, keep: int, num_prefix: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """Compute `_plain.keep` with the fastest kernel."""
    if x.numel() and _runtime.runs_triton(x):
        from . import _triton

        return _triton.keep(x, score, keep, num_prefix, fuse)
    kept, slot = _plain.keep(x, score, keep, num_prefix, fuse)
    return kept.contiguous(), slot.contiguous()


@torch.library.custom_op("mixerzoo::keep_tokens", mutates_args=())
def _keep_tokens(x: Tensor, score: Tensor, keep: int, num_prefix: int, fuse: bool) -> tuple[Tensor, Tensor]:
    return select(x, score, keep, num_prefix, fuse)


@_keep_tokens.register_fake
def _(x, score, keep, num_prefix, fuse):
    kept = x.new_empty(x.shape[0], num_prefix + keep + int(fuse), x.shape[2])
    return kept, x.new_empty(x.shape[0], x.shape[1], dtype=torch.int64)


def _save_keep(ctx, inputs, output) -> None:
    x, score, _, ctx.num_prefix, ctx.fuse = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *((x, score) if ctx.fuse else ()))


def _differentiate_keep(ctx, grad, _):
    slot, *values = ctx.saved_tensors
    grad_x = _plain.unmerge(grad, slot)
    if not ctx.fuse:
        return grad_x, None, None, None, None
    x, score = values
    of_fused, dropped = grad[:, -1:], slot[:, ctx.num_prefix :] < 0
    weight = torch.where(dropped, score, 0.0).unsqueeze(2)
    to_candidates = (weight * of_fused).to(grad.dtype)
    grad_x = grad_x + torch.cat([torch.zeros_like(x[:, : ctx.num_prefix]), to_candidates], 1)
    wide = torch.promote_types(score.dtype, torch.float32)
    products = (x[:, ctx.num_prefix :].to(wide) * of_fused.to(wide)).sum(2)
    return grad_x, torch.where(dropped, products, 0.0).to(score.dtype), None, None, None


_keep_tokens.register_autograd(_differentiate_keep, setup_context=_save_keep)


@torch.library.custom_op("mixerzoo::attention_with_evidence", mutates_args=())
def _attention_with_evidence(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of attention, the first row or column sums of its matrix, and the log-sum-exp of each row."""
    return attend(q, k, v, log_size, scale, sums)


def can_attend(q: Tensor) -> bool:
    """Return whether the Triton kernels support these queries."""
    if not runs_triton(q) or q.numel() == 0:
        return False
    from . import _triton_attention

    return _triton_attention.can_attend(q)


def attend(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `mixerzoo::attention_with_evidence` for tensors that the Triton kernels support."""
    from . import _triton_attention

    return _triton_attention.attend(q, k, v, log_size, scale, sums)


@_attention_with_evidence.register_fake
def _(q, k, v, log_size, scale, sums):
    batch, heads, tokens, dim = q.shape
    numbers = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2), numbers, torch.empty_like(numbers)


@torch.library.custom_op("mixerzoo::attention_with_evidence_backward", mutates_args=())
def _attention_with_evidence_backward(
    grad: Tensor,
    grad_evidence: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    out: Tensor,
    evidence: Tensor,
    lse: Tensor,
    scale: float,
    sums: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, and of log_size unless it is None."""
    from . import _triton_attention

    return _triton_attention.attend_backward(grad, grad_evidence, q, k, v, log_size, out, evidence, lse, scale, sums)


@_attention_with_evidence_backward.register_fake
def _(grad, grad_evidence, q, k, v, log_size, out, evidence, lse, scale, sums):
    batch, heads, tokens, dim = q.shape
    grads = [q.new_empty(batch, tokens, heads, dim).transpose(1, 2) for _ in range(3)]
    return grads if log_size is None else [*grads, torch.empty_like(log_size, memory_format=torch.contiguous_format)]


def _save_attention(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.sums = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, *output)


def _differentiate_attention(ctx, grad, grad_evidence, _):
    grads = torch.ops.mixerzoo.attention_with_evidence_backward(
        grad, grad_evidence, *ctx.saved_tensors, ctx.scale, ctx.sums
    )
    needed = [grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad, strict=False)]
    return *needed, *[None] * (6 - len(needed))


_attention_with_evidence.register_autograd(_differentiate_attention, setup_context=_save_attention)
