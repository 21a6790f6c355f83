"""Fewer tokens: merge the most similar ones, keep the most important ones, put them back; and the attention that says
which are important, without ever writing its matrix.

Every change is one map, `slot` [batch, tokens in]: the position of each token in the new sequence, -1 if it has none.
Maps compose (`later_slot.gather(1, slot)`), undo themselves (`unmerge_tokens`, `scatter_tokens`) and are all that a
picture of the reduction needs.

Papers: Bolya et al., "Token Merging: Your ViT But Faster" (ToMe, arXiv 2210.09461); Liang et al., "Not All Patches are
What You Need: Expediting Vision Transformers via Token Reorganizations" (EViT, arXiv 2202.07800); Rao et al.,
"DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (arXiv 2106.02034); Wang, Zhang, Han,
"SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning" (arXiv 2012.09852).

What is unusual:
* Lengths depend on shapes and rates alone, never on values, so that everything compiles, exports and batches.
* Of equal values the one with the lower index counts as the larger, everywhere, on every device.
* The first `num_prefix` tokens (class, distillation, registers) are never merged, dropped or moved.
* Tokens that did not merge come out of `merge_tokens` bit by bit as they went in.
"""

from ._functional import (
    attention_with_class_row,
    attention_with_column_sums,
    bipartite_match,
    keep_tokens,
    merge_tokens,
    merged_length,
    scatter_tokens,
    unmerge_tokens,
)

__all__ = [
    "attention_with_class_row",
    "attention_with_column_sums",
    "bipartite_match",
    "keep_tokens",
    "merge_tokens",
    "merged_length",
    "scatter_tokens",
    "unmerge_tokens",
]
