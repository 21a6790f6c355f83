"""LITv2: convolutional MLPs in the first two stages, HiLo attention in the third, plain attention in the last.

Papers: Pan, Cai and Zhuang, "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022, arXiv 2205.13213); its
deformable token merging is from Pan et al., "Less is More: Pay Less Attention in Vision Transformers" (AAAI 2022, arXiv
2105.14217). Code and weights: github.com/ziplab/LITv2, Apache 2.0.

What is unusual:
* There is no position embedding: the 3 x 3 convolution inside each MLP encodes positions.
* The map is downsampled by a deformable 2 x 2 convolution: a small convolution predicts the sampling offset of each of
  its four taps. On CUDA, in float32, this is `torchvision.ops.deform_conv2d`. Since the taps do not overlap, sampling
  the map once followed by a matrix product gives the same result; that is faster on the CPU, supports every dtype, and
  exports.
* The offset convolutions are initialised to zero and were trained with a hundredth of the learning rate
  (`OFFSET_LR_MULTI`; weights of `stages.*.downsample.offset`, not their biases).
* Any image size. The image is padded to whole patches. Downsampling drops the last row or column of an odd map, as in
  the official segmentation code (27 x 31 becomes 13 x 15), unless it is the only one. HiLo pads (`mixers/hilo.py`).
* `alpha`, the fraction of heads that attend to the pooled map, determines the shapes of the weights. The published
  sweep of LITv2-S has one tag each: `timm.create_model("litv2_s.alpha05_in1k", pretrained=True, alpha=0.5)`.
* `window_sizes` does not: detection on large images uses (0, 0, 4, 1) with the same weights.
* `stem_stride` 2 or 1 lets the 4 x 4 patches overlap, for small images; the weights keep their shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from ...kernels._runtime import is_exporting, wants_plain_ops
from ...mixers import HiLo
from ._checkpoints import StateDict, keep_fresh_norms, refuse_mismatch, rename, unwrap
from ._conv_mlp import evaluate_by_parts
from ._hierarchical import HierarchicalBackbone, Stage


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
        overlap = 4 - self.stride
        before = overlap // 2
        below, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        x = F.pad(x, [before, right + overlap - before, before, below + overlap - before])
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def _axis_neighbors(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the two neighbours of each position along an axis and their linear weights, [..., 2] both.

    Outside the axis, the weight is zero and the index is clamped to a valid one. A non-finite position (an overflow in
    half precision) gives non-finite weights, but never an index that would crash.
    """
    floor = position.floor()
    neighbors = torch.stack([floor, floor + 1], -1)
    weights = torch.stack([floor + 1 - position, position - floor], -1)
    inside = (neighbors >= 0) & (neighbors < length)
    return neighbors.long().clamp(0, length - 1), weights * inside


def sample_taps(x: Tensor, offset: Tensor) -> Tensor:
    """Sample the four displaced taps of every 2 x 2 square bilinearly, zero outside the map: [B, rows, columns, 4 C].

    Args:
        x: [B, H, W, C].
        offset: [B, 8, rows, columns], (y, x) in positions for each of the taps (0, 0), (0, 1), (1, 0), (1, 1).
    """
    batch, height, width, dim = x.shape
    rows, columns = offset.shape[2], offset.shape[3]
    if offset.dtype in (torch.float16, torch.bfloat16):  # too coarse for positions
        offset = offset.float()
    offset = offset.permute(0, 2, 3, 1).unflatten(-1, [4, 2])
    tap, row, column = (torch.arange(count, device=x.device) for count in (4, rows, columns))
    y, y_weights = _axis_neighbors(offset[..., 0] + (2 * row[:, None, None] + tap // 2), height)
    x_, x_weights = _axis_neighbors(offset[..., 1] + (2 * column[:, None] + tap % 2), width)

    first = height * width * torch.arange(batch, device=x.device).view(-1, 1, 1, 1, 1, 1)
    index = (first + y.unsqueeze(-1) * width + x_.unsqueeze(-2)).flatten(-2)
    weights = (y_weights.unsqueeze(-1) * x_weights.unsqueeze(-2)).flatten(-2).to(x.dtype)
    tokens = x.flatten(0, 2)
    if is_exporting():  # other runtimes have no embedding-bag operator
        corners = [tokens[index[..., i]] * weights[..., i, None] for i in range(4)]
        sampled = corners[0] + corners[1] + corners[2] + corners[3]
    else:
        sampled = F.embedding_bag(index.view(-1, 4), tokens, per_sample_weights=weights.view(-1, 4), mode="sum")
    return sampled.view(batch, rows, columns, 4 * dim)


def takes_torchvision(x: Tensor) -> bool:
    """Return whether to use torchvision's operator for `x`; it lacks bfloat16 and is inaccurate in half precision."""
    return x.is_cuda and x.dtype in (torch.float32, torch.float64) and not wants_plain_ops()


@register_notrace_module
class DeformableTokenMerging(nn.Module):
    """Downsample [B, H, W, C] to [B, H // 2, W // 2, 2 C], at least 1 x 1, by a deformable 2 x 2 convolution."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, 8, 2, stride=2, device=device, dtype=dtype)
        self.proj = nn.Conv2d(dim, 2 * dim, 2, stride=2, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(2 * dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the offsets to zero, an ordinary convolution; the other layers initialise themselves."""
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        if min(height, width) < 2:
            x = F.pad(x, [0, 0, 0, max(2 - width, 0), 0, max(2 - height, 0)])
        offset = self.offset(x.permute(0, 3, 1, 2))
        if takes_torchvision(x):
            x = deform_conv2d(x.permute(0, 3, 1, 2), offset, self.proj.weight, self.proj.bias, stride=(2, 2))
        else:
            taps = sample_taps(x, offset)
            x = F.linear(taps, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias).permute(0, 3, 1, 2)
        return self.act(self.norm(x)).permute(0, 2, 3, 1)


@register_notrace_module
class ConvMlp(nn.Module):
    """Apply an MLP with a 3 x 3 depth-wise convolution before its activation; [B, H, W, C]."""

    def __init__(self, dim: int, hidden: int, *, drop: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the depth-wise convolution; the linear layers initialise themselves."""
        nn.init.kaiming_normal_(self.dwconv.weight, mode="fan_in", nonlinearity="relu")  # fan-in equals fan-out: 9
        nn.init.zeros_(self.dwconv.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            y = evaluate_by_parts(self, x)
            if y is not None:
                return y
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(self.act(x))))


class ConvFFNBlock(nn.Module):
    """Apply a convolutional MLP as a pre-norm residual branch; [B, H, W, C]."""

    def __init__(
        self, dim: int, *, mlp_ratio: float, proj_drop: float, drop_path: float, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class HiLoBlock(nn.Module):
    """Apply HiLo attention and a convolutional MLP as pre-norm residual branches; [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        alpha: float,
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
        self.attn = HiLo(
            dim, num_heads, window_size=window_size, alpha=alpha, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class LITv2(HierarchicalBackbone):
    """LITv2.

    Args:
        embed_dim: channels of the first stage; each later one has twice as many.
        num_heads: per stage; ignored in stages without attention.
        window_sizes: HiLo's window per stage, 1 for plain attention, 0 for no attention.
        alpha: fraction of HiLo's heads that attend to the pooled map, from 0 to 1.
        stem_stride: pixels per position of the first stage: 4, or 2 or 1 for small images.
        out_norms: normalise the maps that `features_only` returns, as the published segmentation backbones do.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the projections of attention and MLP.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
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
        for name, values in (("num_heads", num_heads), ("window_sizes", window_sizes)):
            if len(values) != len(depths):
                raise ValueError(f"{name} needs one entry per stage, {len(depths)}; got {tuple(values)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def block(stage: int, drop_path: float) -> nn.Module:
            dim, window_size = embed_dim * 2**stage, window_sizes[stage]
            args: dict[str, Any] = {"mlp_ratio": mlp_ratio, "proj_drop": proj_drop_rate, "drop_path": drop_path, **dd}
            if window_size == 0:
                return ConvFFNBlock(dim, **args)
            return HiLoBlock(dim, num_heads[stage], window_size=window_size, alpha=alpha, qkv_bias=qkv_bias, **args)

        stages = [
            Stage(
                [block(i, drop_path) for drop_path in drop_paths[i]],
                dim=embed_dim * 2**i,
                reduction=stem_stride * 2**i,
                downsample=DeformableTokenMerging(embed_dim * 2 ** (i - 1), **dd) if i else None,
                out_norm=nn.LayerNorm(embed_dim * 2**i, **dd) if out_norms else None,
            )
            for i in range(len(depths))
        ]
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


def _refuse_another_alpha(state_dict: StateDict, model: nn.Module) -> None:
    """Raise ValueError naming the `alpha` of a checkpoint whose heads are split differently from the model's."""
    for name, module in model.named_modules():
        if not isinstance(module, HiLo):
            continue
        heads = module.h_heads + module.l_heads
        low, high = state_dict.get(f"{name}.l_proj.weight"), state_dict.get(f"{name}.h_proj.weight")
        dim = sum(weight.shape[0] for weight in (low, high) if weight is not None)
        low_heads = 0 if low is None else low.shape[0] // module.head_dim
        if dim == module.dim and low_heads != module.l_heads:
            steps = [step / 20 for step in range(21) if int(heads * (step / 20)) == low_heads]
            remedy = f"create the model with alpha={steps[0] if steps else low_heads / heads}"
            raise ValueError(
                f"the checkpoint gives {low_heads} of {heads} heads to the pooled map, "
                f"the model {module.l_heads}; {remedy}"
            )


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename published parameters to ours; also accept dense-task backbones (`norm0` to `norm3`, no head)."""
    rules = [
        (r"patch_embed\.", "stem."),
        (r"norm(\d)\.", r"stages.\1.out_norm."),
        (r"head\.(weight|bias)", r"head.fc.\1"),
        (r"layers\.(\d+\.blocks\.\d+\.mlp\.dwconv)\.dwconv\.", r"stages.\1."),
    ]
    for i in range(1, len(model.stages)):
        published, ours = rf"layers\.{i - 1}\.downsample\.", f"stages.{i}.downsample."
        rules += [
            (rf"{published}dconv\.conv_offset\.", f"{ours}offset."),
            (rf"{published}dconv\.", f"{ours}proj."),
            (rf"{published}norm_layer\.", f"{ours}norm."),
        ]
    state_dict = rename(unwrap(checkpoint), [*rules, (r"layers\.", "stages.")])
    _refuse_another_alpha(state_dict, model)
    state_dict = keep_fresh_norms(state_dict, model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_litv2(name: str, pretrained: bool, **kwargs: Any) -> LITv2:
    return build_model_with_cfg(
        LITv2,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://github.com/ziplab/LITv2/releases/download/{file}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "origin_url": "https://github.com/ziplab/LITv2",
        "paper_name": "Fast Vision Transformers with HiLo Attention",
        "paper_ids": "arXiv:2205.13213",
        **kwargs,
    }


def _alpha_cfg(alpha: str) -> dict[str, Any]:
    return _cfg(f"v1.1/alpha_{alpha}.pth", description=f"needs alpha={alpha}")


_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}

default_cfgs = generate_default_cfgs(
    {
        "litv2_s.in1k": _cfg("v1.0/litv2_s.pth"),
        "litv2_s.alpha00_in1k": _alpha_cfg("0"),
        "litv2_s.alpha02_in1k": _alpha_cfg("0.2"),
        "litv2_s.alpha04_in1k": _alpha_cfg("0.4"),
        "litv2_s.alpha05_in1k": _alpha_cfg("0.5"),
        "litv2_s.alpha07_in1k": _alpha_cfg("0.7"),
        "litv2_s.alpha10_in1k": _alpha_cfg("1"),
        "litv2_m.in1k": _cfg("v1.0/litv2_m.pth"),
        "litv2_b.in1k": _cfg("v1.0/litv2_b.pth"),
        "litv2_b.in1k_384": _cfg("v1.0/litv2_b_384.pth", **_AT_384),
    }
)

_S = {"depths": (2, 2, 6, 2), "embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2}
_M = {**_S, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_B = {**_M, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create_litv2("litv2_s", pretrained, **{**_S, **kwargs})


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create_litv2("litv2_m", pretrained, **{**_M, **kwargs})


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create_litv2("litv2_b", pretrained, **{**_B, **kwargs})
