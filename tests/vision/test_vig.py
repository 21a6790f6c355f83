"""ViG, plain and hierarchical: official outputs, published settings and files, arguments."""

from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.mixers import GatedLinearAttention2d
from timm.layers import DropPath, RmsNorm
from torch import Tensor, nn
from torch.nn import functional as F

# Millions of parameters with 1000 classes, of the authors' code; the rate of stochastic depth of their last block.
MODELS = {
    "vig_tiny": (5.835, 0.0),
    "vig_small": (22.615, 0.2),
    "vig_base": (89.022, 0.5),
    "vig_h_tiny": (28.601, 0.2),
    "vig_h_small": (50.052, 0.3),
    "vig_h_base": (88.904, 0.6),
}


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": 1000}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})


@torch.no_grad()
def test_official_outputs(golden, tmp_path: Path) -> None:
    gold = golden("vig_tiny")
    model = load("vig_tiny", {"model": gold.checkpoint()}, tmp_path).eval()
    tokens, (block,) = model.forward_intermediates(gold.picture(), indices=[0], output_fmt="NLC")
    logits = model.forward_head(tokens)
    got = {"block0": block, "tokens": tokens, "pre_logits": tokens.mean(1), "logits": logits}
    got["logits_trainpath"] = logits
    assert got.keys() == gold.record["outputs"].keys()
    for output, tensor in got.items():
        assert gold.error(output, tensor) < 1e-5 * max(gold.record["sensitivity"][output], 1), output


@torch.no_grad()
def test_official_outputs_of_the_pyramid(golden, tmp_path: Path) -> None:
    gold = golden("vig_h_tiny")
    model = load("vig_h_tiny", {"model": gold.checkpoint()}, tmp_path).eval()
    picture = gold.picture()
    features, stages = model.forward_intermediates(picture)
    got = {"patch_embed": model.stem(picture).permute(0, 3, 1, 2), "logits": model.forward_head(features)}
    got |= {f"stage{i}": stage for i, stage in enumerate(stages)}
    assert got.keys() == gold.record["outputs"].keys()
    for output, tensor in got.items():
        assert gold.error(output, tensor) < 1e-5 * gold.record["sensitivity"][output], output


@pytest.mark.parametrize(("name", "published"), MODELS.items())
def test_published_settings(golden, name: str, published: tuple[float, float]) -> None:
    model = timm.create_model(name, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 3) == published[0]
    if name.endswith("tiny"):
        assert count == golden(name).record["params"]
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.0) == pytest.approx(published[1])
    assert {m.eps for m in model.modules() if isinstance(m, RmsNorm)} == {1e-6}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    mixers = [m for m in model.modules() if isinstance(m, GatedLinearAttention2d)]
    heads = {m.dim // m.num_heads for m in mixers}
    assert heads == ({32} if "_h_" in name else {64})
    acts = {type(act) for m in mixers for act in (m.conv_act, m.act)}
    assert acts == ({nn.SiLU} if name == "vig_tiny" else {nn.Identity})


def test_initial_weights() -> None:
    """Mixers keep their own, whatever initialises the linear layers of the rest."""
    for name, args in (("vig_tiny", {"depth": 2}), ("vig_h_tiny", {"depths": (1, 1, 1, 1)})):
        model = timm.create_model(name, **args)
        for _ in range(2):
            for module in model.modules():
                if isinstance(module, GatedLinearAttention2d):
                    bound = 2**-2.5 * (6 / sum(module.qkv.weight.shape)) ** 0.5
                    assert 0.95 * bound < module.qkv.weight.abs().max() <= bound
                    assert not module.gate.bias.any() and not module.decay[1].bias.any()
            assert model.get_classifier().weight.std().item() == pytest.approx(0.02, rel=0.05)
            model.init_weights()


def test_checkpoints(golden, tmp_path: Path) -> None:
    official = golden("vig_tiny").checkpoint()
    want = load("vig_tiny", official, tmp_path).state_dict()
    for checkpoint in ({"model": {f"module.{k}": w for k, w in official.items()}}, want):
        got = load("vig_tiny", checkpoint, tmp_path).state_dict()
        assert all(torch.equal(got[key], want[key]) for key in want)
    assert load("vig_tiny", official, tmp_path, num_classes=7).head.weight.shape == (7, 192)
    del official["blocks.3.attn.g_norm.weight"]
    with pytest.raises(ValueError, match=r"missing: 1 \(blocks\.3\.mixer\.norm\.weight\)"):
        load("vig_tiny", official, tmp_path)
    with pytest.raises(ValueError, match="does not belong to vig_h_tiny"):
        load("vig_h_tiny", official, tmp_path)


@torch.no_grad()
def test_positions_of_another_size(golden, tmp_path: Path) -> None:
    """As the official code at every call: bicubic, without anti-aliasing."""
    official, grid = golden("vig_tiny").checkpoint(), (9, 17)
    raster = official["pos_embed"].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    want = F.interpolate(raster, grid, mode="bicubic", align_corners=False).flatten(2).mT
    resized = load("vig_tiny", official, tmp_path, img_size=(16 * grid[0], 16 * grid[1])).eval()
    torch.testing.assert_close(resized.pos_embed, want)
    model, picture = load("vig_tiny", official, tmp_path).eval(), torch.randn(1, 3, 16 * grid[0], 16 * grid[1])
    torch.testing.assert_close(model(picture), resized(picture))


def test_backbone_of_a_segmenter(golden, tmp_path: Path) -> None:
    """VMamba's way to save one: with norms of the taps, without the classifier."""
    official = golden("vig_h_tiny").checkpoint()
    norms = {f"backbone.outnorm{i}.{kind}": torch.rand(96 * 2**i) for i in range(4) for kind in ("weight", "bias")}
    backbone = {f"backbone.{key}": w for key, w in official.items() if not key.startswith("classifier.")}
    model = load("vig_h_tiny", {"state_dict": backbone | norms}, tmp_path, out_norms=True, features_only=True)
    assert torch.equal(model.model.stages[2].out_norm.bias, norms["backbone.outnorm2.bias"])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"num_heads needs one entry per stage, 4; got \(3, 6\)"):
        timm.create_model("vig_h_tiny", device="meta", num_heads=(3, 6))
    with pytest.raises(ValueError, match="the size of overlapping patches cannot be changed; got patch_size 8"):
        timm.create_model("vig_tiny", device="meta").set_input_size(patch_size=8)


def test_gradients_reach_both_directions(golden) -> None:
    model = timm.create_model("vig_tiny", depth=1)
    out: Tensor = model(golden("vig_tiny").picture()[..., :48, :64])
    out.square().sum().backward()
    grad = model.blocks[0].mixer.decay[1].weight.grad
    assert grad.unflatten(0, (2, -1)).abs().amax((1, 2)).all()
