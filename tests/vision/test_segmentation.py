"""Head and segmenter."""

from __future__ import annotations

import mixerzoo.vision  # noqa: F401  # registers the models
import pytest
import timm
import torch
from mixerzoo.vision.segmentation import FPNHead, Segmenter
from mixerzoo.vision.segmentation.segmenter import feature_channels


def _segmenter(name: str = "test_convnext") -> Segmenter:
    backbone = timm.create_model(name, features_only=True)
    return Segmenter(backbone, FPNHead(feature_channels(backbone), 5, channels=16, dropout=0.1))


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (37, 61)])
def test_logits_have_the_size_of_the_picture(size: tuple[int, int]) -> None:
    logits = _segmenter()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, *size)


def test_every_parameter_of_backbone_and_head_learns() -> None:
    model = _segmenter()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.head.classify.parameters())


def test_coarse_maps_reach_every_pixel_of_the_finest() -> None:
    """The pyramid carries context down: the coarsest map alone changes the whole output."""
    head = FPNHead([4, 8], 3, channels=8).eval()
    fine, coarse = torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 4, 4)
    change = (head([fine, coarse + 1]) - head([fine, coarse])).abs().amax(1)
    assert (change > 0).all()


def test_wrong_numbers_of_maps_and_plain_models_are_refused() -> None:
    with pytest.raises(ValueError, match="built for 2 feature maps; got 1"):
        FPNHead([4, 8], 3)([torch.zeros(1, 4, 8, 8)])
    with pytest.raises(ValueError, match="features_only=True"):
        feature_channels(torch.nn.Conv2d(1, 1, 1))


def test_what_the_backbone_spares_from_weight_decay_keeps_its_name() -> None:
    kwargs = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "kernel_size": 3}
    backbone = timm.create_model("nat_mini", features_only=True, **kwargs)
    model = Segmenter(backbone, FPNHead(feature_channels(backbone), 2, channels=8))
    spared = model.no_weight_decay()
    assert spared and spared <= {name for name, _ in model.named_parameters()}
    assert all("rpb" in name for name in spared)
