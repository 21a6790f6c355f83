"""LookupViT: every block does most of its work on a few compressed tokens, and updates all patches at low cost.

Paper: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens" (ECCV 2024, arXiv
2407.12753). The authors published neither code nor weights; nothing here is pretrained.

What is unusual:
* There are two streams: the lookup tokens, one per patch, and the compressed tokens, initially the lookup map resized
  bilinearly to `compressed_size`. In each block, the compressed tokens gather from all lookup tokens, attend to each
  other, pass an MLP of 4 times their width, and update the lookup tokens by transposed attention. The lookup tokens
  have an MLP of half their width, and no attention to each other.
* The number of compressed tokens is not part of the weights. `set_compressed_size` can change it between any two calls:
  a model trained with a random size at each step runs at all of these sizes.
* The classifier uses the mean of the compressed tokens; features are the lookup tokens, always a complete map.
* The last block does not update the lookup tokens, since the classifier does not use them and these weights would get
  no gradient. So there is one feature map fewer than there are blocks.
* The paper does not specify how the transposed attention is normalised (see `mixers/lookup_attention.py`), nor whether
  its input, the compressed tokens, is normalised (here it is, as for every other branch).
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
from ._token_reduction import numbers_of

torch.fx.wrap("resample_positions")


class LookupBlock(nn.Module):
    """Update lookup tokens [B, N, C] and compressed tokens [B, M, C] by pre-norm residual branches.

    Args:
        lookup_mlp_ratio: hidden width of the lookup tokens' MLP, relative to `dim`.
        renormalize: see `TransposedAttention`.
        gives_back: whether the compressed tokens update the lookup tokens, which otherwise pass unchanged.
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
    """Resize tokens [B, rows * columns, C] from `grid` to `size` by bilinear interpolation."""
    raster = lookup.transpose(1, 2).unflatten(2, [grid[0], grid[1]])
    raster = F.interpolate(raster, [size[0], size[1]], mode="bilinear", align_corners=False)
    return raster.flatten(2).transpose(1, 2)


def _as_size(size: int | Sequence[int]) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else numbers_of("compressed_size", size, whole=True, or_number=True)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"compressed_size is a number of rows and columns, each 1 or more; got {size}")
    return int(sides[0]), int(sides[1])


class LookupViT(IsotropicBackbone):
    """A vision transformer with lookup tokens for all patches and a few compressed tokens.

    Args:
        img_size: image size of the position embedding, which is resampled for other sizes.
        compressed_size: rows and columns of compressed tokens, independent of the image size.
        mlp_ratio: hidden width of the compressed tokens' MLP, relative to `embed_dim`.
        lookup_mlp_ratio: hidden width of the lookup tokens' MLP, relative to `embed_dim`.
        renormalize: whether the update of a lookup token is a weighted mean, see `TransposedAttention`.
        fc_norm: whether to normalise after pooling instead of before.
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
        """Change the rows and columns of compressed tokens; the weights do not change."""
        self.compressed_size = _as_size(compressed_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Flatten patches [B, rows, columns, C] to tokens [B, rows * columns, C], and add positions."""
        size = (self.patch_embed.grid_size[0], self.patch_embed.grid_size[1])
        positions = resample_positions(self.pos_embed, size, (x.shape[1], x.shape[2]))  # pyright: ignore
        return self.pos_drop(x.flatten(1, 2) + positions)

    def initial_state(self, x: Tensor, grid: tuple[int, int], dense: bool = False) -> Tensor:  # type: ignore[override]
        return _compress(x, grid, self.compressed_size)

    def final_tokens(self, x: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        """Return the normalised compressed tokens [B, M, C]."""
        return self.norm(state)

    def dense_tokens(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the compressed tokens as the prefix, and the lookup tokens as the patches."""
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
    """Build block number `depth`; timm passes all options of a ViT's block, and the others are ignored here."""
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
    """Load our own files, with positions and patches resized to the model's."""
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
