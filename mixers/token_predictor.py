"""DynamicViT's prediction module: a small network that says of every token whether it is worth keeping; and what goes
with it: how many stay, the random decisions of training, attention under a policy.

Papers: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (NeurIPS 2021, arXiv
2106.02034); "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks" (TPAMI
2023, arXiv 2207.01580). Code: github.com/raoyongming/DynamicViT, MIT, whose names `in_conv` and `out_conv` are kept.

What is unusual:
* One module for all of them. The published ConvNeXt has convolutions of side 1 in it: the same numbers, with
  `norm_eps=1e-6`, once their two last axes are taken off.
* The log-probabilities are computed in float32 also under autocast: the best tokens of a picture differ by 1e-4.
* A policy that keeps no token at all, which training may draw, gives zeros for the global half, not NaN.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import is_autocast

_FRACTION_BITS = 40


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
    """How many of so many tokens a ratio keeps: rounded down as Python does it, but at least one.

    So 0.7 - 0.2 of 196 are 97, not 98. While exporting, `tokens` may be a symbol; ONNX would multiply in float32, so
    the product is one of integers there.
    """
    if torch.jit.is_scripting():
        return max(int(tokens * ratio), 1)
    elif isinstance(tokens, torch.SymInt):
        return torch.sym_max((tokens * _numerator(ratio)) // (1 << _FRACTION_BITS), 1)
    else:
        return torch.sym_max(torch.sym_int(tokens * ratio), 1)


def _numerator(ratio: float) -> int:
    """Of the fraction over 2**40 that gives the same counts as the floating-point number."""
    below = int(ratio * (1 << _FRACTION_BITS))
    exact = all((n * below) >> _FRACTION_BITS == int(n * ratio) for n in range(1, 4097))
    return below if exact else below + 1


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
