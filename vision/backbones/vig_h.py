"""Hierarchical ViG: VMamba's pyramid with gated linear attention in place of its scans.

Paper: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention" (AAAI 2025, arXiv
2405.18425). Code: github.com/hustvl/ViG, MIT. Weights: huggingface.co/hustvl/ViG; the file names there are inferred and
have not been verified.

What is unusual:
* Attention covers the whole map already in the first stage, 3136 tokens at 224 pixels: its cost is linear.
* Stem and downsampling are those of the current VMamba, and round sizes up by their padding: any image size.
* The mixers have no activation besides their gates, and the MLPs are SwiGLU. Maps are normalised by layer norms, the
  insides of the mixers by RMS norms.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ...mixers import GatedLinearAttention2d
from ._checkpoints import StateDict, keep_fresh_norms, refuse_mismatch, rename, unwrap
from ._hierarchical import HierarchicalBackbone, Stage
from .vig import BLOCK_RULES, init_module, swiglu, vig_cfg
from .vmamba import ConvDownsample, ConvStem


class ViGHBlock(nn.Module):
    """Apply gated linear attention and SwiGLU as pre-norm residual branches; [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        proj_drop: float,
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = GatedLinearAttention2d(dim, num_heads, act_layer=nn.Identity, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = swiglu(dim, multiple=32, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class HierarchicalViG(HierarchicalBackbone):
    """Hierarchical ViG.

    Args:
        embed_dim: channels of the first stage; each later one has twice as many.
        num_heads: per stage.
        out_norms: normalise the maps that `features_only` returns, as VMamba's segmentation backbones do.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside and after each MLP.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 5, 2),
        embed_dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
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
        dims = [embed_dim * 2**i for i in range(len(depths))]
        stages = [
            Stage(
                [
                    ViGHBlock(dim, num_heads[i], proj_drop=proj_drop_rate, drop_path=drop_path, **dd)
                    for drop_path in drop_paths[i]
                ],
                dim=dim,
                reduction=4 * 2**i,
                downsample=ConvDownsample(dims[i - 1], dim, **dd) if i else None,
                out_norm=nn.LayerNorm(dim, **dd) if out_norms else None,
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            ConvStem(in_chans, dims[0], **dd),
            stages,
            ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd),
            norm=nn.LayerNorm(dims[-1], **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    @staticmethod
    def init_module(module: nn.Module, name: str, needs_reset: bool) -> None:
        init_module(module, name, needs_reset)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename published parameters to ours; also accept VMamba's dense-task form (`outnorm0` to `outnorm3`, no head)."""
    rules = [
        (r"layers\.(\d+\.blocks)\.", r"stages.\1."),
        (r"patch_embed\.0\.", "stem.conv1."),
        (r"patch_embed\.2\.", "stem.norm1."),
        (r"patch_embed\.5\.", "stem.conv2."),
        (r"patch_embed\.7\.", "stem.norm2."),
        (r"outnorm(\d)\.", r"stages.\1.out_norm."),
        (r"classifier\.norm\.", "norm."),
        (r"classifier\.head\.", "head.fc."),
    ]
    for i in range(1, len(model.stages)):
        published, ours = rf"layers\.{i - 1}\.downsample\.", f"stages.{i}.downsample."
        rules += [(published + r"1\.", f"{ours}conv."), (published + r"3\.", f"{ours}norm.")]
    state_dict = rename(rename(unwrap(checkpoint), rules), BLOCK_RULES)
    state_dict = keep_fresh_norms(state_dict, model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_vig_h(name: str, pretrained: bool, **kwargs: Any) -> HierarchicalViG:
    return build_model_with_cfg(
        HierarchicalViG,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


_LAYERS = {"first_conv": "stem.conv1", "classifier": "head.fc", "pool_size": (7, 7)}

default_cfgs = generate_default_cfgs(
    {
        "vig_h_tiny.in1k": vig_cfg("vig_h_t.pth", **_LAYERS),
        "vig_h_small.in1k": vig_cfg("vig_h_s.pth", **_LAYERS),
        "vig_h_base.in1k": vig_cfg("vig_h_b.pth", **_LAYERS),
    }
)

_96 = {"embed_dim": 96, "num_heads": (3, 6, 12, 24)}


@register_model
def vig_h_tiny(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    model_args = {**_96, "depths": (2, 2, 5, 2), "drop_path_rate": 0.2}
    return _create_vig_h("vig_h_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def vig_h_small(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    model_args = {**_96, "depths": (2, 2, 17, 2), "drop_path_rate": 0.3}
    return _create_vig_h("vig_h_small", pretrained, **{**model_args, **kwargs})


@register_model
def vig_h_base(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    model_args = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 17, 2), "drop_path_rate": 0.6}
    return _create_vig_h("vig_h_base", pretrained, **{**model_args, **kwargs})
