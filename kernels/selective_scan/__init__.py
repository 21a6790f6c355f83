"""The selective scan: a linear recurrence whose coefficients are functions of the input (Mamba's S6), on sequences and
along paths over maps (SS2D).

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t . h_t + D x_t

for each channel on its own, with `state` numbers h each; delta_t is the channel's, B_t and C_t belong to the position.

Papers: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752); Liu et al.,
"VMamba: Visual State Space Model" (arXiv 2401.10166). Definition: github.com/state-spaces/mamba,
`selective_scan_interface.py`.
"""

from ._functional import selective_scan, selective_scan_2d

__all__ = ["selective_scan", "selective_scan_2d"]
