"""SpAtten: vision transformers that prune tokens and heads progressively, by importance accumulated over the blocks.

Paper: Wang, Zhang, Han, "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning" (HPCA
2021, arXiv 2012.09852). The paper is about language models in hardware; the authors published no vision models and no
weights. The pretrained weights are timm's DeiT, trained with all tokens and heads: fine-tune them, as the paper does.
To reduce any other ViT, use `reduce_tokens(model, "spatten", keep_rate=0.7, head_keep_rate=0.9)`.

What is unusual:
* The importance of a token is the attention received from all heads and queries in all blocks so far; that of a head is
  the magnitude of its outputs. Both are summed for each image. Pruned tokens and heads stay pruned in all later blocks.
* The first 15 % of the blocks keep all tokens, and the first 30 % all heads. From there on, the shares fall linearly
  with `keep_rate` and `head_keep_rate` as their mean: from 0.97 to 0.43 at 0.7 and 12 blocks.
* Class, distillation and register tokens are always kept.
* Queries, keys and values are computed for all heads, since the images of a batch keep different heads; pruning heads
  saves only attention. Local value pruning and progressive quantisation belong to the hardware and are not here.
* With both rates at 1, these models are bit-identical to plain transformers.
"""

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from ...mixers.token_cascade import CascadePruning
from ...mixers.token_reduction import TokenReducer
from ._checkpoints import timm_cfg, vit_checkpoint_filter
from ._token_reduction import METHODS, TokenReducedViT, create_reduced, numbers_of

FIRST_WITH_ALL_TOKENS = 0.15
FIRST_WITH_ALL_HEADS = 0.3


def falling_rates(rate: float | Sequence[float], depth: int, untouched: float) -> list[float]:
    """Return the share that each of `depth` blocks keeps.

    Args:
        rate: one number: the mean share of the blocks that prune; or one share per block, starting with 1 and never
            rising.
        untouched: share of the blocks, rounded up, that keep everything if `rate` is one number.
    """
    if isinstance(rate, numbers.Real):
        rate = float(rate)
        if not 0 < rate <= 1:
            raise ValueError(f"keep rates are shares above 0 and up to 1; got {rate}")
        whole = math.ceil(untouched * depth)
        pruning = depth - whole
        reach = min(rate, 1 - rate)
        return [1.0] * whole + [rate + reach * (1 - (2 * i + 1) / pruning) for i in range(pruning)]
    rates = [float(share) for share in numbers_of("keep rates", rate, or_number=True)]
    falls = all(later <= earlier for earlier, later in itertools.pairwise(rates))
    if len(rates) != depth or not falls or rates[0] != 1 or rates[-1] <= 0:
        raise ValueError(
            f"keep rates for every block are {depth} shares that never rise, from 1 (the first block has nothing to go "
            f"by) to something above 0; got {rate}"
        )
    return rates


@dataclass(frozen=True)
class SpAtten:
    """Prune tokens and heads by cumulative importance.

    Args:
        keep_rate: shares of tokens, in the forms that `falling_rates` accepts.
        head_keep_rate: shares of heads, in the same forms; counts are rounded to the nearest integer, at least one.
    """

    keep_rate: float | Sequence[float] = 0.7
    head_keep_rate: float | Sequence[float] = 0.9

    merges: ClassVar[bool] = False

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        depth = len(model.blocks)
        tokens = falling_rates(self.keep_rate, depth, FIRST_WITH_ALL_TOKENS)
        rates = falling_rates(self.head_keep_rate, depth, FIRST_WITH_ALL_HEADS)
        blocks: Any = model.blocks
        total = [block.attn.num_heads for block in blocks]
        heads = [max(1, math.floor(rate * count + 0.5)) for rate, count in zip(rates, total, strict=True)]
        return [
            CascadePruning(
                tokens[i] if i > 0 and tokens[i] < tokens[i - 1] else None,
                heads[i] if heads[i] < total[i] else None,
                scores_tokens=tokens[-1] < tokens[i],
                scores_heads=heads[-1] < heads[i],
                num_prefix=model.num_prefix_tokens,
            )
            for i in range(depth)
        ]


METHODS["spatten"] = SpAtten


def _create_spatten(name: str, pretrained: bool, **kwargs: Any) -> TokenReducedViT:
    return create_reduced(TokenReducedViT, name, pretrained, SpAtten, vit_checkpoint_filter, **kwargs)


def _cfg(name: str) -> dict[str, Any]:
    return timm_cfg(
        name,
        origin_url="https://github.com/facebookresearch/deit",
        paper_name="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
        paper_ids="arXiv:2012.09852",
    )


default_cfgs = generate_default_cfgs(
    {
        "spatten_deit_tiny_patch16_224.fb_in1k": _cfg("deit_tiny_patch16_224.fb_in1k"),
        "spatten_deit_small_patch16_224.fb_in1k": _cfg("deit_small_patch16_224.fb_in1k"),
    }
)


@register_model
def spatten_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 192, "num_heads": 3, **kwargs}
    return _create_spatten("spatten_deit_tiny_patch16_224", pretrained, **settings)


@register_model
def spatten_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 384, "num_heads": 6, **kwargs}
    return _create_spatten("spatten_deit_small_patch16_224", pretrained, **settings)
