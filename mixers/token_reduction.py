"""How a vision transformer gets rid of tokens: what every method shares, merging, and pruning by class attention.

A method puts one `TokenReducer` into each block of the transformer. The block calls its four steps; what is known of
the tokens goes from block to block as a `TokenState`, an argument and a result, never an attribute: so activations can
be checkpointed, models copied and exported, and two pictures can be under way at once.

Papers: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461), github.com/facebookresearch/
ToMe, written here from the paper; Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
Token Reorganizations" (ICLR 2022, arXiv 2202.07800), github.com/youweiliang/evit, Apache-2.0.

Unusual:
* `TokenState.assign` says for every token of the first block where it is now. It alone gives dense features, the
  pictures, and what was kept; ToMe's own code traces with a float matrix of tokens by tokens instead.
* How many tokens remain depends on the rate and the number of tokens, never on the picture. A rate means what it says:
  0.55 of 20 tokens are 11, though their product in floating point is a little more, and the published code keeps 12.
* EViT's fused token stands nowhere on the raster: the tokens in it count as dropped.
* A merged token weighs as much as its parts in attention (`proportional`), through the logarithm of its size.
"""

from typing import NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import is_exporting
from ..kernels.token_reduction import (
    attention_with_class_row,
    bipartite_match,
    keep_tokens,
    merge_tokens,
    merged_length,
    scatter_tokens,
    unmerge_tokens,
)

_FRACTION_BITS = 40


def share_of(tokens: int, rate: float, up: bool = False) -> int:
    """The largest number of so many tokens whose share, tokens by tokens, is not above the rate; or with `up` the
    smallest whose share is not below it.

    While exporting, `tokens` may be a symbol. ONNX would compute in float32, so it gets a product of integers.
    """
    if torch.jit.is_scripting():
        return _share_of(tokens, rate, up)
    else:
        if not (isinstance(tokens, torch.SymInt) and is_exporting()):
            return _share_of(tokens, rate, up)
        rest = (1 << _FRACTION_BITS) - 1 if up else 0  # and nothing negative, which ONNX would round towards zero
        return (tokens * _numerator(rate, up) + rest) // (1 << _FRACTION_BITS)


def _share_of(tokens: int, rate: float, up: bool) -> int:
    nearest = int(tokens * rate + 0.5)
    share = nearest / max(tokens, 1)
    if up:
        return nearest + 1 if share < rate else nearest
    return nearest - 1 if share > rate else nearest


def _numerator(rate: float, up: bool) -> int:
    """Of the fraction over 2**40 that gives the counts of `share_of`.

    They are those of one number that is as good as the rate, and between two neighbours over 2**40 there is no more
    than one fraction of so few tokens: so if it is not the lower neighbour it is the upper one.
    """
    below = int(rate * (1 << _FRACTION_BITS))
    for n in range(1, 4097):
        count = -((-n * below) >> _FRACTION_BITS) if up else (n * below) >> _FRACTION_BITS
        if count != _share_of(n, rate, up):
            return below + 1
    return below


class TokenState(NamedTuple):
    """What the blocks know of the tokens [batch, N, C] that they get, of [batch, N0, C] in the first block."""

    assign: Tensor
    """[batch, N0] int64: the place of each token of the first block among those of now, prefix too; -1 if dropped."""
    size: Tensor | None
    """[batch, N]: how many tokens of the first block each one stands for; None while none was merged."""
    canvas: Tensor | None
    """[batch, N0, C]: the last values of dropped tokens; carried only while dense features are asked for."""
    importance: Tensor | None
    """[batch, N]: scores that add up over the blocks (cascades)."""
    heads: Tensor | None
    """[batch, heads]: the same for the heads of attention."""
    policy: Tensor | None
    """[batch, N] of 1 for kept and 0 for masked tokens, with gradient; only while training with masks."""
    decisions: list[Tensor]
    """[batch, N0 - prefix] for each stage so far, as `policy`."""


@register_notrace_function
def initial_state(x: Tensor, dense: bool) -> TokenState:
    """The state before the first block. `dense`: whether dropped tokens will be asked for."""
    assign = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    decisions: list[Tensor] = []
    return TokenState(assign, None, x if dense else None, None, None, None, decisions)


def composed(slot: Tensor, assign: Tensor) -> Tensor:
    """Where the tokens of the first block are after those of now have moved to `slot` [batch, N]; -1 stays -1."""
    moved = slot.gather(1, assign.clamp(min=0))
    return torch.where(assign >= 0, moved, assign)


def after_merging(state: TokenState, slot: Tensor, size: Tensor) -> TokenState:
    """The state after tokens moved to `slot`, none of them dropped, and got these sizes."""
    return TokenState(
        slot.gather(1, state.assign),
        size,
        state.canvas,
        state.importance,
        state.heads,
        state.policy,
        state.decisions,
    )


def after_pruning(state: TokenState, x: Tensor, slot: Tensor) -> TokenState:
    """The state after the tokens `x` [batch, N, C] of now moved to `slot`, -1 for those that are dropped."""
    canvas = state.canvas
    if canvas is not None:
        canvas = scatter_tokens(x, state.assign, canvas)
    return TokenState(
        composed(slot, state.assign),
        state.size,
        canvas,
        state.importance,
        state.heads,
        state.policy,
        state.decisions,
    )


def on_raster(x: Tensor, state: TokenState) -> Tensor:
    """Tokens [batch, N, C] at the places of the first block, [batch, N0, C].

    A merged token's value stands wherever its parts were; dropped tokens have the value that they had last, or zeros if
    no canvas was carried.
    """
    canvas = state.canvas
    return unmerge_tokens(x, state.assign) if canvas is None else scatter_tokens(x, state.assign, canvas)


class TokenReducer(nn.Module):
    """One block's share of a method. This one leaves all tokens alone.

    x is [batch, N, C]; queries, keys and values are [batch, heads, N, head_dim]. What `attend` measures besides its
    output is handed to the steps after it as `evidence`.
    """

    def before(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """At the block's beginning."""
        return x, state

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        """The attention itself."""
        return F.scaled_dot_product_attention(query, key, value), None

    def between(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        """Behind attention and its residual, before the MLP."""
        return x, state

    def after(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        """At the block's end."""
        return x, state


class TokenMerging(TokenReducer):
    """ToMe: the `r` most similar pairs of tokens become one each, its value their mean weighted by size.

    Similar are tokens whose keys, averaged over the heads, point the same way. At most half of the tokens can merge in
    one block, so `r` is cut to that.

    Args:
        r: tokens fewer after this block.
        proportional: a token draws attention in proportion to its size.
        num_prefix: tokens at the beginning that are left alone.
    """

    def __init__(self, r: int, *, proportional: bool = True, num_prefix: int = 1) -> None:
        super().__init__()
        if r < 0:
            raise ValueError(f"r is the number of tokens to merge, 0 or more; got {r}")
        self.r, self.proportional, self.num_prefix = r, proportional, num_prefix

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        size = state.size
        bias: Tensor | None = None
        if self.proportional and size is not None:
            bias = size.log()[:, None, None, :].to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, bias), key

    def between(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        length = merged_length(x.shape[1], self.r, num_prefix=self.num_prefix)
        if self.r == 0 or length == x.shape[1] or evidence is None:
            return x, state
        slot = bipartite_match(evidence, self.r, num_prefix=self.num_prefix)
        x, size = merge_tokens(x, slot, length, size=state.size)
        return x, after_merging(state, slot, size)

    def extra_repr(self) -> str:
        return f"r={self.r}, proportional={self.proportional}, num_prefix={self.num_prefix}"


class AttentivePruning(TokenReducer):
    """EViT: the tokens that the class token attends to stay, the rest is dropped or becomes one token.

    Args:
        keep_rate: share of the tokens behind the prefix that stay, above 0 and up to 1, rounded up.
        fuse: append the sum of the dropped tokens, each times its attention.
        num_prefix: tokens at the beginning that stay; the first is the class token.
    """

    def __init__(self, keep_rate: float, *, fuse: bool = True, num_prefix: int = 1) -> None:
        super().__init__()
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate is a share of the tokens, above 0 and up to 1; got {keep_rate}")
        if num_prefix < 1:
            raise ValueError("pruning by class attention needs a class token; this model has none")
        self.keep_rate, self.fuse, self.num_prefix = keep_rate, fuse, num_prefix

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        if self.keep_rate == 1:
            return F.scaled_dot_product_attention(query, key, value), None
        out, row = attention_with_class_row(query, key, value)
        return out, row.mean(dim=1)[:, self.num_prefix :]

    def between(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        tokens = x.shape[1] - self.num_prefix
        keep = share_of(tokens, self.keep_rate, up=True)
        if evidence is None or keep == tokens:
            return x, state
        kept, slot = keep_tokens(x, evidence, keep, num_prefix=self.num_prefix, fuse=self.fuse)
        return kept, after_pruning(state, x, slot)

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, fuse={self.fuse}, num_prefix={self.num_prefix}"
