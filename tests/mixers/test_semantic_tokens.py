"""Semantic tokens: pooling and windows against loops and PyTorch's own, on maps that are no whole windows."""

import pytest
import torch
from mixerzoo.mixers import CrossAttention, WindowCrossAttention, pool_to_tokens
from mixerzoo.mixers.semantic_tokens import cut_windows, join_windows, spread_windows
from torch import Tensor
from torch.nn import functional as F


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (8, 13), (14, 14), (20, 22), (29, 3)])
def test_pooling_is_adaptive(size: tuple[int, int]) -> None:
    x = torch.randn(2, *size, 5, requires_grad=True)
    tokens = pool_to_tokens(x, 7, 3)
    rows, columns = (-(-side // 7) * 3 for side in size)
    want = F.adaptive_max_pool2d(x.permute(0, 3, 1, 2), (rows, columns)).permute(0, 2, 3, 1)
    assert torch.equal(tokens, want)
    grad = torch.randn_like(tokens)
    got, expected = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (tokens, want))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("length", "windows", "side", "first"),
    [
        (14, 2, 10, [0, 4]),  # the published classifier's: unfold(kernel_size=10, stride=4)
        (28, 3, 14, [0, 7, 14]),  # the detector's on a map with zeros around it
        (9, 3, 3, [0, 3, 6]),
        (15, 3, 10, [0, 2, 5]),
        (7, 1, 10, [0]),
    ],
)
def test_windows_spread_from_edge_to_edge(length: int, windows: int, side: int, first: list[int]) -> None:
    x = torch.arange(length).view(1, length, 1, 1).float().expand(-1, -1, 4, -1)
    got, inside = spread_windows(x, windows, 1, side)
    rows = got.unflatten(1, (side, side))[:, :, 0, 0]
    for window, start in enumerate(first):
        assert rows[window].tolist() == [min(start + i, length - 1) for i in range(side)]
    assert torch.equal(inside.unflatten(1, (side, side))[0, :, 0], torch.arange(side) < length)
    assert inside.unflatten(1, (side, side))[0, 0].tolist() == [i < 4 for i in range(side)]


def test_tiles() -> None:
    x = torch.randn(2, 6, 9, 4)
    windows = cut_windows(x, 3)
    assert windows.shape == (12, 9, 4) and torch.equal(windows[4], x[0, 3:, 3:6].flatten(0, 1))
    assert torch.equal(join_windows(windows, 2, 6, 9, 3), x)


def attend(part: CrossAttention, query: Tensor, context: Tensor) -> Tensor:
    """Before the last projection; [queries, C] and [keys, C]."""
    heads = part.num_heads
    q = part.q(query).unflatten(-1, (heads, -1)).transpose(0, 1)
    k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in part.kv(context).chunk(2, -1))
    out = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return out.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("size", [(14, 14), (8, 13), (4, 23), (1, 1)])
@torch.no_grad()
def test_windows_attend_as_a_loop_says(size: tuple[int, int]) -> None:
    height, width = size
    part = WindowCrossAttention(8, 2, window_size=3, key_window_size=10, sees_query=True)
    context = torch.randn(2, height, width, 8)
    query = pool_to_tokens(context, 7, 3)
    got = part(query, context)
    rows, columns = query.shape[1] // 3, query.shape[2] // 3
    for b in range(2):
        for i in range(rows):
            for j in range(columns):
                top = i * max(height - 10, 0) // max(rows - 1, 1)
                left = j * max(width - 10, 0) // max(columns - 1, 1)
                own = query[b, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
                keys = torch.cat([own.flatten(0, 1), context[b, top : top + 10, left : left + 10].flatten(0, 1)])
                want = part.proj(attend(part, own.flatten(0, 1), keys)).unflatten(0, (3, 3))
                torch.testing.assert_close(got[b, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3], want)


@torch.no_grad()
def test_masked_windows() -> None:
    part = WindowCrossAttention(8, 2, window_size=2, key_window_size=4)
    query, context = torch.randn(1, 4, 2, 8), torch.randn(1, 8, 4, 8)
    mask = torch.zeros(8, 4, dtype=torch.bool)
    mask[1, 2] = mask[2, 0] = True
    got = part(query, context, mask)
    above, below = query[0, :2].flatten(0, 1), query[0, 2:].flatten(0, 1)
    want = part.proj(attend(part, above, context[0][mask]))
    torch.testing.assert_close(got[0, :2].flatten(0, 1), want)
    everything = part.proj(attend(part, below, context[0, 4:].flatten(0, 1)))
    torch.testing.assert_close(got[0, 2:].flatten(0, 1), everything)  # rather than nothing


@torch.no_grad()
def test_global_attention_takes_maps_and_sequences() -> None:
    part = CrossAttention(8, 2)
    query, context = torch.randn(1, 2, 3, 8), torch.randn(1, 4, 5, 8)
    want = part.proj(attend(part, query[0].flatten(0, 1), context[0].flatten(0, 1)))
    torch.testing.assert_close(part(query, context)[0].flatten(0, 1), want)
    torch.testing.assert_close(part(query.flatten(1, 2), context.flatten(1, 2))[0], want)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads; got dim 8 and num_heads 3"):
        CrossAttention(8, 3)
    with pytest.raises(ValueError, match="windows have sides of 1 or more; got 0 and 3"):
        WindowCrossAttention(8, 2, window_size=0, key_window_size=3)
    part = WindowCrossAttention(8, 2, window_size=3, key_window_size=3)
    with pytest.raises(ValueError, match="must be whole windows of 3 x 3"):
        part(torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8))
