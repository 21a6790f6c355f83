"""The selective scan (Mamba's S6): a linear recurrence with input-dependent coefficients, over sequences or along paths
over maps (SS2D).

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t . h_t + D x_t

Each channel has its own recurrence with `state` elements h. delta_t is per channel; B_t and C_t are per position.

Papers: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752); Liu et al.,
"VMamba: Visual State Space Model" (arXiv 2401.10166). Definition: github.com/state-spaces/mamba,
`selective_scan_interface.py`.
"""

from ._functional import selective_scan, selective_scan_2d

__all__ = ["selective_scan", "selective_scan_2d"]
