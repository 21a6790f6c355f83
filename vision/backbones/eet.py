"""EET: a vision transformer for hashing pictures that drops the patches with little to say behind three of its blocks.

Paper: Jiang, Tang, Pan, Li, "Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval" (arXiv
2504.16691). The authors' repository, github.com/WhiteJiang/EET, has no licence and was not used, and there are no
weights: what is fetched is timm's DeiT, from which the authors' training starts. Any other ViT with a class token:
`reduce_tokens(model, "eet")`.

What is unusual:
* The shares that stay are of the first block's patches, rounded down: 98, 49 and 12 of 196 behind blocks 3, 7 and 9.
* A patch stays for the class token's attention to it times the size of what it attended to itself: `ContentPruning`.
* The hash is read off the class scores: `head_hash` maps them to `bits` numbers, the signs of which are the code. So it
  changes with the number of classes, and is gone where there are none.
* `forward` gives class scores, `forward_hash` the numbers that training needs, `hash_codes` the bits. Without `bits`
  there is no `head_hash`: a classifier has no weights that its loss does not reach.
* The authors train a model with all tokens along: `restore_tokens` makes a `HashingViT` of an EET model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from ...mixers.token_cascade import ContentPruning
from ...mixers.token_reduction import TokenReducer
from ._checkpoints import StateDict, refuse_mismatch, unwrap
from ._token_reduction import METHODS, REDUCED, TokenReducedViT, create_reduced, numbers_of, stage_blocks
from .tome import timm_cfg


class HashingViT(VisionTransformer):
    """A vision transformer that can turn its class scores into a binary code.

    Args:
        bits: of the code; 0 for a plain classifier.
        vit_args: as of timm's `VisionTransformer`.
    """

    def __init__(self, *, bits: int = 0, **vit_args: Any) -> None:
        super().__init__(**vit_args)
        if bits < 0:
            raise ValueError(f"bits is the length of the code, or 0 for none; got {bits}")
        self.bits = bits
        self._reset_hash()

    def _reset_hash(self) -> None:
        if self.bits and self.num_classes:
            like = next(self.parameters())
            self.head_hash = nn.Linear(self.num_classes, self.bits, device=like.device, dtype=like.dtype)
        else:
            self.head_hash = nn.Identity()
        self.head_hash.train(self.training)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._reset_hash()

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def forward_hash(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] to the real numbers [B, bits] of which the signs are the code."""
        if isinstance(self.head_hash, nn.Identity):
            raise ValueError(
                f"a hash needs bits and classes; this model has bits={self.bits}, num_classes={self.num_classes}. "
                "Create it with bits=16 and keep its classifier"
            )
        return self.head_hash(self(x))

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    @torch.no_grad()
    def hash_codes(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] to codes [B, bits] of booleans; `numpy.packbits` makes bytes of them."""
        return self.forward_hash(x) > 0


class EETViT(TokenReducedViT, HashingViT):
    """The same with a reducer in each block."""


REDUCED[HashingViT] = EETViT


@dataclass(frozen=True)
class EET:
    """Content-based pruning.

    Args:
        keep_rate: share of the first block's patches that is left behind each of the locations.
        locations: blocks, from 0; None for 3, 7 and 9 of 12, and in proportion for other depths.
    """

    keep_rate: Sequence[float] = (1 / 2, 1 / 4, 1 / 16)
    locations: Sequence[int] | None = None

    merges: ClassVar[bool] = False

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        if getattr(model, "cls_token", None) is None:
            raise ValueError("EET keeps what the class token attends to; this model has none. Use tome")
        stages = self.stages(len(model.blocks))
        return [
            ContentPruning(stages[i], num_prefix=model.num_prefix_tokens) if i in stages else TokenReducer()
            for i in range(len(model.blocks))
        ]

    def stages(self, depth: int) -> dict[int, float]:
        """The share of the first block's patches that is left behind each block that prunes."""
        rates = numbers_of("keep_rate", self.keep_rate)
        if sorted(rates, reverse=True) != rates:
            raise ValueError(f"keep_rate is of the first block's patches, so it may not rise; got {self.keep_rate}")
        if self.locations is not None:
            if sorted(numbers_of("locations", self.locations)) != list(self.locations):
                raise ValueError(f"locations are blocks in order, as keep_rate is; got {self.locations}")
            return stage_blocks(self.locations, rates, depth)
        if len(rates) != 3:
            raise ValueError(f"keep_rate needs three numbers, or locations as many as it has; got {self.keep_rate}")
        # Where a model is so shallow that two of them fall together, the later one counts.
        return dict(zip([depth * i // 12 for i in (3, 7, 9)], rates, strict=True))


METHODS["eet"] = EET


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HashingViT) -> StateDict:
    """timm's rules for ViTs; a hash head that is missing, or of other bits or classes, starts anew."""
    given: StateDict = vit_filter_fn(unwrap(checkpoint), model)  # type: ignore[assignment]
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head_hash.")}
    state_dict = {name: tensor for name, tensor in given.items() if not name.startswith("head_hash.")}
    fits = all(name in given and given[name].shape == tensor.shape for name, tensor in fresh.items())
    state_dict |= {name: given[name] for name in fresh} if fits else fresh
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_eet(
    name: str,
    pretrained: bool,
    *,
    keep_rate: Sequence[float] = (1 / 2, 1 / 4, 1 / 16),
    locations: Sequence[int] | None = None,
    **kwargs: Any,
) -> EETViT:
    return create_reduced(EETViT, name, pretrained, EET(keep_rate, locations), checkpoint_filter_fn, **kwargs)


def _cfg(name: str) -> dict[str, Any]:
    return timm_cfg(
        name,
        origin_url="https://github.com/facebookresearch/deit",
        paper_name="Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval",
        paper_ids="arXiv:2504.16691",
    )


default_cfgs = generate_default_cfgs(
    {
        "eet_vit_small.deit_fb_in1k": _cfg("deit_small_patch16_224.fb_in1k"),
        "eet_vit_base.deit_fb_in1k": _cfg("deit_base_patch16_224.fb_in1k"),
    }
)


@register_model
def eet_vit_small(pretrained: bool = False, **kwargs: Any) -> EETViT:
    return _create_eet("eet_vit_small", pretrained, **{"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def eet_vit_base(pretrained: bool = False, **kwargs: Any) -> EETViT:
    return _create_eet("eet_vit_base", pretrained, **{"embed_dim": 768, "num_heads": 12, **kwargs})
