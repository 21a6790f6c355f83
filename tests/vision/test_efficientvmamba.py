"""EfficientVMamba: official outputs, published tables and files, arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.kernels.cross_scan import ATROUS
from mixerzoo.mixers import AtrousSS2D
from mixerzoo.vision.backbones.efficientvmamba import EVSSBlock, MBConvBlock
from torch import nn

# Thousands of parameters with 1000 classes, of the authors' code.
PARAMETERS = {"efficientvmamba_tiny": 6494, "efficientvmamba_small": 11274, "efficientvmamba_base": 33717}


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": 1000}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})


@torch.no_grad()
def test_official_outputs(golden: Callable, tmp_path: Path) -> None:
    gold = golden("efficientvmamba_tiny")
    picture = gold.picture()
    official = {f"module.module.{key}": tensor for key, tensor in gold.checkpoint().items()}
    model = load("efficientvmamba_tiny", {"state_dict": official}, tmp_path).eval()
    features, stages = model.forward_intermediates(picture)
    got = {"patch_embed": model.stem(picture).permute(0, 3, 1, 2), "logits": model.forward_head(features)}
    got |= {f"stage{i}": stage for i, stage in enumerate(stages)}
    assert got.keys() == gold.record["outputs"].keys()
    sensitivity = gold.record["sensitivity"]
    errors = {output: gold.error(output, tensor) for output, tensor in got.items()}
    assert all(error < 2e-6 * max(sensitivity[output], 1) for output, error in errors.items()), errors


@pytest.mark.parametrize(("name", "thousands"), PARAMETERS.items())
def test_parameter_count(golden: Callable, name: str, thousands: int) -> None:
    model = timm.create_model(name, device="meta", num_classes=1000)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e3) == thousands
    if name == "efficientvmamba_tiny":
        assert count == golden(name).record["params"]


def test_the_settings_that_were_not_published() -> None:
    """The file of settings of the small model says 96 channels: another model, 24.757 million parameters."""
    model = timm.create_model("efficientvmamba_small", device="meta", embed_dim=96, num_classes=1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e3) == 24757


def test_published_settings() -> None:
    registered = set(timm.list_models("efficientvmamba*"))
    assert registered == PARAMETERS.keys()
    model = timm.create_model("efficientvmamba_base", device="meta")
    kinds = [{type(block) for block in stage.blocks} for stage in model.stages]
    assert kinds == [{EVSSBlock}, {EVSSBlock}, {MBConvBlock}, {MBConvBlock}]
    mixers = [module for module in model.modules() if isinstance(module, AtrousSS2D)]
    assert all(mixer.scan.paths == ATROUS and mixer.scan.state_dim == 16 for mixer in mixers) and len(mixers) == 4
    assert model.no_weight_decay() == {
        f"stages.{i}.blocks.{j}.mixer.scan.{name}" for i in (0, 1) for j in (0, 1) for name in ("A_log", "D", "dt_bias")
    }


def test_files(golden: Callable, tmp_path: Path) -> None:
    name = "efficientvmamba_tiny"
    official = golden(name).checkpoint()
    want = load(name, official, tmp_path).state_dict()
    backbone = {key: tensor for key, tensor in official.items() if not key.startswith("classifier.")}
    norms = {f"outnorm{i}.weight": torch.full((48 * 2**i,), i + 2.0) for i in range(4)}
    norms |= {f"outnorm{i}.bias": torch.zeros(48 * 2**i) for i in range(4)}
    detector = {f"backbone.{key}": tensor for key, tensor in {**backbone, **norms}.items()}
    got = load(name, {"state_dict": detector}, tmp_path, features_only=True, out_norms=True).model.state_dict()
    assert all((got[f"stages.{i}.out_norm.weight"] == i + 2).all() for i in range(4))
    ours = load(name, want, tmp_path).state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in want.items())
    assert load(name, official, tmp_path, num_classes=7).head.fc.weight.shape == (7, 384)
    del official["layers.2.3.se.conv_reduce.bias"]
    with pytest.raises(ValueError, match=r"missing: 1 \(stages\.2\.blocks\.2\.se\.fc1\.bias\)"):
        load(name, official, tmp_path)
    with pytest.raises(ValueError, match="does not belong to efficientvmamba_base"):
        load("efficientvmamba_base", official, tmp_path)


@torch.no_grad()
def test_one_gate_weighs_both_branches() -> None:
    """By the average of each: a branch of nothing gives nothing, whatever the other's gate."""
    block = EVSSBlock(8, expand=2.0, state_dim=2, drop_path=0.0).eval()
    x = torch.randn(1, 6, 5, 8)
    y = block.norm1(x)
    local = block.conv_branch(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    scanned = block.mixer(y)
    gates = [
        block.gate.expand(block.gate.act(block.gate.reduce(block.gate.norm(b).mean((1, 2))))) for b in (scanned, local)
    ]
    want = x + scanned * gates[0].sigmoid()[:, None, None] + local * gates[1].sigmoid()[:, None, None]
    assert torch.allclose(block(x), want, atol=1e-6)
    assert not torch.allclose(gates[0], gates[1], atol=1e-3)
