"""Token reduction in vision transformers: the interface of all methods, token merging, and pruning by class attention.

A method puts one `TokenReducer` into each block of the transformer, and the block calls its four steps. The blocks pass
on a `TokenState` as an argument and a result, never as an attribute. So activations can be checkpointed, models copied
and exported, and several batches processed at the same time.

Papers: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461), github.com/facebookresearch/
ToMe, written here from the paper; Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
Token Reorganizations" (ICLR 2022, arXiv 2202.07800), github.com/youweiliang/evit, Apache-2.0.

What is unusual:
* `TokenState.assign` gives the current position of every token of the first block. Dense features, visualisations and
  keep decisions all derive from it; ToMe's own code traces tokens with a float matrix of tokens by tokens instead.
* The number of remaining tokens depends on the rate and the number of tokens, never on the image. Rates are exact: a
  rate of 0.55 keeps 11 of 20 tokens, although their floating-point product is slightly above 11, for which the
  published code keeps 12.
* EViT's fused token has no position on the raster: the tokens fused into it count as dropped.
* A merged token has the weight of all its parts in attention (`proportional`), through the logarithm of its size.
"""

import functools
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

_MOST_TOKENS = 2**15 - 1


def share_of(tokens: int, rate: float, up: bool = False) -> int:
    """Return the largest count with count / tokens <= rate, or with `up` the smallest with count / tokens >= rate.

    While exporting, `tokens` may be a symbol. ONNX would compute in float32, so exported programs multiply integers;
    they are exact for up to 32767 tokens.
    """
    if torch.jit.is_scripting():
        return _share_of(tokens, rate, up)
    else:
        if not (isinstance(tokens, torch.SymInt) and is_exporting()):
            return _share_of(tokens, rate, up)
        numerator, denominator = _fraction(rate, up)
        offset = denominator - 1 if up else 0  # not -(-a // b): ONNX rounds that towards zero
        return (tokens * numerator + offset) // denominator


def _share_of(tokens: int, rate: float, up: bool) -> int:
    nearest = int(tokens * rate + 0.5)
    share = nearest / max(tokens, 1)
    if up:
        return nearest + 1 if share < rate else nearest
    return nearest - 1 if share > rate else nearest


@functools.cache
def _fraction(rate: float, up: bool) -> tuple[int, int]:
    """Return the fraction whose multiples round to the counts of `share_of`, for up to 32767 tokens.

    It is the count / tokens that comes closest to the rate. All products fit into 32 bits, in which OpenVINO computes.
    """
    count, tokens = _share_of(1, rate, up), 1
    for n in range(2, _MOST_TOKENS + 1):
        other = _share_of(n, rate, up)
        if (other * tokens < count * n) if up else (other * tokens > count * n):
            count, tokens = other, n
    return count, tokens


class TokenState(NamedTuple):
    """The state of the tokens [batch, N, C] that blocks pass on; the tokens of the first block are [batch, N0, C].

    A block returns a new state instead of modifying its input. New states list all fields, since TorchScript cannot
    compile `_replace`.
    """

    assign: Tensor
    """[batch, N0] int64: the index, among the current tokens, of each token of the first block; -1 if dropped. Prefix
    tokens are included."""
    size: Tensor | None
    """[batch, N]: how many tokens of the first block each token represents; None if none has been merged."""
    canvas: Tensor | None
    """[batch, N0, C]: the last value of each dropped token; None unless dense features were requested."""
    token_importance: Tensor | None
    """[batch, N]: scores summed over the blocks (cascade pruning)."""
    head_importance: Tensor | None
    """[batch, heads]: scores of the attention heads, summed over the blocks (cascade pruning)."""
    policy: Tensor | None
    """[batch, N]: 1 for kept and 0 for masked tokens, differentiable; None except in training with masks."""
    decisions: list[Tensor]
    """[batch, N0 - prefix] for each stage so far: 1 for kept and 0 for dropped tokens."""


@register_notrace_function
def initial_state(x: Tensor, dense: bool) -> TokenState:
    """Return the state before the first block; `dense` keeps the values of dropped tokens for dense features."""
    assign = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    decisions: list[Tensor] = []
    return TokenState(assign, None, x if dense else None, None, None, None, decisions)


def composed(slot: Tensor, assign: Tensor) -> Tensor:
    """Update `assign` [batch, N0] after the current tokens have moved to `slot` [batch, N]; -1 stays -1."""
    present = slot.gather(1, assign.clamp(min=0))
    return torch.where(assign >= 0, present, assign)


def move_values(values: Tensor, slot: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """Move one value per token, [batch, N], to its `slot` in a sequence of `length`; unassigned slots get `fill`."""
    index = torch.where(slot < 0, length, slot)  # dropped tokens share one extra position, which is cut off
    moved = torch.full([values.shape[0], length + 1], fill, dtype=values.dtype, device=values.device)
    return moved.scatter(1, index, values)[:, :length]


def after_merging(state: TokenState, slot: Tensor, size: Tensor) -> TokenState:
    """Return the state after tokens have moved to `slot` [batch, N] and got these sizes; no token may be dropped.

    Importance scores and policies are not merged, since no method that merges uses them.
    """
    return TokenState(
        assign=slot.gather(1, state.assign),
        size=size,
        canvas=state.canvas,
        token_importance=state.token_importance,
        head_importance=state.head_importance,
        policy=state.policy,
        decisions=state.decisions,
    )


def after_pruning(state: TokenState, x: Tensor, slot: Tensor, length: int) -> TokenState:
    """Return the state after the tokens `x` [batch, N, C] have moved to `slot`, -1 if dropped, of `length` tokens.

    Size, importance and policy of each token move with it. A slot without a source, such as a fused token, has size 1.
    """
    canvas, size, importance, policy = state.canvas, state.size, state.token_importance, state.policy
    return TokenState(
        assign=composed(slot, state.assign),
        size=None if size is None else move_values(size, slot, length, fill=1.0),
        canvas=None if canvas is None else scatter_tokens(x, state.assign, canvas),
        token_importance=None if importance is None else move_values(importance, slot, length),
        head_importance=state.head_importance,
        policy=None if policy is None else move_values(policy, slot, length, fill=1.0),
        decisions=state.decisions,
    )


def under_policy(x: Tensor, canvas: Tensor, policy: Tensor | None) -> Tensor:
    """Return `x` where the policy [batch, N] keeps a token and `canvas` where it masks it; both are [batch, N, C]."""
    if policy is None:
        return x
    weight = policy.unsqueeze(2).to(x.dtype)
    return weight * x + (1 - weight) * canvas


def on_raster(x: Tensor, state: TokenState) -> Tensor:
    """Map tokens [batch, N, C] back to the positions of the first block, [batch, N0, C].

    The value of a merged token is repeated at the positions of all its parts. Dropped and masked tokens take their last
    values from the canvas. If the state has no canvas, dropped tokens are zero.
    """
    canvas = state.canvas
    if canvas is None:
        return unmerge_tokens(x, state.assign)
    return scatter_tokens(under_policy(x, canvas, state.policy), state.assign, canvas)


class TokenReducer(nn.Module):
    """The part of a reduction method that runs in one block; this base class keeps all tokens.

    x is [batch, N, C]; queries, keys and values are [batch, heads, N, head_dim]. `attend` returns its output and
    optional measurements, which `between` and `after` receive as `evidence`.
    """

    def before(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Return tokens and state for the block, called at its start."""
        return x, state

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        """Compute attention; return its output and the evidence."""
        return F.scaled_dot_product_attention(query, key, value), None

    def between(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        """Return tokens and state for the MLP, called after attention and its residual connection."""
        return x, state

    def after(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        """Return tokens and state for the next block, called at the end of this one."""
        return x, state


class TokenMerging(TokenReducer):
    """Merge the `r` most similar pairs of tokens into their size-weighted means (ToMe).

    Similarity is the cosine similarity of the keys, averaged over the heads. At most half of the tokens can merge in
    one block, so `r` is limited to that.

    Args:
        r: number of tokens that this block merges away.
        proportional: whether a token receives attention in proportion to its size.
        num_prefix: tokens at the start that are never merged.
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
    """Keep the tokens with the most class attention; drop the others or fuse them into one token (EViT).

    Args:
        keep_rate: share of the tokens after the prefix that is kept, above 0 and up to 1; the count is rounded up.
        fuse: whether to append the sum of the dropped tokens, weighted by their class attention.
        num_prefix: tokens at the start that are always kept; the first is the class token.
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
        return kept, after_pruning(state, x, slot, kept.shape[1])

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, fuse={self.fuse}, num_prefix={self.num_prefix}"
