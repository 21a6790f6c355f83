"""Semantic tokens: pool the windows of a map to a few tokens each, and attend between those tokens and the map.

Paper: Chang et al., "Making Vision Transformers Efficient from a Token Sparsification View" (CVPR 2023, arXiv
2303.08685). Code: github.com/changsn/STViT-R and STViT-R-Object-Detection (MIT), whose names `q`, `kv`, `proj` are
kept.

What is unusual:
* Windows are spread evenly from edge to edge of a map and overlap where necessary. That rule gives the windows of the
  published classifier (10 wide, stride 4, on a map of 14) and detector (21 wide, stride 7, on a padded map), and needs
  no padding on any other map. A window larger than the map is masked to the map.
* Pooling is adaptive, so that windows that do not divide a map evenly still have no empty bin.
* Keys and values are projected once per position, before the windows are cut; the published code projects every copy of
  a position in overlapping windows, 81 of them in the detector's recovery.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor
from torch.nn import functional as F

from ..kernels._compat import divide_with_remainder, is_exporting
from ._cross_projections import CrossProjections


def _max_along(x: Tensor, dim: int, bins: int, longest: int) -> Tensor:
    """Max-pool one axis adaptively to `bins` bins, whose number may be symbolic.

    A bin with fewer than `longest` positions repeats its last one.
    """
    length = x.shape[dim]
    number = torch.arange(bins, device=x.device)
    first, last = number * length // bins, ((number + 1) * length - 1) // bins
    index = (first[:, None] + torch.arange(longest, device=x.device)).minimum(last[:, None])
    return x.index_select(dim, index.flatten()).unflatten(dim, [bins, longest]).amax(dim + 1)


def pool_to_tokens(x: Tensor, window_size: int, tokens: int) -> Tensor:
    """Initialise the semantic tokens: the maximum in `tokens` x `tokens` overlapping bins of each window of a map.

    Args:
        x: [B, H, W, C].
        window_size: rows and columns of a window; the last window has those that remain.

    Returns:
        [B, rows, columns, C] with `tokens` rows for each of ceil(H / window_size) windows, and columns accordingly.
    """
    rows = (x.shape[1] + window_size - 1) // window_size * tokens
    columns = (x.shape[2] + window_size - 1) // window_size * tokens
    longest = (window_size + tokens - 1) // tokens + 1
    return _max_along(_max_along(x, 1, rows, longest), 2, columns, longest)


# Windows are cut and joined by flat position indices. No tensor axis has the number of windows along a map axis as its
# length, since the exporter would specialise a trace with a single window. For the same reason batch and windows form
# one axis until they are split, and are never compared.


def cut_windows(x: Tensor, side: int) -> Tensor:
    """Cut a map [B, H, W, C] into its windows, row-major: [B * windows, side * side, C]."""
    batch, height, width, dim = x.shape
    number, columns = torch.arange(height * width, device=x.device), width // side
    window, inside = number // (side * side), number % (side * side)
    window_row, window_column = divide_with_remainder(window, columns)
    row, column = window_row * side + inside // side, window_column * side + inside % side
    x = x.flatten(1, 2).index_select(1, row * width + column).flatten(0, 1)
    return x.reshape(batch * (height // side) * columns, side * side, dim)


def join_windows(windows: Tensor, batch: int, height: int, width: int, side: int) -> Tensor:
    """Reassemble the map [B, H, W, C] from the windows of `cut_windows`."""
    number = torch.arange(height * width, device=windows.device)
    row, column = divide_with_remainder(number, width)
    window = row // side * (width // side) + column // side
    x = windows.flatten(0, 1).reshape(batch, height * width, windows.shape[-1])
    x = x.index_select(1, window * (side * side) + row % side * side + column % side)
    return x.reshape(batch, height, width, windows.shape[-1])


def _spare(length: int, side: int) -> int:
    """Return the positions of an axis not covered by one window; 0 if the axis is too short."""
    if torch.jit.is_scripting():
        return max(length - side, 0)
    else:
        return torch.sym_max(length - side, 0)  # pyright: ignore[reportReturnType]  # no guard while exporting


def _spread_positions(length: int, windows: int, side: int, device: torch.device) -> Tensor:
    """Return the positions [windows * side] of evenly spread windows, some past the end if the axis is too short."""
    number = torch.arange(windows * side, device=device)
    # The divisor is windows - 1, and 1 for a single window, where the dividend is 0.
    return number // side * _spare(length, side) // (windows - 1 + 1 // windows) + number % side


def spread_windows(x: Tensor, rows: int, columns: int, side: int) -> tuple[Tensor, Tensor]:
    """Cut `rows` x `columns` evenly spread square windows from a map [B, H, W, C], from edge to edge.

    Returns:
        The windows [B * rows * columns, side * side, C]; and a mask [B * rows * columns, side * side], false for
        positions outside the map, where the last row or column is repeated.
    """
    height, width = x.shape[1], x.shape[2]
    row = _spread_positions(height, rows, side, x.device)
    column = _spread_positions(width, columns, side, x.device)
    inside = ((row < height)[:, None] & (column < width))[None, :, :, None].expand(x.shape[0], -1, -1, -1)
    x = x.index_select(1, row.clamp(max=height - 1)).index_select(2, column.clamp(max=width - 1))
    return cut_windows(x, side), cut_windows(inside, side)[..., 0]


class CrossAttention(CrossProjections):
    """Attend from every position of one set to every position of another.

    Each set is a map [B, H, W, C] or a sequence [B, N, C]; the output has the shape of the query.
    """

    def _attend(self, query: Tensor, key_value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from projected tokens [B, N, C] to concatenated keys and values [B, M, 2 C]."""
        q, k, v = self._heads(query, key_value)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from `query` to `context`.

        Args:
            mask: [M] for the M positions of `context`, true where visible; None for all.
        """
        out = self._attend(self.q(query).flatten(1, -2), self.kv(context).flatten(1, -2), mask)
        return self.proj_drop(self.proj(out.reshape(query.shape)))


class WindowCrossAttention(CrossAttention):
    """Attend from each window of one map to the corresponding window of another; both are [B, H, W, C].

    Args:
        window_size: side of the windows that tile the query's map, whose height and width must be multiples of it.
        key_window_size: side of equally many windows, spread evenly over the other map; if equal, they tile it as well.
        sees_query: whether each window also attends to the query's window, concatenated first.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        key_window_size: int,
        sees_query: bool = False,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, device=device, dtype=dtype)
        if min(window_size, key_window_size) < 1:
            raise ValueError(f"windows have sides of 1 or more; got {window_size} and {key_window_size}")
        self.window_size, self.key_window_size, self.sees_query = window_size, key_window_size, sees_query

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from the windows of `query` to those of `context`.

        Args:
            mask: [H, W] for the positions of `context`, true where visible; None for all. A window without any visible
                position sees all of them.
        """
        side = self.window_size
        if not is_exporting() and (query.shape[1] % side or query.shape[2] % side):
            raise ValueError(f"the query's map must be whole windows of {side} x {side}; got {list(query.shape)}")
        queries = cut_windows(self.q(query), side)
        keys_values, visible = self._keys_values(context, query.shape[1] // side, query.shape[2] // side, mask)
        if self.sees_query:
            keys_values = torch.cat([cut_windows(self.kv(query), side), keys_values], dim=1)
        if visible is not None:
            if self.sees_query:
                visible = torch.cat([torch.ones_like(visible[:, :1]).expand(-1, side * side), visible], dim=1)
            visible = visible[:, None, None].expand(-1, 1, side * side, -1)
        out = self._attend(queries, keys_values, visible)
        return self.proj_drop(self.proj(join_windows(out, query.shape[0], query.shape[1], query.shape[2], side)))

    def _keys_values(
        self, context: Tensor, rows: int, columns: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the windows of the projected context, and their visibility mask, None if everything is visible."""
        side = self.key_window_size
        if side == self.window_size and mask is None:
            return cut_windows(self.kv(context), side), None
        windows, visible = spread_windows(self.kv(context), rows, columns, side)
        if mask is not None:
            mask = mask[None, :, :, None].expand(context.shape[0], -1, -1, -1)
            visible = spread_windows(mask, rows, columns, side)[0][..., 0] & visible
            return windows, visible | ~visible.any(1, keepdim=True)
        too_small = is_exporting() or context.shape[1] < side or context.shape[2] < side
        return windows, visible if too_small else None

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, key_window_size={self.key_window_size}, sees_query={self.sees_query}"


register_notrace_module(CrossAttention)  # not as decorators, which would hide the classes' types
register_notrace_module(WindowCrossAttention)
