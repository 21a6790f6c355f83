"""ViG: a plain stack of bidirectional gated linear attention over patches.

Paper: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention" (AAAI 2025, arXiv
2405.18425). Code: github.com/hustvl/ViG, MIT. Weights: huggingface.co/hustvl/ViG; the file names there are inferred and
have not been verified. The same paper's pyramid is in vig_h.py. Not the graph network "Vision GNN" of the same name.

What is unusual:
* vig_tiny has SiLU after the mixers' convolution and before their last projection, vig_small and vig_base have none.
  This follows the authors' configurations; no name or shape in a checkpoint reveals it.
* Patches overlap: a 9 x 9 convolution of stride 8, then a 3 x 3 one of stride 2. An image that ends within a patch is
  zero-padded at its end; the official code drops pixels that do not fill the first convolution's stride.
* Positions are resampled bicubically without anti-aliasing, as in the official code.
* There is no class token; the final norm precedes average pooling.
* See `GatedLinearAttention2d` for the two halvings of the official evaluation, of which this model has one.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    GluMlp,
    LayerNorm2d,
    PatchEmbed,
    RmsNorm,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels._runtime import is_exporting
from ...mixers import GatedLinearAttention2d
from ._checkpoints import StateDict, refuse_mismatch, rename, unwrap
from ._hierarchical import HierarchicalBackbone
from ._isotropic import IsotropicBackbone


def swiglu(dim: int, *, multiple: int, drop: float, **dd: Any) -> nn.Module:
    """Return a bias-free SwiGLU with 8 / 3 times as many hidden channels, rounded up to a multiple."""
    hidden = multiple * -(-(8 * dim // 3) // multiple)
    return GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, gate_last=False, bias=False, drop=drop, **dd)


def init_module(module: nn.Module, name: str, needs_reset: bool) -> None:
    """Initialise one module's own parameters; a mixer is visited after its layers and reinitialises them."""
    if isinstance(module, GatedLinearAttention2d):
        module.reset_parameters()
    else:
        HierarchicalBackbone.init_module(module, name, needs_reset)


@register_notrace_module
class ConvPatchEmbed(PatchEmbed):
    """Embed [B, in_chans, H, W] as [B, ceil(H / 16), ceil(W / 16), C]."""

    def __init__(self, *, in_chans: int, embed_dim: int, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **kwargs, device="meta")
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 9, stride=8, padding=1, **dd),
            LayerNorm2d(embed_dim // 2, eps=1e-5, **dd),
            nn.SiLU(),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1, **dd),
            LayerNorm2d(embed_dim, eps=1e-5, **dd),
        )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(f"the size of overlapping patches cannot be changed; got patch_size {patch_size}")
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.pad(x, [0, 6, 0, 6])).permute(0, 2, 3, 1)  # 6 suffices for any size, and rounds up


@torch.fx.wrap
def _positions(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resample a position embedding [1, rows * columns, C] of `grid` to [1, rows, columns, C] of `size`."""
    raster = table.unflatten(1, [grid[0], grid[1]])
    if is_exporting() or size[0] != grid[0] or size[1] != grid[1]:
        channels_first = raster.permute(0, 3, 1, 2).float()
        raster = F.interpolate(channels_first, [size[0], size[1]], mode="bicubic").permute(0, 2, 3, 1)
    return raster.to(table.dtype)


class ViGBlock(nn.Module):
    """Apply gated linear attention and SwiGLU as pre-norm residual branches; [B, N, C] and the grid."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mixer_act_layer: type[nn.Module],
        proj_drop: float,
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = RmsNorm(dim, **dd)
        self.mixer = GatedLinearAttention2d(dim, num_heads, act_layer=mixer_act_layer, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = RmsNorm(dim, **dd)
        self.mlp = swiglu(dim, multiple=256, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        mixed = self.mixer(self.norm1(x).unflatten(1, [grid[0], grid[1]])).flatten(1, 2)
        x = x + self.drop_path1(mixed)
        return x + self.drop_path2(self.mlp(self.norm2(x))), grid


class ViG(IsotropicBackbone):
    """ViG.

    Args:
        img_size: image size that the position embedding is made for; for others it is resampled.
        mixer_act_layer: `act_layer` of the mixers.
        fc_norm: normalise after pooling instead of before.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        proj_drop_rate: dropout inside and after each MLP.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        fc_norm: bool = False,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mixer_act_layer: type[nn.Module] = nn.Identity,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=16,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,  # type: ignore[arg-type]
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            class_token=False,
            fc_norm=fc_norm,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=ConvPatchEmbed,
            norm_layer=RmsNorm,
            block_fn=partial(_make_block, mixer_act_layer),  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        named_apply(partial(init_module, needs_reset=needs_reset), self)

    def _pos_embed(self, x: Tensor) -> Tensor:
        assert self.pos_embed is not None  # as timm declares it
        x = x + _positions(self.pos_embed, self.patch_embed.grid_size, (x.shape[1], x.shape[2]))
        return self.pos_drop(x.flatten(1, 2))


def _make_block(
    mixer_act_layer: type[nn.Module],
    *,
    dim: int,
    num_heads: int,
    proj_drop: float,
    drop_path: float,
    device: Any,
    dtype: Any,
    **_: Any,
) -> ViGBlock:
    """Build a block. timm passes all options of a ViT block; the others do not apply here."""
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    return ViGBlock(dim, num_heads, mixer_act_layer=mixer_act_layer, proj_drop=proj_drop, drop_path=drop_path, **dd)


_BLOCK, _MIXER = r"(.*blocks\.\d+\.)", r"(.*blocks\.\d+\.)(?:attn|op)\."
BLOCK_RULES = [
    (_MIXER + r"in_proj\.0\.", r"\1mixer.conv."),
    (_MIXER + r"qkv_proj\.", r"\1mixer.qkv."),
    (_MIXER + r"gk_proj\.", r"\1mixer.decay."),
    (_MIXER + r"g_proj\.", r"\1mixer.gate."),
    (_MIXER + r"g_norm\.", r"\1mixer.norm."),
    (_MIXER + r"l_norm\.", r"\1mixer.local_norm."),
    (_MIXER + r"o_proj\.", r"\1mixer.proj."),
    (_BLOCK + r"(?:attn_norm|norm)\.", r"\1norm1."),
    (_BLOCK + r"(?:mlp_norm|norm2)\.", r"\1norm2."),
    (_BLOCK + r"mlp\.gate_proj\.", r"\1mlp.fc1."),
    (_BLOCK + r"mlp\.down_proj\.", r"\1mlp.fc2."),
]
"""(pattern, replacement) from published names inside blocks to ours, for plain models and pyramids."""


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: ViG) -> StateDict:
    """Rename published parameters to ours; resize the position embedding to the model's."""
    state_dict = rename(unwrap(checkpoint), BLOCK_RULES)
    positions = state_dict.get("pos_embed")
    if positions is not None and model.pos_embed is not None and positions.shape[1] != model.pos_embed.shape[1]:
        side = round(positions.shape[1] ** 0.5)
        rows, columns = model.patch_embed.grid_size
        state_dict["pos_embed"] = _positions(positions, (side, side), (rows, columns)).flatten(1, 2)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_vig(name: str, pretrained: bool, **kwargs: Any) -> ViG:
    return build_model_with_cfg(
        ViG,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (2, 5, 8, 11), "feature_cls": "getter"},
        **kwargs,
    )


def vig_cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": "hustvl/ViG",
        "hf_hub_filename": file,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "mit",
        "origin_url": "https://github.com/hustvl/ViG",
        "paper_name": "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        "paper_ids": "arXiv:2405.18425",
        **kwargs,
    }


_LAYERS = {"first_conv": "patch_embed.proj.0", "classifier": "head"}

default_cfgs = generate_default_cfgs(
    {
        "vig_tiny.in1k": vig_cfg("vig_t.pth", **_LAYERS),
        "vig_small.in1k": vig_cfg("vig_s.pth", **_LAYERS),
        "vig_base.in1k": vig_cfg("vig_b.pth", **_LAYERS),
    }
)


@register_model
def vig_tiny(pretrained: bool = False, **kwargs: Any) -> ViG:
    model_args = {"embed_dim": 192, "num_heads": 3, "mixer_act_layer": nn.SiLU}
    return _create_vig("vig_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def vig_small(pretrained: bool = False, **kwargs: Any) -> ViG:
    model_args = {"embed_dim": 384, "num_heads": 6, "drop_path_rate": 0.2}
    return _create_vig("vig_small", pretrained, **{**model_args, **kwargs})


@register_model
def vig_base(pretrained: bool = False, **kwargs: Any) -> ViG:
    model_args = {"embed_dim": 768, "num_heads": 12, "drop_path_rate": 0.5}
    return _create_vig("vig_base", pretrained, **{**model_args, **kwargs})
