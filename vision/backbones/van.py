"""VAN: a convolutional pyramid whose blocks mix tokens by large kernel attention (LKA).

Paper: Guo et al., "Visual Attention Network" (CVMJ 2023, arXiv 2202.09741). Code: github.com/Visual-Attention-Network
(VAN-Classification, VAN-Segmentation), Apache-2.0. Weights: b0 to b3 at huggingface.co/Visual-Attention-Network, b4 to
b6 as converted by OpenMMLab (github.com/open-mmlab/mmpretrain); files with the names of either load.

What is unusual:
* A block's attention contains a further shortcut around the gate and its two projections, from the normalised map,
  which no figure of the paper shows: x + scale1 * (attention(norm1(x)) + norm1(x)).
* Each block is quadratic in its input: the gate multiplies the map by a linear function of itself, without bound. The
  initial layer scale of 1e-2 keeps that under control; see `LargeKernelAttention` for the limits of half precision.
* Blocks use batch norm; a layer norm follows each stage, and the next stage reads its output. The segmentation backbone
  has the same parameter names, but `norm_eps=1e-5` in the layer norms instead of the classifier's 1e-6.
* b6 is 384 wide in its third stage, here and in the authors' code. mmpretrain's file is of another network, 480 wide;
  the URL here is mmsegmentation's copy of the authors' weights. Whether it has a classifier has not been verified.
* Maps are channels_last internally, whatever the memory format of the image: every operation of a block is fastest so.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, calculate_drop_path_rates, register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ...mixers import DepthwiseConv2d, LargeKernelAttention
from ...mixers.row_conv import RowConv2d, RowGELU
from ._checkpoints import StateDict, refuse_mismatch, rename, unwrap
from ._conv_mlp import evaluate_by_parts
from ._hierarchical import HierarchicalBackbone, Stage


class OverlapPatchEmbed(nn.Module):
    """Embed [B, in_chans, H, W] as [B, dim, ceil(H / stride), ceil(W / stride)], channels_last."""

    def __init__(
        self, in_chans: int, dim: int, *, kernel_size: int, stride: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.contiguous(memory_format=torch.channels_last)))


class Attention(nn.Module):
    """Apply LKA between two projections, with a residual connection around them; [B, C, H, W]."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj_1 = RowConv2d(dim, dim, 1, **dd)
        self.act = RowGELU()
        self.spatial_gating_unit = LargeKernelAttention(dim, **dd)
        self.proj_2 = RowConv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(self.act(self.proj_1(x))))


@register_notrace_module
class ConvMlp(nn.Module):
    """Apply two 1 x 1 convolutions with a 3 x 3 depth-wise one and GELU in between; [B, C, H, W]."""

    def __init__(self, dim: int, hidden_dim: int, *, drop: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = RowConv2d(dim, hidden_dim, 1, **dd)
        self.dwconv = DepthwiseConv2d(hidden_dim, 3, **dd)
        self.act = RowGELU()
        self.fc2 = RowConv2d(hidden_dim, dim, 1, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            y = evaluate_by_parts(self, x.permute(0, 2, 3, 1))
            if y is not None:
                return y.permute(0, 3, 1, 2)
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(self.fc1(x))))))


class VANBlock(nn.Module):
    """Apply attention and an MLP as pre-norm residual branches with layer scale; [B, C, H, W]."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float,
        init_values: float,
        proj_drop: float,
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.init_values = init_values
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = Attention(dim, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.layer_scale_1 = nn.Parameter(torch.empty(dim, **dd))
        self.layer_scale_2 = nn.Parameter(torch.empty(dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the two layer scales; the layers initialise themselves."""
        nn.init.constant_(self.layer_scale_1, self.init_values)
        nn.init.constant_(self.layer_scale_2, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        scale_1, scale_2 = self.layer_scale_1.view(-1, 1, 1), self.layer_scale_2.view(-1, 1, 1)
        x = torch.addcmul(x, self.drop_path(self.attn(self.norm1(x))), scale_1)  # scale and add in one pass
        return torch.addcmul(x, self.drop_path(self.mlp(self.norm2(x))), scale_2)


class VAN(HierarchicalBackbone):
    """VAN.

    Args:
        init_values: initial layer scale of the residual branches.
        norm_eps: epsilon of the layer norm after each stage: 1e-6 in the published classifiers, 1e-5 in the
            segmentation backbones.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside and after each MLP.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 5, 2),
        dims: Sequence[int] = (32, 64, 160, 256),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        init_values: float = 1e-2,
        norm_eps: float = 1e-6,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, values in (("dims", dims), ("mlp_ratios", mlp_ratios)):
            if len(values) != len(depths):
                raise ValueError(f"{name} needs one entry per stage, {len(depths)}; got {tuple(values)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                VANBlock(
                    dim,
                    mlp_ratio=mlp_ratios[i],
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            downsample = OverlapPatchEmbed(dims[i - 1], dim, kernel_size=3, stride=2, **dd) if i else None
            norm = LayerNorm2d(dim, eps=norm_eps, **dd)
            stages.append(Stage(blocks, dim=dim, reduction=4 * 2**i, downsample=downsample, norm=norm))
        super().__init__(
            OverlapPatchEmbed(in_chans, dims[0], kernel_size=7, stride=4, **dd),
            stages,
            ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, input_fmt="NCHW", **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NCHW",
        )

    @staticmethod
    def init_module(module: nn.Module, name: str, needs_reset: bool) -> None:
        """Initialise convolutions as normal by their fan-out with zero biases, all else as the base class does."""
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            HierarchicalBackbone.init_module(module, name, needs_reset)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename published parameters to ours: the authors' models, also for segmentation, and mmpretrain's conversions."""
    state_dict = rename(
        unwrap(checkpoint),
        [
            (r"(patch_embed\d)\.projection\.", r"\1.proj."),
            (r"blocks(\d.*)\.DW_conv\.", r"block\1.conv0."),
            (r"blocks(\d.*)\.DW_D_conv\.", r"block\1.conv_spatial."),
            (r"blocks", "block"),
        ],
    )
    rules = [(r"patch_embed1\.", "stem."), (r"head\.(weight|bias)", r"head.fc.\1")]
    for i in range(len(model.stages)):
        rules += [
            (rf"patch_embed{i + 1}\.", f"stages.{i}.downsample."),
            (rf"block{i + 1}\.(\d+\.mlp\.dwconv\.)dwconv\.", rf"stages.{i}.blocks.\1"),
            (rf"block{i + 1}\.", f"stages.{i}.blocks."),
            (rf"norm{i + 1}\.", f"stages.{i}.norm."),
        ]
    state_dict = rename(state_dict, rules)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_van(name: str, pretrained: bool, **kwargs: Any) -> VAN:
    return build_model_with_cfg(
        VAN,
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
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "Visual Attention Network",
        "paper_ids": "arXiv:2202.09741",
        "origin_url": "https://github.com/Visual-Attention-Network/VAN-Classification",
        **kwargs,
    }


def _authors(file: str) -> dict[str, Any]:
    return _cfg(f"https://huggingface.co/Visual-Attention-Network/{file}")


def _converted(file: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(f"https://download.openmmlab.com/mmclassification/v0/van/{file}", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "van_b0.in1k": _authors("VAN-Tiny-original/resolve/main/van_tiny_754.pth.tar"),
        "van_b1.in1k": _authors("VAN-Small-original/resolve/main/van_small_811.pth.tar"),
        "van_b2.in1k": _authors("VAN-Base-original/resolve/main/van_base_828.pth.tar"),
        "van_b3.in1k": _authors("VAN-Large-original/resolve/main/van_large_839.pth.tar"),
        "van_b4.in1k": _converted("van-b4_3rdparty_in1k_20220909-f4665b92.pth"),
        "van_b4.in22k": _converted("van-b4_3rdparty_in21k_20220909-db926b18.pth", num_classes=21841),
        "van_b5.in22k": _converted("van-b5_3rdparty_in21k_20220909-18e904e3.pth", num_classes=21841),
        "van_b6.in22k": _cfg(
            "https://download.openmmlab.com/mmsegmentation/v0.5/van_3rdparty/van-b6-in22k_3rdparty_20230522-5e5172a3.pth",
            num_classes=21841,
        ),
    }
)

_B0 = {"depths": (3, 3, 5, 2), "dims": (32, 64, 160, 256), "drop_path_rate": 0.1}
_B1 = {"depths": (2, 2, 4, 2), "dims": (64, 128, 320, 512), "drop_path_rate": 0.1}


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create_van("van_b0", pretrained, **{**_B0, **kwargs})


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create_van("van_b1", pretrained, **{**_B1, **kwargs})


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    return _create_van("van_b2", pretrained, **{**_B1, "depths": (3, 3, 12, 3), **kwargs})


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    model_args = {**_B1, "depths": (3, 5, 27, 3), "drop_path_rate": 0.2}
    return _create_van("van_b3", pretrained, **{**model_args, **kwargs})


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    model_args = {**_B1, "depths": (3, 6, 40, 3), "drop_path_rate": 0.2}
    return _create_van("van_b4", pretrained, **{**model_args, **kwargs})


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    model_args = {"depths": (3, 3, 24, 3), "dims": (96, 192, 480, 768), "drop_path_rate": 0.2}
    return _create_van("van_b5", pretrained, **{**model_args, **kwargs})


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    model_args = {"depths": (6, 6, 90, 6), "dims": (96, 192, 384, 768), "drop_path_rate": 0.3}
    return _create_van("van_b6", pretrained, **{**model_args, **kwargs})
