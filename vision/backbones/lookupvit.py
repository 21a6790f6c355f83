"""LookupViT: every block does its work on a few compressed tokens, and keeps all patches up to date cheaply.

Paper: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens" (ECCV 2024, arXiv
2407.12753). The authors published neither code nor weights; nothing here is pretrained.

What is unusual:
* Two streams: the lookup tokens, one a patch, and the compressed ones, at first their map resized bilinearly to
  `compressed_size`. In a block those gather from all patches, attend to each other, pass an MLP of 4 times their width,
  and give back to the patches, which have an MLP of half their width and no attention to each other.
* The number of compressed tokens is no part of the weights. `set_compressed_size` changes it between any two calls: a
  model trained with another random size at each step runs at all of them.
* The classifier sees the mean of the compressed tokens; features are the lookup tokens, a whole map at all times.
* The last block gives nothing back, since a classifier would never see it, and its weights would never learn. So there
  is one map less than there are blocks.
* What the paper leaves open: how the attention back is normalised (see `mixers/lookup_attention.py`), and whether the
  compressed tokens are normalised before they give back (here yes, as before every other branch).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, Mlp, resample_abs_pos_embed, resample_patch_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers import GatherAttention, TransposedAttention
from ._checkpoints import StateDict, refuse_mismatch, unwrap
from ._isotropic import IsotropicBackbone
from ._positions import resample_positions

torch.fx.wrap("resample_positions")


class LookupBlock(nn.Module):
    """Lookup tokens [B, N, C] and compressed tokens [B, M, C] to the same; each branch normalised before and added.

    Args:
        lookup_mlp_ratio: width of the lookup tokens' MLP.
        renormalize: see `TransposedAttention`.
        gives_back: whether the lookup tokens learn of the compressed ones; if not they pass unchanged.
    """

    gives_back: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        lookup_mlp_ratio: float,
        qkv_bias: bool,
        renormalize: bool,
        gives_back: bool,
        proj_drop: float,
        drop_path: float,
        norm_layer: Any,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        args: dict[str, Any] = {"qkv_bias": qkv_bias, "proj_drop": proj_drop, **dd}
        self.gives_back = gives_back
        self.norm_lookup = norm_layer(dim, **dd)
        self.norm_query = norm_layer(dim, **dd)
        self.gather = GatherAttention(dim, num_heads, **args)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(dim, num_heads, **args)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if gives_back:
            self.norm_back: nn.Module = norm_layer(dim, **dd)
            self.back: nn.Module = TransposedAttention(dim, num_heads, renormalize=renormalize, **args)
            self.norm_lookup2: nn.Module = norm_layer(dim, **dd)
            self.lookup_mlp: nn.Module = Mlp(dim, int(dim * lookup_mlp_ratio), drop=proj_drop, **dd)

    def forward(self, lookup: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        gathered, query, key = self.gather(self.norm_query(compressed), self.norm_lookup(lookup))
        compressed = compressed + self.drop_path(gathered)
        compressed = compressed + self.drop_path(self.attn(self.norm1(compressed)))
        compressed = compressed + self.drop_path(self.mlp(self.norm2(compressed)))
        if self.gives_back:
            lookup = lookup + self.drop_path(self.back(self.norm_back(compressed), query, key))
            lookup = lookup + self.drop_path(self.lookup_mlp(self.norm_lookup2(lookup)))
        return lookup, compressed


@torch.fx.wrap
def _compress(lookup: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens [B, rows * columns, C] of `grid` to those of `size`, bilinearly."""
    raster = lookup.transpose(1, 2).unflatten(2, [grid[0], grid[1]])
    raster = F.interpolate(raster, [size[0], size[1]], mode="bilinear", align_corners=False)
    return raster.flatten(2).transpose(1, 2)


def _as_size(size: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else tuple(size)
    if min(rows, columns) < 1:
        raise ValueError(f"compressed_size is a number of rows and columns, each 1 or more; got {size}")
    return rows, columns


class LookupViT(IsotropicBackbone):
    """LookupViT.

    Args:
        img_size: image size that the position embedding is made for; others resample it.
        compressed_size: rows and columns of compressed tokens, at any size of the image.
        mlp_ratio: width of the compressed tokens' MLP.
        lookup_mlp_ratio: width of the lookup tokens' MLP.
        renormalize: whether what a lookup token is given back is a mean, see `TransposedAttention`.
        fc_norm: normalise after pooling instead of before.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        proj_drop_rate: dropout after the projections of attention and MLP.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        compressed_size: int | Sequence[int] = 5,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        fc_norm: bool = False,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        qkv_bias: bool = True,
        renormalize: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if depth < 2:
            raise ValueError(f"depth must be 2 or more, since the last block has no map to give out; got {depth}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,  # type: ignore[arg-type]
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            class_token=False,
            fc_norm=fc_norm,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            block_fn=partial(  # type: ignore[arg-type]
                _make_block, last=depth - 1, lookup_mlp_ratio=lookup_mlp_ratio, renormalize=renormalize
            ),
            device=device,
            dtype=dtype,
        )
        self.feature_info = self.feature_info[:-1]
        self.compressed_size = _as_size(compressed_size)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def set_compressed_size(self, compressed_size: int | Sequence[int]) -> None:
        """Change the rows and columns of compressed tokens, without new weights."""
        self.compressed_size = _as_size(compressed_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches [B, rows, columns, C] to tokens [B, rows * columns, C]."""
        size = (self.patch_embed.grid_size[0], self.patch_embed.grid_size[1])
        positions = resample_positions(self.pos_embed, size, (x.shape[1], x.shape[2]))  # pyright: ignore
        return self.pos_drop(x.flatten(1, 2) + positions)

    def initial_state(self, x: Tensor, grid: tuple[int, int], dense: bool = False) -> Tensor:  # type: ignore[override]
        return _compress(x, grid, self.compressed_size)

    def final_tokens(self, x: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        """The compressed tokens [B, M, C]."""
        return self.norm(state)

    def dense_tokens(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The compressed tokens, and the lookup tokens."""
        return state, x


def _make_block(
    *,
    last: int,
    depth: int,
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    lookup_mlp_ratio: float,
    qkv_bias: bool,
    renormalize: bool,
    proj_drop: float,
    drop_path: float,
    norm_layer: Any,
    device: Any,
    dtype: Any,
    **_: Any,
) -> LookupBlock:
    """Block number `depth`. timm offers a block every option that a ViT has; the rest of them mean nothing here."""
    return LookupBlock(
        dim,
        num_heads,
        mlp_ratio=mlp_ratio,
        lookup_mlp_ratio=lookup_mlp_ratio,
        qkv_bias=qkv_bias,
        renormalize=renormalize,
        gives_back=depth < last,
        proj_drop=proj_drop,
        drop_path=drop_path,
        norm_layer=norm_layer,
        device=device,
        dtype=dtype,
    )


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: LookupViT) -> StateDict:
    """Our own files; positions and patches resized to the model's."""
    state_dict = unwrap(checkpoint)
    positions, patches = state_dict.get("pos_embed"), state_dict.get("patch_embed.proj.weight")
    if positions is not None:
        grid = list(model.patch_embed.grid_size)
        state_dict["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=0)
    if patches is not None:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(patches, list(model.patch_embed.patch_size))
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_lookupvit(name: str, pretrained: bool, **kwargs: Any) -> LookupViT:
    return build_model_with_cfg(
        LookupViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (1, 4, 7, 10), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "LookupViT: Compressing visual information to a limited number of tokens",
        "paper_ids": "arXiv:2407.12753",
    }


default_cfgs = generate_default_cfgs(
    {
        "lookupvit_tiny_patch16_224": _cfg(),
        "lookupvit_small_patch16_224": _cfg(),
        "lookupvit_base_patch16_224": _cfg(),
    }
)


@register_model
def lookupvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    model_args = {"embed_dim": 192, "num_heads": 3}
    return _create_lookupvit("lookupvit_tiny_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def lookupvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    model_args = {"embed_dim": 384, "num_heads": 6}
    return _create_lookupvit("lookupvit_small_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def lookupvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    return _create_lookupvit("lookupvit_base_patch16_224", pretrained, **kwargs)
