"""Our pyramids as `tu-` encoders of segmentation_models_pytorch, and its architectures as heads of ours."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import pytest
import torch
from mixerzoo.vision.segmentation import build_segmenter
from torch import nn

smp = pytest.importorskip("segmentation_models_pytorch")

ARCHITECTURES = ("Unet", "FPN", "UPerNet", "Segformer")
SHALLOW: dict[str, Any] = {"depths": (1, 1, 1, 1)}
NARROW = SHALLOW | {"embed_dim": 8, "num_heads": (1, 1, 1, 1)}
THIN = SHALLOW | {"dims": (8, 16, 24, 32)}
FAMILIES: dict[str, dict[str, Any]] = {
    "bevanet_s": {},
    "dinat_mini": NARROW | {"kernel_size": 3, "dilations": 1},
    "dinat_s_tiny": NARROW | {"kernel_size": 3, "dilations": 1},
    "dynamicvit_convnext_tiny": {},
    "dynamicvit_swin_tiny": {},
    "efficientvmamba_tiny": {},
    "litv2_s": NARROW,
    "nat_mini": NARROW | {"kernel_size": 3},
    "stvitr_det_swin_small": {},
    "stvitr_swin_small": {},
    "unireplknet_a": {},
    "van_b0": THIN,
    "vig_h_tiny": {},
    "vmamba_tiny_s1l8": THIN,
    "vmambav0_tiny": SHALLOW | {"embed_dim": 8},
}
"""One variant of each family with maps of strides 4, 8, 16 and 32. MobileMamba's are 16, 32 and 64."""
SAMPLE = [
    pair
    for pair in zip(itertools.cycle(ARCHITECTURES), FAMILIES, strict=False)
    if pair[1] != "stvitr_swin_small"  # slow, and beside stvitr_det_swin_small no other pyramid
]


def _narrow(architecture: str) -> dict[str, Any]:
    """Less of a decoder, where it says so."""
    return {"decoder_channels": (16, 16, 8, 8, 8)} if architecture == "Unet" else {}


def _check(architecture: str, name: str) -> None:
    kind = getattr(smp, architecture)
    model = kind(f"tu-{name}", encoder_weights=None, classes=3, **_narrow(architecture), **FAMILIES[name]).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.exhaustive
def test_every_architecture_takes_every_pyramid(architecture: str, name: str) -> None:
    _check(architecture, name)


def test_an_architecture_takes_a_pyramid() -> None:
    _check("FPN", "van_b0")


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "name"), SAMPLE)
def test_each_architecture_and_each_pyramid_once(architecture: str, name: str) -> None:
    _check(architecture, name)


def _segmenter(architecture: str = "FPN", name: str = "nat_mini", **options: Any) -> nn.Module:
    head = {"name": f"smp:{architecture}", "kwargs": {"decoder_pyramid_channels": 16}, **options}
    arguments = FAMILIES["nat_mini"] if name == "nat_mini" else {}
    return build_segmenter(name, 5, head=head, **arguments)


@pytest.mark.slow
def test_an_architecture_is_a_head_at_any_size(tmp_path: Path) -> None:
    model: Any = _segmenter(dropout=0.3)
    for size in ((64, 64), (37, 61), (96, 40)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 5, *size)
    assert model.network.decoder.dropout.p == 0.3
    assert model.network.encoder.model.model.stages[0].out_norm.weight.shape == (8,)  # as published, by published.py
    images = torch.randn(1, 3, 32, 64)
    assert torch.equal(model.eval()(images), model.network(images))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again = _segmenter(dropout=0.3)
    head = {"name": "smp:fpn", "kwargs": {"decoder_pyramid_channels": 16}}
    again = build_segmenter("nat_mini", 5, head=head, checkpoint=tmp_path / "own.pth", **FAMILIES["nat_mini"])
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_its_encoder_keeps_weight_decay_and_layers() -> None:
    model: Any = _segmenter()
    names = {name for name, _ in model.named_parameters()}
    spared = model.no_weight_decay()
    assert spared and spared <= names and all(name.endswith(".rpb") for name in spared)
    matcher = model.group_matcher()
    layers = {name: matcher(name) for name in names}
    assert layers["network.encoder.model.model.stem.norm.weight"] < layers[next(iter(spared))]
    assert {layer for name, layer in layers.items() if not name.startswith("network.encoder.")} == {(1, 0)}


def test_what_smp_cannot_take_is_said() -> None:
    with pytest.raises(ValueError, match=r"no architecture of smp is called Unett; did you mean smp:Unet\?"):
        _segmenter("Unett")
    for name in ("mobilemamba_t2", "vim_tiny"):
        with pytest.raises(ValueError, match=rf"needs maps of strides 4, 8, 16 and 32; those of {name} are \[16\b"):
            _segmenter(name=name)
    with pytest.raises(ValueError, match=r"those of nat_mini are \[2, 4, 8, 16\]; .*leave out arguments"):
        build_segmenter("nat_mini", 5, head={"name": "smp:FPN"}, stem_stride=2)
    with pytest.raises(ValueError, match=r"head\.channels is of our own heads"):
        _segmenter(channels=8)
    with pytest.raises(ValueError, match=r"aux_params adds a classifier of whole pictures.*leave it out"):
        _segmenter(kwargs={"aux_params": {"classes": 3}})
    with pytest.raises(ValueError, match=r"smp:FPN around nat_mini: .*'width'; see head\.kwargs"):
        _segmenter(kwargs={"width": 3})


@pytest.mark.parametrize("architecture", ["DeepLabV3", "DeepLabV3Plus", "PAN"])
def test_architectures_that_dilate_the_backbone_name_those_that_do_not(architecture: str) -> None:
    message = rf"smp:{architecture} needs a backbone .* dilated.*, which van_b0 is not; take one of (.*)"
    with pytest.raises(ValueError, match=message) as caught:
        build_segmenter("van_b0", 5, head={"name": f"smp:{architecture}"}, **THIN)
    named = str(caught.value).rpartition("one of ")[2].split(", ")
    assert set(ARCHITECTURES) <= set(named) and not {"DeepLabV3", "DeepLabV3Plus", "PAN"} & set(named)


@pytest.mark.parametrize("architecture", ["FPN", "DPT"])
def test_a_classifier_of_other_classes_begins_anew(architecture: str, tmp_path: Path) -> None:
    head = {"name": f"smp:{architecture}"}
    five: Any = build_segmenter("van_b0", 5, head=head, **THIN)
    torch.save(five.state_dict(), tmp_path / "five.pth")
    seven: Any = build_segmenter("van_b0", 7, head=head, checkpoint=tmp_path / "five.pth", **THIN)
    before = five.state_dict()
    new = {name for name, tensor in seven.state_dict().items() if not torch.equal(tensor, before[name])}
    last = "head.4" if architecture == "DPT" else "0"
    assert new == {f"network.segmentation_head.{last}.{part}" for part in ("weight", "bias")}
    assert seven.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7, 64, 64)


def test_without_smp_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ValueError, match="needs segmentation_models_pytorch; pip install segmentation-models-pytorch"):
        _segmenter()
