"""EET: a vision transformer for image hashing that drops uninformative patches after three of its blocks.

Paper: Jiang, Tang, Pan, Li, "Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval" (arXiv
2504.16691). The authors' repository, github.com/WhiteJiang/EET, has no licence: no code of it is here, but the tests
compare with outputs recorded from it (tests/goldens/eet_vit_small.json). The authors published no weights; the
pretrained weights are timm's DeiT, from which the authors' training starts. To reduce any other ViT with a class token,
use `reduce_tokens(model, "eet")`.

What is unusual:
* Keep rates are relative to the patches of the first block, and counts are rounded down: 98, 49 and 12 of 196 remain
  after blocks 3, 7 and 9.
* The score of a patch is the class token's attention to it, weighted by the norm of its own attention output: see
  `ContentPruning`.
* The hash is computed from the class scores: `head_hash` maps them to `bits` numbers, whose signs are the code. So it
  changes with the number of classes, and does not exist without classes.
* `forward` returns class scores, `forward_hash` the real numbers for training, `hash_codes` the bits. Without `bits`
  there is no `head_hash`, so that a classifier has no weights without a gradient.
* The authors train a model with all tokens alongside: `restore_tokens` turns an EET model into a `HashingViT`.
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
from ._checkpoints import StateDict, refuse_mismatch, timm_cfg, unwrap
from ._token_reduction import METHODS, REDUCED, TokenReducedViT, create_reduced, numbers_of, stage_blocks


class HashingViT(VisionTransformer):
    """A vision transformer that can turn its class scores into a binary code.

    Args:
        bits: length of the code; 0 for a plain classifier.
        vit_args: arguments of timm's `VisionTransformer`.
    """

    def __init__(self, *, bits: int = 0, **vit_args: Any) -> None:
        super().__init__(**vit_args)
        if not isinstance(bits, int) or bits < 0:
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
        """Map images [B, 3, H, W] to real numbers [B, bits], whose signs are the code."""
        if isinstance(self.head_hash, nn.Identity):
            raise ValueError(
                f"a hash needs bits and classes; this model has bits={self.bits}, num_classes={self.num_classes}. "
                "Create it with bits=16 and keep its classifier"
            )
        return self.head_hash(self(x))

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    @torch.no_grad()
    def hash_codes(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to boolean codes [B, bits]; `numpy.packbits` converts them to bytes."""
        return self.forward_hash(x) > 0


class EETViT(TokenReducedViT, HashingViT):
    """A `HashingViT` with a reducer in each block."""


REDUCED[HashingViT] = EETViT


@dataclass(frozen=True)
class EET:
    """Prune patches by content.

    Args:
        keep_rate: share of the first block's patches that remains after each location.
        locations: indices of blocks; None for 3, 7 and 9 of 12, scaled in proportion for other depths.
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
        """Return the share of the first block's patches that remains after each block that prunes."""
        rates = numbers_of("keep_rate", self.keep_rate)
        if sorted(rates, reverse=True) != rates:
            raise ValueError(f"keep_rate is of the first block's patches, so it may not rise; got {self.keep_rate}")
        if self.locations is not None:
            if sorted(numbers_of("locations", self.locations, whole=True)) != list(self.locations):
                raise ValueError(f"locations are blocks in order, as keep_rate is; got {self.locations}")
            return stage_blocks(self.locations, rates, depth)
        if len(rates) != 3:
            raise ValueError(f"keep_rate needs three numbers, or locations as many as it has; got {self.keep_rate}")
        # If a model is so shallow that two locations coincide, the later rate applies.
        return dict(zip([depth * i // 12 for i in (3, 7, 9)], rates, strict=True))


METHODS["eet"] = EET


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HashingViT) -> StateDict:
    """Apply timm's filter for ViTs; initialise a hash head that is missing or has another number of bits or classes."""
    loaded: StateDict = vit_filter_fn(unwrap(checkpoint), model)  # type: ignore[assignment]
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head_hash.")}
    state_dict = {name: tensor for name, tensor in loaded.items() if not name.startswith("head_hash.")}
    fits = all(name in loaded and loaded[name].shape == tensor.shape for name, tensor in fresh.items())
    state_dict |= {name: loaded[name] for name in fresh} if fits else fresh
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_eet(name: str, pretrained: bool, **kwargs: Any) -> EETViT:
    return create_reduced(EETViT, name, pretrained, EET, checkpoint_filter_fn, **kwargs)


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
