"""Segmenter: sizes, what it says in training, layers and weight decay under it, and what it refuses."""

from __future__ import annotations

from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import pytest
import torch
from mixerzoo.vision.segmentation import SegmenterOutput, build_segmenter
from mixerzoo.vision.segmentation.features import feature_info

NAT = {"stem_stride": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "kernel_size": 3}
HEADS = ("upernet", "semantic_fpn", "segformer")


def _segmenter(name: str = "test_convnext", head: str = "semantic_fpn", **options: Any) -> Any:
    head_options = {"name": head, "channels": 8, **options}
    return build_segmenter(name, 5, head=head_options, **(NAT if name == "nat_mini" else {}))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(64, 64), (37, 61), (96, 40)])
def test_logits_have_the_size_of_the_picture(head: str, size: tuple[int, int]) -> None:
    model = _segmenter("nat_mini", head)
    trained = model(torch.randn(2, 3, *size))
    answers = [trained] if isinstance(trained, torch.Tensor) else [trained.logits, *trained.auxiliary]
    assert len(answers) == (2 if head == "upernet" else 1)
    answers.append(model.eval()(torch.randn(1, 3, *size)))
    assert all(answer.shape[1:] == (5, *size) for answer in answers)


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_of_backbone_and_heads_learns(head: str) -> None:
    model = _segmenter("nat_mini", head, auxiliary=True)
    output = model(torch.randn(2, 3, 64, 64))
    assert isinstance(output, SegmenterOutput) and output.boundary is None
    (output.logits.square().mean() + output.auxiliary[0].square().mean()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_the_auxiliary_head_only_learns() -> None:
    """It changes nothing of the answer, and can be left out."""
    model = _segmenter("nat_mini", "upernet").eval()
    images = torch.randn(1, 3, 64, 64)
    whole = model(images)
    model.auxiliary_head = None
    assert torch.equal(model(images), whole)
    without = _segmenter("nat_mini", "upernet", auxiliary=False)
    assert without.auxiliary_head is None and isinstance(without(torch.randn(2, 3, 64, 64)), torch.Tensor)


def test_what_is_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no head is called 'uppernet'; did you mean upernet\?"):
        _segmenter(head="uppernet")
    with pytest.raises(ValueError, match=r"a head has name, channels, .*'width': 8"):
        _segmenter(width=8)
    with pytest.raises(ValueError, match="a head has name, channels, "):
        build_segmenter("test_convnext", 5, head={"channels": 8})
    with pytest.raises(ValueError, match="no head is called None"):
        build_segmenter("test_convnext", 5, head={"name": None})
    with pytest.raises(ValueError, match=r"head\.channels is a width, at least 1, or None .* got 0"):
        _segmenter(channels=0)
    wrong: Any = "upernet"
    with pytest.raises(ValueError, match=r"described as in head=\{'name': 'upernet'\}; got 'upernet'"):
        build_segmenter("test_convnext", 5, head=wrong)
    with pytest.raises(ValueError, match="needs classes; got num_classes=0"):
        build_segmenter("test_convnext", 0, head={"name": "upernet"})


def test_maps_of_stride_two_stay_out_unless_asked_for() -> None:
    model = _segmenter("test_resnet", "segformer")
    assert model.backbone.feature_info.reduction() == [4, 8, 16, 32]
    with torch.device("meta"):
        model = build_segmenter("bevanet_s", 5, head={"name": "segformer", "channels": 8})
    assert model.backbone.feature_info.reduction() == [4, 8, 16, 32]  # of two maps at 1/32 the last
    asked = build_segmenter("test_resnet", 5, head={"name": "segformer", "channels": 8}, out_indices=(0, 4))
    assert len(asked.decode_head.convs) == 2  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="there is one map; set auxiliary=False"):
        build_segmenter("test_resnet", 5, head={"name": "upernet", "channels": 8}, out_indices=(4,))


def test_one_picture_is_too_few_to_train_upernet() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures in training; got a batch of 1"):
        _segmenter("nat_mini", "upernet")(torch.randn(1, 3, 64, 64))


def test_plain_models_are_refused() -> None:
    with pytest.raises(ValueError, match="features_only=True"):
        feature_info(torch.nn.Conv2d(1, 1, 1))


def test_what_the_backbone_spares_from_weight_decay_keeps_its_name() -> None:
    model = _segmenter("nat_mini", "upernet")
    spared = model.no_weight_decay()
    assert spared and spared <= {name for name, _ in model.named_parameters()}
    assert all("rpb" in name for name in spared)
