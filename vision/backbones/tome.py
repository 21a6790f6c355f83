"""ToMe: vision transformers that merge similar tokens in every block, with timm's weights or weights trained by ToMe.

Paper: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461). The authors' code and trained
weights: github.com/facebookresearch/ToMe, CC-BY-NC 4.0. No code here is from that repository; the default weights are
timm's, trained without merging. To reduce any other ViT, use `reduce_tokens(model, "tome", r=13)`.

What is unusual:
* Weights trained on labels without merging need proportional attention (`prop_attn`, the default). MAE's fine-tuned
  weights perform better without it, unless they were trained with merging.
* `tome_mae_*` pool over all tokens, weighted by size; their published parameter names are timm's with `fc_norm`.
* Compared with the published code: LayerScale, query and key norms, registers and gates of a model are supported, ties
  go to the lowest index, and unmerging is also correct with a distillation token.
"""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn

from ...mixers.token_reduction import TokenMerging, TokenReducer
from ._checkpoints import StateDict, refuse_mismatch, timm_cfg, unwrap
from ._token_reduction import METHODS, TokenReducedDistilledViT, TokenReducedViT, check_flag, create_reduced, numbers_of


def merge_schedule(r: int | Sequence[float], depth: int) -> list[int]:
    """Return how many tokens each of `depth` blocks merges.

    Args:
        r: one number for all blocks; or one number per block, zero for blocks beyond the end of the list; or a pair
            (mean, inflection) with a float inflection from -1 to 1: the number of merged tokens then changes linearly
            along the depth, rising from zero for 1 and falling to zero for -1.

    Raises:
        ValueError: for negative counts, for more than `depth` counts, and for two integers, which could be either a
            pair or two counts.
    """
    if isinstance(r, numbers.Real):
        return merge_schedule(numbers_of("r", [r], whole=True) * depth, depth)
    r = numbers_of("r", r, or_number=True)
    if len(r) == 2 and depth != 2 and r[1] in (-1, 0, 1) and not isinstance(r[1], float):
        raise ValueError(
            f"r={r} could be a mean with an inflection or the counts of two blocks; "
            f"write {[r[0], float(r[1])]} for the first, {[*r, 0]} for the second"
        )
    if len(r) == 2 and isinstance(r[1], float):
        mean, inflection = r
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection of r goes from -1 to 1; got {inflection}")
        first = int(mean * (1 - inflection))
        step = 2 * (mean - first) / max(depth - 1, 1)
        schedule = [int(first + step * i) for i in range(depth)]
    else:
        counts = numbers_of("r", r, whole=True, or_number=True)
        schedule = [*(int(count) for count in counts), *[0] * (depth - len(counts))]
    if len(schedule) > depth or min(schedule, default=0) < 0:
        raise ValueError(f"r needs up to {depth} counts, one per block, each 0 or more; got {r}")
    return schedule


@dataclass(frozen=True)
class ToMe:
    """Merge similar tokens in every block.

    Args:
        r: number of merged tokens, in the forms that `merge_schedule` accepts.
        prop_attn: whether tokens receive attention in proportion to their size.
    """

    r: int | Sequence[float] = 8
    prop_attn: bool = True

    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_flag("prop_attn", self.prop_attn)

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        return [
            TokenMerging(r, proportional=self.prop_attn, num_prefix=model.num_prefix_tokens)
            for r in merge_schedule(self.r, len(model.blocks))
        ]


METHODS["tome"] = ToMe


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: VisionTransformer) -> StateDict:
    """Apply timm's filter for ViTs: resize patches and positions, and rename the parameters of DeiT's and MAE's files.

    A masked autoencoder ends with a norm before pooling; fine-tuning replaces it with a new norm after pooling.
    """
    state_dict: StateDict = vit_filter_fn(unwrap(checkpoint), model)  # type: ignore[assignment]
    initial = model.state_dict()
    if "fc_norm.weight" in initial and "norm.weight" in state_dict:
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("norm.")}
        state_dict |= {name: initial[name] for name in ("fc_norm.weight", "fc_norm.bias")}
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_tome(name: str, pretrained: bool, **kwargs: Any) -> TokenReducedViT:
    distilled = kwargs.pop("distilled", False)
    kind = TokenReducedDistilledViT if distilled else TokenReducedViT
    return create_reduced(kind, name, pretrained, ToMe, checkpoint_filter_fn, **kwargs)


_PAPER = {"paper_name": "Token Merging: Your ViT But Faster", "paper_ids": "arXiv:2210.09461"}
_ORIGINS = {
    "deit": "https://github.com/facebookresearch/deit",
    "vit": "https://github.com/google-research/vision_transformer",
}


def _plain(name: str) -> dict[str, Any]:
    """Return the configuration of timm's weights, trained without merging."""
    return timm_cfg(name, origin_url=_ORIGINS[name.partition("_")[0]], **_PAPER)


def _trained(file: str) -> dict[str, Any]:
    """Return the configuration of the authors' weights, trained with merging."""
    return {
        "url": f"https://dl.fbaipublicfiles.com/tome/{file}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "cc-by-nc-4.0",
        "origin_url": "https://github.com/facebookresearch/ToMe",
        **_PAPER,
    }


default_cfgs = generate_default_cfgs(
    {
        "tome_deit_tiny_patch16_224.fb_in1k": _plain("deit_tiny_patch16_224.fb_in1k"),
        "tome_deit_tiny_patch16_224.r13_in1k": _trained("f367470145_deit_T_r13.pth"),
        "tome_deit_small_patch16_224.fb_in1k": _plain("deit_small_patch16_224.fb_in1k"),
        "tome_deit_small_patch16_224.r13_in1k": _trained("f367470145_deit_S_r13.pth"),
        "tome_deit_small_distilled_patch16_224.fb_in1k": _plain("deit_small_distilled_patch16_224.fb_in1k"),
        "tome_deit_base_patch16_224.fb_in1k": _plain("deit_base_patch16_224.fb_in1k"),
        "tome_vit_small_patch16_224.augreg_in21k_ft_in1k": _plain("vit_small_patch16_224.augreg_in21k_ft_in1k"),
        "tome_vit_base_patch16_224.augreg_in21k_ft_in1k": _plain("vit_base_patch16_224.augreg_in21k_ft_in1k"),
        "tome_vit_large_patch16_224.augreg_in21k_ft_in1k": _plain("vit_large_patch16_224.augreg_in21k_ft_in1k"),
        "tome_mae_vit_base_patch16_224.r16_in1k": _trained("f367082919_vit_B_16_r16.pth"),
        "tome_mae_vit_large_patch16_224.r8_in1k": _trained("f366894475_vit_L_16_r8.pth"),
        "tome_mae_vit_huge_patch14_224.r7_in1k": _trained("f366895717_vit_H_14_r7.pth"),
    }
)

_TINY = {"embed_dim": 192, "num_heads": 3, "r": 13}
_SMALL = {"embed_dim": 384, "num_heads": 6, "r": 13}
_BASE = {"embed_dim": 768, "num_heads": 12, "r": 13}
_LARGE = {"embed_dim": 1024, "num_heads": 16, "depth": 24, "r": 7}
_HUGE = {"embed_dim": 1280, "num_heads": 16, "depth": 32, "patch_size": 14}
_MAE = {"global_pool": "avg"}


@register_model
def tome_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    return _create_tome("tome_deit_tiny_patch16_224", pretrained, **{**_TINY, **kwargs})


@register_model
def tome_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    return _create_tome("tome_deit_small_patch16_224", pretrained, **{**_SMALL, **kwargs})


@register_model
def tome_deit_small_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {**_SMALL, "distilled": True, **kwargs}
    return _create_tome("tome_deit_small_distilled_patch16_224", pretrained, **settings)


@register_model
def tome_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    return _create_tome("tome_deit_base_patch16_224", pretrained, **{**_BASE, **kwargs})


@register_model
def tome_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    return _create_tome("tome_vit_small_patch16_224", pretrained, **{**_SMALL, **kwargs})


@register_model
def tome_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    return _create_tome("tome_vit_base_patch16_224", pretrained, **{**_BASE, **kwargs})


@register_model
def tome_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    return _create_tome("tome_vit_large_patch16_224", pretrained, **{**_LARGE, **kwargs})


@register_model
def tome_mae_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {**_BASE, **_MAE, "r": 16, **kwargs}
    return _create_tome("tome_mae_vit_base_patch16_224", pretrained, **settings)


@register_model
def tome_mae_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {**_LARGE, **_MAE, "r": 8, **kwargs}
    return _create_tome("tome_mae_vit_large_patch16_224", pretrained, **settings)


@register_model
def tome_mae_vit_huge_patch14_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {**_HUGE, **_MAE, "r": 7, **kwargs}
    return _create_tome("tome_mae_vit_huge_patch14_224", pretrained, **settings)
