"""MobileMamba: three stages starting at stride 16, whose blocks combine a long, a short and no receptive field.

Paper: He et al., "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network" (CVPR 2025, arXiv 2411.15941). Code:
github.com/lewandofskee/MobileMamba, MIT. The weights are on Google Drive, whose URLs do not name a file: they must be
downloaded by hand, and `pretrained=True` says from where.

What is unusual:
* A block's mixer passes most channels to `WaveletSS2D`, some to a depth-wise convolution, and the rest through
  unchanged. The fractions vary between stages; the first part is rounded to a multiple of 16.
* Besides the five residual branches of a block, a further shortcut connects its input and its output.
* `timm.utils.reparameterize_model(model)` folds away every batch norm and the scales of the wavelet mixers.
* B1, B2 and B4 are one network at 256, 384 and 512 pixels. The default weights are those of 300 epochs; the tag
  `dist_in1k` has the authors' of 1000 epochs with a teacher (their T2s to B4s).
* The published state dict contains the wavelet filters. They are dropped if they are Haar's, and used otherwise.
* Maps are channels_last internally, whatever the memory format of the image.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, SqueezeExcite, calculate_drop_path_rates
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    reparameterize_model,
)
from torch import Tensor, nn

from ...mixers import WaveletSS2D
from ...mixers.conv_norm import ConvNorm
from ...mixers.dilated_reparam import fold_norm, statistics_of
from ._checkpoints import StateDict, drive_url, refuse_drive, refuse_mismatch, unwrap
from ._hierarchical import HierarchicalBackbone, Stage


class ConvFfn(nn.Module):
    """Apply two 1 x 1 convolutions with ReLU between them; the second is initialised to zero."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, 2 * dim, **dd)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(2 * dim, dim, norm_weight=0.0, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class Downsample(nn.Module):
    """Downsample [B, dim, H, W] to [B, out_dim, ceil(H / 2), ceil(W / 2)], between two convolutions and MLPs."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.dw0 = ConvNorm(dim, dim, 3, depthwise=True, norm_weight=0.0, **dd)
        self.ffn0 = ConvFfn(dim, **dd)
        self.conv1 = ConvNorm(dim, 4 * dim, **dd)
        self.act = nn.ReLU()
        self.conv2 = ConvNorm(4 * dim, 4 * dim, 3, stride=2, depthwise=True, **dd)
        self.se = SqueezeExcite(4 * dim, 0.25, **dd)
        self.conv3 = ConvNorm(4 * dim, out_dim, **dd)
        self.dw1 = ConvNorm(out_dim, out_dim, 3, depthwise=True, norm_weight=0.0, **dd)
        self.ffn1 = ConvFfn(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dw0(x)
        x = x + self.ffn0(x)
        x = self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))
        x = x + self.dw1(x)
        return x + self.ffn1(x)


class MultiReceptiveMixer(nn.Module):
    """The paper's MRFFI: mix some channels globally, some locally and some not at all, then project."""

    def __init__(self, dim: int, *, global_ratio: float, local_ratio: float, kernel_size: int, **dd: Any) -> None:
        super().__init__()
        wide = int(global_ratio * dim)
        wide = wide // 16 * 16 if wide % 16 < 8 else wide // 16 * 16 + 16
        near = min(int(local_ratio * dim), dim - wide)
        if wide < 1 or near < 1:
            raise ValueError(
                f"global_ratio and local_ratio must leave channels to both parts, the first a multiple of 16; got "
                f"{global_ratio} and {local_ratio} of {dim} channels"
            )
        self.parts = [wide, near, dim - wide - near]
        self.global_op = WaveletSS2D(wide, kernel_size=kernel_size, **dd)
        self.local_op = nn.Sequential(
            ConvNorm(near, near, kernel_size, depthwise=True, **dd),
            nn.ReLU(),
            ConvNorm(near, near, depthwise=True, **dd),
        )
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim, norm_weight=0.0, **dd)

    def forward(self, x: Tensor) -> Tensor:
        wide, near, rest = x.split(self.parts, dim=1)
        wide = self.global_op(wide.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj(self.act(torch.cat([wide, self.local_op(near), rest], dim=1)))


class MobileMambaBlock(nn.Module):
    """Apply convolution, MLP, mixer, convolution and MLP as residual branches, then add the input; [B, C, H, W]."""

    def __init__(
        self, dim: int, *, global_ratio: float, local_ratio: float, kernel_size: int, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.dw0 = ConvNorm(dim, dim, 3, depthwise=True, norm_weight=0.0, **dd)
        self.ffn0 = ConvFfn(dim, **dd)
        self.mixer = MultiReceptiveMixer(
            dim, global_ratio=global_ratio, local_ratio=local_ratio, kernel_size=kernel_size, **dd
        )
        self.dw1 = ConvNorm(dim, dim, 3, depthwise=True, norm_weight=0.0, **dd)
        self.ffn1 = ConvFfn(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.dw0(x)
        y = y + self.ffn0(y)
        y = y + self.mixer(y)
        y = y + self.dw1(y)
        return x + self.drop_path(y + self.ffn1(y))


class NormClassifierHead(ClassifierHead):
    """timm's pooling and classifier, with a batch norm in between that exists only with the classifier."""

    def __init__(self, in_features: int, num_classes: int, **kwargs: Any) -> None:
        super().__init__(in_features, num_classes, **kwargs)
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.norm: nn.Module = nn.BatchNorm1d(self.num_features, **dd) if num_classes else nn.Identity()

    def reset(self, num_classes: int, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().reset(num_classes, *args, device=device, dtype=dtype, **kwargs)
        if num_classes == 0:
            self.norm = nn.Identity()
        elif not isinstance(self.norm, nn.BatchNorm1d) or self.norm.num_features != self.num_features:
            self.norm = nn.BatchNorm1d(self.num_features, device=device, dtype=dtype)
        self.norm.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.flatten(self.global_pool(x))
        return x if pre_logits else self.fc(self.drop(self.norm(x)))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the norm into the classifier, in place."""
        if not isinstance(self.norm, nn.BatchNorm1d):
            return
        one = torch.ones_like(self.norm.weight)
        scale, shift = fold_norm(one, None, *statistics_of(self.norm))
        fc: Any = self.fc
        weight = fc.weight.to(scale.dtype)
        fc.bias += (weight @ shift).to(fc.bias.dtype)
        fc.weight.copy_(weight * scale)
        self.norm = nn.Identity().train(self.training)


class ChannelsLast(nn.Module):
    """Convert [B, C, H, W] to the channels_last memory format."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


class MobileMamba(HierarchicalBackbone):
    """MobileMamba.

    Args:
        global_ratios: approximate fraction of each stage's channels that are scanned; rounded to a multiple of 16.
        local_ratios: fraction that the depth-wise convolution processes, limited by what the first leaves.
        kernel_sizes: of that convolution, and of the convolution of the wavelet transform.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 2, 2),
        dims: Sequence[int] = (144, 272, 368),
        global_ratios: Sequence[float] = (0.8, 0.7, 0.6),
        local_ratios: Sequence[float] = (0.2, 0.2, 0.3),
        kernel_sizes: Sequence[int] = (7, 5, 3),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        per_stage = {"dims": dims, "global_ratios": global_ratios, "local_ratios": local_ratios}
        for name, values in (per_stage | {"kernel_sizes": kernel_sizes}).items():
            if len(values) != len(depths):
                raise ValueError(f"{name} needs one entry per stage, {len(depths)}; got {tuple(values)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                MobileMambaBlock(
                    dim,
                    global_ratio=global_ratios[i],
                    local_ratio=local_ratios[i],
                    kernel_size=kernel_sizes[i],
                    drop_path=drop_path,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            downsample = Downsample(dims[i - 1], dim, **dd) if i else None
            stages.append(Stage(blocks, dim=dim, reduction=16 * 2**i, downsample=downsample))
        widths = [in_chans, *(dims[0] // part for part in (8, 4, 2, 1))]
        stem: list[nn.Module] = [ChannelsLast()]
        for before, after in itertools.pairwise(widths):
            stem += [ConvNorm(before, after, 3, stride=2, **dd), nn.ReLU()]
        super().__init__(
            nn.Sequential(*stem[:-1]),
            stages,
            NormClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NCHW",
        )

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        """Exempt the decay parameters of the scans, as Mamba does; the authors decay everything but vectors."""
        return {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".D", ".dt_bias"))}


# (published pattern, our replacement), in the order of application.
_PIECES = [
    (r"^patch_embed\.0\.", "stem.1."),
    (r"^patch_embed\.2\.", "stem.3."),
    (r"^patch_embed\.4\.", "stem.5."),
    (r"^patch_embed\.6\.", "stem.7."),
    (r"^head\.bn\.", "head.norm."),
    (r"^head\.l\.", "head.fc."),
    (r"\.m\.(attn\.)?", "."),
    (r"\.proj\.1\.", ".proj."),
    (r"\.local_op\.dwconv3x3\.", ".local_op.0.conv."),
    (r"\.local_op\.bn1\.", ".local_op.0.norm."),
    (r"\.local_op\.dwconv1x1\.", ".local_op.2.conv."),
    (r"\.local_op\.bn2\.", ".local_op.2.norm."),
    (r"\.(base_scale|wavelet_scale\.0)\.weight$", r".\1"),
    (r"\.wavelet_scale\.0$", ".wavelet_scale"),
    (r"\.wavelet_convs\.0\.", ".conv."),
    (r"\.global_atten\.(in|out)_proj\.c\.", r".ss2d.\1_proj.linear."),
    (r"\.global_atten\.x_proj_weight$", ".ss2d.scan.x_proj_weight"),
    (r"\.global_atten\.dt_projs_(weight|bias)$", r".ss2d.scan.dt_\1"),
    (r"\.global_atten\.A_logs$", ".ss2d.scan.A_log"),
    (r"\.global_atten\.Ds$", ".ss2d.scan.D"),
    (r"\.global_atten\.", ".ss2d."),
    (r"\.c\.", ".conv."),
    (r"\.bn\.", ".norm."),
]
_DOWNSAMPLE = {"0.0": "dw0.", "0.1": "ffn0.", "1": "", "2.0": "dw1.", "2.1": "ffn1."}


def _our_name(name: str) -> str:
    """Convert a published name; names that are already ours stay unchanged."""
    first = re.match(r"blocks1\.", name)
    if first:
        name = f"stages.0.blocks.{name[first.end() :]}"
    elif place := re.match(r"blocks(\d)\.(0\.0|0\.1|1|2\.0|2\.1)\.", name):
        name = f"stages.{int(place[1]) - 1}.downsample.{_DOWNSAMPLE[place[2]]}{name[place.end() :]}"
    elif place := re.match(r"blocks(\d)\.(\d+)\.", name):
        name = f"stages.{int(place[1]) - 1}.blocks.{int(place[2]) - 3}.{name[place.end() :]}"
    for pattern, replacement in _PIECES:
        name = re.sub(pattern, replacement, name)
    return name


# For each sub-band, the weights of the pixels of a 2 x 2 square.
_HAAR = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2


def _take_filters(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Remove the wavelet filters if they are Haar's; otherwise register them with their mixer."""
    state_dict = dict(state_dict)
    for name, mixer in model.named_modules():
        names = [f"{name}.wt_filter", f"{name}.iwt_filter"]
        if not isinstance(mixer, WaveletSS2D) or any(
            filters not in state_dict or state_dict[filters].shape != (4 * mixer.dim, 1, 2, 2) for filters in names
        ):
            continue
        by_channel = [state_dict.pop(filters).view(mixer.dim, 4, 2, 2) for filters in names]
        filters = [bank.permute(1, 2, 3, 0).contiguous() for bank in by_channel]
        if not all(torch.allclose(bank, _HAAR[..., None].to(bank), atol=1e-4) for bank in filters):
            mixer.use_filters(*filters)
            state_dict[f"{name}.analysis"], state_dict[f"{name}.synthesis"] = filters
    return state_dict


def _reshape(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Reshape the weights of scans and projections to our shapes, and reorder sub-bands into blocks of channels."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fitted = {}
    for name, tensor in state_dict.items():
        if name.endswith(("global_op.conv.weight", "wavelet_scale")):
            tensor = tensor.flatten(0, 1) if tensor.shape[0] == 1 else tensor
            tensor = tensor.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)
        shape = shapes.get(name, tensor.shape)
        fitted[name] = tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor
    return fitted


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: MobileMamba) -> StateDict:
    """Rename published parameters to ours.

    From a training checkpoint, take the trained weights `net`, or their average `net_E` if only that exists. A file of
    a re-parameterised model re-parameterises `model`, in place.
    """
    for envelope in ("net", "net_E"):
        if isinstance(checkpoint.get(envelope), Mapping):
            checkpoint = checkpoint[envelope]
    state_dict = unwrap(checkpoint)
    if any(name.startswith(("blocks1.", "patch_embed.")) for name in state_dict):
        state_dict = {_our_name(name): tensor for name, tensor in state_dict.items()}
        state_dict = _reshape(_take_filters(state_dict, model), model)
    elif "stem.1.weight" in state_dict:
        reparameterize_model(model, inplace=True)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_mobilemamba(name: str, pretrained: bool, **kwargs: Any) -> MobileMamba:
    if pretrained:
        refuse_drive(name, kwargs)
    return build_model_with_cfg(
        MobileMamba,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(size: int, drive_id: str) -> dict[str, Any]:
    last = -(-size // 64)
    return {
        "url": drive_url(drive_id),
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (last, last),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.1.conv",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/lewandofskee/MobileMamba",
        "paper_name": "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network",
        "paper_ids": "arXiv:2411.15941",
    }


default_cfgs = generate_default_cfgs(
    {
        "mobilemamba_t2.in1k": _cfg(192, "1LXh5wjVEUu5Kj1foclC9zmlKsy7JpMQ-"),
        "mobilemamba_t2.dist_in1k": _cfg(192, "14UUeEeN62a1jo5qit-m0yChQnNU8JWQG"),
        "mobilemamba_t4.in1k": _cfg(192, "17-5Q93_cEhBYMDzWTq4sDcc4_c_ezwpd"),
        "mobilemamba_t4.dist_in1k": _cfg(192, "12e1RKJEYDWVjOZuQLycjOUkA5PqCUnwu"),
        "mobilemamba_s6.in1k": _cfg(224, "13en_zNB2wuHmnHKZMUQDe4KizlaTCHbP"),
        "mobilemamba_s6.dist_in1k": _cfg(224, "1ujVeWpoICjioRF0aB7PD1fadM4PGFRfl"),
        "mobilemamba_b1.in1k": _cfg(256, "1ODO1XM2luMfczbDLJxHrEl-ie7yUscAC"),
        "mobilemamba_b1.dist_in1k": _cfg(256, "15rBhYky_f7jNSknXujuwQESaIkiTBAR1"),
        "mobilemamba_b2.in1k": _cfg(384, "1tJJZqeP09D_IAKKFuQtJQOYm4eNGjr1r"),
        "mobilemamba_b2.dist_in1k": _cfg(384, "1KuleL6Fi84zkjIhkRFbR4lqGa2iu6bOp"),
        "mobilemamba_b4.in1k": _cfg(512, "1MiGLHSldK2JpbQEe-7VlmFsaCdugDnYR"),
        "mobilemamba_b4.dist_in1k": _cfg(512, "1KevdesGm8Pb4fEbgZ5JY4FMy9IQgYbiZ"),
    }
)

_T2 = {"depths": (1, 2, 2), "dims": (144, 272, 368)}
_T4 = {"depths": (1, 2, 2), "dims": (176, 368, 448)}
_S6 = {"depths": (1, 2, 2), "dims": (192, 384, 448)}
_B = {"depths": (2, 3, 2), "dims": (200, 376, 448), "drop_path_rate": 0.03}


@register_model
def mobilemamba_t2(pretrained: bool = False, **kwargs: Any) -> MobileMamba:
    return _create_mobilemamba("mobilemamba_t2", pretrained, **{**_T2, **kwargs})


@register_model
def mobilemamba_t4(pretrained: bool = False, **kwargs: Any) -> MobileMamba:
    return _create_mobilemamba("mobilemamba_t4", pretrained, **{**_T4, **kwargs})


@register_model
def mobilemamba_s6(pretrained: bool = False, **kwargs: Any) -> MobileMamba:
    return _create_mobilemamba("mobilemamba_s6", pretrained, **{**_S6, **kwargs})


@register_model
def mobilemamba_b1(pretrained: bool = False, **kwargs: Any) -> MobileMamba:
    return _create_mobilemamba("mobilemamba_b1", pretrained, **{**_B, **kwargs})


@register_model
def mobilemamba_b2(pretrained: bool = False, **kwargs: Any) -> MobileMamba:
    return _create_mobilemamba("mobilemamba_b2", pretrained, **{**_B, **kwargs})


@register_model
def mobilemamba_b4(pretrained: bool = False, **kwargs: Any) -> MobileMamba:
    return _create_mobilemamba("mobilemamba_b4", pretrained, **{**_B, **kwargs})
