"""ToMe: vision transformers that merge similar tokens in every block, on timm's own weights or trained with it.

Paper: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461). Their code and trained weights:
github.com/facebookresearch/ToMe, CC-BY-NC 4.0. Nothing here is from that code; the weights that are fetched by default
are timm's, trained without merging. Any other ViT: `reduce_tokens(model, "tome", r=13)`.

What is unusual:
* Weights that were trained without merging want proportional attention if they were trained on labels (`prop_attn`, the
  default); MAE's fine-tuned ones are better without it unless they were trained with merging.
* `tome_mae_*` pool over all tokens by their size; their published names are timm's with `fc_norm`.
* Against the published code: LayerScale, query and key norms, registers and gates of a model are respected, ties go to
  the lowest index, and undoing the merge is right with a distillation token too.
"""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn

from ...mixers.token_reduction import TokenMerging, TokenReducer
from ._checkpoints import StateDict, refuse_mismatch, unwrap
from ._token_reduction import METHODS, TokenReducedDistilledViT, TokenReducedViT, create_reduced, numbers_of


def merge_schedule(r: int | Sequence[float], depth: int) -> list[int]:
    """How many tokens each of `depth` blocks merges.

    Args:
        r: one number for all blocks; one for each, zeros where the list ends; or a pair of a mean and, as a float, an
            inflection from -1 to 1: the number then rises (1) or falls (-1) evenly along the depth, to or from zero.
    """
    r = (float(r), 0.0) if isinstance(r, numbers.Real) else numbers_of("r", r)
    if len(r) == 2 and isinstance(r[1], float):
        mean, inflection = r
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection of r goes from -1 to 1; got {inflection}")
        first = int(mean * (1 - inflection))
        step = 2 * (mean - first) / max(depth - 1, 1)
        schedule = [int(first + step * i) for i in range(depth)]
    else:
        schedule = [*(int(count) for count in r), *[0] * (depth - len(r))]
    if len(schedule) > depth or min(schedule, default=0) < 0:
        raise ValueError(f"r needs up to {depth} counts, one a block, each 0 or more; got {r}")
    return schedule


@dataclass(frozen=True)
class ToMe:
    """Token merging; `r` as in `merge_schedule`, `prop_attn` lets tokens attract attention by their size."""

    r: int | Sequence[float] = 8
    prop_attn: bool = True

    merges: ClassVar[bool] = True

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        return [
            TokenMerging(r, proportional=self.prop_attn, num_prefix=model.num_prefix_tokens)
            for r in merge_schedule(self.r, len(model.blocks))
        ]


METHODS["tome"] = ToMe


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: VisionTransformer) -> StateDict:
    """timm's rules for ViTs: patches and positions resized, the names of DeiT's and MAE's files.

    A masked autoencoder ends in a norm before pooling, which its fine-tuning replaces by a new one behind it.
    """
    state_dict: StateDict = vit_filter_fn(unwrap(checkpoint), model)  # type: ignore[assignment]
    own = model.state_dict()
    if "fc_norm.weight" in own and "norm.weight" in state_dict:
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("norm.")}
        state_dict |= {name: own[name] for name in ("fc_norm.weight", "fc_norm.bias")}
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_tome(
    name: str, pretrained: bool, *, r: int | Sequence[float], prop_attn: bool = True, **kwargs: Any
) -> TokenReducedViT:
    distilled = kwargs.pop("distilled", False)
    kind = TokenReducedDistilledViT if distilled else TokenReducedViT
    return create_reduced(kind, name, pretrained, ToMe(r, prop_attn), checkpoint_filter_fn, **kwargs)


def timm_cfg(name: str, **settings: Any) -> dict[str, Any]:
    """The entry of timm's own model, for a model of ours on the same weights."""
    cfg = get_pretrained_cfg(name)
    assert cfg is not None, name
    return {**cfg.to_dict(remove_source=False, remove_null=True), **settings}


_PAPER = {"paper_name": "Token Merging: Your ViT But Faster", "paper_ids": "arXiv:2210.09461"}
_ORIGINS = {
    "deit": "https://github.com/facebookresearch/deit",
    "vit": "https://github.com/google-research/vision_transformer",
}


def _plain(name: str) -> dict[str, Any]:
    """timm's weights, trained without merging."""
    return timm_cfg(name, origin_url=_ORIGINS[name.partition("_")[0]], **_PAPER)


def _trained(file: str) -> dict[str, Any]:
    """Weights that were trained with merging."""
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
