"""DynamicViT: a small network says of every token whether it is worth keeping. Here is that network, and what goes with
it: how many tokens stay, the random decisions of training, attention under a policy, reducers for transformers.

Papers: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (NeurIPS 2021, arXiv
2106.02034); "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks" (TPAMI
2023, arXiv 2207.01580). Code: github.com/raoyongming/DynamicViT, MIT, whose names `in_conv` and `out_conv` are kept.

What is unusual:
* One module for all of them. The published ConvNeXt has convolutions of side 1 in it: the same numbers, with
  `norm_eps=1e-6`, once their two last axes are taken off.
* The log-probabilities are computed in float32 also under autocast: the best tokens of a picture differ by 1e-4.
* Training drops nothing, so it is no faster than that of the whole transformer: dropped tokens are masked, and all of
  them are there for the losses.
* A policy that keeps no token at all, which training may draw, gives zeros for the global half, not NaN.
"""

import torch
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import is_autocast
from ..kernels.token_reduction import keep_tokens
from .token_reduction import TokenReducer, TokenState, after_pruning, share_of


class PredictorLG(nn.Module):
    """Log-probabilities of keeping and of dropping each token.

    Half of the channels are the token's own, half are the mean over all tokens.

    Args:
        dim: channels of the tokens, a multiple of 4.
        norm_eps: of the layer norm at the beginning.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"the predictor halves its channels twice, so dim must be a multiple of 4; got {dim}")
        self.in_conv = nn.Sequential(
            nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype),
            nn.Linear(dim, dim, device=device, dtype=dtype),
            nn.GELU(),
        )
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(dim // 4, 2, device=device, dtype=dtype),
            nn.LogSoftmax(dim=-1),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Score tokens.

        Args:
            x: [B, N, C].
            policy: [B, N] of 1 and 0, with gradient; the mean is over the tokens that have 1. None: all of them.

        Returns:
            [B, N, 2]: the first to keep, the second to drop.
        """
        if torch.jit.is_scripting():
            return self._log_probabilities(x, policy)
        else:
            if not is_autocast(x):
                return self._log_probabilities(x, policy)
            with torch.autocast(x.device.type, enabled=False):
                return self._log_probabilities(x.float(), policy)

    def _log_probabilities(self, x: Tensor, policy: Tensor | None) -> Tensor:
        local, everywhere = self.in_conv(x).chunk(2, dim=-1)
        if policy is None:
            mean = everywhere.mean(dim=1, keepdim=True)
        else:
            weight = policy.unsqueeze(2).to(everywhere.dtype)
            mean = (everywhere * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        return self.out_conv(torch.cat([local, mean.expand_as(local)], dim=-1))


def kept_count(tokens: int, ratio: float) -> int:
    """How many of so many tokens a ratio keeps: rounded down, but at least one.

    The published 0.7 - 0.2 is a little less than a half, so of 196 it keeps 97.
    """
    count = share_of(tokens, ratio)
    if torch.jit.is_scripting():
        return max(count, 1)
    else:
        return torch.sym_max(count, 1)  # type: ignore[return-value]


@register_notrace_function
def draw_decision(log_probabilities: Tensor, previous: Tensor | None = None) -> Tensor:
    """One hard decision a token, drawn by its probability, through which gradients go as if it were soft.

    Args:
        log_probabilities: [B, N, 2], as from `PredictorLG`.
        previous: [B, N], the decision before: what was dropped stays so.

    Returns:
        [B, N], 1 for tokens to keep and 0 for the others (Gumbel-softmax, straight-through).
    """
    drawn = F.gumbel_softmax(log_probabilities.float(), hard=True, dim=-1)[:, :, 0]
    drawn = drawn.to(log_probabilities.dtype)
    return drawn if previous is None else drawn * previous


def attention_under_policy(query: Tensor, key: Tensor, value: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Attention in which masked tokens are keys to none but themselves, with gradient to the policy.

    exp(a - max a) * m is normalised, m[i, j] = policy[j] off the diagonal and 1 on it; eps / N is added to each
    numerator and eps to the denominator, so that masked keys keep a trace of weight, as in the published training.

    Args:
        query, key, value: [B, heads, N, head_dim].
        policy: [B, N] of 1 and 0.
    """
    tokens = query.shape[2]
    logits = ((query * query.shape[3] ** -0.5) @ key.transpose(2, 3)).float()
    seen = policy.float()[:, None, None, :]
    seen = seen + (1 - seen) * torch.eye(tokens, device=query.device)
    weight = (logits - logits.amax(dim=3, keepdim=True)).exp() * seen
    attention = (weight + eps / tokens) / (weight.sum(dim=3, keepdim=True) + eps)
    return attention.to(value.dtype) @ value


class PolicyAttention(TokenReducer):
    """A block that only respects what was decided before it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        policy = state.policy
        if policy is None:
            return F.scaled_dot_product_attention(query, key, value), None
        return attention_under_policy(query, key, value, policy), None


class PredictedPruning(PolicyAttention):
    """The tokens that its predictor thinks best stay, before the block; while training, random decisions mask the rest.

    Args:
        dim: channels of the tokens.
        keep_rate: share of the first block's tokens behind the prefix that stays, above 0 and up to 1; rounded down,
            but one at least.
        num_prefix: tokens at the beginning that stay and are not scored.
    """

    def __init__(
        self,
        dim: int,
        keep_rate: float,
        *,
        num_prefix: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate is a share of the tokens, above 0 and up to 1; got {keep_rate}")
        self.keep_rate, self.num_prefix = keep_rate, num_prefix
        self.predictor = PredictorLG(dim, device=device, dtype=dtype)

    def before(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        policy = state.policy
        previous = None if policy is None else policy[:, self.num_prefix :]
        log_probabilities = self.predictor(x[:, self.num_prefix :], previous)
        if self.training:
            decision = draw_decision(log_probabilities, previous)
            prefix = decision.new_ones(decision.shape[0], self.num_prefix)
            return x, after_decision(state, decision, torch.cat([prefix, decision], dim=1))
        count = kept_count(state.assign.shape[1] - self.num_prefix, self.keep_rate)
        kept, slot = keep_tokens(x, log_probabilities[:, :, 0], count, num_prefix=self.num_prefix)
        state = after_pruning(state, x, slot)
        return kept, after_decision(state, (state.assign[:, self.num_prefix :] >= 0).to(x.dtype), None)

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, num_prefix={self.num_prefix}"


def after_decision(state: TokenState, decision: Tensor, policy: Tensor | None) -> TokenState:
    """The state after a decision [B, N0 - prefix] over the first block's patches, masked by it if there is a policy."""
    return TokenState(
        state.assign,
        state.size,
        state.canvas,
        state.importance,
        state.heads,
        policy,
        state.decisions + [decision],  # noqa: RUF005  TorchScript knows no unpacking
    )
