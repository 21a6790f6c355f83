"""Neighborhood attention: every position attends to the window of positions around it.

    out_i = sum_j softmax_j(scale * q_i . k_j + rpb[K - 1 + (j - i) / dilation]) v_j        j in the window of i

The window is not cut at a border but shifted inwards, so that every query has the same number of keys; a dilation d
makes d interleaved lattices of every axis that do not see each other; a stride s lets s neighbouring queries share a
window (s = 1 slides, s = K is blocked attention); a causal axis sees only what lies before. `_geometry.py` has the
arithmetic. All of it per axis, on one, two or three axes.

Papers: Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143); Hassani and Shi, "Dilated Neighborhood
Attention Transformer" (2209.15001); Hassani et al., "Generalized Neighborhood Attention" (2504.16922). The semantics
are those of NATTEN (github.com/SHI-Labs/NATTEN), whose relative position bias ended with its release 0.17.

What is unusual here:
* The relative position bias is inside the fused kernels, with its gradient, at any dilation, stride and causality.
* Backward gathers: a key sums over the queries that see it, which are contiguous too. No atomics, so equal inputs
  give equal bits.
* Five implementations of one definition: `_reference` (dense), `_plain` (PyTorch operators: export, `torch.func`, any
  dtype), `_native` (C++, CPU), `_triton` (GPU), and `_operator`, which chooses between them.
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
