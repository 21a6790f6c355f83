"""Dynamic Swin: the third stage applies the MLP to the best positions only, and window attention to the whole map.

Papers: Rao et al., "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks"
(TPAMI 2023, arXiv 2207.01580); Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"
(arXiv 2103.14030). Code and weights: github.com/raoyongming/DynamicViT, MIT. Files of a dense Swin, Microsoft's or
timm's, load as well, with newly initialised predictors and fast paths; training starts this way.

What is unusual:
* No position is ever dropped, see `dynamicvit_convnext`. The fast path has its own norm and starts after attention.
* Any image size is accepted: patches, windows and merged maps are padded with zeros. An axis with a single window is
  not shifted. The masks of shifted windows are computed in the forward pass, so buffers in published files are ignored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ...mixers.token_predictor import PredictorLG
from ._checkpoints import StateDict, drive_url, refuse_drive, refuse_mismatch, rename, unwrap
from ._dynamic import DynamicBackbone, DynamicBlock, DynamicStage, keep_ratios, with_fresh_predictors
from ._hierarchical import Stage
from .dinat_s import PatchEmbed, PatchMerging
from .stvitr import WindowBlock


class FastPath(nn.Module):
    """Apply a norm and one linear layer to [B, N, C] in place of the MLP; `fc1` is the published parameter name."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Sequential(nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x)


class DynamicSwinBlock(DynamicBlock, WindowBlock):
    """Swin's block on [B, H, W, C] with an MLP for the best positions and a linear layer for the others.

    Args:
        keep_ratio: share of the positions to which the MLP is applied.
        decides: whether a predictor selects the positions anew before this block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        keep_ratio: float,
        decides: bool,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.keep_ratio = keep_ratio
        self.predictor = PredictorLG(dim, device=device, dtype=dtype) if decides else None
        self.fastmlp = FastPath(dim, device=device, dtype=dtype)

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    def full(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))

    def fast(self, x: Tensor) -> Tensor:
        return self.fastmlp(x)

    def forward(self, x: Tensor, route: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.drop_path1(self._attend(self.norm1(x)))
        return x + self.drop_path2(self.either(self.tokens(x), route).view(x.shape))


class DynamicSwin(DynamicBackbone):
    """Swin with a dynamic third stage.

    Args:
        keep_rate: share of the third stage's positions to which the MLP is applied from the first location on; 0.2 less
            from each later location on.
        locations: blocks of the third stage before which a predictor selects the positions; the blocks before the first
            location are ordinary.
        embed_dim: channels of the first stage; each later one has twice as many.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the projections of attention and MLP.
    """

    def __init__(
        self,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        locations: Sequence[int] = (1, 2, 3),
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(num_heads) != len(depths) or len(depths) < 3:
            raise ValueError(
                f"depths and num_heads need one entry per stage, 3 or more; got {tuple(depths)}, {tuple(num_heads)}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        ratios = keep_ratios(keep_rate, locations, depths[2])
        stages: list[Stage] = []
        for i, heads in enumerate(num_heads):
            dim = embed_dim * 2**i
            args: Any = {"num_heads": heads, "window_size": window_size, "mlp_ratio": mlp_ratio, **dd}
            downsample = PatchMerging(dim // 2, **dd) if i else None
            blocks = _blocks(
                dim, ratios if i == 2 else [None] * depths[i], drop_paths[i], {"proj_drop": proj_drop_rate, **args}
            )
            kind = DynamicStage if i == 2 else Stage
            stages.append(kind(blocks, dim=dim, reduction=4 * 2**i, downsample=downsample))
        dim = stages[-1].dim
        super().__init__(
            PatchEmbed(in_chans, embed_dim, stride=4, **dd),
            stages,
            ClassifierHead(dim, num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd),
            norm=nn.LayerNorm(dim, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def final_tokens(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)


def _blocks(
    dim: int, ratios: Sequence[float | None], drop_paths: Sequence[float], args: dict[str, Any]
) -> list[nn.Module]:
    """Build the blocks of a stage: dynamic from the first ratio on, with a predictor in each block that has a ratio."""
    blocks: list[nn.Module] = []
    current: float | None = None
    for i, (ratio, drop_path) in enumerate(zip(ratios, drop_paths, strict=True)):
        shift = args["window_size"] // 2 if i % 2 else 0
        shared: Any = {"shift": shift, "shifts_single": False, "drop_path": drop_path, **args}
        current = current if ratio is None else ratio
        if current is None:
            blocks.append(WindowBlock(dim, **shared))
        else:
            blocks.append(DynamicSwinBlock(dim, keep_ratio=current, decides=ratio is not None, **shared))
    return blocks


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: DynamicSwin) -> StateDict:
    """Rename published parameters to ours, from the authors' files or a dense Swin's of Microsoft or timm."""
    stage: Any = model.stages[2]
    deciding = [i for i, block in enumerate(stage.blocks) if getattr(block, "predictor", None) is not None]
    state_dict = unwrap(checkpoint)
    if any(name.startswith("layers.0.downsample.") for name in state_dict):  # published: merging ends a stage
        state_dict = rename(
            state_dict,
            [(rf"layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(len(model.stages))],
        )
    state_dict = rename(
        state_dict,
        [
            (r"patch_embed\.", "stem."),
            *(
                (rf"layers\.2\.score_predictor\.{n}\.", f"stages.2.blocks.{i}.predictor.")
                for n, i in enumerate(deciding)
            ),
            (r"layers\.", "stages."),
            (r"head\.(weight|bias)", r"head.fc.\1"),
        ],
    )
    buffers = ("attn_mask", "relative_position_index")
    state_dict = {name: tensor for name, tensor in state_dict.items() if not name.endswith(buffers)}
    state_dict = with_fresh_predictors(state_dict, model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_swin(name: str, pretrained: bool, **kwargs: Any) -> DynamicSwin:
    if pretrained:
        refuse_drive(name, kwargs)
    return build_model_with_cfg(
        DynamicSwin,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(drive_id: str) -> dict[str, Any]:
    return {
        "url": drive_url(drive_id),
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/raoyongming/DynamicViT",
        "paper_name": "Dynamic Spatial Sparsification for Efficient Vision Transformers and CNNs",
        "paper_ids": "arXiv:2207.01580",
    }


default_cfgs = generate_default_cfgs(
    {
        "dynamicvit_swin_tiny.r07_in1k": _cfg("1BFlCvXedgttyj8n9smcNphE7NLOy99ig"),
        "dynamicvit_swin_small.r07_in1k": _cfg("1gveNkt5aCzjb5CX_DaGq_XJRvvxruxmy"),
        "dynamicvit_swin_base.r07_in1k": _cfg("1sJctKZxdIH0zHwTekWmmCns_1AOeFzeN"),
    }
)

_SMALL = {"depths": (2, 2, 18, 2), "locations": (2, 4, 6)}


@register_model
def dynamicvit_swin_tiny(pretrained: bool = False, **kwargs: Any) -> DynamicSwin:
    return _create_swin("dynamicvit_swin_tiny", pretrained, **{"drop_path_rate": 0.2, **kwargs})


@register_model
def dynamicvit_swin_small(pretrained: bool = False, **kwargs: Any) -> DynamicSwin:
    return _create_swin("dynamicvit_swin_small", pretrained, **{**_SMALL, "drop_path_rate": 0.2, **kwargs})


@register_model
def dynamicvit_swin_base(pretrained: bool = False, **kwargs: Any) -> DynamicSwin:
    model_args = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
    return _create_swin("dynamicvit_swin_base", pretrained, **{**model_args, **kwargs})
