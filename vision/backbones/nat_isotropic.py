"""Isotropic NAT, DiNAT and ViT-rpb: a plain stack of blocks on 16 x 16 patches with three kinds of attention.

Paper: Hassani and Shi, "Dilated Neighborhood Attention Transformer" (arXiv 2209.15001), section 4.4. Code and weights:
github.com/SHI-Labs/Neighborhood-Attention-Transformer, MIT.

What is unusual:
* `vitrpb_*` attends globally. Like the others it has a bias per head and relative position, and neither class token nor
  position embedding. Its table covers the patches of `img_size`; for another grid it is resized bicubically at each
  call.
* The published ViT-rpb reads its table flipped along both axes, that is, indexed by key minus query, as neighborhood
  attention does.
* Any image size: the image is padded at the end of its axes to whole patches.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, register_notrace_module, resample_patch_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels._runtime import is_exporting
from ...mixers import NeighborhoodAttention2d
from ._checkpoints import StateDict, refuse_mismatch, rename, resize_bias_tables, unwrap
from ._isotropic import IsotropicBackbone
from ._patterns import repeat_to


@register_notrace_module
class GlobalAttention(nn.Module):
    """Attend from every position of a map [B, H, W, C] to every other, with a relative position bias.

    Args:
        grid: rows and columns that the bias table covers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        qkv_bias: bool,
        proj_drop: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.rpb, std=0.02)

    def _bias(self, height: int, width: int) -> Tensor:
        """Return the bias [heads, queries, keys], with positions in row-major order."""
        table = self.rpb
        size = [2 * height - 1, 2 * width - 1]
        if is_exporting() or table.shape[1] != size[0] or table.shape[2] != size[1]:
            table = F.interpolate(table.unsqueeze(0).float(), size, mode="bicubic", align_corners=False)
            table = table.squeeze(0).to(self.rpb.dtype)
        rows, columns = torch.arange(height, device=table.device), torch.arange(width, device=table.device)
        down = (rows[None, :] - rows[:, None] + height - 1)[:, None, :, None]
        right = (columns[None, :] - columns[:, None] + width - 1)[None, :, None, :]
        return table[:, down, right].flatten(3, 4).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, [3, self.num_heads, -1])
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, self._bias(height, width).to(query.dtype))
        out = out.transpose(1, 2).flatten(2).unflatten(1, [height, width])
        return self.proj_drop(self.proj(out))


class IsotropicBlock(nn.Module):
    """Apply a mixer on the grid and an MLP as pre-norm residual branches; [B, N, C] and the grid."""

    def __init__(self, dim: int, attn: nn.Module, *, mlp_ratio: float, proj_drop: float, drop_path: float, **dd: Any):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        mixed = self.attn(self.norm1(x).unflatten(1, [grid[0], grid[1]])).flatten(1, 2)
        x = x + self.drop_path1(mixed)
        return x + self.drop_path2(self.mlp(self.norm2(x))), grid


class NATIsotropic(IsotropicBackbone):
    """Isotropic NAT, DiNAT or ViT-rpb.

    Args:
        img_size: nominal image size; it only determines the extent of the bias tables of global attention.
        kernel_size: side of the attention window, odd; None for global attention.
        dilations: of the windows, repeated cyclically over the blocks.
        fc_norm: normalise after pooling instead of before.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the projections of attention and MLP.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        fc_norm: bool = False,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        kernel_size: int | None = 7,
        dilations: int | Sequence[int] = 1,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if kernel_size is None:
            grid = (-(-size[0] // patch_size), -(-size[1] // patch_size))
            mixers: list[Any] = [partial(GlobalAttention, grid=grid)] * depth
        else:
            mixers = [
                partial(NeighborhoodAttention2d, kernel_size=kernel_size, dilation=dilation, rpb=True)
                for dilation in repeat_to(dilations, depth, "dilations")
            ]
        super().__init__(
            img_size=size,
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
            pos_embed="none",
            fc_norm=fc_norm,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            embed_norm_layer=nn.LayerNorm,
            norm_layer=nn.LayerNorm,
            block_fn=partial(_make_block, mixers),  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


def _make_block(
    mixers: Sequence[Any],
    *,
    depth: int,
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool,
    proj_drop: float,
    drop_path: float,
    device: Any,
    dtype: Any,
    **_: Any,
) -> IsotropicBlock:
    """Build block number `depth`. timm passes all options of a ViT block; the others do not apply here."""
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    attn = mixers[depth](dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd)
    return IsotropicBlock(dim, attn, mlp_ratio=mlp_ratio, proj_drop=proj_drop, drop_path=drop_path, **dd)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: NATIsotropic) -> StateDict:
    """Rename published parameters to ours; resize patch embedding and bias tables to the model's."""
    state_dict = rename(unwrap(checkpoint), [(r"layers\.", "blocks.")])
    state_dict = {name: tensor for name, tensor in state_dict.items() if not name.endswith("relative_position_index")}
    patches = state_dict.get("patch_embed.proj.weight")
    if patches is not None:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(patches, list(model.patch_embed.patch_size))
    state_dict = resize_bias_tables(state_dict, model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_isotropic(name: str, pretrained: bool, **kwargs: Any) -> NATIsotropic:
    return build_model_with_cfg(
        NATIsotropic,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (2, 5, 8, 11), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(file: str) -> dict[str, Any]:
    return {
        "url": f"https://shi-labs.com/projects/dinat/checkpoints/isotropic/{file}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        "paper_ids": "arXiv:2209.15001",
    }


default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.in1k": _cfg("nat_isotropic_small_in1k_224.pth"),
        "nat_isotropic_base.in1k": _cfg("nat_isotropic_base_in1k_224.pth"),
        "dinat_isotropic_small.in1k": _cfg("dinat_isotropic_small_in1k_224.pth"),
        "dinat_isotropic_base.in1k": _cfg("dinat_isotropic_base_in1k_224.pth"),
        "vitrpb_small.in1k": _cfg("vitrpb_small_in1k_224.pth"),
        "vitrpb_base.in1k": _cfg("vitrpb_base_in1k_224.pth"),
    }
)

_SMALL = {"embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1}
_BASE = {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4}


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create_isotropic("nat_isotropic_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create_isotropic("nat_isotropic_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create_isotropic("dinat_isotropic_small", pretrained, **{**_SMALL, "dilations": (1, 2), **kwargs})


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create_isotropic("dinat_isotropic_base", pretrained, **{**_BASE, "dilations": (1, 2), **kwargs})


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create_isotropic("vitrpb_small", pretrained, **{**_SMALL, "kernel_size": None, **kwargs})


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> NATIsotropic:
    return _create_isotropic("vitrpb_base", pretrained, **{**_BASE, "kernel_size": None, **kwargs})
