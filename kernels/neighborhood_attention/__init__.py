"""Neighborhood attention: every position attends to the window of positions around it.

    out_i = sum_j softmax_j(scale * q_i . k_j + rpb[K - 1 + (j - i) / dilation]) v_j        j in the window of i

At a border the window is not cut but shifted inwards, so that every query has the same number of keys. A dilation d
splits every axis into d interleaved lattices that do not interact. A stride s makes s neighbouring queries share a
window (s = 1 is a sliding window, s = K is blocked attention). On a causal axis a query sees no later position.
`_geometry.py` has the arithmetic. All options are per axis, for one, two or three axes.

Papers: Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143); Hassani and Shi, "Dilated Neighborhood
Attention Transformer" (2209.15001); Hassani et al., "Generalized Neighborhood Attention" (2504.16922). The semantics
are those of NATTEN (github.com/SHI-Labs/NATTEN), which dropped the relative position bias after its release 0.17.

What is unusual here:
* The relative position bias is inside the fused kernels, with its gradient, for any dilation, stride and causality.
* The backward pass gathers: a key sums over the queries that see it, which are contiguous as well. There are no
  atomics, so the results are bitwise deterministic.
* There are five modules for one definition: `_reference` (dense), `_plain` (PyTorch operators: export, `torch.func`,
  any dtype), `_native` (C++, CPU), `_triton` (GPU), and `_operator`, which chooses between them.
"""

from ._functional import na1d, na2d, na3d, neighborhood_attention
from ._geometry import Axes, make_windows
from ._reference import neighborhood_attention_reference

__all__ = [
    "Axes",
    "make_windows",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_attention_reference",
]
