"""VMamba: a pyramid whose blocks scan the map along its rows and columns, in both directions.

Paper: Liu et al., "VMamba: Visual State Space Model" (NeurIPS 2024, arXiv 2401.10166). Code and weights:
github.com/MzeroMiko/VMamba, MIT.

What is unusual:
* Two architectures share the name. The current one, `vmamba_*`, has an MLP in each block, convolutions of stride two, a
  state of one element per channel and no gate; `s2l15` means expansion 2 in the scans and 15 blocks in the third stage.
  The first one, `vmambav0_*`, is Mamba's block on maps: no MLP, a state of 16, a gate, Swin's patch merging.
* Maps are [B, H, W, C] from stem to head; the convolutions see them as channels_last.
* Any image size. The current stem and downsampling round up by their padding; the patches and squares of the first
  architecture are zero-padded, where the official code crops an image that is no multiple of four.
* From a file with trained and averaged weights, "model" is loaded: in the released files those are the weights the
  authors evaluated, averaging included. A local file is read by timm, which prefers "model_ema".
* The official training decays `A_log` and `dt_bias`; ours does not, see `VMamba.no_weight_decay`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers import SS2D
from ._checkpoints import StateDict, keep_fresh_norms, refuse_mismatch, rename, unwrap
from ._hierarchical import HierarchicalBackbone, Stage
from .dinat_s import PatchMerging


class ConvStem(nn.Module):
    """Embed [B, in_chans, H, W] as [B, ceil(H / 4), ceil(W / 4), dim], by two convolutions of stride two."""

    def __init__(self, in_chans: int, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.act(self.norm1(x))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """Downsample [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), out_dim]."""

    def __init__(self, dim: int, out_dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    """Embed [B, in_chans, H, W] as [B, ceil(H / 4), ceil(W / 4), dim]."""

    def __init__(self, in_chans: int, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, [0, 3, 0, 3])  # the maximum that any size needs: the convolution drops incomplete patches
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class VSSBlock(nn.Module):
    """Apply scans and an MLP as pre-norm residual branches; [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        *,
        expand: float,
        state_dim: int,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = SS2D(dim, expand=expand, state_dim=state_dim, gate=False, conv_bias=False, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class VSSBlockV0(nn.Module):
    """Apply gated scans as a pre-norm residual branch; [B, H, W, C]."""

    def __init__(
        self, dim: int, *, expand: float, state_dim: int, drop_path: float, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mixer = SS2D(dim, expand=expand, state_dim=state_dim, device=device, dtype=dtype)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path1(self.mixer(self.norm1(x)))


def parameters_of_scans(model: nn.Module) -> set[str]:
    """Return the names of A_log, D and dt_bias of every scan in a model."""
    return {name for name, _ in model.named_parameters() if name.endswith((".A_log", ".D", ".dt_bias"))}


class VMamba(HierarchicalBackbone):
    """VMamba, the current architecture.

    Args:
        expand: inner channels of the scans, as a multiple of the map's channels.
        state_dim: state elements per channel of the scans.
        out_norms: normalise the maps that `features_only` returns, as the published segmentation and detection
            backbones do.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside and after each MLP.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        expand: float = 1.0,
        state_dim: int = 1,
        mlp_ratio: float = 4.0,
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
        if len(dims) != len(depths):
            raise ValueError(f"dims needs one entry per stage, {len(depths)}; got {tuple(dims)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        block_args: dict[str, Any] = {"expand": expand, "state_dim": state_dim, "mlp_ratio": mlp_ratio}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                [
                    VSSBlock(dim, **block_args, proj_drop=proj_drop_rate, drop_path=drop_path, **dd)
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

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        """Exempt A_log, D and dt_bias of every scan, as Mamba does: decayed to zero, all states would forget at one
        rate. The official training of VMamba decays A_log and dt_bias, apparently by an oversight: it marks these
        parameters, but its optimizer does not read the marks."""
        return parameters_of_scans(self)


class VMambaV0(HierarchicalBackbone):
    """VMamba, the first architecture.

    Args:
        embed_dim: channels of the first stage; each later one has twice as many.
        expand: inner channels of the scans, as a multiple of the map's channels.
        state_dim: state elements per channel of the scans.
        out_norms: normalise the maps that `features_only` returns, as in `VMamba`.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 9, 2),
        embed_dim: int = 96,
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
        stages = [
            Stage(
                [
                    VSSBlockV0(dim, expand=expand, state_dim=state_dim, drop_path=drop_path, **dd)
                    for drop_path in drop_paths[i]
                ],
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


_OP = r"(.+\.mixer\.)"
SS2D_RULES = [
    (_OP + r"x_proj(?:_|\.)weight", r"\1scan.x_proj_weight"),
    (_OP + r"dt_projs(?:_|\.)(weight|bias)", r"\1scan.dt_\2"),
    (_OP + "A_logs", r"\1scan.A_log"),
    (_OP + "Ds", r"\1scan.D"),
]
"""(pattern, replacement) from published names inside `SS2D` to ours, once the mixers are called `mixer`."""


def reshape_weights(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Reshape scan weights, published flat, stacked or as grouped convolutions, and 1 x 1 convolutions to our shapes.

    The scan is the slowest axis in each published form.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fitted = dict(state_dict)
    for name, tensor in state_dict.items():
        shape = shapes.get(name, tensor.shape)
        is_another_form = ".scan." in name or (tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and len(shape) == 2)
        if is_another_form and tensor.numel() == shape.numel():
            fitted[name] = tensor.reshape(shape)
    return fitted


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename published parameters to ours.

    Accept classifiers of both architectures with the names of any year and of the single file `vmamba.py`, and
    segmentation and detection backbones (`outnorm0` to `outnorm3`, no head).
    """
    rules = [
        (r"layers\.(\d+\.blocks\.\d+)\.(?:norm|ln_1)\.", r"stages.\1.norm1."),
        (r"layers\.(\d+\.blocks\.\d+)\.(?:op|self_attention)\.", r"stages.\1.mixer."),
        (r"layers\.(\d+\.blocks)\.", r"stages.\1."),
        (r"patch_embed\.(?:0|proj)\.", "stem.conv1." if isinstance(model, VMamba) else "stem.proj."),
        (r"patch_embed\.(?:2|norm)\.", "stem.norm1." if isinstance(model, VMamba) else "stem.norm."),
        (r"patch_embed\.5\.", "stem.conv2."),
        (r"patch_embed\.7\.", "stem.norm2."),
        (r"outnorm(\d)\.", r"stages.\1.out_norm."),
        (r"(?:classifier\.)?norm\.", "norm."),
        (r"(?:classifier\.)?head\.(weight|bias)", r"head.fc.\1"),
    ]
    for i in range(1, len(model.stages)):
        published, ours = rf"layers\.{i - 1}\.downsample\.", f"stages.{i}.downsample."
        rules += [(published + r"1\.", f"{ours}conv."), (published + r"3\.", f"{ours}norm."), (published, ours)]
    state_dict = rename(rename(unwrap(checkpoint), rules), SS2D_RULES)
    state_dict = keep_fresh_norms(reshape_weights(state_dict, model), model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create(cls: type[HierarchicalBackbone], name: str, pretrained: bool, **kwargs: Any) -> Any:
    return build_model_with_cfg(
        cls,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://github.com/MzeroMiko/VMamba/releases/download/{file}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        "paper_name": "VMamba: Visual State Space Model",
        "paper_ids": "arXiv:2401.10166",
        **kwargs,
    }


def _v0(file: str) -> dict[str, Any]:
    return _cfg(f"%23v0cls/{file}", first_conv="stem.proj")


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8.in1k": _cfg("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264"),
        "vmamba_tiny_s2l5.in1k": _cfg("%23v2cls/vssm_tiny_0230_ckpt_epoch_262"),
        "vmamba_small_s1l20.in1k": _cfg("%23v2cls/vssm1_small_0229s_ckpt_epoch_240"),
        "vmamba_small_s2l15.in1k": _cfg("%23v2cls/vssm_small_0229_ckpt_epoch_222"),
        "vmamba_base_s1l20.in1k": _cfg("%23v2cls/vssm1_base_0229s_ckpt_epoch_225"),
        "vmamba_base_s2l15.in1k": _cfg("%23v2cls/vssm_base_0229_ckpt_epoch_237"),
        "vmambav0_tiny.in1k": _v0("vssmtiny_dp01_ckpt_epoch_292"),
        "vmambav0_small.in1k": _v0("vssmsmall_dp03_ckpt_epoch_238"),
        "vmambav0_base.in1k": _v0("vssmbase_dp06_ckpt_epoch_241"),
    }
)

_96 = {"dims": (96, 192, 384, 768)}
_128 = {"dims": (128, 256, 512, 1024)}


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = {**_96, "depths": (2, 2, 8, 2), "expand": 1.0, "drop_path_rate": 0.2}
    return _create(VMamba, "vmamba_tiny_s1l8", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = {**_96, "depths": (2, 2, 5, 2), "expand": 2.0, "drop_path_rate": 0.2}
    return _create(VMamba, "vmamba_tiny_s2l5", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = {**_96, "depths": (2, 2, 20, 2), "expand": 1.0, "drop_path_rate": 0.3}
    return _create(VMamba, "vmamba_small_s1l20", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = {**_96, "depths": (2, 2, 15, 2), "expand": 2.0, "drop_path_rate": 0.3}
    return _create(VMamba, "vmamba_small_s2l15", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = {**_128, "depths": (2, 2, 20, 2), "expand": 1.0, "drop_path_rate": 0.5}
    return _create(VMamba, "vmamba_base_s1l20", pretrained, **{**model_args, **kwargs})


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = {**_128, "depths": (2, 2, 15, 2), "expand": 2.0, "drop_path_rate": 0.6}
    return _create(VMamba, "vmamba_base_s2l15", pretrained, **{**model_args, **kwargs})


@register_model
def vmambav0_tiny(pretrained: bool = False, **kwargs: Any) -> VMambaV0:
    model_args = {"depths": (2, 2, 9, 2), "embed_dim": 96, "drop_path_rate": 0.1}
    return _create(VMambaV0, "vmambav0_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def vmambav0_small(pretrained: bool = False, **kwargs: Any) -> VMambaV0:
    model_args = {"depths": (2, 2, 27, 2), "embed_dim": 96, "drop_path_rate": 0.3}
    return _create(VMambaV0, "vmambav0_small", pretrained, **{**model_args, **kwargs})


@register_model
def vmambav0_base(pretrained: bool = False, **kwargs: Any) -> VMambaV0:
    model_args = {"depths": (2, 2, 27, 2), "embed_dim": 128, "drop_path_rate": 0.6}
    return _create(VMambaV0, "vmambav0_base", pretrained, **{**model_args, **kwargs})
