"""EViT: the class token says which patches stay, in three blocks of the transformer; the rest becomes one token.

Paper: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (ICLR
2022, arXiv 2202.07800). Code and weights: github.com/youweiliang/evit, Apache-2.0. Any other ViT with a class token:
`reduce_tokens(model, "evit", keep_rate=0.7)`.

What is unusual:
* The share that stays is of the tokens that the block gets, the fused one of the block before included, rounded up:
  196, 139, 99, 71 at 0.7. The fused token can be dropped later like any other.
* The fused token is the sum of the dropped ones times their attention, which is not divided by the sum of it.
* Fusing gains 0.1 % at best (the authors' table); both ways have published weights, so `fuse_token` must fit the file.
* The weights of `evit_deit_base_*` are DeiT's, trained with all tokens: a start for fine-tuning.
* Fine-tuning starts with all tokens and lowers the rate over the epochs: `set_keep_rate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor

from ...mixers.token_reduction import AttentivePruning, TokenReducer
from ._checkpoints import StateDict, drive_url, refuse_drive, refuse_mismatch, unwrap
from ._token_reduction import METHODS, TokenReducedViT, create_reduced, stage_blocks
from .tome import timm_cfg

torch.fx.wrap("resample_abs_pos_embed")


@dataclass(frozen=True)
class EViT:
    """Pruning by class attention.

    Args:
        keep_rate: share of the tokens that stays at each of the locations; one number or one a location.
        fuse_token: replace those that do not stay by one token.
        locations: blocks, from 0; None for a quarter, a half and three quarters of the depth.
    """

    keep_rate: float | Sequence[float] = 0.7
    fuse_token: bool = True
    locations: Sequence[int] | None = None

    merges: ClassVar[bool] = False

    def stages(self, depth: int) -> dict[int, float]:
        """The rate of each block that prunes."""
        return stage_blocks(self.locations, self.keep_rate, depth)

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        stages = self.stages(len(model.blocks))
        return [
            AttentivePruning(stages[i], fuse=self.fuse_token, num_prefix=_prefix(model))
            if i in stages
            else TokenReducer()
            for i in range(len(model.blocks))
        ]


def _prefix(model: VisionTransformer) -> int:
    """Tokens before the patches, the first of which must be a class token."""
    if getattr(model, "cls_token", None) is None:
        raise ValueError("EViT keeps what the class token attends to; this model has none. Use tome")
    return model.num_prefix_tokens


METHODS["evit"] = EViT


class EViTVisionTransformer(TokenReducedViT):
    """EViT as published: its positions are resized without antialiasing, timm's are with."""

    def __init__(self, **vit_args: Any) -> None:
        super().__init__(**vit_args)
        if self.num_prefix_tokens != 1 or self.pos_embed is None or self.no_embed_class or not self.dynamic_img_size:
            raise ValueError(
                "evit_* models are as published: a class token, learned positions of all tokens, pictures of any size. "
                'reduce_tokens(model, "evit") takes all other vision transformers; got '
                f"num_prefix_tokens={self.num_prefix_tokens}, no_embed_class={self.no_embed_class}, "
                f"dynamic_img_size={self.dynamic_img_size}, positions {'no' if self.pos_embed is None else 'yes'}"
            )

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches [B, rows, columns, C] to tokens [B, 1 + rows * columns, C]."""
        size = [x.shape[1], x.shape[2]]
        grid = [self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]]
        positions = resample_abs_pos_embed(self.pos_embed, size, grid, antialias=False)  # pyright: ignore
        class_token = self.cls_token.expand(x.shape[0], -1, -1)  # pyright: ignore
        return self.pos_drop(torch.cat([class_token, x.flatten(1, 2)], dim=1) + positions)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: VisionTransformer) -> StateDict:
    """Published names are ours; patches and positions resized to the model's."""
    state_dict: StateDict = vit_filter_fn(unwrap(checkpoint), model, antialias=False)  # type: ignore[assignment]
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_evit(
    name: str,
    pretrained: bool,
    *,
    keep_rate: float | Sequence[float] = 0.7,
    fuse_token: bool = True,
    locations: Sequence[int] | None = None,
    **kwargs: Any,
) -> TokenReducedViT:
    if pretrained:
        refuse_drive(name, kwargs)
    return create_reduced(
        EViTVisionTransformer,
        name,
        pretrained,
        EViT(keep_rate, fuse_token, locations),
        checkpoint_filter_fn,
        **kwargs,
    )


_PAPER = {
    "paper_name": "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    "paper_ids": "arXiv:2202.07800",
}


def _cfg(drive_id: str) -> dict[str, Any]:
    return {
        "url": drive_url(drive_id),
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/youweiliang/evit",
        **_PAPER,
    }


default_cfgs = generate_default_cfgs(
    {
        "evit_deit_small_patch16_224.k07_fuse_in1k": _cfg("1FfvdEBss9f8gexjqEY8vOSUQe_8qwYuL"),
        "evit_deit_small_patch16_224.k09_fuse_in1k": _cfg("1CmROmlLV-7nyYY-Bhph8_5ut3wFwqvny"),
        "evit_deit_small_patch16_224.k08_fuse_in1k": _cfg("1BTJyIe0zVK3zYXz3BzIlSC4YZCnZu7cJ"),
        "evit_deit_small_patch16_224.k06_fuse_in1k": _cfg("1D1m067jDbyG0g2UjyBMaJ4NTT2Ad8vrv"),
        "evit_deit_small_patch16_224.k05_fuse_in1k": _cfg("1-nyxAlRWjD2icbgj3Y3YWcCmYj9sTgfD"),
        "evit_deit_small_patch16_224.k09_in1k": _cfg("1tSaPLged8ED2RTiN5ttSmeTNIw1aNNwV"),
        "evit_deit_small_patch16_224.k08_in1k": _cfg("1zdFbHk-gOw_Wiid5_Z8NFcBa1HMI-JF-"),
        "evit_deit_small_patch16_224.k07_in1k": _cfg("1VCZGphW34rFWZDXOoF7XO4EJfRLZ-YB8"),
        "evit_deit_small_patch16_224.k06_in1k": _cfg("1okYcKryyD6FFPG9v5r40R28SRNfVZ5X0"),
        "evit_deit_small_patch16_224.k05_in1k": _cfg("1qsPeLN5ytLO8pM7lUuj5bi6pyMhjiSJO"),
        "evit_deit_base_patch16_224.fb_in1k": timm_cfg(
            "deit_base_patch16_224.fb_in1k", origin_url="https://github.com/facebookresearch/deit", **_PAPER
        ),
    }
)


@register_model
def evit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 384, "num_heads": 6, **kwargs}
    return _create_evit("evit_deit_small_patch16_224", pretrained, **settings)


@register_model
def evit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 768, "num_heads": 12, **kwargs}
    return _create_evit("evit_deit_base_patch16_224", pretrained, **settings)
