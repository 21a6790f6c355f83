"""Receptive fields of models whose fields are known, and of fresh weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from mixerzoo.vision.receptive_field import ReceptiveField, open_branches, receptive_fields
from torch import nn


class _Blur(nn.Module):
    """A model whose receptive field is known: one 3 x 3 mean after another."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def forward_intermediates(
        self, images: torch.Tensor, *, indices: int | None, intermediates_only: bool
    ) -> list[torch.Tensor]:
        maps = [images]
        for _ in range(self.depth):
            maps.append(nn.functional.conv2d(maps[-1], torch.full((1, 1, 3, 3), 1 / 9), padding=1))
        return maps[1:] if indices is None else maps[-indices:]


def test_a_convolution_sees_its_kernel() -> None:
    (field,) = receptive_fields(_Blur(1), torch.randn(2, 1, 11, 11))
    expected = torch.zeros(11, 11)
    expected[4:7, 4:7] = 1 / 9
    torch.testing.assert_close(field.gradient, expected)
    assert field.centre == (5.5, 5.5) and field.map_size == (11, 11) and field.reach == (4, 4, 3, 3)
    assert field.side(1 - 1e-6) == 3 and field.area(1 - 1e-6) == pytest.approx(9 / 121)


def test_stages_or_only_the_last() -> None:
    images = torch.randn(1, 1, 15, 15)
    fields = receptive_fields(_Blur(3), images)
    assert [field.reach for field in fields] == [(6, 6, 3, 3), (5, 5, 5, 5), (4, 4, 7, 7)]
    assert [field.side(1 - 1e-6) for field in fields] == [3, 5, 7]
    (last,) = receptive_fields(_Blur(3), images, last=1)
    torch.testing.assert_close(last.gradient, fields[-1].gradient)


def test_images_are_averaged() -> None:
    model = timm.create_model("test_convnext").eval()
    images = torch.randn(3, 3, 64, 64)
    torch.manual_seed(0)
    (together,) = receptive_fields(model, images, last=1)
    torch.manual_seed(0)  # the signs are drawn in the same order
    alone = [receptive_fields(model, image, last=1)[0].gradient for image in images.split(1)]
    torch.testing.assert_close(together.gradient, torch.stack(alone).mean(0))


def test_areas_of_a_known_map() -> None:
    gradient = torch.zeros(20, 40)
    gradient[10, 20], gradient[9:12, 19:22] = 1.0, 0.05  # two thirds in one pixel, all in nine of them
    gradient[10, 20] = 0.8
    field = ReceptiveField(gradient, (5, 10))
    assert field.side(0.5) == 1 and field.area(0.5) == pytest.approx(1 / 800)
    assert field.side(0.9) == 3 and field.area(0.9) == pytest.approx(9 / 800)
    flat = ReceptiveField(torch.ones(50, 50), (2, 2))
    assert [round(flat.area(share), 2) for share in (0.2, 0.5, 0.99)] == [0.23, 0.52, 1.0]  # whole rings of pixels
    assert flat.area(0.99) <= 1 and flat.side(0.99) == 50


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 30.0])
def test_a_share_is_between_nothing_and_all(share: float) -> None:
    with pytest.raises(ValueError, match="lies between 0 and 1; got"):
        ReceptiveField(torch.ones(4, 4), (1, 1)).area(share)


def test_a_dilated_model_looks_further() -> None:
    arguments = dict(depths=(2,), embed_dim=16, num_heads=(1,), stem_stride=2)
    near = timm.create_model("nat_mini", **arguments)
    far = timm.create_model("nat_mini", **arguments, dilations=((1, 3),))
    far.load_state_dict(near.state_dict())
    images = torch.randn(1, 3, 64, 64)
    reach = [receptive_fields(model.eval(), images)[0].reach[3] for model in (near, far)]
    assert reach[1] > reach[0] + 15


def test_the_field_of_a_resnet_is_the_one_that_arithmetic_gives() -> None:
    """A stem of three convolutions and a pooling, stages of two; 3 x 3 each, so each adds twice the stride it sees."""
    model = timm.create_model("resnet10t").eval()
    images = torch.randn(1, 3, 288, 288)
    open_branches(model, images)
    (field,) = receptive_fields(model, images, last=1)
    side = 1 + 2 * sum([1, 2, 2, 2, *[4, 4], *[4, 8], *[8, 16], *[16, 32]])
    assert field.reach[2:] == (side, side)


def test_opening_the_branches_of_fresh_weights() -> None:
    """ConvNeXt begins with layer scales of 1e-6, ResNet with norms of zero; neither sees further than its shortcuts."""
    for name, vectors in (("test_convnext", 9), ("test_resnet", 4)):
        model = timm.create_model(name).eval()
        scales = [p for p in model.parameters() if p.ndim == 1 and p.min() == p.max() and p.max() in (0, 1e-6)]
        images = torch.randn(2, 3, 160, 160)
        before, others = receptive_fields(model, images, last=1)[0], dict(model.named_parameters())
        kept = {key: value.clone() for key, value in others.items()}
        assert open_branches(model, images) == vectors, name
        changed = [key for key, value in model.named_parameters() if not torch.equal(value, kept[key])]
        assert len(changed) == vectors and all((others[key] == 1).all() for key in changed)
        assert {id(others[key]) for key in changed} <= {id(scale) for scale in scales}
        assert not model.training
        after = receptive_fields(model, images, last=1)[0]
        assert after.area(0.9) > 1.5 * before.area(0.9), name
    assert open_branches(timm.create_model("nat_mini", depths=(1,), embed_dim=8, num_heads=(1,)), images) == 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need images \[B, C, H, W\], at least one; got \[1, 9, 9\]"):
        receptive_fields(_Blur(1), torch.randn(1, 9, 9))
    with pytest.raises(ValueError, match="at least one"):
        receptive_fields(_Blur(1), torch.randn(0, 1, 9, 9))
    with pytest.raises(ValueError, match="Linear has no forward_intermediates"):
        receptive_fields(nn.Linear(2, 2), torch.randn(1, 1, 9, 9))
    for factor, message in ((0.0, "zero everywhere"), (math.inf, "not finite")):
        with pytest.raises(ValueError, match=message):
            receptive_fields(_Times(factor), torch.randn(1, 1, 9, 9))


class _Times(_Blur):
    def __init__(self, factor: float) -> None:
        super().__init__(1)
        self.factor = factor

    def forward_intermediates(self, images: torch.Tensor, **arguments: Any) -> list[torch.Tensor]:
        return [feature * self.factor for feature in super().forward_intermediates(images, **arguments)]
