"""Gated linear attention (GLA): linear attention with a data-dependent decay for each row of its state.

    state[t] = exp(log_gate[t])[:, None] * state[t - 1] + key[t][:, None] * value[t][None, :]
    out[t] = scale * query[t] @ state[t]

Papers: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (ICML 2024, arXiv
2312.06635); bidirectional: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention"
(arXiv 2405.18425).
"""

from ._functional import bidirectional_gated_linear_attention, gated_linear_attention

__all__ = ["bidirectional_gated_linear_attention", "gated_linear_attention"]
