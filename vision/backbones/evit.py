"""EViT: three blocks keep the patches with the most class attention, and fuse the others into one token.

Paper: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (ICLR
2022, arXiv 2202.07800). Code and weights: github.com/youweiliang/evit, Apache-2.0. To reduce any other ViT with a class
token, use `reduce_tokens(model, "evit", keep_rate=0.7)`.

What is unusual:
* The keep rate is relative to the tokens that enter the block, including an earlier fused token, and the count is
  rounded up: 196, 139, 99, 71 at 0.7. The fused token can be dropped later like any other.
* The fused token is the sum of the dropped tokens weighted by their class attention; the weights are not normalised.
* Fusing gains 0.1 % at best (the authors' table). Weights are published for both variants; their tags set the rate and
  the `fuse_token` with which they were trained.
* The weights of `evit_deit_base_*` are DeiT's, trained with all tokens, as a starting point for fine-tuning.
* Fine-tuning starts with all tokens and lowers the rate over the epochs with `set_keep_rate`.
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
from ._checkpoints import StateDict, drive_url, refuse_drive, refuse_mismatch, timm_cfg, trained_settings, unwrap
from ._token_reduction import METHODS, REDUCED, TokenReducedViT, check_flag, create_reduced, stage_blocks

torch.fx.wrap("resample_abs_pos_embed")


@dataclass(frozen=True)
class EViT:
    """Prune tokens by class attention.

    Args:
        keep_rate: share of the tokens kept at each location; one number, or one per location.
        fuse_token: whether to fuse the dropped tokens into one.
        locations: indices of blocks; None for a quarter, a half and three quarters of the depth.
    """

    keep_rate: float | Sequence[float] = 0.7
    fuse_token: bool = True
    locations: Sequence[int] | None = None

    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_flag("fuse_token", self.fuse_token)

    def stages(self, depth: int) -> dict[int, float]:
        """Return the keep rate of each block that prunes."""
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
    """Return the number of tokens before the patches; the first of them must be a class token."""
    if getattr(model, "cls_token", None) is None:
        raise ValueError("EViT keeps what the class token attends to; this model has none. Use tome")
    return model.num_prefix_tokens


METHODS["evit"] = EViT


class AliasedViT(VisionTransformer):
    """timm's VisionTransformer, with positions resized without antialiasing, as in DeiT's code."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Flatten patches [B, rows, columns, C] to tokens [B, 1 + rows * columns, C], and add positions."""
        size = [x.shape[1], x.shape[2]]
        grid = [self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]]
        positions = resample_abs_pos_embed(self.pos_embed, size, grid, antialias=False)  # pyright: ignore
        class_token = self.cls_token.expand(x.shape[0], -1, -1)  # pyright: ignore
        return self.pos_drop(torch.cat([class_token, x.flatten(1, 2)], dim=1) + positions)


class EViTVisionTransformer(TokenReducedViT, AliasedViT):
    """EViT as published, with a class token and learned positions."""

    def __init__(self, **vit_args: Any) -> None:
        super().__init__(**vit_args)
        if self.num_prefix_tokens != 1 or self.pos_embed is None or self.no_embed_class or not self.dynamic_img_size:
            raise ValueError(
                "evit_* models are as published: a class token, learned positions of all tokens, pictures of any size. "
                'reduce_tokens(model, "evit") takes all other vision transformers; got '
                f"num_prefix_tokens={self.num_prefix_tokens}, no_embed_class={self.no_embed_class}, "
                f"dynamic_img_size={self.dynamic_img_size}, positions {'no' if self.pos_embed is None else 'yes'}"
            )


REDUCED[AliasedViT] = EViTVisionTransformer


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: VisionTransformer) -> StateDict:
    """Resize patches and positions to the model's; the published parameter names are ours."""
    state_dict: StateDict = vit_filter_fn(unwrap(checkpoint), model, antialias=False)  # type: ignore[assignment]
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_evit(name: str, pretrained: bool, **kwargs: Any) -> TokenReducedViT:
    if pretrained:
        refuse_drive(name, kwargs)
    settings = {**trained_settings(name, kwargs, _TRAINED_WITH), **kwargs}
    return create_reduced(EViTVisionTransformer, name, pretrained, EViT, checkpoint_filter_fn, **settings)


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


_FILES = (  # tag, file on Google Drive, keep rate and fused token of its training
    ("k07_fuse_in1k", "1FfvdEBss9f8gexjqEY8vOSUQe_8qwYuL", 0.7, True),
    ("k09_fuse_in1k", "1CmROmlLV-7nyYY-Bhph8_5ut3wFwqvny", 0.9, True),
    ("k08_fuse_in1k", "1BTJyIe0zVK3zYXz3BzIlSC4YZCnZu7cJ", 0.8, True),
    ("k06_fuse_in1k", "1D1m067jDbyG0g2UjyBMaJ4NTT2Ad8vrv", 0.6, True),
    ("k05_fuse_in1k", "1-nyxAlRWjD2icbgj3Y3YWcCmYj9sTgfD", 0.5, True),
    ("k09_in1k", "1tSaPLged8ED2RTiN5ttSmeTNIw1aNNwV", 0.9, False),
    ("k08_in1k", "1zdFbHk-gOw_Wiid5_Z8NFcBa1HMI-JF-", 0.8, False),
    ("k07_in1k", "1VCZGphW34rFWZDXOoF7XO4EJfRLZ-YB8", 0.7, False),
    ("k06_in1k", "1okYcKryyD6FFPG9v5r40R28SRNfVZ5X0", 0.6, False),
    ("k05_in1k", "1qsPeLN5ytLO8pM7lUuj5bi6pyMhjiSJO", 0.5, False),
)
_TRAINED_WITH = {tag: {"keep_rate": rate, "fuse_token": fuse} for tag, _, rate, fuse in _FILES}

default_cfgs = generate_default_cfgs(
    {
        **{f"evit_deit_small_patch16_224.{tag}": _cfg(file) for tag, file, _, _ in _FILES},
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
