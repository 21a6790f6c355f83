"""DynamicViT's pruning: a small network predicts which tokens to keep; with the number of kept tokens, the sampled
decisions of training, attention under a policy, and the reducers for transformers.

Papers: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (NeurIPS 2021, arXiv
2106.02034); "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks" (TPAMI
2023, arXiv 2207.01580). Code: github.com/raoyongming/DynamicViT, MIT, whose names `in_conv` and `out_conv` are kept.

What is unusual:
* All models share one predictor. The published ConvNeXt's predictor has 1 x 1 convolutions, which are equivalent to our
  linear layers after removing the last two axes of their weights, with `norm_eps=1e-6`.
* The log-probabilities are computed in float32 also under autocast: the best tokens of an image differ by only 1e-4.
* Training masks dropped tokens instead of removing them, since the losses need all tokens. It is therefore no faster
  than training the dense transformer.
* A policy that keeps no token, which can be sampled during training, gives zeros for the global half, not NaN.
"""

import torch
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import is_autocast
from ..kernels.token_reduction import keep_tokens
from .token_reduction import TokenReducer, TokenState, after_pruning, share_of, under_policy


class PredictorLG(nn.Module):
    """Predict the log-probabilities of keeping and of dropping each token.

    Half of the hidden channels are those of the token itself, the other half are averaged over all tokens.

    Args:
        dim: channels of the tokens, a multiple of 4.
        norm_eps: epsilon of the first layer norm.
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
            policy: [B, N] of 1 and 0, differentiable; the mean is over the tokens with 1. None for all tokens.

        Returns:
            [B, N, 2]: the log-probabilities of keeping and of dropping each token.
        """
        if torch.jit.is_scripting():
            return self._log_probabilities(x, policy)
        else:
            if not is_autocast(x):
                return self._log_probabilities(x, policy)
            with torch.autocast(x.device.type, enabled=False):
                return self._log_probabilities(x.float(), policy)

    def _log_probabilities(self, x: Tensor, policy: Tensor | None) -> Tensor:
        local_half, global_half = self.in_conv(x).chunk(2, dim=-1)
        if policy is None:
            mean = global_half.mean(dim=1, keepdim=True)
        else:
            weight = policy.unsqueeze(2).to(global_half.dtype)
            mean = (global_half * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        return self.out_conv(torch.cat([local_half, mean.expand_as(local_half)], dim=-1))


def kept_count(tokens: int, ratio: float) -> int:
    """Return how many of `tokens` a ratio keeps: rounded down, but at least one.

    The published ratio 0.7 - 0.2 is slightly less than one half in floating point, so it keeps 97 of 196 tokens.
    """
    count = share_of(tokens, ratio)
    if torch.jit.is_scripting():
        return max(count, 1)
    else:
        return torch.sym_max(count, 1)  # type: ignore[return-value]


@register_notrace_function
def draw_decision(log_probabilities: Tensor, previous: Tensor | None = None) -> Tensor:
    """Sample a hard decision for each token by straight-through Gumbel-softmax.

    Args:
        log_probabilities: [B, N, 2], the output of `PredictorLG`.
        previous: [B, N], the previous decision: tokens that it dropped stay dropped.

    Returns:
        [B, N], 1 for tokens to keep and 0 for the others, with the gradient of the soft sample.
    """
    decision = F.gumbel_softmax(log_probabilities.float(), hard=True, dim=-1)[:, :, 0]
    decision = decision.to(log_probabilities.dtype)
    return decision if previous is None else decision * previous


def attention_under_policy(query: Tensor, key: Tensor, value: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute attention in which each masked token is a key only for itself, differentiable in the policy.

    The weights are exp(a - max a) * m, normalised, with m[i, j] = policy[j] off the diagonal and 1 on it. As in the
    published training, eps / N is added to each numerator and eps to the denominator: masked keys keep a tiny weight.

    Args:
        query, key, value: [B, heads, N, head_dim].
        policy: [B, N] of 1 and 0.
    """
    tokens = query.shape[2]
    logits = ((query * query.shape[3] ** -0.5) @ key.transpose(2, 3)).float()
    mask = policy.float()[:, None, None, :]
    mask = mask + (1 - mask) * torch.eye(tokens, device=query.device)
    weight = (logits - logits.amax(dim=3, keepdim=True)).exp() * mask
    attention = (weight + eps / tokens) / (weight.sum(dim=3, keepdim=True) + eps)
    return attention.to(value.dtype) @ value


class PolicyAttention(TokenReducer):
    """Apply the policy of earlier blocks in attention; prune nothing."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, state: TokenState) -> tuple[Tensor, Tensor | None]:
        policy = state.policy
        if policy is None:
            return F.scaled_dot_product_attention(query, key, value), None
        return attention_under_policy(query, key, value, policy), None


class PredictedPruning(PolicyAttention):
    """Keep the tokens with the highest predicted scores before the block; in training, mask sampled tokens instead.

    Args:
        dim: channels of the tokens.
        keep_rate: share of the first block's tokens after the prefix that remains, above 0 and up to 1; the count is
            rounded down, but at least one.
        num_prefix: tokens at the start that are always kept and not scored.
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
            return x, after_decision(state, x, decision, torch.cat([prefix, decision], dim=1))
        count = kept_count(state.assign.shape[1] - self.num_prefix, self.keep_rate)
        kept, slot = keep_tokens(x, log_probabilities[:, :, 0], count, num_prefix=self.num_prefix)
        state = after_pruning(state, x, slot, kept.shape[1])
        return kept, after_decision(state, kept, (state.assign[:, self.num_prefix :] >= 0).to(x.dtype), None)

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, num_prefix={self.num_prefix}"


def after_decision(state: TokenState, x: Tensor, decision: Tensor, policy: Tensor | None) -> TokenState:
    """Return the state after a decision [B, N0 - prefix] on the first block's patches.

    Args:
        x: the current tokens [B, N, C].
        policy: [B, N], 1 for kept and 0 for masked tokens; None if the decision has removed tokens instead. Dense
            features use the values in `x` of newly masked tokens, just as they use the last values of removed tokens.
    """
    canvas = state.canvas
    if canvas is not None and policy is not None:
        canvas = under_policy(x, canvas, state.policy)
    return TokenState(
        assign=state.assign,
        size=state.size,
        canvas=canvas,
        token_importance=state.token_importance,
        head_importance=state.head_importance,
        policy=policy,
        decisions=state.decisions + [decision],  # noqa: RUF005  TorchScript does not support unpacking
    )
