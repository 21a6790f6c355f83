"""Token reduction: merge similar tokens, keep important tokens, restore the full sequence; and attention that also
returns the importance of each token, without storing the attention matrix.

Each reduction is described by one map, `slot` [batch, tokens in]: the position of each token in the new sequence, or -1
for a dropped token. Maps compose (`later_slot.gather(1, slot)`), can be undone (`unmerge_tokens`, `scatter_tokens`) and
contain all that is needed to draw the reduction.

Papers: Bolya et al., "Token Merging: Your ViT But Faster" (ToMe, arXiv 2210.09461); Liang et al., "Not All Patches are
What You Need: Expediting Vision Transformers via Token Reorganizations" (EViT, arXiv 2202.07800); Rao et al.,
"DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (arXiv 2106.02034); Wang, Zhang, Han,
"SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning" (arXiv 2012.09852).

What is unusual:
* Sequence lengths depend only on shapes and rates, never on values, so all functions compile, export and batch.
* Ties are resolved in favour of the lower index, in every function and on every device.
* The first `num_prefix` tokens (class, distillation, registers) are never merged, dropped or moved.
* `merge_tokens` returns tokens that were not merged bit for bit as they were.
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
