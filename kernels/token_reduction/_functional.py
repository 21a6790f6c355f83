"""The public functions of `mixerzoo.kernels.token_reduction`.

TorchScript compiles the plain operators under them, without the checks; and as it knows no keyword-only arguments with
defaults, there are none here.
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
    """Products in the precision that the inputs have: choices and sums are not what autocast is for."""
    if not _runtime.is_autocast(x):
        return function(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *arguments)


def merged_length(tokens: int, r: int, num_prefix: int = 1) -> int:
    """How many of `tokens` are left when r are to merge into others, which no more than half after the prefix do."""
    if not torch.jit.is_scripting():
        _check_r(tokens, r, num_prefix)
    return tokens - _plain.at_most_half(tokens, r, num_prefix)


def bipartite_match(metric: Tensor, r: int, num_prefix: int = 1) -> Tensor:
    """Find r tokens to merge and those to merge them into.

    After the prefix, every token at an even position looks for the one at an odd position that is most like it, by the
    cosine; the r most alike pairs merge. The new order is prefix, even tokens that stay, odd tokens, each ascending;
    with r = 0 nothing moves. Differentiable in nothing.

    Args:
        metric: what to compare: [batch, tokens, dim], or the keys of attention, [batch, heads, tokens, dim], of which
            ToMe takes the mean over the heads.
        r: tokens to lose, at least 0; no more than half of those after the prefix are.
        num_prefix: tokens at the start that have no part in it.

    Returns:
        int64 [batch, tokens], the new position of each; `merged_length` says how many there are.

    Raises:
        ValueError: for a metric that is not [batch, tokens, dim], or an r or prefix that is out of range.
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


def merge_tokens(x: Tensor, slot: Tensor, length: int, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean, weighted by size, of the tokens that share a slot.

    Args:
        x: [batch, tokens, dim].
        slot: as `bipartite_match` gives it. Each slot below `length` needs a token; tokens of slot -1 are left out.
        length: tokens of the new sequence.
        size: [batch, tokens], positive, how many tokens each one stands for; 1 each if None.

    Returns:
        [batch, length, dim], and the sizes [batch, length]. Differentiable in x and size; sums are float32 at least.
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
                f"size must be one number a token, floating-point {list(slot.shape)}; "
                f"got {list(size.shape)}, {size.dtype}"
            )
        if not (_operator.runs_triton(x) or _operator.runs_native(x)):
            return _plain.merge(x, slot, length, size)
        if _runtime.needs_operator(x, size):
            return torch.ops.mixerzoo.merge_tokens(x, slot, length, size)
        return _operator.merge(x, slot, length, size)


def unmerge_tokens(x: Tensor, slot: Tensor) -> Tensor:
    """Every token of the old sequence gets the value of the one that it is in now; zeros if it is in none.

    Args:
        x: [batch, length, dim], the new sequence.
        slot: [batch, tokens], the map that led to it, or several in one: `later.gather(1, earlier)`.

    Returns:
        [batch, tokens, dim]. Differentiable in x.
    """
    if torch.jit.is_scripting():
        return _plain.unmerge(x, slot)
    else:
        _check_tokens("x", x)
        _check_slot(slot, x.shape[0], None)
        return _operator.unmerge(x, slot)


def keep_tokens(x: Tensor, score: Tensor, keep: int, num_prefix: int = 1, fuse: bool = False) -> tuple[Tensor, Tensor]:
    """Keep the prefix and the `keep` tokens of the highest score, in descending order of it.

    Args:
        x: [batch, num_prefix + candidates, dim].
        score: [batch, candidates], floating-point.
        keep: from 0 to the number of candidates.
        num_prefix: tokens at the start that stay whatever happens.
        fuse: one token more at the end, the sum of score * token over those that were dropped (zeros if none was); the
            weights are not made to add up to 1.

    Returns:
        [batch, num_prefix + keep (+ 1), dim] and the new positions, int64 [batch, num_prefix + candidates], -1 for
        dropped tokens, fused or not. Differentiable in x, and through the fused token in score.
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
    """A copy of the canvas in which the tokens that still exist have their new values.

    Args:
        x: [batch, length, dim], the shorter sequence.
        slot: [batch, tokens], where each token of the canvas is in it; -1 leaves the canvas alone.
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
        return torch.where(slot.unsqueeze(2) >= 0, _operator.unmerge(x, slot), canvas)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None) -> None:
    if q.dim() != 4 or not q.is_floating_point() or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must be [batch, heads, tokens, head_dim], alike and floating-point; "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}, {q.dtype}"
        )
    if log_size is not None and log_size.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"log_size must be [{k.shape[0]}, {k.shape[2]}], one number a key; got {list(log_size.shape)}")


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float, sums: bool
) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, log_size)
    if not _runtime.is_autocast(q):
        return _attend_as_given(q, k, v, log_size, scale, sums)
    q, k, v = (_runtime.as_autocast_wants(x) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return _attend_as_given(q, k, v, log_size, scale, sums)


def _attend_as_given(
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
    """Attention, and how much of it the first token, the class token, pays to each.

    Args:
        q, k, v: [batch, heads, tokens, head_dim].
        log_size: [batch, tokens], added to every logit of a key: the logarithm of the sizes makes a merged token count
            as many (ToMe's proportional attention).
        scale: of the logits; head_dim ** -0.5 if None.

    Returns:
        [batch, heads, tokens, head_dim], and the first row of each head's attention matrix, [batch, heads, tokens],
        float32 at least also under autocast. Differentiable in all but scale, through both.
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if torch.jit.is_scripting():
        return _plain.attend_row(q, k, v, log_size, factor)
    else:
        return _attend(q, k, v, log_size, factor, False)


def attention_with_column_sums(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention, and how much of it all tokens together pay to each (SpAtten's importance).

    As `attention_with_class_row`, but for the sum of all rows in place of the first. The attention matrix is only ever
    there for a few queries, except in exported programs, which have no loop whose length may vary.
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if torch.jit.is_scripting():
        return _plain.attend_columns(q, k, v, log_size, factor)
    else:
        return _attend(q, k, v, log_size, factor, True)
