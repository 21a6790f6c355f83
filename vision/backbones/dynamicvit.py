"""DynamicViT: DeiT and LV-ViT in which a predictor before each of three blocks selects the patches to drop.

Paper: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (NeurIPS 2021, arXiv
2106.02034). Code and weights: github.com/raoyongming/DynamicViT, MIT. To reduce any other ViT, use
`reduce_tokens(model, "dynamicvit", keep_rate=0.7)` and train the predictors.

What is unusual:
* Each stage keeps a power of the rate, relative to the patches of the first block, and the count is rounded down: 196,
  137, 96, 67 at 0.7. The counts scale with the image size; the published code is fixed to 14 x 14 patches.
* No token is dropped in training. Each predictor samples a decision for every remaining patch, and attention masks the
  others; `forward_decided` returns what the losses need. Training is therefore no faster.
* Files of a dense DeiT or LV-ViT load as well, with newly initialised predictors; training starts this way.
* Fine-tuning freezes the class token and the positions, see configs/recipes/dynamicvit_finetune.yaml.
"""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn

from ...mixers.token_predictor import PolicyAttention, PredictedPruning
from ...mixers.token_reduction import TokenReducer
from ._checkpoints import StateDict, drive_url, refuse_drive, refuse_mismatch, rename, trained_settings, unwrap
from ._token_reduction import METHODS, TokenReducedViT, create_reduced, numbers_of, stage_blocks
from .lvvit import TokenReducedLVViT


@dataclass(frozen=True)
class DynamicViT:
    """Prune patches by learned predictors.

    Args:
        keep_rate: one number: the share of the remaining patches that each location keeps; or one number per location:
            the share of the first block's patches that remains after it.
        locations: indices of blocks; None for a quarter, a half and three quarters of the depth.
    """

    keep_rate: float | Sequence[float] = 0.7
    locations: Sequence[int] | None = None

    merges: ClassVar[bool] = False

    def _rates(self) -> list[float]:
        """Return the share of the first block's patches that remains after each location."""
        if not isinstance(self.keep_rate, numbers.Real):
            return numbers_of("keep_rate", self.keep_rate, or_number=True)
        count = 3 if self.locations is None else len(numbers_of("locations", self.locations, whole=True))
        return [float(self.keep_rate) ** (i + 1) for i in range(count)]

    def stages(self, depth: int) -> dict[int, float]:
        """Return the share of the first block's patches that remains after each block with a predictor."""
        rates = self._rates()
        stages = stage_blocks(self.locations, rates, depth)
        if sorted(rates, reverse=True) != rates:
            raise ValueError(f"keep_rate is of the first block's patches, so it may not rise; got {self.keep_rate}")
        if sorted(stages) != list(stages):
            raise ValueError(f"locations are blocks in order, as keep_rate is; got {self.locations}")
        return stages

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        if model.global_pool not in ("token", "avg", ""):
            raise ValueError(
                "DynamicViT only masks patches while it trains, which the class token or a mean can leave out; this "
                f"model has global_pool={model.global_pool!r}. Use tome"
            )
        stages = self.stages(len(model.blocks))
        like = model.patch_embed.proj.weight
        return [
            PredictedPruning(
                model.embed_dim, stages[i], num_prefix=model.num_prefix_tokens, device=like.device, dtype=like.dtype
            )
            if i in stages
            else PolicyAttention()
            for i in range(len(model.blocks))
        ]


METHODS["dynamicvit"] = DynamicViT


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: TokenReducedViT) -> StateDict:
    """Rename the authors' parameters to ours; add the model's initial predictors to the file of a dense model."""
    deciding = [i for i, reducer in enumerate(model.reducers) if isinstance(reducer, PredictedPruning)]
    rules = [(rf"score_predictor\.{n}\.", f"blocks.{i}.reducer.predictor.") for n, i in enumerate(deciding)]
    state_dict: StateDict = vit_filter_fn(rename(unwrap(checkpoint), rules), model)  # type: ignore[assignment]
    if not any(".predictor." in name for name in state_dict):
        state_dict |= {name: tensor for name, tensor in model.state_dict().items() if ".predictor." in name}
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_dynamicvit(kind: type[TokenReducedViT], name: str, pretrained: bool, **kwargs: Any) -> TokenReducedViT:
    if pretrained:
        refuse_drive(name, kwargs)
    settings = {**trained_settings(name, kwargs, _TRAINED_WITH), **kwargs}
    return create_reduced(kind, name, pretrained, DynamicViT, checkpoint_filter_fn, **settings)


def _cfg(drive_id: str, **settings: Any) -> dict[str, Any]:
    return {
        "url": drive_url(drive_id),
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/raoyongming/DynamicViT",
        "paper_name": "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
        "paper_ids": "arXiv:2106.02034",
        **settings,
    }


_TRAINED_WITH = {"r07_in1k": {"keep_rate": 0.7}, "r05_in1k": {"keep_rate": 0.5}}
_LVVIT = {"first_conv": "patch_embed.conv1", "classifier": ("head", "aux_head")}

default_cfgs = generate_default_cfgs(
    {
        "dynamicvit_deit_256_patch16_224.r07_in1k": _cfg("1fpdTNRZtGOW25UwOadj1iUdjqmu88WkO"),
        "dynamicvit_deit_small_patch16_224.r07_in1k": _cfg("1H5kHHagdqo4emk9CgjfA7DA62XJr8Yc1"),
        "dynamicvit_deit_base_patch16_224.r07_in1k": _cfg("1J9PCPiOSHmzRiWw370GDYJPEZ8r4uU3M"),
        "dynamicvit_lvvit_small.r07_in1k": _cfg("1dNloEsuEiTi592SdM_ELC36kOJ7aaF-3", **_LVVIT),
        "dynamicvit_lvvit_small.r05_in1k": _cfg("1kPe3MhtYHNdG7natrU20xcAqodO6-Z58", **_LVVIT),
        "dynamicvit_lvvit_medium.r07_in1k": _cfg("1dNab1B5ZOTVNpnpO6H1TsXKFM8BAlA3I", **_LVVIT),
    }
)


@register_model
def dynamicvit_deit_256_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 256, "num_heads": 4, **kwargs}
    return _create_dynamicvit(TokenReducedViT, "dynamicvit_deit_256_patch16_224", pretrained, **settings)


@register_model
def dynamicvit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 384, "num_heads": 6, **kwargs}
    return _create_dynamicvit(TokenReducedViT, "dynamicvit_deit_small_patch16_224", pretrained, **settings)


@register_model
def dynamicvit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 768, "num_heads": 12, **kwargs}
    return _create_dynamicvit(TokenReducedViT, "dynamicvit_deit_base_patch16_224", pretrained, **settings)


@register_model
def dynamicvit_lvvit_small(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 384, "num_heads": 6, "depth": 16, "mlp_ratio": 3.0, **kwargs}
    return _create_dynamicvit(TokenReducedLVViT, "dynamicvit_lvvit_small", pretrained, **settings)


@register_model
def dynamicvit_lvvit_medium(pretrained: bool = False, **kwargs: Any) -> TokenReducedViT:
    settings = {"embed_dim": 512, "num_heads": 8, "depth": 20, "mlp_ratio": 3.0, **kwargs}
    return _create_dynamicvit(TokenReducedLVViT, "dynamicvit_lvvit_medium", pretrained, **settings)
