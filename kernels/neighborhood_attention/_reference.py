"""Define neighborhood attention as dense attention under a mask: short, any dtype, quadratic in the map size."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ._geometry import Window


def _axis_mask(length: int, window: Window, device: torch.device) -> Tensor:
    """Return a [length, length] boolean mask: whether the query (row) sees the key (column)."""
    position = torch.arange(length, device=device)
    lattice, point = position % window.dilation, position // window.dilation
    points = (length - lattice + window.dilation - 1) // window.dilation
    start, end = window.bounds(point, points)
    inside = (point[None] >= start[:, None]) & (point[None] < end[:, None])
    return inside & (lattice[None] == lattice[:, None])


def neighborhood_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    windows: Sequence[Window],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute output [batch, *spatial, heads, head_dim] and natural log-sum-exp [batch, *spatial, heads] with autograd.

    `rpb` is [heads, 2 K - 1 per axis]; `windows` holds one `Window` per spatial axis of the heads-last tensors.
    """
    spatial = query.shape[1:-2]
    tokens = [tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value)]
    scores = tokens[0] @ tokens[1].transpose(-1, -2) * scale

    mask = torch.ones((), dtype=torch.bool, device=query.device)
    bias = rpb
    for axis, (length, window) in enumerate(zip(spatial, windows, strict=True)):
        axis_mask = _axis_mask(length, window, query.device)
        mask = (
            (mask[..., :, None, :, None] & axis_mask[:, None, :]).flatten(-4, -3).flatten(-2, -1) if axis else axis_mask
        )
        if bias is not None:
            position = torch.arange(length, device=query.device)
            step = torch.div(position[None] - position[:, None], window.dilation, rounding_mode="floor")
            index = (step + window.size - 1).clamp(0, 2 * window.size - 2)
            # [heads, (pairs of earlier axes), rest...] -> one more pair of axes in place of this table axis
            bias = bias.index_select(1 + 2 * axis, index.flatten()).unflatten(1 + 2 * axis, (length, length))
    if bias is not None:
        order = [0, *itertools.chain(range(1, 2 * len(spatial), 2), range(2, 2 * len(spatial) + 1, 2))]
        count = scores.shape[-1]
        scores = scores + bias.permute(order).reshape(-1, count, count)

    scores = scores.masked_fill(~mask, float("-inf"))
    out = scores.softmax(-1) @ tokens[2]
    return out.transpose(1, 2).unflatten(1, spatial), scores.logsumexp(-1).transpose(1, 2).unflatten(1, spatial)
