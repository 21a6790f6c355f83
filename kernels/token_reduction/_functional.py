"""The public functions of `mixerzoo.kernels.token_reduction`.

TorchScript compiles the plain operators that these functions call, without the argument checks. It does not support
keyword-only arguments with defaults, so these functions have none.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .. import _runtime
from . import _operator, _plain

_T = TypeVar("_T")


def _check_tokens(name: str, x: Tensor) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be [batch, tokens, dim], floating-point; got shape {list(x.shape)}, {x.dtype}")


def _check_r(tokens: int, r: int, num_prefix: int) -> None:
    if r < 0:
        raise ValueError(f"r, the number of tokens to merge, must be at least 0; got {r}")
    _check_prefix(num_prefix, tokens)


def _check_prefix(num_prefix: int, tokens: int) -> None:
    if num_prefix < 0 or num_prefix > tokens:
        raise ValueError(f"num_prefix must be from 0 to the {tokens} tokens; got {num_prefix}")


def _check_slot(slot: Tensor, batch: int, tokens: int | None) -> None:
    fits = slot.dim() == 2 and slot.shape[0] == batch and tokens in (None, slot.shape[1])
    if not fits or slot.dtype != torch.int64:
        raise ValueError(
            f"slot must be int64 [{batch}, {tokens or 'tokens'}], as bipartite_match and keep_tokens give it; "
            f"got shape {list(slot.shape)}, {slot.dtype}"
        )


def _without_autocast(function: Callable[..., _T], x: Tensor, *arguments: object) -> _T:
    """Call `function` with autocast disabled, so that rankings and sums are computed in the precision of the inputs."""
    if not _runtime.is_autocast(x):
        return function(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *arguments)


def merged_length(tokens: int, r: int, num_prefix: int = 1) -> int:
    """Return how many of `tokens` remain after merging r of them, at most half of those after the prefix."""
    if not torch.jit.is_scripting():
        _check_r(tokens, r, num_prefix)
    return tokens - _plain.at_most_half(tokens, r, num_prefix)


def bipartite_match(metric: Tensor, r: int, num_prefix: int = 1) -> Tensor:
    """Select r tokens to merge, and the token that each of them merges into.

    After the prefix, every token at an even position is paired with the token at an odd position that has the highest
    cosine similarity to it; the r most similar pairs merge. The new order is prefix, unmerged even tokens, odd tokens,
    each in ascending order; with r = 0 nothing moves. The result has no gradient.

    Args:
        metric: features to compare: [batch, tokens, dim], or the keys of attention, [batch, heads, tokens, dim], which
            are averaged over the heads as in ToMe.
        r: number of tokens to merge away, at least 0; limited to half of the tokens after the prefix.
        num_prefix: tokens at the start that are excluded from merging.

    Returns:
        int64 [batch, tokens], the new position of each token; `merged_length` returns the length of the new sequence.

    Raises:
        ValueError: for a metric of another shape, or an r or prefix that is out of range.
    """
    if torch.jit.is_scripting():
        return _plain.match(metric, r, num_prefix)
    else:
        if metric.dim() not in (3, 4) or not metric.is_floating_point():
            raise ValueError(
                "metric must be [batch, tokens, dim] or [batch, heads, tokens, dim], floating-point; "
                f"got shape {list(metric.shape)}, {metric.dtype}"
            )
        _check_r(metric.shape[-2], r, num_prefix)
        merging = _plain.at_most_half(metric.shape[-2], r, num_prefix)
        if not (_operator.runs_triton(metric) or _operator.runs_native(metric)) or merging == 0:
            return _without_autocast(_plain.match, metric, r, num_prefix)
        metric = metric.detach()
        if _runtime.needs_operator(metric):
            return torch.ops.mixerzoo.match_tokens(metric, merging, num_prefix)
        return _operator.match(metric, merging, num_prefix)


def _check_in_range(slot: Tensor, length: int) -> None:
    """Raise for slots past the end, but only where the check needs no synchronisation and breaks no graph."""
    if torch.compiler.is_compiling() or type(slot) is not Tensor or slot.device.type != "cpu":
        return
    if not _runtime.wants_plain_ops() and slot.numel() and slot.max() >= length:
        raise ValueError(f"slots are below length={length}, or -1 for dropped tokens; got slots up to {slot.max()}")


def merge_tokens(x: Tensor, slot: Tensor, length: int, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge tokens that share a slot into their size-weighted mean.

    Args:
        x: [batch, tokens, dim].
        slot: the map returned by `bipartite_match`. Each slot below `length` needs at least one token; tokens with slot
            -1 are left out.
        length: number of tokens in the new sequence.
        size: [batch, tokens], positive: the number of original tokens that each token represents; 1 each if None.

    Returns:
        Merged tokens [batch, length, dim] and their sizes [batch, length]. Differentiable in x and size; sums are
        computed in at least float32.
    """
    if torch.jit.is_scripting():
        return _plain.merge(x, slot, length, size)
    else:
        _check_tokens("x", x)
        _check_slot(slot, x.shape[0], x.shape[1])
        if length < 1:
            raise ValueError(f"length, the tokens of the new sequence, must be at least 1; got {length}")
        if size is not None and (size.shape != slot.shape or not size.is_floating_point()):
            raise ValueError(
                f"size must be one number per token, floating-point {list(slot.shape)}; "
                f"got {list(size.shape)}, {size.dtype}"
            )
        if not (_operator.runs_triton(x) or _operator.runs_native(x)):
            _check_in_range(slot, length)
            return _plain.merge(x, slot, length, size)
        if _runtime.needs_operator(x, size):
            return torch.ops.mixerzoo.merge_tokens(x, slot, length, size)
        return _operator.merge(x, slot, length, size)


def unmerge_tokens(x: Tensor, slot: Tensor) -> Tensor:
    """Restore the original sequence: each token gets the value of the token it was merged into, or zeros if dropped.

    Args:
        x: [batch, length, dim], the new sequence.
        slot: [batch, tokens], the map that produced x, or a composition of several: `later.gather(1, earlier)`.

    Returns:
        [batch, tokens, dim]. Differentiable in x.
    """
    if torch.jit.is_scripting():
        return _plain.unmerge(x, slot)
    else:
        _check_tokens("x", x)
        _check_slot(slot, x.shape[0], None)
        _check_in_range(slot, x.shape[1])
        return _operator.unmerge(x, slot)


def keep_tokens(x: Tensor, score: Tensor, keep: int, num_prefix: int = 1, fuse: bool = False) -> tuple[Tensor, Tensor]:
    """Keep the prefix and the `keep` tokens with the highest scores, in descending order of score.

    Args:
        x: [batch, num_prefix + candidates, dim].
        score: [batch, candidates], floating-point.
        keep: number of candidates to keep, from 0 to all of them.
        num_prefix: tokens at the start that are always kept.
        fuse: append one token: the sum of score * token over the dropped tokens (zeros if none was dropped). The
            weights are not normalised to add up to 1.

    Returns:
        The kept tokens [batch, num_prefix + keep (+ 1), dim] and the new positions, int64 [batch, num_prefix +
        candidates], -1 for dropped tokens, fused or not. Differentiable in x, and through the fused token in score.
    """
    if torch.jit.is_scripting():
        return _plain.keep(x, score, keep, num_prefix, fuse)
    else:
        _check_tokens("x", x)
        _check_prefix(num_prefix, x.shape[1])
        candidates = x.shape[1] - num_prefix
        if score.dim() != 2 or score.shape != (x.shape[0], candidates) or not score.is_floating_point():
            raise ValueError(
                f"score must be floating-point [{x.shape[0]}, {candidates}], one number for each token after a prefix "
                f"of {num_prefix}; got {list(score.shape)}, {score.dtype}"
            )
        if keep < 0 or keep > candidates:
            raise ValueError(f"keep must be from 0 to the {candidates} candidates; got {keep}")
        if not _operator.runs_triton(x):
            return _without_autocast(_plain.keep, x, score, keep, num_prefix, fuse)
        if _runtime.needs_operator(x, score):
            return torch.ops.mixerzoo.keep_tokens(x, score, keep, num_prefix, fuse)
        return _operator.select(x, score, keep, num_prefix, fuse)


def scatter_tokens(x: Tensor, slot: Tensor, canvas: Tensor) -> Tensor:
    """Return a copy of the canvas in which the remaining tokens have their new values.

    Args:
        x: [batch, length, dim], the shorter sequence.
        slot: [batch, tokens], the position in x of each token of the canvas; -1 keeps the canvas's value.
        canvas: [batch, tokens, dim].

    Returns:
        [batch, tokens, dim]. Differentiable in x and canvas.
    """
    if torch.jit.is_scripting():
        return _plain.scatter(x, slot, canvas)
    else:
        _check_tokens("x", x)
        _check_tokens("canvas", canvas)
        _check_slot(slot, canvas.shape[0], canvas.shape[1])
        if x.shape[0] != canvas.shape[0] or x.shape[2] != canvas.shape[2] or x.dtype != canvas.dtype:
            raise ValueError(
                f"x and canvas must share batch, dim and data type; got {list(x.shape)}, {x.dtype} and "
                f"{list(canvas.shape)}, {canvas.dtype}"
            )
        _check_in_range(slot, x.shape[1])
        return torch.where(slot.unsqueeze(2) >= 0, _operator.unmerge(x, slot), canvas)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None) -> None:
    if q.dim() != 4 or not q.is_floating_point() or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must be [batch, heads, tokens, head_dim], alike and floating-point; "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}, {q.dtype}"
        )
    if log_size is not None and log_size.shape != (k.shape[0], k.shape[2]):
        wanted = [k.shape[0], k.shape[2]]
        raise ValueError(f"log_size must be {wanted}, one number per key; got {list(log_size.shape)}")


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float, sums: bool
) -> tuple[Tensor, Tensor]:
    if not _runtime.is_autocast(q):
        return _attend_in_input_dtype(q, k, v, log_size, scale, sums)
    q, k, v = (_runtime.as_autocast_wants(x) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return _attend_in_input_dtype(q, k, v, log_size, scale, sums)


def _attend_in_input_dtype(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float, sums: bool
) -> tuple[Tensor, Tensor]:
    if _operator.can_attend(q):
        if _runtime.needs_operator(q, k, v, log_size):
            return torch.ops.mixerzoo.attention_with_evidence(q, k, v, log_size, scale, sums)[:2]
        return _operator.attend(q, k, v, log_size, scale, sums)[:2]
    if sums:
        return _plain.attend_columns(q, k, v, log_size, scale)
    return _plain.attend_row(q, k, v, log_size, scale)


def attention_with_class_row(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention, and return the attention weights of the first token (the class token) as well.

    Args:
        q, k, v: [batch, heads, tokens, head_dim].
        log_size: [batch, tokens], added to the logits of each key: with the logarithm of the sizes, a merged token has
            the weight of all its parts (ToMe's proportional attention).
        scale: factor of the logits; head_dim ** -0.5 if None.

    Returns:
        The output [batch, heads, tokens, head_dim], and the first row of each head's attention matrix, [batch, heads,
        tokens], in at least float32, also under autocast. Both are differentiable in all arguments except scale.
    """
    if not torch.jit.is_scripting():
        _check_attention(q, k, v, log_size)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if torch.jit.is_scripting():
        return _plain.attend_row(q, k, v, log_size, factor)
    else:
        return _attend(q, k, v, log_size, factor, False)


def attention_with_column_sums(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention, and return the total attention that each token receives (SpAtten's importance) as well.

    Arguments and results are those of `attention_with_class_row`, with the sum over all rows in place of the first row.
    The attention matrix is computed for a few queries at a time, except in exported programs, which cannot contain a
    loop of variable length.
    """
    if not torch.jit.is_scripting():
        _check_attention(q, k, v, log_size)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if torch.jit.is_scripting():
        return _plain.attend_columns(q, k, v, log_size, factor)
    else:
        return _attend(q, k, v, log_size, factor, True)
