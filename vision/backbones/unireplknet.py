"""UniRepLKNet: a pyramid with few large kernels, trained as sums of dilated branches and evaluated as one convolution.

Paper: Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series
and Image Recognition" (CVPR 2024, arXiv 2311.15599). Code github.com/AILab-CVC/UniRepLKNet, weights
huggingface.co/DingXiaoH/UniRepLKNet, Apache-2.0.

What is unusual:
* Evaluation always runs the merged large kernels (see `mixers/dilated_reparam.py`) and keeps the parameters. For
  deployment, `timm.utils.reparameterize_model(model)` also folds away all batch norms, the layer scale and the bias of
  the response norm: the copy has other parameters, with the counts stated in the paper.
* A file in that deployed form only fits a deployed model, so loading one re-parameterises the model. The reverse is
  impossible: a deployed model rejects a training checkpoint.
* The norm follows the pooling and belongs to the head. Segmentation and detection backbones drop it and normalise every
  stage's map instead: `out_norms=True`.
* Models at 384 pixels were evaluated on images resized to a square without cropping.
* Weight decay: the official optimiser decays the response norm's parameters, which have four axes there. Here they have
  one axis, and timm's optimisers exempt them like those of other norms.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    NormMlpClassifierHead,
    SEModule,
    calculate_drop_path_rates,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, reparameterize_model
from torch import Tensor, nn

from ...mixers import DepthwiseConv2d, DilatedReparamBlock
from ...mixers.dilated_reparam import fold_norm, statistics_of
from ._checkpoints import StateDict, keep_fresh_norms, refuse_mismatch, rename, unwrap
from ._hierarchical import HierarchicalBackbone, Stage
from ._patterns import Pattern, per_stage

SMALLEST_WITH_BRANCHES = 7


class GlobalResponseNorm(nn.Module):
    """Amplify each channel of [B, H, W, C] by its share of the map's energy (global response norm, ConvNeXt V2).

    timm's layer reads the map twice more, and always has a bias, which deployment folds into the next layer here. In
    half precision the energy comes from PyTorch's norm, since squares would overflow; in other dtypes from plain sums,
    which are faster on the CPU.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias: Tensor | None = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            energy = x.norm(p=2, dim=(1, 2), keepdim=True)
        else:
            energy = (x.square().sum(dim=(1, 2), keepdim=True) + 1e-24).sqrt()  # the offset keeps the gradient finite
        gain = 1 + self.weight * (energy / (energy.mean(dim=-1, keepdim=True) + self.eps))
        bias = self.bias
        return x * gain if bias is None else torch.addcmul(bias, x, gain)


register_notrace_module(GlobalResponseNorm)  # not as a decorator, which would hide the class's type


class UniRepLKNetBlock(nn.Module):
    """Apply depth-wise convolution, channel attention and an MLP as one residual branch; [B, C, H, W].

    Args:
        kernel_size: 7 or more adds dilated branches to the large kernel; smaller ones are a plain convolution.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        mlp_ratio: float,
        init_values: float,
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        large = kernel_size >= SMALLEST_WITH_BRANCHES
        self.dwconv = (
            DilatedReparamBlock(dim, kernel_size, **dd)
            if large
            else DepthwiseConv2d(dim, kernel_size, bias=False, **dd)
        )
        self.norm1: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.se = SEModule(dim, rd_channels=dim // 4, **dd)
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.grn = GlobalResponseNorm(hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, bias=False, **dd)
        self.norm2: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.ls: nn.Module = LayerScale2d(dim, init_values, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm1(self.dwconv(x)))
        y = self.fc2(self.grn(self.act(self.fc1(y.permute(0, 2, 3, 1)))))
        return x + self.drop_path(self.ls(self.norm2(y.permute(0, 3, 1, 2))))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold branches, batch norms (with running statistics) and layer scale into the layers, in place."""
        if not isinstance(self.ls, LayerScale2d):
            return
        if isinstance(self.dwconv, DilatedReparamBlock):
            self.dwconv = self.dwconv.fuse(self.norm1)
        else:
            old = self.dwconv.weight
            weight, bias = fold_norm(old, self.dwconv.bias, *statistics_of(self.norm1))
            conv = DepthwiseConv2d.from_weight(weight.to(old.dtype), bias.to(old.dtype))
            self.dwconv = conv.requires_grad_(old.requires_grad).train(self.training)
        self._fold_into_fc2(self.ls.gamma)
        self.norm1, self.norm2, self.ls = (nn.Identity().train(self.training) for _ in range(3))

    def _fold_into_fc2(self, gamma: Tensor) -> None:
        old, shift = self.fc2.weight, self.grn.bias
        wide = torch.promote_types(old.dtype, torch.float32)
        bias = None if shift is None else old.to(wide) @ shift.to(wide)
        weight, bias = fold_norm(old, bias, *statistics_of(self.norm2))
        weight, bias = weight * gamma.to(wide)[:, None], bias * gamma.to(wide)
        self.fc2 = nn.Linear(self.fc2.in_features, self.fc2.out_features, device="meta").train(self.training)
        self.fc2.weight = nn.Parameter(weight.to(old.dtype), old.requires_grad)
        self.fc2.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)
        self.grn.bias = None


def _downsampler(in_dim: int, dim: int, **dd: Any) -> list[nn.Module]:
    """Return layers that downsample to [B, dim, ceil(H / 2), ceil(W / 2)]; the norm's output is channels_last."""
    return [nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd), LayerNorm2d(dim, **dd)]


class UniRepLKNet(HierarchicalBackbone):
    """UniRepLKNet.

    Args:
        dims: channels of each stage.
        kernel_sizes: of the depth-wise convolutions; one for all blocks, or per stage those of its blocks, repeated to
            the stage's depth.
        init_values: initial layer scale of the residual branches.
        out_norms: normalise the maps that `features_only` returns, as the published segmentation backbones do.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (40, 80, 160, 320),
        kernel_sizes: Pattern = (3, 13, 13, 13),
        mlp_ratio: float = 4.0,
        init_values: float = 1e-6,
        out_norms: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(dims) != len(depths):
            raise ValueError(f"dims needs one entry per stage, {len(depths)}; got {tuple(dims)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, sides in enumerate(per_stage(kernel_sizes, depths, "kernel_sizes")):
            blocks = [
                UniRepLKNetBlock(dims[i], side, mlp_ratio=mlp_ratio, init_values=init_values, drop_path=drop_path, **dd)
                for side, drop_path in zip(sides, drop_paths[i], strict=True)
            ]
            stages.append(
                Stage(
                    blocks,
                    dim=dims[i],
                    reduction=4 * 2**i,
                    downsample=nn.Sequential(*_downsampler(dims[i - 1], dims[i], **dd)) if i else None,
                    out_norm=LayerNorm2d(dims[i], **dd) if out_norms else None,
                )
            )
        stem = [*_downsampler(in_chans, dims[0] // 2, **dd), nn.GELU(), *_downsampler(dims[0] // 2, dims[0], **dd)]
        super().__init__(
            nn.Sequential(*stem),
            stages,
            NormMlpClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NCHW",
        )

    @staticmethod
    def init_module(module: nn.Module, name: str, needs_reset: bool) -> None:
        if isinstance(module, nn.Conv2d):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            HierarchicalBackbone.init_module(module, name, needs_reset)


def _is_deployed(names: Iterable[str]) -> bool:
    """Return whether these are names of a re-parameterised model, whose second linear layer alone has a bias."""
    return any(re.fullmatch(r"stages\.\d+\.blocks\.\d+\.fc2\.bias", name) for name in names)


_BLOCK = r"stages\.(\d+)\.(\d+)\."
_BLOCK_RULES = [
    (r"gamma", "ls.gamma"),
    (r"dwconv\.dil_conv_(k\d+_\d+)", r"dwconv.small.\3.conv"),
    (r"dwconv\.dil_bn_(k\d+_\d+)", r"dwconv.small.\3.norm"),
    (r"dwconv\.origin_bn", "dwconv.large.norm"),
    (r"norm\.", "norm1."),
    (r"se\.down", "se.fc1"),
    (r"se\.up", "se.fc2"),
    (r"pwconv1\.1", "fc1"),
    (r"act\.1\.gamma", "grn.weight"),
    (r"act\.1\.beta", "grn.bias"),
    (r"pwconv2\.0", "fc2"),
    (r"pwconv2\.2", "norm2"),
    (r"dwconv\.", "dwconv."),
]


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename published parameters of both forms to ours; also accept dense-task backbones (`norm0` to `norm3`).

    A file in deployed form turns `model` into its deployed form, in place.
    """
    state_dict = unwrap(checkpoint)
    merged = not any(".origin_bn." in name for name in state_dict)
    kernel = "dwconv." if merged else "dwconv.large.conv."
    rules = [
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (_BLOCK + r"dwconv\.lk_origin\.", rf"stages.\1.blocks.\2.{kernel}"),
        *((_BLOCK + pattern, rf"stages.\1.blocks.\2.{name}") for pattern, name in _BLOCK_RULES),
        (r"norm(\d)\.", r"stages.\1.out_norm."),
        (r"norm\.", "head.norm."),
        (r"head\.(weight|bias)", r"head.fc.\1"),
    ]
    state_dict = rename(state_dict, rules)
    state_dict = {name: t.flatten() if ".grn." in name else t for name, t in state_dict.items()}
    if _is_deployed(state_dict):
        reparameterize_model(model, inplace=True)
    elif _is_deployed(model.state_dict()):
        raise ValueError(
            "the checkpoint is of the training form, and the model has been re-parameterised, which cannot be undone. "
            "Load the checkpoint into a new model and re-parameterise that"
        )
    state_dict = keep_fresh_norms(state_dict, model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_unireplknet(name: str, pretrained: bool, **kwargs: Any) -> UniRepLKNet:
    return build_model_with_cfg(
        UniRepLKNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": "DingXiaoH/UniRepLKNet",
        "hf_hub_filename": f"unireplknet_{file}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "origin_url": "https://github.com/AILab-CVC/UniRepLKNet",
        "paper_name": "UniRepLKNet: A Universal Perception Large-Kernel ConvNet",
        "paper_ids": "arXiv:2311.15599",
        **kwargs,
    }


_AT_192 = {"input_size": (3, 192, 192), "pool_size": (6, 6)}
_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}
_22K = {"num_classes": 21841}

default_cfgs = generate_default_cfgs(
    {
        "unireplknet_a.in1k": _cfg("a_in1k_224_acc77.03"),
        "unireplknet_f.in1k": _cfg("f_in1k_224_acc78.58"),
        "unireplknet_p.in1k": _cfg("p_in1k_224_acc80.23"),
        "unireplknet_n.in1k": _cfg("n_in1k_224_acc81.64"),
        "unireplknet_t.in1k": _cfg("t_in1k_224_acc83.21"),
        "unireplknet_s.in1k": _cfg("s_in1k_224_acc83.91"),
        "unireplknet_s.in22k_ft_in1k": _cfg("s_in22k_to_in1k_384_acc86.44", **_AT_384),
        "unireplknet_s.in22k": _cfg("s_in22k_pretrain", **_22K),
        "unireplknet_b.in22k_ft_in1k": _cfg("b_in22k_to_in1k_384_acc87.40", **_AT_384),
        "unireplknet_b.in22k": _cfg("b_in22k_pretrain", **_22K),
        "unireplknet_l.in22k_ft_in1k": _cfg("l_in22k_to_in1k_384_acc87.88", **_AT_384),
        "unireplknet_l.in22k": _cfg("l_in22k_pretrain", **_AT_192, **_22K),
        "unireplknet_xl.in22k_ft_in1k": _cfg("xl_in22k_to_in1k_384_acc87.96", **_AT_384),
        "unireplknet_xl.in22k": _cfg("xl_in22k_pretrain", **_AT_192, **_22K),
    }
)

# Drop path rates are those with which the published weights were trained, before any fine-tuning.
_A = {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), "kernel_sizes": (3, 13, 13, 13)}
_F = {**_A, "dims": (48, 96, 192, 384)}
_P = {**_A, "dims": (64, 128, 256, 512), "drop_path_rate": 0.1}
_N = {**_P, "depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)}
_T = {**_N, "depths": (3, 3, 18, 3), "kernel_sizes": (3, 13, (13, 3), 13), "drop_path_rate": 0.2}
_S = {
    "depths": (3, 3, 27, 3),
    "dims": (96, 192, 384, 768),
    "kernel_sizes": (3, 13, (13, 3, 3), 13),
    "drop_path_rate": 0.4,
}
_B = {**_S, "dims": (128, 256, 512, 1024), "drop_path_rate": 0.1}
_L = {**_B, "dims": (192, 384, 768, 1536)}
_XL = {**_L, "dims": (256, 512, 1024, 2048), "drop_path_rate": 0.2}


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_a", pretrained, **{**_A, **kwargs})


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_f", pretrained, **{**_F, **kwargs})


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_p", pretrained, **{**_P, **kwargs})


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_n", pretrained, **{**_N, **kwargs})


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_t", pretrained, **{**_T, **kwargs})


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_s", pretrained, **{**_S, **kwargs})


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_b", pretrained, **{**_B, **kwargs})


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_l", pretrained, **{**_L, **kwargs})


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return _create_unireplknet("unireplknet_xl", pretrained, **{**_XL, **kwargs})
