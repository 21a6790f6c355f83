"""Backbones whose maps have one size: the pyramid that segmenters make of them, at any size of picture."""

from __future__ import annotations

from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import pytest
import torch
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.segmentation.features import make_features
from mixerzoo.vision.segmentation.pyramid import FeaturePyramid
from torch.nn import functional as F

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 24}
HEADED: dict[str, Any] = SMALL | {"num_heads": 2}
ISOTROPIC: dict[str, dict[str, Any]] = {
    "vim_tiny": SMALL,
    "vim_tiny_stride8": SMALL,
    "vit_tiny_patch16_224": HEADED,
    "tome_deit_tiny_patch16_224": HEADED | {"r": 2},
    "vig_tiny": {"depth": 4, "embed_dim": 48, "num_heads": 1},
    "nat_isotropic_small": HEADED | {"kernel_size": 3},
    "vitrpb_small": HEADED,
    "evit_deit_small_patch16_224": HEADED,
    "dynamicvit_deit_small_patch16_224": HEADED,
    "eet_vit_small": {},
    "spatten_deit_tiny_patch16_224": HEADED,
    "lookupvit_tiny_patch16_224": HEADED | {"depth": 5},
    "lvvit_small": {},
    "tome_mae_vit_huge_patch14_224": HEADED | {"r": 2},
}
QUICK = ("vim_tiny", "vim_tiny_stride8", "vit_tiny_patch16_224", "tome_deit_tiny_patch16_224")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ISOTROPIC]
)
@torch.no_grad()
def test_any_size_of_picture(name: str) -> None:
    model: Any = build_segmenter(name, 3, head={"name": "upernet", "channels": 8}, **ISOTROPIC[name]).eval()
    for size in ((64, 64), (37, 61), (96, 40), (16, 16)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)
    stride = 14 if "patch14" in name else 16
    finest, *others = model.neck(model.backbone(torch.randn(1, 3, 6 * stride, 8 * stride)))
    assert [tuple(level.shape[2:]) for level in others] == [(12, 16), (6, 8), (3, 4)] or "stride8" in name
    assert finest.shape[2] / others[0].shape[2] == pytest.approx(2, abs=0.1)


def test_semantic_fpn_has_a_pyramid_under_its_own() -> None:
    model = build_segmenter("vim_tiny", 3, head={"name": "semantic_fpn", "channels": 8}, **SMALL)
    images = torch.randn(2, 3, 37, 61)
    model(images).mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not [name for name in without if not name.startswith("backbone.")]
    names = {name for name, _ in model.named_parameters()}
    assert {"neck.0.fpn1.3.weight", "neck.1.lateral_convs.0.conv.weight", "decode_head.conv_seg.weight"} <= names


VIM = {"fpn1.0": "conv", "fpn1.1": "norm", "fpn1.3": "conv", "fpn2.0": "conv"}


def test_names_and_shapes_are_vims() -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name, kind in VIM.items():
        expected |= {f"{name}.weight": (192, 192, 2, 2) if kind == "conv" else (192,), f"{name}.bias": (192,)}
    norm = {f"fpn1.1.{leaf}": (192,) for leaf in ("running_mean", "running_var")}
    expected |= norm | {"fpn1.1.num_batches_tracked": ()}
    state = FeaturePyramid([192] * 4, reduction=16).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert FeaturePyramid([192] * 4, reduction=8).state_dict().keys() == {"fpn1.0.weight", "fpn1.0.bias"}


@pytest.mark.parametrize(("reduction", "strides"), [(16, (4, 8, 16, 32)), (8, (4, 8, 16, 32)), (4, (4, 8, 16, 32))])
@torch.no_grad()
def test_the_pyramid_is_its_definition(reduction: int, strides: tuple[int, ...]) -> None:
    pyramid = FeaturePyramid([6] * 4, reduction=reduction).eval()
    maps = [torch.randn(1, 6, 192 // reduction, 256 // reduction) for _ in range(4)]
    got = pyramid(maps)
    assert [tuple(level.shape[2:]) for level in got] == [(192 // s, 256 // s) for s in strides]
    state = pyramid.state_dict()
    x = maps[0]
    for step in (0, 3) if reduction == 16 else (0,) if reduction == 8 else ():
        if step:
            x = F.gelu(x / (1 + 1e-5) ** 0.5)  # a new batch norm
        # Without overlap, each position becomes a square of 2 x 2.
        squares = torch.einsum("bchw,cdij->bdhiwj", x, state[f"fpn1.{step}.weight"])
        x = squares.flatten(2, 3).flatten(3, 4) + state[f"fpn1.{step}.bias"].view(-1, 1, 1)
    torch.testing.assert_close(got[0], x)
    pooled = {16: (3, 2), 8: (3, 4), 4: (3, 8)}[reduction]
    level, factor = pooled
    torch.testing.assert_close(got[level], maps[level].unfold(2, factor, factor).unfold(3, factor, factor).amax((4, 5)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "taps"), [("vim_tiny", [5, 11, 17, 23]), ("lookupvit_tiny_patch16_224", [1, 4, 7, 10])]
)
def test_taps_are_those_of_the_published_models(name: str, taps: list[int]) -> None:
    with torch.device("meta"):
        backbone: Any = make_features(name, {})
    assert list(backbone.feature_info.out_indices) == taps


def test_taps_can_be_chosen() -> None:
    backbone: Any = make_features("vit_tiny_patch16_224", HEADED | {"out_indices": (2,)})
    assert list(backbone.feature_info.out_indices) == [2]
    backbone = make_features("vit_tiny_patch16_224", HEADED | {"depth": 3})
    assert list(backbone.feature_info.out_indices) == [2]  # too few for four


def test_one_map_serves_for_all_and_other_numbers_are_refused() -> None:
    pyramid = FeaturePyramid([6], reduction=16)
    assert pyramid.out_channels == (6, 6, 6, 6) and len(pyramid([torch.randn(1, 6, 3, 4)])) == 4
    with pytest.raises(ValueError, match="takes 4 maps or 1, got 3; choose the blocks by out_indices"):
        FeaturePyramid([6] * 3, reduction=16)
    with pytest.raises(ValueError, match="was built for 1 feature maps; got 2"):
        pyramid([torch.randn(1, 6, 3, 4)] * 2)
