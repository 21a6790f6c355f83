"""BEVANet, classifier and segmenter, against the authors' records, and what is particular about it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mixerzoo.vision.backbones.bevanet import BEVANet, checkpoint_filter_fn
from mixerzoo.vision.segmentation import SegmenterOutput, build_segmenter
from mixerzoo.vision.segmentation.bevanet import BEVANetSegmenter, from_published
from torch import Tensor, nn

HEAD = {"name": "bevanet"}
TINY: dict[str, Any] = {"depths": (1, 1, 1, 1, 1), "embed_dim": 4, "last_dim": 8}
TINY_HEAD = {**HEAD, "channels": 8, "neck_channels": 4}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], float, float]] = {
    "S": ("bevanet_s", {}, {}, 15.19, 15.09),
    "base": ("bevanet", {}, {}, 58.82, 58.60),
    "SW": ("bevanet", {}, {"depths": (2, 2, 3, 2, 2)}, 57.64, 57.42),
    "L": ("bevanet", {"channels": 256, "neck_channels": 112}, {"depths": (3, 3, 4, 2, 2)}, 60.20, 59.83),
}


def tiny(num_classes: int = 5, **kwargs: Any) -> BEVANetSegmenter:
    model = build_segmenter("bevanet_s", num_classes, head={**TINY_HEAD, **kwargs}, **TINY)
    assert isinstance(model, BEVANetSegmenter)
    return model


def taps(network: Any, into: dict[str, Tensor]) -> None:
    """Record what the authors' hooks recorded, under their names."""

    def keep(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, inputs, output: into.update({name: output.clone()}))

    before_act = network.stages[1].blocks[-1].act
    before_act.register_forward_pre_hook(lambda _, inputs: into.update(layer2=inputs[0].clone()))
    keep(network.stages[2].detail.fuse, "fuse3")
    keep(network.stages[3].detail.fuse, "fuse4")
    keep(network.refine, "ds")


@torch.no_grad()
def test_official_classifier(golden) -> None:
    gold = golden("bevanet_s_cls")
    model = timm.create_model("bevanet_s").eval()
    assert isinstance(model, BEVANet) and sum(p.numel() for p in model.parameters()) == gold.record["params"]
    model.load_state_dict(checkpoint_filter_fn({"state_dict": gold.checkpoint()}, model))
    found: dict[str, Tensor] = {}
    taps(model, found)
    found["logits"] = model(gold.picture())
    errors = {name: gold.error(name, found[name]) for name in gold.record["outputs"]}
    assert all(error < 8 * gold.record["fp64_rel_err"][name] for name, error in errors.items()), errors


@torch.no_grad()
def test_official_segmenter(golden, tmp_path: Path) -> None:
    """From a file as the authors' training saves it: names behind `model.`, and a buffer of the loss."""
    gold = golden("bevanet_s_cityscapes")
    file = tmp_path / "best.pt"
    saved = {f"model.{name}": tensor for name, tensor in gold.checkpoint().items()}
    torch.save({**saved, "sem_loss.criterion.weight": torch.ones(19)}, file)
    model = build_segmenter("bevanet_s", 19, head=HEAD, checkpoint=file).eval()
    assert sum(p.numel() for p in model.parameters()) == gold.record["params"]
    found: dict[str, Tensor] = {}
    taps(model.backbone.model, found)
    for module, name in ((model.decode_head.pool, "spp"), (model.decode_head.fuse, "dfm")):
        module.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: output.clone()}))
    found["out"], (found["out_ds"],), found["out_db"] = model.forward_heads(gold.picture())
    errors = {name: gold.error(name, found[name]) for name in gold.record["outputs"]}
    assert all(error < 8 * gold.record["fp64_rel_err"][name] for name, error in errors.items()), errors
    logits = model(gold.picture())
    want = nn.functional.interpolate(found["out"], size=(256, 512), mode="bilinear", align_corners=True)
    torch.testing.assert_close(logits, want)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_have_their_published_size(name: str) -> None:
    backbone, head, kwargs, whole, inference = CONFIGURATIONS[name]
    with torch.device("meta"):
        model = build_segmenter(backbone, 19, head={**HEAD, **head}, **kwargs)
    learning = (model.auxiliary_head, model.boundary_head)
    sizes = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (model, *learning)]
    assert sizes[0] == pytest.approx(whole, abs=5e-3)
    assert sizes[0] - sizes[1] - sizes[2] == pytest.approx(inference, abs=5e-3)


def test_answers_in_evaluation_and_in_training() -> None:
    model, images = tiny(), torch.randn(2, 3, 66, 97)
    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.shape == (2, 5, 66, 97)
        heads = model.forward_heads(images)
        assert heads.logits.shape == heads.auxiliary[0].shape == (2, 5, 9, 13)
    out = model.train()(images)
    assert isinstance(out, SegmenterOutput) and out.boundary is not None
    assert out.logits.shape == out.auxiliary[0].shape == (2, 5, 66, 97) and out.boundary.shape == (2, 1, 66, 97)
    (out.logits.square().mean() + out.auxiliary[0].square().mean() + out.boundary.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    alone = tiny(auxiliary=False).train()
    assert isinstance(alone(images), Tensor)
    assert set(alone.state_dict()) < set(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 64), (33, 1), (7, 50), (1, 1)])
def test_any_size(size: tuple[int, int]) -> None:
    model = tiny().eval()
    x = torch.randn(2, 3, *size)
    logits = model(x)
    assert logits.shape == (2, 5, *size) and logits.isfinite().all()
    torch.testing.assert_close(model(x[1:]), logits[1:])


@pytest.mark.slow
@torch.no_grad()
def test_its_own_weights_and_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    torch.save({"state_dict": {f"model.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "ours.ckpt")
    arguments: dict[str, Any] = {"head": TINY_HEAD, "checkpoint": tmp_path / "ours.ckpt", **TINY}
    same = build_segmenter("bevanet_s", 5, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), source.state_dict().values(), strict=True))
    with caplog.at_level(logging.INFO):
        other = build_segmenter("bevanet_s", 3, **arguments)
    assert "has 5 classes; those of 3 begin anew" in caplog.text
    assert torch.equal(other.decode_head.head.conv1.weight, source.decode_head.head.conv1.weight)
    arguments["head"] = {**TINY_HEAD, "auxiliary": False}
    lean = build_segmenter("bevanet_s", 5, **arguments).state_dict()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in lean.items())
    with pytest.raises(ValueError, match=r"do not fit this segmenter\. missing: .*stages\.0\.blocks\.1"):
        build_segmenter("bevanet_s", 5, **{**arguments, "depths": (2, 1, 1, 1, 1)})


@torch.no_grad()
def test_a_classifier_is_a_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its four stages and the end of the detail branch; what is not used is told."""
    classifier = timm.create_model("bevanet_s", **TINY)
    for parameter in classifier.parameters():
        nn.init.normal_(parameter)
    torch.save(classifier.state_dict(), tmp_path / "imagenet.pth")
    with caplog.at_level(logging.INFO):
        model = build_segmenter("bevanet_s", 5, head=TINY_HEAD, checkpoint=tmp_path / "imagenet.pth", **TINY)
    own, given = model.backbone.model.state_dict(), classifier.state_dict()
    assert {name.split(".")[0] for name in own} == {"stem", "stages", "refine"}
    assert all(torch.equal(tensor, given[name]) for name, tensor in own.items())
    assert "not used of them: the last stage of the context (stages.4), last_conv and the classifier" in caplog.text


def test_the_detail_map_is_the_end_of_its_branch() -> None:
    model = timm.create_model("bevanet_s", **TINY).eval()
    x = torch.randn(1, 3, 70, 50)
    with torch.no_grad():
        features = timm.create_model("bevanet_s", features_only=True, **TINY).eval()(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        _, detail, earlier = model.forward_branches(x)
        assert torch.equal(maps[1], model.refine(detail)) and (earlier >= 0).all()
    assert [tuple(m.shape) for m in maps] == [
        *((1, 4, 18, 13), (1, 16, 9, 7), (1, 16, 5, 4), (1, 32, 3, 2), (1, 64, 3, 2)),
    ]
    assert [m.shape[1] for m in features] == [4, 16, 16, 64]
    model.prune_intermediate_layers([0, 2])
    assert not [name for name, _ in model.named_parameters() if "detail" in name or "refine" in name]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"depths needs five entries of at least 1; got \(2, 2, 3\)"):
        timm.create_model("bevanet_s", depths=(2, 2, 3))
    with pytest.raises(ValueError, match=r"needed the features of a BEVANet .*; got VAN"):
        build_segmenter("van_b0", 3, head=HEAD, depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))
    with pytest.raises(ValueError, match=r"bevanet has no dropout; got 0\.5"):
        build_segmenter("bevanet_s", 3, head={**HEAD, "dropout": 0.5})
    with pytest.raises(ValueError, match=r"cannot be fetched by a program; download https://drive\.google\.com"):
        build_segmenter("bevanet_s", 3, head=HEAD, pretrained=True)
    torch_names = from_published({"sem_loss.criterion.weight": torch.ones(1), "conv1.0.weight": torch.ones(1)})
    assert list(torch_names) == ["backbone.model.stem.conv1.weight"]
