"""Dynamic ConvNeXt: the third stage applies the MLP to the best positions only, and convolutions to the whole map.

Papers: Rao et al., "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks"
(TPAMI 2023, arXiv 2207.01580); Liu et al., "A ConvNet for the 2020s" (arXiv 2201.03545). Code and weights:
github.com/raoyongming/DynamicViT, MIT. Files of a dense ConvNeXt, Facebook's or timm's, load as well, with newly
initialised predictors and fast paths; training starts this way.

What is unusual:
* No position is ever dropped: those that are not among the best get one linear layer instead of the MLP, and each
  predictor selects from all positions again. The MLP is applied to 137, 97 and 58 positions of a 14 x 14 map: the
  authors' count of 97 is due to 0.7 - 0.2, which is slightly less than 0.5 in floating point.
* Images whose sides are not multiples of 4, and maps with odd sides, are padded with zeros; the published code crops.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, LayerNorm2d, NormMlpClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers.token_predictor import PredictorLG
from ._checkpoints import StateDict, drive_url, refuse_drive, refuse_mismatch, rename, trained_settings, unwrap
from ._dynamic import DynamicBackbone, DynamicBlock, DynamicStage, keep_ratios, with_fresh_predictors
from ._hierarchical import HierarchicalBackbone, Stage


class PatchConv2d(nn.Conv2d):
    """Convolve with a stride equal to the kernel size, padding incomplete patches with zeros at the bottom and right.

    The padding is always the kernel size minus one, and the stride skips what is too much. So the size of the output
    remains a simple symbol while exporting.
    """

    def __init__(self, in_chans: int, dim: int, size: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(in_chans, dim, size, stride=size, device=device, dtype=dtype)
        self.size = size

    def forward(self, input: Tensor) -> Tensor:  # named as in torch.nn.Conv2d
        padded = F.pad(input, (0, self.size - 1, 0, self.size - 1))
        return F.conv2d(padded, self.weight, self.bias, self.stride)


class PlainBlock(ConvNeXtBlock):
    """timm's ConvNeXt block on [B, C, H, W], with a `reset_parameters` for its layer scale."""

    def __init__(
        self, dim: int, *, init_values: float, drop_path: float, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(dim, ls_init_value=init_values, drop_path=drop_path, device=device, dtype=dtype)
        self.init_values = init_values

    def reset_parameters(self) -> None:
        """Reset the layer scale; sub-modules reset their own parameters."""
        nn.init.constant_(self.gamma, self.init_values)  # type: ignore[arg-type]


class DynamicConvNeXtBlock(DynamicBlock, PlainBlock):
    """ConvNeXt's block on [B, C, H, W] with an MLP for the best positions and a linear layer for the others.

    Args:
        keep_ratio: share of the positions to which the MLP is applied.
        decides: whether a predictor selects the positions anew before this block.
    """

    def __init__(
        self, dim: int, *, keep_ratio: float, decides: bool, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(dim, device=device, dtype=dtype, **kwargs)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.keep_ratio = keep_ratio
        self.predictor = PredictorLG(dim, norm_eps=1e-6, **dd) if decides else None
        self.fast_path = nn.Sequential(LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd))
        self.fast_path_gamma = nn.Parameter(torch.full((dim,), self.init_values, **dd))

    def reset_parameters(self) -> None:
        """Reset the two layer scales; sub-modules reset their own parameters."""
        nn.init.constant_(self.gamma, self.init_values)  # type: ignore[arg-type]
        nn.init.constant_(self.fast_path_gamma, self.init_values)

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def full(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x)) * self.gamma

    def fast(self, x: Tensor) -> Tensor:
        return self.fast_path(x) * self.fast_path_gamma

    def forward(self, x: Tensor, route: Tensor) -> Tensor:  # type: ignore[override]
        y = self.either(self.tokens(self.conv_dw(x)), route)
        return x + self.drop_path(y.transpose(1, 2).view(x.shape))


class DynamicConvNeXt(DynamicBackbone):
    """ConvNeXt with a dynamic third stage.

    Args:
        keep_rate: share of the third stage's positions to which the MLP is applied from the first location on; 0.2 less
            from each later location on.
        locations: blocks of the third stage before which a predictor selects the positions; the blocks before the first
            location are ordinary.
        init_values: initial layer scale.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        locations: Sequence[int] = (1, 2, 3),
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        init_values: float = 1e-6,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(dims) != len(depths) or len(depths) < 3:
            raise ValueError(f"dims and depths need one entry per stage, 3 or more; got {tuple(dims)}, {tuple(depths)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[Stage] = []
        for i, dim in enumerate(dims):
            downsample = (
                nn.Sequential(LayerNorm2d(dims[i - 1], **dd), PatchConv2d(dims[i - 1], dim, 2, **dd)) if i else None
            )
            stage_args: Any = {"dim": dim, "reduction": 4 * 2**i, "downsample": downsample}
            if i == 2:
                blocks = _dynamic_blocks(
                    dim, keep_ratios(keep_rate, locations, depths[i]), drop_paths[i], init_values, dd
                )
                stages.append(DynamicStage(blocks, **stage_args))
            else:
                blocks = [PlainBlock(dim, init_values=init_values, drop_path=rate, **dd) for rate in drop_paths[i]]
                stages.append(Stage(blocks, **stage_args))
        super().__init__(
            nn.Sequential(PatchConv2d(in_chans, dims[0], 4, **dd), LayerNorm2d(dims[0], **dd)),
            stages,
            NormMlpClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NCHW",
        )

    @staticmethod
    def init_module(module: nn.Module, name: str, needs_reset: bool) -> None:
        """Initialise convolutions like linear layers, and all other modules as the base class does."""
        if isinstance(module, nn.Conv2d):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            HierarchicalBackbone.init_module(module, name, needs_reset)

    def final_tokens(self, x: Tensor) -> Tensor:
        return self.head.norm(x).flatten(2).transpose(1, 2)


def _dynamic_blocks(
    dim: int, ratios: Sequence[float | None], drop_paths: Sequence[float], init_values: float, dd: dict[str, Any]
) -> list[nn.Module]:
    """Build the blocks of the dynamic stage, with a predictor in each block whose entry in `ratios` is not None."""
    blocks: list[nn.Module] = []
    current: float | None = None
    for ratio, drop_path in zip(ratios, drop_paths, strict=True):
        shared: Any = {"init_values": init_values, "drop_path": drop_path, **dd}
        current = current if ratio is None else ratio
        if current is None:
            blocks.append(PlainBlock(dim, **shared))
        else:
            blocks.append(DynamicConvNeXtBlock(dim, keep_ratio=current, decides=ratio is not None, **shared))
    return blocks


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: DynamicConvNeXt) -> StateDict:
    """Rename published parameters to ours, from the authors' files or a dense ConvNeXt's of Facebook or timm."""
    stage: Any = model.stages[2]
    deciding = [i for i, block in enumerate(stage.blocks) if getattr(block, "predictor", None) is not None]
    state_dict = rename(
        unwrap(checkpoint),
        [
            (r"downsample_layers\.0\.", "stem."),
            (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
            (r"stages\.(\d)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
            (r"stages\.(\d)\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
            (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            *((rf"score_predictor\.{n}\.", f"stages.2.blocks.{i}.predictor.") for n, i in enumerate(deciding)),
            (r"norm\.", "head.norm."),
            (r"head\.(weight|bias)", r"head.fc.\1"),
        ],
    )
    linear = {name: w.flatten(1) if ".predictor." in name and w.ndim == 4 else w for name, w in state_dict.items()}
    state_dict = with_fresh_predictors(linear, model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_convnext(name: str, pretrained: bool, **kwargs: Any) -> DynamicConvNeXt:
    if pretrained:
        refuse_drive(name, kwargs)
    return build_model_with_cfg(
        DynamicConvNeXt,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**trained_settings(name, kwargs, _TRAINED_WITH), **kwargs},
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
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/raoyongming/DynamicViT",
        "paper_name": "Dynamic Spatial Sparsification for Efficient Vision Transformers and CNNs",
        "paper_ids": "arXiv:2207.01580",
    }


_TRAINED_WITH = {"r07_in1k": {"keep_rate": 0.7}, "r09_in1k": {"keep_rate": 0.9}}

default_cfgs = generate_default_cfgs(
    {
        "dynamicvit_convnext_tiny.r07_in1k": _cfg("1Jdp5Xi5E3teBm6zfXqAE681XiszrwqCe"),
        "dynamicvit_convnext_tiny.r09_in1k": _cfg("1AHh4kQ_zecKhDzm4bvcZxdl0SoJA3K4Q"),
        "dynamicvit_convnext_small.r07_in1k": _cfg("155I0ixZzLFLn9xqZtQML5lXt0QWiQaak"),
        "dynamicvit_convnext_small.r09_in1k": _cfg("1xFvhSXua2w2m1tr3WFA_d8MH3wEGgRhN"),
        "dynamicvit_convnext_base.r07_in1k": _cfg("1epwmGKOEfqjU-WITgrB9VXTWhCu6pcgG"),
        "dynamicvit_convnext_base.r09_in1k": _cfg("1lQLXnxETK6hpsx2Tcv3q1HtRjLI21epl"),
    }
)

_SMALL = {"depths": (3, 3, 27, 3), "locations": (3, 6, 9)}


@register_model
def dynamicvit_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> DynamicConvNeXt:
    return _create_convnext("dynamicvit_convnext_tiny", pretrained, **{"drop_path_rate": 0.2, **kwargs})


@register_model
def dynamicvit_convnext_small(pretrained: bool = False, **kwargs: Any) -> DynamicConvNeXt:
    model_args = {**_SMALL, "drop_path_rate": 0.2}
    return _create_convnext("dynamicvit_convnext_small", pretrained, **{**model_args, **kwargs})


@register_model
def dynamicvit_convnext_base(pretrained: bool = False, **kwargs: Any) -> DynamicConvNeXt:
    model_args = {**_SMALL, "dims": (128, 256, 512, 1024), "drop_path_rate": 0.5}
    return _create_convnext("dynamicvit_convnext_base", pretrained, **{**model_args, **kwargs})
