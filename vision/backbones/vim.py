"""Vim: a plain stack of bidirectional Mamba blocks over patches, with the class token in the middle.

Paper: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (ICML
2024, arXiv 2401.09417). Code: github.com/hustvl/Vim, Apache-2.0. Weights: huggingface.co/hustvl, Vim-tiny-midclstok,
Vim-small-midclstok and Vim-base-midclstok; the file names there are from memory and have not been verified.

What is unusual:
* The class token is in the middle of the sequence, before patch number M // 2 of M, at any image size. The tokens that
  `forward_features` returns have that order; intermediate features contain the patches only, and prefix tokens
  separately. The position embedding is stored as in timm, with the class token's first, and resampled without it.
* The published code passes two streams from block to block, the residual and its next addend, so that one kernel can
  add and normalise. Here their sum is a single stream, which is float32 whatever the dtype of the weights, as there.
  Stochastic depth rates rise linearly from the first block's output to the last's; the published code applies each one
  block later, to the same addition.
* In `*_stride8` the patches of 16 pixels overlap: 27 x 27 of them at 224 pixels. In all models, an image that ends
  within a patch is zero-padded at its end. Published models accept only one image size.
* There is no MLP: a block is its mixer.
* The published segmentation and detection backbones are another, older model (rotary positions, class token first),
  without published weights.
* Weight decay: none on `A_log`, `D` and the bias of the step sizes, which are rates and not directions. The authors
  exempt only one-dimensional parameters, so they decay `A_log`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    PatchEmbed,
    RmsNorm,
    global_pool_nlc,
    register_notrace_module,
    resample_abs_pos_embed,
    resample_patch_embed,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers import BidirectionalMamba
from ._checkpoints import StateDict, refuse_mismatch, rename, unwrap
from ._isotropic import IsotropicBackbone
from ._positions import resample_positions

torch.fx.wrap("resample_positions")


def _beyond(length: int, patch_size: int, stride: int) -> int:
    """Return the padding of an axis to whole patches, without branching: the length may be symbolic while exporting."""
    if torch.jit.is_scripting():
        return max(length, patch_size) + (patch_size - max(length, patch_size)) % stride - length
    else:
        covered = torch.sym_max(length, patch_size)
        return covered + (patch_size - covered) % stride - length  # pyright: ignore[reportReturnType]


@register_notrace_module
class OverlappingPatchEmbed(PatchEmbed):
    """Embed [B, in_chans, H, W] as [B, rows, columns, C]: patches that begin every `stride` pixels, at least one."""

    def __init__(self, *, patch_size: int, stride: int, **kwargs: Any) -> None:
        self.stride: Any = (stride, stride)  # set first, since the base constructor asks for the number of patches
        super().__init__(patch_size=patch_size, **kwargs)
        self.proj.stride = self.stride

    def _init_img_size(self, img_size: int | tuple[int, int]) -> Any:
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = self.dynamic_feat_size((size[0], size[1]))
        return size, grid, grid[0] * grid[1]

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(f"the size of overlapping patches cannot be changed; got patch_size {patch_size}")
        super().set_input_size(img_size)

    def feat_ratio(self, as_scalar: bool = True) -> Any:
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        sizes: Any = zip(img_size, self.patch_size, self.stride, strict=True)
        rows, columns = [(side + _beyond(side, patch, stride) - patch) // stride + 1 for side, patch, stride in sizes]
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        below = _beyond(x.shape[2], self.patch_size[0], self.stride[0])  # pyright: ignore[reportArgumentType]
        right = _beyond(x.shape[3], self.patch_size[1], self.stride[1])  # pyright: ignore[reportArgumentType]
        return self.proj(F.pad(x, [0, right, 0, below])).permute(0, 2, 3, 1)


@torch.fx.wrap
def _wide(x: Tensor) -> Tensor:
    """Cast tokens to the dtype of the residual stream: float32, or float64 if they are."""
    return x if x.dtype == torch.float64 else x.float()


@register_notrace_module
class StreamNorm(RmsNorm):
    """Apply RMS norm to the float32 stream, in float32, and return the dtype of the weight."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


class VimBlock(nn.Module):
    """Compute x + mixer(norm(x)); takes and returns the stream [B, N, C] and the grid."""

    def __init__(self, dim: int, *, drop_path: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.norm = StreamNorm(dim, device=device, dtype=dtype)
        self.mixer = BidirectionalMamba(dim, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        return x + self.drop_path(self.mixer(self.norm(x))), grid


class Vim(IsotropicBackbone):
    """Vim.

    Args:
        img_size: image size that the position embedding is made for; for others it is resampled.
        stride: pixels between the starts of adjacent patches, `patch_size` if None.
        global_pool: "token", or a pooling over the patches.
        fc_norm: normalise after pooling instead of before.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        fc_norm: bool = False,
        embed_dim: int = 192,
        depth: int = 24,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if global_pool not in ("", "avg", "avgmax", "max", "token"):
            raise ValueError(f"global_pool must be 'token', 'avg', 'max', 'avgmax' or ''; got {global_pool!r}")
        stride = patch_size if stride is None else stride
        if not 1 <= stride <= patch_size:
            raise ValueError(f"stride must lie between 1 and patch_size, {patch_size}; got {stride}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,  # type: ignore[arg-type]
            embed_dim=embed_dim,
            depth=depth,
            num_heads=1,
            fc_norm=fc_norm,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            weight_init="reset",
            embed_layer=partial(OverlappingPatchEmbed, stride=stride) if stride < patch_size else PatchEmbed,
            norm_layer=StreamNorm,
            block_fn=_make_block,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as the published code does: Mamba's mixers, with output projections scaled down by depth."""
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=0.02)
        fan_in = self.patch_embed.proj.weight[0].numel()
        trunc_normal_(self.patch_embed.proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for block in self.blocks:
            projection: Any = block.mixer.out_proj.weight  # pyright: ignore[reportAttributeAccessIssue]
            bound = (projection.shape[1] * len(self.blocks)) ** -0.5
            nn.init.uniform_(projection, -bound, bound)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        rates = ("A_log", ".D", "dt_bias", "conv_bias")
        return {"pos_embed", "cls_token", *(name for name, _ in self.named_parameters() if name.endswith(rates))}

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Turn patches [B, rows, columns, C] into the stream [B, rows * columns + 1, C], class token in the middle."""
        positions = resample_positions(self.pos_embed[:, 1:], self.patch_embed.grid_size, (x.shape[1], x.shape[2]))  # pyright: ignore
        patches = x.flatten(1, 2) + positions
        token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)  # pyright: ignore
        middle = patches.shape[1] // 2
        return _wide(self.pos_drop(torch.cat([patches[:, :middle], token, patches[:, middle:]], dim=1)))

    def dense_tokens(self, x: Tensor, state: tuple[int, int]) -> tuple[Tensor, Tensor]:
        middle = (x.shape[1] - 1) // 2
        x = x.to(self.cls_token.dtype)  # pyright: ignore
        return x[:, middle : middle + 1], torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == "":
            return x
        if pool_type == "token":
            return x[:, (x.shape[1] - 1) // 2]
        return global_pool_nlc(self.dense_tokens(x, (0, 0))[1], pool_type=pool_type, num_prefix_tokens=0)


def _make_block(*, dim: int, drop_path: float, device: Any, dtype: Any, **_: Any) -> VimBlock:
    """Build a block. timm passes all options of a ViT block; the others do not apply here."""
    return VimBlock(dim, drop_path=drop_path, device=device, dtype=dtype)


# Our name -> the published names of its two directions.
_PAIRS = {
    "conv_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv_bias": ("conv1d.bias", "conv1d_b.bias"),
    "scan.x_proj_weight": ("x_proj.weight", "x_proj_b.weight"),
    "scan.dt_weight": ("dt_proj.weight", "dt_proj_b.weight"),
    "scan.dt_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "scan.A_log": ("A_log", "A_b_log"),
    "scan.D": ("D", "D_b"),
}


def _join_directions(state_dict: StateDict) -> StateDict:
    """Stack the parameters of the two directions; if a file lacks one of a pair, keep the other, to be reported."""
    joined = dict(state_dict)
    for name in state_dict:
        prefix, separator, _ = name.partition(".mixer.in_proj.weight")
        for ours, pair in _PAIRS.items() if separator else ():
            names = [f"{prefix}.mixer.{theirs}" for theirs in pair]
            if all(theirs in joined for theirs in names):
                both = torch.stack([joined.pop(theirs) for theirs in names])
                joined[f"{prefix}.mixer.{ours}"] = both.squeeze(2) if ours == "conv_weight" else both
    return joined


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: Vim) -> StateDict:
    """Rename published parameters to ours; resize position and patch embeddings to the model's."""
    state_dict = unwrap(checkpoint)
    positions = state_dict.get("pos_embed")
    if positions is not None and "norm_f.weight" in state_dict:  # published files have the class token in the middle
        middle = (positions.shape[1] - 1) // 2
        order = [middle, *range(middle), *range(middle + 1, positions.shape[1])]
        state_dict["pos_embed"] = positions[:, order]
    state_dict = rename(_join_directions(state_dict), [(r"layers\.", "blocks."), (r"norm_f\.", "norm.")])
    if positions is not None and model.pos_embed is not None:
        state_dict["pos_embed"] = resample_abs_pos_embed(
            state_dict["pos_embed"], list(model.patch_embed.grid_size), num_prefix_tokens=1
        )
    patches = state_dict.get("patch_embed.proj.weight")
    if patches is not None:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(patches, list(model.patch_embed.patch_size))
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_vim(name: str, pretrained: bool, **kwargs: Any) -> Vim:
    return build_model_with_cfg(
        Vim,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (5, 11, 17, 23), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(repository: str, file: str) -> dict[str, Any]:
    return {
        "hf_hub_id": f"hustvl/{repository}",
        "hf_hub_filename": file,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/hustvl/Vim",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "paper_ids": "arXiv:2401.09417",
    }


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny.in1k": _cfg("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_stride8.in1k": _cfg("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small.in1k": _cfg("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_stride8.in1k": _cfg("Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base.in1k": _cfg("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
    }
)

_TINY = {"embed_dim": 192}
_SMALL = {"embed_dim": 384, "drop_path_rate": 0.05}


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create_vim("vim_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create_vim("vim_tiny_stride8", pretrained, **{**_TINY, "stride": 8, **kwargs})


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create_vim("vim_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create_vim("vim_small_stride8", pretrained, **{**_SMALL, "stride": 8, **kwargs})


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    return _create_vim("vim_base", pretrained, **{**_SMALL, "embed_dim": 768, **kwargs})
