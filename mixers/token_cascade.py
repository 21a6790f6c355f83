"""Pruning by the output of attention: of tokens by their content (EET), of tokens and heads across blocks (SpAtten).

Papers: Jiang, Tang, Pan, Li, "Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval" (EET, arXiv
2504.16691); Wang, Zhang, Han, "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning"
(HPCA 2021, arXiv 2012.09852). EET's repository, github.com/WhiteJiang/EET, has no licence: no code of it is here, but
the tests compare with outputs recorded from it (tests/goldens/eet_vit_small.json).

What is unusual:
* Keep rates are relative to the tokens of the first block, not to the remaining tokens.
* SpAtten's importance scores are sums over all blocks so far. They only grow, so the heads that are kept are always a
  subset of those kept before, and no list of heads has to be passed on.
* Heads are selected for each image. Pruned heads are left out of attention and contribute zeros to the projection.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.token_reduction import attention_with_class_row, attention_with_column_sums, keep_tokens
from .token_predictor import kept_count
from .token_reduction import TokenReducer, TokenState, after_pruning, move_values, share_of


def _wide(x: Tensor) -> Tensor:
    """Convert half precision to float32, in which importance scores are summed."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


class ContentPruning(TokenReducer):
    """Keep the tokens with the most class attention, weighted by the norm of each head's output (EET).

    The score of token j is sum_h a_hj * |o_hj| / (sum_h |o_hj| + 1e-8), where a_hj is the class token's attention to
    token j in head h, and o_hj the output of head h at token j. Tokens are dropped at the end of the block.

    Args:
        keep_rate: share of the first block's tokens after the prefix that remains, above 0 and up to 1; the count is
            rounded down, but at least one.
        num_prefix: tokens at the start that are always kept; the first is the class token.
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
        return kept, after_pruning(state, x, slot, kept.shape[1])

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, num_prefix={self.num_prefix}"


class CascadePruning(TokenReducer):
    """Prune tokens before the block and heads within it, by importance scores summed over all earlier blocks (SpAtten).

    The importance of a token is the attention that it receives from all queries in all heads. The importance of a head
    is the sum of the magnitudes of its output. `attend` returns as evidence the scores of this block: first those of
    the tokens, then those of the heads.

    Args:
        token_rate: share of the first block's tokens after the prefix that remains, rounded up; None keeps all tokens.
        heads: number of heads that take part, selected by the scores of earlier blocks; None for all heads.
        scores_tokens, scores_heads: whether a later block needs these scores.
        num_prefix: tokens at the start that are always kept.
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
        rate, importance = self.token_rate, state.token_importance
        if rate is None or importance is None:
            return x, state
        keep = share_of(state.assign.shape[1] - self.num_prefix, rate, up=True)
        kept, slot = keep_tokens(x, importance[:, self.num_prefix :], keep, num_prefix=self.num_prefix)
        return kept, after_pruning(state, x, slot, kept.shape[1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        count, importance = self.heads, state.head_importance
        if count is None or importance is None:
            out, received, magnitude = self._measured(query, key, value)
        else:
            heads = _strongest(importance, count)
            index = heads[:, :, None, None].expand(-1, -1, query.shape[2], query.shape[3])
            kept, received, magnitude = self._measured(
                query.gather(1, index), key.gather(1, index), value.gather(1, index)
            )
            out = torch.zeros_like(query, dtype=kept.dtype).scatter(1, index, kept)
            if magnitude is not None:
                magnitude = torch.zeros_like(importance).scatter(1, heads, magnitude)
        if received is not None and magnitude is not None:
            return out, torch.cat([received, magnitude], 1)
        return out, magnitude if received is None else received

    def _measured(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute attention, the attention received by each token [batch, N], and head magnitudes [batch, heads]."""
        received: Tensor | None = None
        magnitude: Tensor | None = None
        if self.scores_tokens:
            out, sums = attention_with_column_sums(query, key, value)
            received = sums.detach().sum(1)
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        if self.scores_heads:
            magnitude = _wide(out.detach()).abs().sum([2, 3])
        return out, received, magnitude

    def between(self, x: Tensor, state: TokenState, evidence: Tensor | None) -> tuple[Tensor, TokenState]:
        if evidence is None:
            return x, state
        token_importance, head_importance = state.token_importance, state.head_importance
        tokens = x.shape[1] if self.scores_tokens else 0
        if self.scores_tokens:
            received = evidence[:, :tokens]
            token_importance = received if token_importance is None else token_importance + received
        if self.scores_heads:
            magnitude = evidence[:, tokens:]
            head_importance = magnitude if head_importance is None else head_importance + magnitude
        return x, TokenState(
            assign=state.assign,
            size=state.size,
            canvas=state.canvas,
            token_importance=token_importance,
            head_importance=head_importance,
            policy=state.policy,
            decisions=state.decisions,
        )

    def extra_repr(self) -> str:
        return (
            f"token_rate={self.token_rate}, heads={self.heads}, scores_tokens={self.scores_tokens}, "
            f"scores_heads={self.scores_heads}, num_prefix={self.num_prefix}"
        )


def _strongest(importance: Tensor, count: int) -> Tensor:
    """Return the indices [batch, count] of the largest values of [batch, heads]; ties go to the lower index."""
    slot = keep_tokens(importance.unsqueeze(2), importance, count, num_prefix=0)[1]
    heads = torch.arange(importance.shape[1], device=importance.device).expand(importance.shape[0], -1)
    return move_values(heads, slot, count)
