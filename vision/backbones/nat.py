"""NAT and DiNAT: a convolutional pyramid with sliding-window attention, without and with dilated windows.

Papers: Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, arXiv 2204.07143); Hassani and Shi, "Dilated
Neighborhood Attention Transformer" (arXiv 2209.15001). Code and weights: github.com/SHI-Labs/Neighborhood-Attention-
Transformer, MIT. DiNAT is NAT with every second block of a stage dilated and otherwise identical.

What is unusual:
* Any image size and aspect ratio: windows shift at borders, and a map smaller than its window is padded inside the
  attention.
* `dilations` is not part of the weights. Published models change it with the image size (ImageNet at 224 and 384,
  ADE20K, COCO), so that the widest window of a stage spans its map: `dilations=((1, 16), (1, 4, 1, 8),
  (1, 2, 1, 3, 1, 4), (1, 2))` is the segmentation setting for 512 pixels.
* The 11 x 11 weights are the 7 x 7 ones with each bias table resized bicubically; any `kernel_size` loads that way.
* The stem consists of two 3 x 3 convolutions of stride 2 without an activation in between. `stem_stride` 2 or 1 removes
  their strides, the last one first, for small images; the weights keep their shapes.
* nat_small, nat_base and dinat_base have layer scale on their residual branches, dinat_small does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerScale, Mlp, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ...mixers import NeighborhoodAttention2d
from ._checkpoints import StateDict, keep_fresh_norms, refuse_mismatch, rename, resize_bias_tables, unwrap
from ._hierarchical import HierarchicalBackbone, Stage
from ._patterns import Pattern, per_stage


class ConvTokenizer(nn.Module):
    """Embed [B, C, H, W] as [B, ceil(H / stride), ceil(W / stride), dim]."""

    def __init__(self, in_chans: int, dim: int, *, stride: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if stride not in (4, 2, 1):
            raise ValueError(f"stem_stride must be 4, 2 or 1; got {stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=min(stride, 2), padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=max(stride // 2, 1), padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """Downsample [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), 2 C]."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(2 * dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NATBlock(nn.Module):
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
        init_values: float | None,
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
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class NAT(HierarchicalBackbone):
    """NAT, or DiNAT if `dilations` exceed 1.

    Args:
        embed_dim: channels of the first stage; each later one has twice as many.
        kernel_size: side of the attention window, odd.
        dilations: one for all blocks, or per stage the dilations of its blocks, repeated to the stage's depth.
        init_values: initial layer scale of the residual branches, None for no layer scale.
        stem_stride: pixels per position of the first stage: 4, or 2 or 1 for small images.
        out_norms: normalise the maps that `features_only` returns, as the published segmentation backbones do.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the projections of attention and MLP.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 5),
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Pattern = 1,
        qkv_bias: bool = True,
        init_values: float | None = None,
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
                NATBlock(
                    dim,
                    num_heads[i],
                    kernel_size,
                    dilation=dilation,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    init_values=init_values,
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
                    downsample=ConvDownsampler(dim // 2, **dd) if i else None,
                    out_norm=nn.LayerNorm(dim, **dd) if out_norms else None,
                )
            )
        dim = stages[-1].dim
        super().__init__(
            ConvTokenizer(in_chans, embed_dim, stride=stem_stride, **dd),
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
    state_dict = unwrap(checkpoint)
    rules = [
        (r"patch_embed\.", "stem."),
        (r"norm(\d)\.", r"stages.\1.out_norm."),
        (r"head\.(weight|bias)", r"head.fc.\1"),
    ]
    rules += [(rf"levels\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(len(model.stages))]
    rules += [(r"levels\.(\d+\.blocks\.\d+)\.gamma([12])", r"stages.\1.ls\2.gamma"), (r"levels\.", "stages.")]
    state_dict = rename(state_dict, rules)
    state_dict = resize_bias_tables(keep_fresh_norms(state_dict, model), model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_nat(name: str, pretrained: bool, **kwargs: Any) -> NAT:
    return build_model_with_cfg(
        NAT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(url: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    }


def _nat_cfg(file: str) -> dict[str, Any]:
    return _cfg(
        f"https://shi-labs.com/projects/nat/checkpoints/CLS/{file}",
        paper_name="Neighborhood Attention Transformer",
        paper_ids="arXiv:2204.07143",
    )


def _dinat_cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(
        f"https://shi-labs.com/projects/dinat/checkpoints/{file}",
        paper_name="Dilated Neighborhood Attention Transformer",
        paper_ids="arXiv:2209.15001",
        **kwargs,
    )


_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _nat_cfg("nat_mini.pth"),
        "nat_tiny.in1k": _nat_cfg("nat_tiny.pth"),
        "nat_small.in1k": _nat_cfg("nat_small.pth"),
        "nat_base.in1k": _nat_cfg("nat_base.pth"),
        "dinat_mini.in1k": _dinat_cfg("imagenet1k/dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": _dinat_cfg("imagenet1k/dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": _dinat_cfg("imagenet1k/dinat_small_in1k_224.pth"),
        "dinat_base.in1k": _dinat_cfg("imagenet1k/dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": _dinat_cfg("imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large.in22k": _dinat_cfg("imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
        "dinat_large_384.in22k_ft_in1k": _dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384.pth", **_AT_384),
        "dinat_large_11x11.in22k": _dinat_cfg(
            "imagenet22k/dinat_large_in22k_224_11x11interp.pth",
            num_classes=21841,
            description="dinat_large.in22k with its bias tables resized to 11 x 11 windows",
        ),
        "dinat_large_11x11_384.in22k_ft_in1k": _dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", **_AT_384),
    }
)

_MINI = {"depths": (3, 4, 6, 5), "embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_TINY = {**_MINI, "depths": (3, 4, 18, 5)}
_SMALL = {**_TINY, "embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_BASE = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "init_values": 1e-5, "drop_path_rate": 0.5}
_LARGE = {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
_DILATIONS = ((1, 8), (1, 4), (1, 2), (1,))


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("nat_mini", pretrained, **{**_MINI, **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("nat_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("nat_small", pretrained, **{**_SMALL, "init_values": 1e-5, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("nat_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_mini", pretrained, **{**_MINI, "dilations": _DILATIONS, **kwargs})


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_tiny", pretrained, **{**_TINY, "dilations": _DILATIONS, **kwargs})


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_small", pretrained, **{**_SMALL, "dilations": _DILATIONS, **kwargs})


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_base", pretrained, **{**_BASE, "dilations": _DILATIONS, **kwargs})


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _create_nat("dinat_large", pretrained, **{**_LARGE, "dilations": _DILATIONS, **kwargs})


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    model_args = {**_LARGE, "dilations": ((1, 13), (1, 6), (1, 3), (1,))}
    return _create_nat("dinat_large_384", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_large_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    model_args = {**_LARGE, "dilations": _DILATIONS, "kernel_size": 11}
    return _create_nat("dinat_large_11x11", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_large_11x11_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    model_args = {**_LARGE, "dilations": _DILATIONS, "kernel_size": 11}
    return _create_nat("dinat_large_11x11_384", pretrained, **{**model_args, **kwargs})
