"""Public functions of neighborhood attention: check the arguments and expand them to the operator's three axes."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _runtime
from . import _operator as _operator  # registers torch.ops.mixerzoo.neighborhood_attention
from . import _plain
from ._blocks import Blocks
from ._geometry import Axes, Window, Windows, make_windows

_AXIS_NAMES = {1: "[batch, length, heads, head_dim]", 2: "[batch, height, width, heads, head_dim]"}
_AXIS_NAMES[3] = "[batch, depth, height, width, heads, head_dim]"


def _check_tensors(rank: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in [("query", query), ("key", key), ("value", value)]:
        if tensor.dim() != rank + 3:
            raise ValueError(
                f"na{rank}d needs {name} as {_AXIS_NAMES[rank]}, {rank + 3} dimensions; got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"query, key and value must share dtype and device; query is {query.dtype} on {query.device}, "
                f"{name} is {tensor.dtype} on {tensor.device}"
            )
    if not query.dtype.is_floating_point:
        raise ValueError(f"query, key and value must be floating point; got {query.dtype}")
    if key.shape != (*query.shape[:-2], key.shape[-2], query.shape[-1]):
        raise ValueError(
            f"key must match query in batch, map and head_dim; query is {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must match key in all but head_dim; key is {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(f"query heads must be a multiple of key heads; got {query.shape[-2]} and {key.shape[-2]}")


def _check_fit(spatial: Sequence[int], windows: Windows) -> None:
    for axis, (length, window) in enumerate(zip(spatial, windows, strict=True)):
        reach = window.size * window.dilation
        if length < reach:
            kind = "causal axis" if window.is_causal else "axis"
            raise ValueError(
                f"{kind} {axis} has length {length}, but kernel_size {window.size} * dilation {window.dilation} needs "
                f"at least {reach}: pad the map (the NeighborhoodAttention modules of mixerzoo.mixers do, as the "
                f"published checkpoints expect), or take a smaller window or dilation"
            )


def _check_rpb(rpb: Tensor, heads: int, windows: Windows) -> None:
    even = [window.size for window in windows if window.size % 2 == 0]
    if even:
        raise ValueError(
            f"a relative position bias needs odd windows, which have a centre; got kernel_size "
            f"{tuple(window.size for window in windows)}: use odd sizes or rpb=None"
        )
    shape = (heads, *(2 * window.size - 1 for window in windows))
    if tuple(rpb.shape) != shape:
        raise ValueError(f"rpb must be [heads, 2 * kernel_size - 1 per axis], here {shape}; got {tuple(rpb.shape)}")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, windows: Windows, scale: float, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return output and log-sum-exp from the custom operator, or from plain operators if the caller needs those."""
    if _runtime.wants_plain_ops():
        return _plain.forward(query, key, value, rpb, windows, scale, with_lse=with_lse)
    missing = 3 - len(windows)
    windows = (Window(1, 1, 1, False),) * missing + windows
    three_axes = [tensor[(slice(None), *[None] * missing)] for tensor in (query, key, value)]
    if rpb is not None:
        rpb = rpb[(slice(None), *[None] * missing)]
    out, lse = torch.ops.mixerzoo.neighborhood_attention(
        *three_axes,
        rpb,
        [window.size for window in windows],
        [window.stride for window in windows],
        [window.dilation for window in windows],
        [window.is_causal for window in windows],
        scale,
    )
    return out.flatten(1, 1 + missing), lse.flatten(1, 1 + missing)


def _prefers_dense(query: Tensor, windows: Windows) -> bool:
    """Return whether every query sees the whole map on the CPU, where PyTorch's own attention has less overhead."""
    if query.device.type != "cpu" or _runtime.wants_plain_ops():
        return False
    return all(
        window.size == length and window.dilation == 1 and not window.is_causal
        for length, window in zip(query.shape[1:-2], windows, strict=True)
    )


def _dense_table_index(spatial: tuple[int, ...], windows: Windows) -> Tensor:
    """Return [tokens * tokens]: for a map that is a single window, the flattened bias table index of each pair."""
    with torch.inference_mode(False):  # the result may be cached, and later saved for a backward pass
        return Blocks.cut(spatial, windows, torch.device("cpu")).table_index().flatten()


_kept_table_index = functools.lru_cache(maxsize=64)(_dense_table_index)


def _attend_densely(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, windows: Windows, scale: float
) -> Tensor:
    spatial = query.shape[1:-2]
    q, k, v = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value))
    bias = None
    if rpb is not None:
        tokens = q.shape[2]
        make_index = _dense_table_index if torch.compiler.is_compiling() else _kept_table_index
        bias = rpb.to(q.dtype).flatten(1).index_select(1, make_index(tuple(spatial), windows))
        bias = bias.unflatten(1, (tokens, tokens))[None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).unflatten(1, spatial)


def _attend_additional(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend every query to the same extra keys [batch, extra, heads, dim], unmasked; return output and log-sum-exp."""
    scores = torch.einsum("b...hd,bxhd->b...hx", query, key) * scale
    lse = scores.logsumexp(-1)
    return torch.einsum("b...hx,bxhd->b...hd", (scores - lse.unsqueeze(-1)).exp(), value), lse


class _Options(NamedTuple):
    """Hold the unprocessed arguments that all public functions share."""

    stride: Axes[int]
    dilation: Axes[int]
    is_causal: Axes[bool]
    scale: float | None
    rpb: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None


def _neighborhood_attention(
    rank: int, query: Tensor, key: Tensor, value: Tensor, kernel_size: Axes[int], options: _Options, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    windows = make_windows(rank, kernel_size, options.stride, options.dilation, options.is_causal)
    _check_tensors(rank, query, key, value)
    if not _runtime.is_exporting():  # sizes are symbolic while exporting, and a comparison would specialise them
        _check_fit(query.shape[1:-2], windows)
    heads, head_dim, value_dim = query.shape[-2], query.shape[-1], value.shape[-1]
    rpb = options.rpb
    if rpb is not None:
        _check_rpb(rpb, heads, windows)
    extra = _check_additional(options.additional_keys, options.additional_values, key, value)
    scale = head_dim**-0.5 if options.scale is None else options.scale
    repeats, widest = heads // key.shape[-2], max(head_dim, value_dim)
    key, value = _repeat_heads(key, repeats), _repeat_heads(value, repeats)

    with_lse = with_lse or extra is not None
    if not with_lse and _prefers_dense(query, windows):
        return _attend_densely(query, key, value, rpb, windows, scale), None
    wide_query, wide_key, wide_value = (_widen(tensor, widest) for tensor in (query, key, value))
    out, lse = _attend(wide_query, wide_key, wide_value, rpb, windows, scale, with_lse=with_lse)
    out = out if value_dim == widest else out[..., :value_dim]
    if extra is None or lse is None:
        return out, lse
    extra_keys, extra_values = (_repeat_heads(tensor, repeats) for tensor in extra)
    return _merge((out, lse), _attend_additional(query, extra_keys, extra_values, scale))


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes[int],
    *,
    stride: Axes[int] = 1,
    dilation: Axes[int] = 1,
    is_causal: Axes[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute neighborhood attention on as many axes as `query` has, with the log-sum-exp of its scores.

    Return the output [batch, *spatial, heads, value_dim] and the natural logarithm of each query's sum of exponentials
    [batch, *spatial, heads] (float32 at least), which merges attention over disjoint keys. Both are differentiable.
    The arguments are those of `na2d`.
    """
    rank = query.dim() - 3
    if rank not in _AXIS_NAMES:
        raise ValueError(f"query must be [batch, *one to three axes, heads, head_dim]; got shape {tuple(query.shape)}")
    options = _Options(stride, dilation, is_causal, scale, rpb, additional_keys, additional_values)
    out, lse = _neighborhood_attention(rank, query, key, value, kernel_size, options, with_lse=True)
    assert lse is not None
    return out, lse


def _repeat_heads(tensor: Tensor, repeats: int) -> Tensor:
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, -2)


def _widen(tensor: Tensor, dim: int) -> Tensor:
    return tensor if tensor.shape[-1] == dim else F.pad(tensor, (0, dim - tensor.shape[-1]))


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint key sets, each given as (output, log-sum-exp)."""
    total = torch.logaddexp(first[1], second[1])
    shares = [(lse - total).exp().unsqueeze(-1) for _, lse in (first, second)]
    return (first[0] * shares[0] + second[0] * shares[1]).to(first[0].dtype), total


def _check_additional(
    keys: Tensor | None, values: Tensor | None, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor] | None:
    if keys is None and values is None:
        return None
    if keys is None or values is None:
        raise ValueError("additional_keys and additional_values must be given together; one of them is missing")
    for name, tensor, like in [("additional_keys", keys, key), ("additional_values", values, value)]:
        if tensor.dim() != 4 or tensor.shape[0] != like.shape[0] or tensor.shape[2:] != like.shape[-2:]:
            raise ValueError(
                f"{name} must be [batch, extra, heads, head_dim] with batch {like.shape[0]}, heads {like.shape[-2]} "
                f"and head_dim {like.shape[-1]}; got {tuple(tensor.shape)}"
            )
    if keys.shape[1] != values.shape[1] or keys.shape[1] == 0:
        raise ValueError(
            f"additional_keys and additional_values need the same count, at least 1; got {keys.shape[1]} and "
            f"{values.shape[1]}"
        )
    return keys, values


def _check_rank(rank: int, query: Tensor) -> None:
    if query.dim() != rank + 3:
        raise ValueError(
            f"na{rank}d needs query as {_AXIS_NAMES[rank]}, {rank + 3} dimensions; got shape {tuple(query.shape)}"
        )


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes[int],
    *,
    stride: Axes[int] = 1,
    dilation: Axes[int] = 1,
    is_causal: Axes[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Compute neighborhood attention over a sequence [batch, length, heads, head_dim]; see `na2d` for the arguments."""
    _check_rank(1, query)
    options = _Options(stride, dilation, is_causal, scale, rpb, additional_keys, additional_values)
    return _neighborhood_attention(1, query, key, value, kernel_size, options, with_lse=False)[0]


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes[int],
    *,
    stride: Axes[int] = 1,
    dilation: Axes[int] = 1,
    is_causal: Axes[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Compute neighborhood attention over a map.

    Args:
        query: [batch, height, width, heads, head_dim], floating point.
        key: shape of `query`, but its number of heads may be a divisor of `heads` (a key head then serves several
            query heads).
        value: shape of `key`, but its head_dim may differ; it determines the head_dim of the output.
        kernel_size: keys per window and axis, at least 1; kernel_size * dilation must fit the axis. An even window
            extends one position further backward than forward.
        stride: queries that share a window, 1 to kernel_size.
        dilation: step between the keys of a window, in positions.
        is_causal: whether a query sees no later position along the axis.
        scale: factor on the scores, head_dim ** -0.5 if None.
        rpb: relative position bias [heads, 2 * kernel_size - 1 per axis], indexed by kernel_size - 1 + (key - query) /
            dilation; windows must be odd.
        additional_keys, additional_values: [batch, extra, heads of key, head_dim]: keys that every query sees as well.

    Returns:
        [batch, height, width, heads, head_dim of value], dtype of query.

    Raises:
        ValueError: if shapes, heads, windows or the bias table are inconsistent; the message has numbers and remedy.
    """
    _check_rank(2, query)
    options = _Options(stride, dilation, is_causal, scale, rpb, additional_keys, additional_values)
    return _neighborhood_attention(2, query, key, value, kernel_size, options, with_lse=False)[0]


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Axes[int],
    *,
    stride: Axes[int] = 1,
    dilation: Axes[int] = 1,
    is_causal: Axes[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Compute neighborhood attention over a volume [batch, depth, height, width, heads, head_dim]; see `na2d`."""
    _check_rank(3, query)
    options = _Options(stride, dilation, is_causal, scale, rpb, additional_keys, additional_values)
    return _neighborhood_attention(3, query, key, value, kernel_size, options, with_lse=False)[0]
