"""EfficientVMamba: atrous scans next to a convolution in the first two stages, inverted residuals in the others.

Paper: Pei, Huang and Xu, "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba" (AAAI 2025, arXiv
2403.09977). Weights: huggingface.co/TerryPei, of the code github.com/TerryPei/EfficientVMamba.

What is unusual:
* The repository's readme names the Apache 2.0 licence, but contains no licence file, and the weights have none. This
  file was written from the paper and from the names and shapes of the published weights. The file names on
  huggingface.co are inferred from the authors' configurations; they have not been verified.
* Scans are used where the map is large, in the first two stages, and convolutions where it is small: most hybrids do
  the opposite.
* Each scan visits a quarter of the pixels, and all four together visit each once: see `ScanPath` and `AtrousSS2D`.
* One gate with shared weights scales the channels of both branches, each from its own average.
* The published small model is 64 wide, although its configuration file says 96.
* Any image size: the map is padded to whole patches, and to even sizes before merging.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BatchNormAct2d, ClassifierHead, DropPath, SEModule, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ...mixers import AtrousSS2D, DepthwiseConv2d
from ._checkpoints import StateDict, keep_fresh_norms, refuse_mismatch, rename, unwrap
from ._conv_mlp import RowConv2d
from ._hierarchical import HierarchicalBackbone, Stage
from .vmamba import SS2D_RULES, PatchEmbed, PatchMerging, parameters_of_scans, reshape_weights


class ChannelGate(nn.Module):
    """Scale each channel by a factor from 0 to 1, computed from the average of the normalised map; [B, H, W, C]."""

    def __init__(self, dim: int, *, reduction: int = 8, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.reduce = nn.Linear(dim, max(dim // reduction, 1), **dd)
        self.act = nn.GELU()
        self.expand = nn.Linear(max(dim // reduction, 1), dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        average = self.norm(x).mean((1, 2), keepdim=True)
        return x * self.expand(self.act(self.reduce(average))).sigmoid()


class EVSSBlock(nn.Module):
    """Add atrous scans and a convolution of the same normalised map, both scaled by one gate; [B, H, W, C]."""

    def __init__(
        self, dim: int, *, expand: float, state_dim: int, drop_path: float, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = AtrousSS2D(dim, expand=expand, state_dim=state_dim, **dd)
        self.conv_branch = nn.Sequential(
            DepthwiseConv2d(dim, 3, **dd), nn.BatchNorm2d(dim, **dd), nn.GELU(), RowConv2d(dim, dim, 1, **dd)
        )
        self.gate = ChannelGate(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        local = self.conv_branch(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path1(self.gate(self.mixer(y)) + self.gate(local))


class MBConvBlock(nn.Module):
    """Apply MobileNet's inverted residual with squeeze and excitation; [B, H, W, C]."""

    def __init__(self, dim: int, *, drop_path: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = 4 * dim
        self.conv_pw = RowConv2d(dim, hidden, 1, bias=False, **dd)
        self.bn1 = BatchNormAct2d(hidden, **dd)
        self.conv_dw = DepthwiseConv2d(hidden, 3, bias=False, **dd)
        self.bn2 = BatchNormAct2d(hidden, **dd)
        self.se = SEModule(hidden, rd_channels=hidden // 8, **dd)
        self.conv_pwl = RowConv2d(hidden, dim, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv_pw(x.permute(0, 3, 1, 2)))
        y = self.se(self.bn2(self.conv_dw(y)))
        return x + self.drop_path(self.bn3(self.conv_pwl(y)).permute(0, 2, 3, 1))


class EfficientVMamba(HierarchicalBackbone):
    """EfficientVMamba.

    Args:
        embed_dim: channels of the first stage; each later one has twice as many.
        expand: inner channels of the scans, as a multiple of the map's channels.
        state_dim: state elements per channel of the scans.
        out_norms: normalise the maps that `features_only` returns, as the published detection backbones do.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 4, 2),
        embed_dim: int = 48,
        expand: float = 2.0,
        state_dim: int = 16,
        out_norms: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = [embed_dim * 2**i for i in range(len(depths))]

        def block(stage: int, drop_path: float) -> nn.Module:
            if stage < 2:
                return EVSSBlock(dims[stage], expand=expand, state_dim=state_dim, drop_path=drop_path, **dd)
            return MBConvBlock(dims[stage], drop_path=drop_path, **dd)

        stages = [
            Stage(
                [block(i, drop_path) for drop_path in drop_paths[i]],
                dim=dim,
                reduction=4 * 2**i,
                downsample=PatchMerging(dims[i - 1], **dd) if i else None,
                out_norm=nn.LayerNorm(dim, **dd) if out_norms else None,
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            PatchEmbed(in_chans, dims[0], **dd),
            stages,
            ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd),
            norm=nn.LayerNorm(dims[-1], **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        """Exempt the scan parameters, as `VMamba` does."""
        return parameters_of_scans(self)


_MBCONV = r"(stages\.\d+\.blocks\.\d+\.)"
_MBCONV_RULES = [
    (_MBCONV + r"conv_pw\.0\.", r"\1conv_pw."),
    (_MBCONV + r"conv_pw\.1\.", r"\1bn1."),
    (_MBCONV + r"conv_dw\.0\.", r"\1conv_dw."),
    (_MBCONV + r"conv_dw\.1\.", r"\1bn2."),
    (_MBCONV + r"se\.conv_reduce\.", r"\1se.fc1."),
    (_MBCONV + r"se\.conv_expand\.", r"\1se.fc2."),
    (_MBCONV + r"conv_pw2\.0\.", r"\1conv_pwl."),
    (_MBCONV + r"conv_pw2\.1\.", r"\1bn3."),
]


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename published parameters to ours; also accept detection backbones (`outnorm0` to `outnorm3`, no head).

    In convolutional stages the published list contains a layout change, the blocks, another layout change and the
    downsampling.
    """
    rules = [
        (r"layers\.(\d+\.blocks\.\d+)\.norm\.", r"stages.\1.norm1."),
        (r"layers\.(\d+\.blocks\.\d+)\.op\.", r"stages.\1.mixer."),
        (r"layers\.(\d+\.blocks\.\d+)\.se\.norm\.", r"stages.\1.gate.norm."),
        (r"layers\.(\d+\.blocks\.\d+)\.se\.global_reduce\.", r"stages.\1.gate.reduce."),
        (r"layers\.(\d+\.blocks\.\d+)\.se\.channel_select\.", r"stages.\1.gate.expand."),
        (r"layers\.(\d+\.blocks)\.", r"stages.\1."),
        (r"patch_embed\.0\.", "stem.proj."),
        (r"patch_embed\.2\.", "stem.norm."),
        (r"outnorm(\d)\.", r"stages.\1.out_norm."),
        (r"(?:classifier\.)?norm\.", "norm."),
        (r"(?:classifier\.)?head\.(weight|bias)", r"head.fc.\1"),
    ]
    for i, stage in enumerate(model.stages):
        depth = len(stage.blocks)  # pyright: ignore[reportArgumentType]
        rules += [(rf"layers\.{i}\.(?:downsample|{depth + 2})\.", f"stages.{i + 1}.downsample.")]
        rules += [(rf"layers\.{i}\.{j + 1}\.", f"stages.{i}.blocks.{j}.") for j in range(depth)]
    state_dict = rename(rename(unwrap(checkpoint), rules), [*SS2D_RULES, *_MBCONV_RULES])
    state_dict = keep_fresh_norms(reshape_weights(state_dict, model), model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_efficientvmamba(name: str, pretrained: bool, **kwargs: Any) -> EfficientVMamba:
    return build_model_with_cfg(
        EfficientVMamba,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(size: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": f"TerryPei/EfficientVMamba-{size}",
        "hf_hub_filename": f"efficient_vmamba_{size.lower()}.ckpt",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "unclear",
        "origin_url": "https://github.com/TerryPei/EfficientVMamba",
        "paper_name": "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
        "paper_ids": "arXiv:2403.09977",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "efficientvmamba_tiny.in1k": _cfg("Tiny"),
        "efficientvmamba_small.in1k": _cfg("Small"),
        "efficientvmamba_base.in1k": _cfg("Base"),
    }
)


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    model_args = {"depths": (2, 2, 4, 2), "embed_dim": 48, "drop_path_rate": 0.2}
    return _create_efficientvmamba("efficientvmamba_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    model_args = {"depths": (2, 2, 4, 2), "embed_dim": 64, "drop_path_rate": 0.2}
    return _create_efficientvmamba("efficientvmamba_small", pretrained, **{**model_args, **kwargs})


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    model_args = {"depths": (2, 2, 9, 2), "embed_dim": 96, "drop_path_rate": 0.2}
    return _create_efficientvmamba("efficientvmamba_base", pretrained, **{**model_args, **kwargs})
