"""DiNAT_s: Swin's pyramid with (dilated) neighborhood attention in place of window attention.

Paper: Hassani and Shi, "Dilated Neighborhood Attention Transformer" (arXiv 2209.15001), its alternative model for a
like-for-like comparison with Swin. Code and weights: github.com/SHI-Labs/Neighborhood-Attention-Transformer, MIT.

What is unusual:
* Compared with DiNAT (`nat.py`): a 4 x 4 patch embedding, patch merging that normalises before it projects, shallower
  stages, an MLP ratio of 4, and no layer scale on the residual branches.
* The image is padded at the end of its axes to whole patches, a map to an even size before merging.
* `stem_stride` 2 or 1 lets the 4 x 4 patches overlap, for small images; the weights keep their shape.
* `dilations` is not part of the weights and changes with the image size, as in `nat.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers import NeighborhoodAttention2d
from ._checkpoints import StateDict, keep_fresh_norms, refuse_mismatch, rename, resize_bias_tables, unwrap
from ._hierarchical import HierarchicalBackbone, Stage
from ._patterns import Pattern, per_stage


class PatchEmbed(nn.Module):
    """Embed [B, C, H, W] as [B, ceil(H / stride), ceil(W / stride), dim], by 4 x 4 patches centred on their stride."""

    def __init__(self, in_chans: int, dim: int, *, stride: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if stride not in (4, 2, 1):
            raise ValueError(f"stem_stride must be 4, 2 or 1; got {stride}")
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=stride, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        before = (4 - self.stride) // 2
        after = 3 - before  # the maximum that any size needs: the convolution drops incomplete patches
        x = F.pad(x, [before, after, before, after])
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Merge each 2 x 2 square of [B, H, W, C] into one position: [B, ceil(H / 2), ceil(W / 2), 2 C]."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Pad one row and column more than an even map needs, without the remainder of a size: exporting becomes a
        # hundred times slower if it has to prove that nested remainders are even.
        x = F.pad(x, [0, 0, 0, 1, 0, 1]).unfold(1, 2, 2).unfold(2, 2, 2)  # [B, H / 2, W / 2, C, 2, 2]
        return self.reduction(self.norm(x.permute(0, 1, 2, 5, 4, 3).flatten(3)))


class DiNATsBlock(nn.Module):
    """Apply neighborhood attention and an MLP as pre-norm residual branches; [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        *,
        dilation: int,
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = NeighborhoodAttention2d(
            dim, num_heads, kernel_size, dilation=dilation, rpb=True, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class DiNATs(HierarchicalBackbone):
    """DiNAT_s; the arguments are those of `nat.NAT`."""

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        dilations: Pattern = ((1, 8), (1, 4), (1, 2), (1,)),
        qkv_bias: bool = True,
        stem_stride: int = 4,
        out_norms: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads needs one entry per stage, {len(depths)}; got {tuple(num_heads)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, stage_dilations in enumerate(per_stage(dilations, depths, "dilations")):
            dim = embed_dim * 2**i
            blocks = [
                DiNATsBlock(
                    dim,
                    num_heads[i],
                    kernel_size,
                    dilation=dilation,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    **dd,
                )
                for dilation, drop_path in zip(stage_dilations, drop_paths[i], strict=True)
            ]
            stages.append(
                Stage(
                    blocks,
                    dim=dim,
                    reduction=stem_stride * 2**i,
                    downsample=PatchMerging(dim // 2, **dd) if i else None,
                    out_norm=nn.LayerNorm(dim, **dd) if out_norms else None,
                )
            )
        dim = stages[-1].dim
        super().__init__(
            PatchEmbed(in_chans, embed_dim, stride=stem_stride, **dd),
            stages,
            ClassifierHead(dim, num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd),
            norm=nn.LayerNorm(dim, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename published parameters to ours; also accept dense-task backbones (`norm0` to `norm3`, no head)."""
    rules = [
        (r"patch_embed\.", "stem."),
        (r"norm(\d)\.", r"stages.\1.out_norm."),
        (r"head\.(weight|bias)", r"head.fc.\1"),
    ]
    rules += [(rf"layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(len(model.stages))]
    rules += [(r"layers\.", "stages.")]
    state_dict = rename(unwrap(checkpoint), rules)
    state_dict = resize_bias_tables(keep_fresh_norms(state_dict, model), model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_dinat_s(name: str, pretrained: bool, **kwargs: Any) -> DiNATs:
    return build_model_with_cfg(
        DiNATs,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://shi-labs.com/projects/dinat/checkpoints/{file}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        "paper_ids": "arXiv:2209.15001",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224.pth"),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224.pth"),
        # The file names of the large model say in1k; the authors' table lists it as pre-trained on ImageNet-22k.
        "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841),
        "dinat_s_large_384.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_384.pth", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
        ),
    }
)

_TINY = {"depths": (2, 2, 6, 2), "embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
_LARGE = {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _create_dinat_s("dinat_s_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _create_dinat_s("dinat_s_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _create_dinat_s("dinat_s_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _create_dinat_s("dinat_s_large", pretrained, **{**_LARGE, **kwargs})


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    model_args = {**_LARGE, "dilations": ((1, 13), (1, 6), (1, 3), (1,))}
    return _create_dinat_s("dinat_s_large_384", pretrained, **{**model_args, **kwargs})
