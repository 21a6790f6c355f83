"""Dynamic ConvNeXt and Swin: official outputs and choices, both ways of a block, files, cost, arguments."""

import re
import zlib
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import numpy as np
import pytest
import timm
import torch
from mixerzoo.mixers.token_predictor import PredictorLG
from mixerzoo.vision.backbones._dynamic import DynamicBlock, keep_ratios
from mixerzoo.vision.backbones.dynamicvit_convnext import DynamicConvNeXtBlock
from mixerzoo.vision.summary import summarize
from torch import Tensor, nn

RECORDS = {
    "dynamicvit_convnext_tiny": "dynamiccnn_convnext_tiny_r07",
    "dynamicvit_swin_tiny": "dynamicswin_tiny_r07",
}
DENSE = {"dynamicvit_convnext_tiny": "convnext_tiny", "dynamicvit_swin_tiny": "swin_tiny_patch4_window7_224"}
NARROW: dict[str, dict[str, Any]] = {
    "dynamicvit_convnext_tiny": {"dims": (16, 32, 64, 128)},
    "dynamicvit_swin_tiny": {"embed_dim": 16, "num_heads": (1, 2, 4, 8)},
}
SHALLOW: dict[str, Any] = {"depths": (1, 1, 4, 1), "locations": (1, 3), "drop_path_rate": 0.0}


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs)


def shallow(name: str, **kwargs: Any) -> nn.Module:
    """With layer scales that let every part show."""
    scales = {"init_values": 1.0} if "convnext" in name else {}
    return timm.create_model(name, **{**SHALLOW, **scales, **kwargs})


def dynamic_blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, DynamicBlock)]


# Against the authors' code


def official_file(gold: Any) -> dict[str, Any]:
    """With the masks of shifted windows that the published files of Swin hold."""
    masks = gold.record["checkpoint_extra_float_buffers"]
    return {"model": gold.checkpoint() | {name: torch.zeros(shape) for name, shape in masks.items()}}


@pytest.mark.parametrize("name", RECORDS)
@torch.no_grad()
def test_official_outputs_and_choices(golden, tmp_path: Path, name: str) -> None:
    gold = golden(RECORDS[name])
    model, picture = load(name, official_file(gold), tmp_path).eval(), gold.picture()
    assert sum(p.numel() for p in model.parameters()) == gold.record["params"]
    scores: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, PredictorLG):
            module.register_forward_hook(lambda *call: scores.append(call[2][:, :, 0]))
    features, stages = model.forward_intermediates(picture)
    got = {"logits": model.forward_head(features)}
    for i, stage in enumerate(stages):
        flat = len(gold.record["outputs"][f"stage{i}"]["shape"]) == 3
        got[f"stage{i}"] = stage.flatten(2).transpose(1, 2) if flat else stage
    assert got.keys() == gold.record["outputs"].keys()
    assert all(gold.error(output, tensor) < 5e-6 for output, tensor in got.items())

    decided = model.forward_decided(torch.cat([picture, picture.flip(3)]))  # two, which the authors' Swin refuses
    assert gold.error("logits", decided.logits[:1]) < 5e-6 and decided.mask is None
    assert decided.tokens.shape == (2, 49, 768)
    wanted = gold.record["keep_decisions"]
    assert [stage["ratio"] for stage in wanted] == model.target_keep_rates
    for score, decision, stage in zip(scores, decided.decisions, wanted, strict=False):
        order = score.argsort(dim=1, descending=True, stable=True)[0]
        assert order[: stage["keep"]].tolist() == stage["kept_local"]
        assert decision[0].nonzero().flatten().tolist() == sorted(stage["kept_local"])
        assert decision.shape == (2, 196) and decision[1].sum() == stage["keep"]


def official_block_name(name: str) -> str:
    name = re.sub(r"mlp\.fc(\d)", r"pwconv\1", name).replace("conv_dw", "dwconv")
    return name.replace("predictor.", "dyconvnext_predictor.") if "predictor" in name else f"dyconvnext_block.{name}"


@torch.no_grad()
def test_official_block(golden) -> None:
    gold = golden("token_ops")
    case = gold.record["dynamicvit"]["convnext"]
    block = DynamicConvNeXtBlock(64, keep_ratio=case["ratio"], decides=True, init_values=1.0, drop_path=0.0).eval()
    names = {official_block_name(name): name for name in block.state_dict()}
    gold.record = {"state": {theirs: [*block.state_dict()[ours].shape] for theirs, ours in names.items()}}
    gold.record["outputs"] = case
    block.load_state_dict({names[theirs]: tensor.clone() for theirs, tensor in gold.checkpoint().items()})
    stream = np.random.Generator(np.random.Philox(zlib.crc32(b"dyconvnext.x")))
    x = torch.from_numpy(stream.standard_normal((2, 64, 14, 14))).float()
    route = block.decide(x)
    order = route.argsort(dim=1, descending=True, stable=True)
    assert order[:, :97].tolist() == case["idx_slow"] and order[:, 97:].tolist() == case["idx_fast"]
    assert gold.error("block_out", block(x, route)) < 5e-6


@pytest.mark.parametrize(
    ("given", "rates"),
    [({}, [0.9, 0.7, 0.5]), ({"keep_rate": 0.6}, [0.6, 0.4, 0.2]), ({"keep_rate": [1, 1, 1]}, [1, 1, 1])],
)
def test_a_tag_brings_its_keep_rate(given: dict[str, Any], rates: list[float]) -> None:
    model: Any = timm.create_model("dynamicvit_convnext_tiny.r09_in1k", dims=(16, 32, 64, 128), **given)
    assert model.target_keep_rates == pytest.approx(rates)


@pytest.mark.parametrize("name", RECORDS)
def test_checkpoints(tmp_path: Path, name: str) -> None:
    want = timm.create_model(name, **NARROW[name]).state_dict()
    got = load(name, {"state_dict": want}, tmp_path, **NARROW[name]).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    incomplete = {key: w for key, w in want.items() if key != "stages.2.blocks.2.predictor.in_conv.1.bias"}
    with pytest.raises(ValueError, match=r"missing: 1 \(stages\.2\.blocks\.2\.predictor\.in_conv\.1\.bias\)"):
        load(name, incomplete, tmp_path, **NARROW[name])
    with pytest.raises(ValueError, match="cannot be fetched by a program"):
        timm.create_model(name, pretrained=True, **NARROW[name])


@pytest.mark.parametrize("name", RECORDS)
@torch.no_grad()
def test_a_dense_model_is_where_training_starts(tmp_path: Path, name: str) -> None:
    dense = timm.create_model(DENSE[name], depths=SHALLOW["depths"], **NARROW[name]).eval()
    for parameter in dense.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    model = load(name, dense.state_dict(), tmp_path, **SHALLOW, **NARROW[name], keep_rate=1.0).eval()
    for block in dynamic_blocks(model):
        block.keep_ratio = 1.0
    x = torch.randn(2, 3, 224, 224)
    assert (model(x) - dense(x)).abs().max() < 1e-5 * dense(x).abs().max()
    fresh = timm.create_model(name, **SHALLOW, **NARROW[name]).state_dict()
    added = [key for key in model.state_dict() if "predictor" in key and key.endswith("1.weight")]
    assert added and all(0.8 < model.state_dict()[key].std() / fresh[key].std() < 1.2 for key in added)


# Both ways of a block


def decide_all(model: nn.Module, keep: bool) -> None:
    """Every position the same, whatever the picture and the noise."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PredictorLG):
                module.out_conv[4].weight.zero_()
                module.out_conv[4].bias.copy_(torch.tensor([200.0, -200.0] if keep else [-200.0, 200.0]))


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_training_computes_what_evaluation_does(name: str, keep: bool) -> None:
    model = shallow(name)
    decide_all(model, keep)
    for block in dynamic_blocks(model):
        block.keep_ratio = 1.0 if keep else 0.0  # one position at least takes the MLP
    x = torch.randn(2, 3, 64, 64)
    trained, evaluated = model.train()(x), model.eval()(x)
    error = (trained - evaluated).abs().max() / evaluated.abs().max()
    assert error < 1e-5 if keep else 1e-6 < error < 0.5


@pytest.mark.parametrize("name", RECORDS)
def test_decisions_learn(name: str) -> None:
    model = shallow(name, num_classes=5).train()
    decided = model.forward_decided(torch.randn(2, 3, 96, 64))
    assert [decision.shape for decision in decided.decisions] == [(2, 24)] * 2
    assert all(set(decision.unique().tolist()) <= {0.0, 1.0} for decision in decided.decisions)
    assert decided.tokens.shape == (2, 6, 768) and decided.logits.shape == (2, 5)
    targets = model.target_keep_rates
    rates = sum((d.mean(1) - rate).square().mean() for d, rate in zip(decided.decisions, targets, strict=True))
    biases = [b.predictor.out_conv[4].bias for b in dynamic_blocks(model)[::2]]
    gradients = torch.autograd.grad(rates, biases, retain_graph=True)
    assert all(gradient.any() for gradient in gradients)
    weight = dynamic_blocks(model)[2].predictor.in_conv[1].weight
    assert torch.autograd.grad(decided.logits.square().sum(), weight)[0].any()  # classification teaches it, too


@pytest.mark.parametrize("name", RECORDS)
@torch.no_grad()
def test_only_the_best_positions_take_the_mlp(name: str) -> None:
    model, seen = shallow(name).eval(), {}
    for i, block in enumerate(dynamic_blocks(model)):
        block.mlp.fc1.register_forward_hook(lambda *call, i=i: seen.update({i: call[1][0].shape[1]}))
    model(torch.randn(1, 3, 160, 96))  # 10 x 6
    assert seen == {0: int(60 * 0.7), 1: int(60 * 0.7), 2: int(60 * (0.7 - 0.2))}


@pytest.mark.parametrize(("name", "gmacs"), [("dynamicvit_convnext_tiny", 3.6), ("dynamicvit_swin_tiny", 4.0)])
def test_cost(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        published = summarize(timm.create_model(name), (3, 224, 224))
        most, least = (summarize(shallow(name, keep_rate=rate), (3, 224, 224)) for rate in (0.9, 0.7))
    assert round(published.macs / 1e9, 1) == gmacs
    kept = 2 * (176 - 137) + (
        137 - 97
    )  # positions more, in the two blocks of the first choice and the last of the second
    assert most.macs - least.macs == kept * (8 * 384**2 - 384**2)


# Arguments


def test_rates_and_locations() -> None:
    assert keep_ratios(0.9, (1, 3), 4) == [None, 0.9, None, 0.9 - 0.2]
    assert timm.create_model("dynamicvit_swin_small", device="meta").target_keep_rates == [0.7, 0.7 - 0.2, 0.7 - 0.4]
    with pytest.raises(ValueError, match=r"ascending, from 0 to 8; got \[1, 2, 9\]"):
        timm.create_model("dynamicvit_convnext_tiny", locations=(1, 2, 9))
    with pytest.raises(ValueError, match=r"falls by 0.2 at each of the 3 locations.*got 0.4"):
        timm.create_model("dynamicvit_swin_tiny", keep_rate=0.4)
    with pytest.raises(ValueError, match="dims and depths need one entry per stage"):
        timm.create_model("dynamicvit_convnext_tiny", dims=(96, 192))
    with pytest.raises(ValueError, match="depths and num_heads need one entry per stage"):
        timm.create_model("dynamicvit_swin_tiny", num_heads=(3, 6))
