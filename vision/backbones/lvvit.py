"""LV-ViT: a vision transformer trained with token labeling, with a second classifier for its patches.

Paper: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (NeurIPS 2021, arXiv
2104.10858). Code and weights: github.com/zihangJiang/TokenLabeling, Apache-2.0.

What is unusual:
* The patch embedding has four convolutions, three of them with batch norms, instead of one.
* Residual branches are multiplied by one half. The blocks are timm's, with a constant in place of the layer scale.
* The logits are those of the class token plus half of the maximum over the patches' logits, for each class. So they
  change when patches are dropped, and both classifiers are replaced together.
* `lvvit_*` and `dynamicvit_lvvit_*` are one model with different reducers: `reduce_tokens` converts one to the other.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers.token_reduction import TokenReducer
from ._checkpoints import vit_checkpoint_filter
from ._token_reduction import REDUCED, Decided, TokenReducedViT, create_reduced


class ConvPatchEmbed(PatchEmbed):
    """Embed patches of 16 x 16 pixels by three convolutions at half resolution and one with an 8 x 8 kernel.

    The image is padded with zeros to whole patches. The arguments are those of timm's `PatchEmbed`.
    """

    patch_size: tuple[int, int]  # type: ignore[assignment]

    def __init__(
        self, *, in_chans: int, embed_dim: int, bias: bool = True, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, bias=bias, **kwargs, **dd)
        rows, columns = self.patch_size
        if rows % 2 or columns % 2:
            raise ValueError(f"the first convolution halves patches; patch_size must be even, got {self.patch_size}")
        half = (rows // 2, columns // 2)
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(64, **dd)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(64, **dd)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(64, **dd)
        self.proj = nn.Conv2d(64, embed_dim, half, stride=half, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        x = F.pad(x, (0, -width % self.patch_size[1], 0, -height % self.patch_size[0]))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)


class Scale(nn.Module):
    """Multiply by a constant, in place of timm's LayerScale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


class LVViT(VisionTransformer):
    """LV-ViT; the arguments are those of timm's `VisionTransformer`."""

    def __init__(self, **vit_args: Any) -> None:
        norm_layer = partial(nn.LayerNorm, eps=1e-5)
        super().__init__(embed_layer=ConvPatchEmbed, qkv_bias=False, norm_layer=norm_layer, **vit_args)
        for block in self.blocks:
            block.ls1, block.ls2 = Scale(0.5), Scale(0.5)
        self._reset_aux_head()

    def _reset_aux_head(self) -> None:
        if self.num_classes == 0:
            self.aux_head = nn.Identity()
            return
        like = next(self.parameters())
        self.aux_head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        trunc_normal_(self.aux_head.weight, std=0.02)
        nn.init.zeros_(self.aux_head.bias)
        self.aux_head.train(self.training)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
        return self.head, self.aux_head

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._reset_aux_head()
        for head in self.get_classifier():
            head.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.head_drop(self.fc_norm(self.pool(x)))
        if pre_logits or self.num_classes == 0:
            return pooled
        return self.head(pooled) + 0.5 * self.aux_head(x[:, self.num_prefix_tokens :]).amax(
            -2, keepdim=pooled.ndim == 3
        )


class TokenReducedLVViT(TokenReducedViT, LVViT):
    """LV-ViT with a reducer in each block."""

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def forward_decided(self, x: Tensor) -> Decided:
        """Classify images, excluding patches masked in training from the maximum of the second classifier."""
        decided = super().forward_decided(x)
        if decided.mask is None or self.num_classes == 0:
            return decided
        patch_logits = self.aux_head(decided.tokens)
        kept_max = patch_logits.masked_fill(decided.mask[:, :, None] == 0, -torch.inf).amax(1)
        full_max = patch_logits.amax(1)
        kept_max = torch.where(kept_max.isinf(), full_max, kept_max)  # if an image keeps no patch, use all patches
        return decided._replace(logits=decided.logits + 0.5 * (kept_max - full_max))


REDUCED[LVViT] = TokenReducedLVViT


@dataclass(frozen=True)
class AllTokens:
    """Keep all tokens: the dense model, to which `reduce_tokens` can apply any other method."""

    merges: ClassVar[bool] = False

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        return [TokenReducer() for _ in model.blocks]


def _create_lvvit(name: str, pretrained: bool, **kwargs: Any) -> TokenReducedLVViT:
    settings = {"mlp_ratio": 3.0, **kwargs}
    return create_reduced(TokenReducedLVViT, name, pretrained, AllTokens, vit_checkpoint_filter, **settings)


def _cfg(file: str, crop_pct: float) -> dict[str, Any]:
    return {
        "url": f"https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/{file}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
        "origin_url": "https://github.com/zihangJiang/TokenLabeling",
        "paper_name": "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
        "paper_ids": "arXiv:2104.10858",
    }


default_cfgs = generate_default_cfgs(
    {
        "lvvit_small.in1k": _cfg("lvvit_s-26M-224-83.3.pth.tar", 0.9),
        "lvvit_medium.in1k": _cfg("lvvit_m-56M-224-84.0.pth.tar", 1.0),
    }
)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> TokenReducedLVViT:
    return _create_lvvit("lvvit_small", pretrained, **{"embed_dim": 384, "num_heads": 6, "depth": 16, **kwargs})


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs: Any) -> TokenReducedLVViT:
    return _create_lvvit("lvvit_medium", pretrained, **{"embed_dim": 512, "num_heads": 8, "depth": 20, **kwargs})
