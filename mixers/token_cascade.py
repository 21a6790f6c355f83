"""Pruning by what attention puts out: of tokens by their content (EET), of tokens and heads over all blocks (SpAtten).

Papers: Jiang, Tang, Pan, Li, "Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval" (EET, arXiv
2504.16691), whose repository has no licence and was not used; Wang, Zhang, Han, "SpAtten: Efficient Sparse Attention
Architecture with Cascade Token and Head Pruning" (HPCA 2021, arXiv 2012.09852).

Unusual:
* What is kept is a share of the first block's tokens, not of those that are left.
* SpAtten's importances are sums over all blocks so far. They only grow, so the heads that are kept are always among
  those kept before: no list of them needs to travel.
* Heads are chosen for each picture; those pruned are left out of attention, and put zeros into the projection.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.token_reduction import attention_with_class_row, attention_with_column_sums, keep_tokens
from .token_predictor import kept_count
from .token_reduction import TokenReducer, TokenState, after_pruning, share_of


def _wide(x: Tensor) -> Tensor:
    """Half precision to float32, in which importance is added up."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


class ContentPruning(TokenReducer):
    """EET: tokens stay that the class token attends to and that have much to say, by the size of what they attended to.

    The score of token j is sum_h a_hj * |o_hj| / (sum_h |o_hj| + 1e-8): a the class token's attention, o the output of
    head h at token j. Tokens leave at the block's end.

    Args:
        keep_rate: share of the first block's tokens behind the prefix that is left, above 0 and up to 1; rounded down,
            but one at least.
        num_prefix: tokens at the beginning that stay; the first is the class token.
    """

    def __init__(self, keep_rate: float, *, num_prefix: int = 1) -> None:
        super().__init__()
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate is a share of the tokens, above 0 and up to 1; got {keep_rate}")
        if num_prefix < 1:
            raise ValueError("pruning by class attention needs a class token; this model has none")
        self.keep_rate, self.num_prefix = keep_rate, num_prefix

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        if self.keep_rate == 1:
            return F.scaled_dot_product_attention(query, key, value), None
        out, row = attention_with_class_row(query, key, value)
        content = torch.linalg.vector_norm(_wide(out.detach()), dim=3)
        score = (row.detach() * content).sum(1) / (content.sum(1) + 1e-8)
        return out, score[:, self.num_prefix :]

    def after(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        if evidence is None:
            return x, state
        keep = kept_count(state.assign.shape[1] - self.num_prefix, self.keep_rate)
        kept, slot = keep_tokens(x, evidence, keep, num_prefix=self.num_prefix)
        return kept, after_pruning(state, x, slot)

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, num_prefix={self.num_prefix}"


class CascadePruning(TokenReducer):
    """SpAtten: tokens leave before the block, and heads sit it out, by all that the blocks before have seen of them.

    The importance of a token is the attention that it drew of all queries and heads, that of a head the sum of the
    magnitudes that it put out. `attend` hands on the tokens' of this block and, behind them, the heads' as evidence.

    Args:
        token_rate: share of the first block's tokens behind the prefix that is left, rounded up; None: all that came.
        heads: how many take part; None: all. Which ones were scored in a block before.
        scores_tokens, scores_heads: whether a later block will ask for their importance.
        num_prefix: tokens at the beginning that stay.
    """

    def __init__(
        self,
        token_rate: float | None = None,
        heads: int | None = None,
        *,
        scores_tokens: bool = True,
        scores_heads: bool = True,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        if token_rate is not None and not 0 < token_rate <= 1:
            raise ValueError(f"token_rate is a share of the tokens, above 0 and up to 1; got {token_rate}")
        if heads is not None and heads < 1:
            raise ValueError(f"at least one head of attention must stay; got heads={heads}")
        self.token_rate, self.heads, self.num_prefix = token_rate, heads, num_prefix
        self.scores_tokens, self.scores_heads = scores_tokens, scores_heads

    def before(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        rate, importance = self.token_rate, state.importance
        if rate is None or importance is None:
            return x, state
        keep = share_of(state.assign.shape[1] - self.num_prefix, rate, up=True)
        score = importance[:, self.num_prefix :]
        kept, slot = keep_tokens(x, score, keep, num_prefix=self.num_prefix)
        importance = keep_tokens(importance.unsqueeze(2), score, keep, num_prefix=self.num_prefix)[0].squeeze(2)
        return kept, _with_importance(after_pruning(state, x, slot), importance, state.heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        count, importance = self.heads, state.heads
        if count is None or importance is None:
            out, drawn, put_out = self._measured(query, key, value)
        else:
            index = _strongest(importance, count)
            place = index[:, :, None, None].expand(-1, -1, query.shape[2], query.shape[3])
            some, drawn, put_out = self._measured(query.gather(1, place), key.gather(1, place), value.gather(1, place))
            out = torch.zeros_like(query, dtype=some.dtype).scatter(1, place, some)
            if put_out is not None:
                put_out = torch.zeros_like(importance).scatter(1, index, put_out)
        if drawn is not None and put_out is not None:
            return out, torch.cat([drawn, put_out], 1)
        return out, put_out if drawn is None else drawn

    def _measured(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attention, what each token drew of it [batch, N], and what each head put out [batch, heads]."""
        drawn: Tensor | None = None
        put_out: Tensor | None = None
        if self.scores_tokens:
            out, sums = attention_with_column_sums(query, key, value)
            drawn = sums.detach().sum(1)
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        if self.scores_heads:
            put_out = _wide(out.detach()).abs().sum([2, 3])
        return out, drawn, put_out

    def between(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        if evidence is None:
            return x, state
        importance, heads = state.importance, state.heads
        tokens = x.shape[1] if self.scores_tokens else 0
        if self.scores_tokens:
            drawn = evidence[:, :tokens]
            importance = drawn if importance is None else importance + drawn
        if self.scores_heads:
            put_out = evidence[:, tokens:]
            heads = put_out if heads is None else heads + put_out
        return x, _with_importance(state, importance, heads)

    def extra_repr(self) -> str:
        return (
            f"token_rate={self.token_rate}, heads={self.heads}, scores_tokens={self.scores_tokens}, "
            f"scores_heads={self.scores_heads}, num_prefix={self.num_prefix}"
        )


def _strongest(importance: Tensor, count: int) -> Tensor:
    """[batch, heads] to the indices [batch, count] of the largest, of equal ones the first."""
    every = torch.arange(importance.shape[1], device=importance.device, dtype=importance.dtype)
    every = every.expand(importance.shape[0], -1).unsqueeze(2)
    return keep_tokens(every, importance, count, num_prefix=0)[0].squeeze(2).long()


def _with_importance(state: TokenState, importance: Tensor | None, heads: Tensor | None) -> TokenState:
    return TokenState(state.assign, state.size, state.canvas, importance, heads, state.policy, state.decisions)
