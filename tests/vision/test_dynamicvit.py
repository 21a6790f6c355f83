"""DynamicViT and LV-ViT: official outputs, scores and choices, masked training, dense features, files, cost."""

from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.mixers import token_predictor
from mixerzoo.mixers.token_predictor import PredictedPruning, PredictorLG
from mixerzoo.vision.backbones._token_reduction import TokenReducedViT, reduce_tokens, restore_tokens
from mixerzoo.vision.backbones.lvvit import LVViT
from mixerzoo.vision.summary import summarize
from torch import Tensor, nn

RECORDS = {  # the tag of the published file, which brings its keep rate
    "dynamicvit_deit_small_r07": "dynamicvit_deit_small_patch16_224.r07_in1k",
    "dynamicvit_lvvit_small_r05": "dynamicvit_lvvit_small.r05_in1k",
}
TINY: dict[str, Any] = {"embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 10}


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": kwargs.get("num_classes", 1000)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def tiny(name: str = "dynamicvit_deit_small_patch16_224", **kwargs: Any) -> Any:
    """With weights that make tokens differ, and predictors that are far from undecided."""
    model = timm.create_model(name, **{**TINY, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def predictors(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PredictorLG)]


def decide(model: nn.Module, keep: bool) -> None:
    """Every token the same, whatever the picture and the noise."""
    with torch.no_grad():
        for predictor in predictors(model):
            predictor.out_conv[4].weight.zero_()
            predictor.out_conv[4].bias.copy_(torch.tensor([200.0, -200.0] if keep else [-200.0, 200.0]))


# Against the authors' code


@pytest.mark.parametrize("record", RECORDS)
@torch.no_grad()
def test_official_outputs_scores_and_choices(golden, tmp_path: Path, record: str) -> None:
    gold = golden(record)
    model = load(RECORDS[record], {"model": gold.checkpoint()}, tmp_path).eval()
    assert sum(p.numel() for p in model.parameters()) == gold.record["params"]
    scores: list[Tensor] = []
    for predictor in predictors(model):
        predictor.register_forward_hook(lambda *call: scores.append(call[2][:, :, 0]))
    tokens = model.forward_features(gold.picture())
    got = {"logits": model.forward_head(tokens), "norm_tokens": tokens}
    got |= {f"score{i}": score for i, score in enumerate(scores)}
    assert got.keys() == gold.record["outputs"].keys()
    assert all(gold.error(output, tensor) < 5e-6 for output, tensor in got.items())

    decided = model.forward_decided(gold.picture())
    assert torch.equal(decided.logits, got["logits"]) and torch.equal(decided.tokens, tokens[:, 1:])
    wanted = gold.record["keep_decisions"]
    assert [stage["ratio"] for stage in wanted] == model.target_keep_rates
    for score, decision, stage in zip(scores, decided.decisions, wanted, strict=False):
        order = score.argsort(dim=1, descending=True, stable=True)[0]
        assert order[: stage["keep"]].tolist() == stage["kept_local"]
        assert decision[0].nonzero().flatten().tolist() == sorted(stage["kept_absolute"])
    behind = model.trace_tokens(gold.picture())[-1].assign[0, 1:]  # where in the sequence each patch is at the end
    assert behind.argsort()[-len(wanted[-1]["kept_absolute"]) :].tolist() == wanted[-1]["kept_absolute"]


def test_checkpoints(tmp_path: Path) -> None:
    model = tiny()
    ours = model.state_dict()
    theirs = {}
    for key, tensor in ours.items():
        for n, block in enumerate((1, 2, 3)):
            key = key.replace(f"blocks.{block}.reducer.predictor.", f"score_predictor.{n}.")
        theirs[key] = tensor
    assert sum(key.startswith("score_predictor.") for key in theirs) == 30
    for checkpoint in (ours, {"model": theirs}):
        got = load("dynamicvit_deit_small_patch16_224", checkpoint, tmp_path, **TINY).state_dict()
        assert all(torch.equal(got[key], ours[key]) for key in ours)
    del theirs["score_predictor.1.in_conv.1.bias"]
    with pytest.raises(ValueError, match=r"missing: 1 \(blocks\.2\.reducer\.predictor\.in_conv\.1\.bias\)"):
        load("dynamicvit_deit_small_patch16_224", theirs, tmp_path, **TINY)
    with pytest.raises(ValueError, match="cannot be fetched by a program"):
        timm.create_model("dynamicvit_deit_small_patch16_224", pretrained=True)


def test_a_dense_model_is_where_training_starts(tmp_path: Path) -> None:
    dense = tiny("lvvit_small")
    model = load("dynamicvit_lvvit_small", dense.state_dict(), tmp_path, **TINY)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in dense.state_dict().items())
    assert len(predictors(model)) == 3


# How many stay


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 160), (50, 70), (16, 16)])
@torch.no_grad()
def test_counts_follow_the_size_of_the_picture(height: int, width: int) -> None:
    model = tiny().eval()
    patches = -(-height // 16) * -(-width // 16)
    decided = model.forward_decided(torch.randn(2, 3, height, width))
    wanted = [max(int(patches * 0.7**i), 1) for i in (1, 2, 3)]
    assert [decision.sum(1).tolist() for decision in decided.decisions] == [[count] * 2 for count in wanted]
    assert decided.tokens.shape[1] == wanted[-1] and decided.mask is None


def test_cost() -> None:
    macs = {}
    with torch.device("meta"):
        for rate in (1.0, 0.7, 0.5):
            model = timm.create_model("dynamicvit_deit_small_patch16_224", keep_rate=rate)
            macs[rate] = summarize(model, (3, 224, 224)).macs / 1e9
    # Published: 2.9 at 0.7, without what the predictors and attention's products cost.
    assert macs[0.7] == pytest.approx(2.98, abs=0.05) and macs[0.5] == pytest.approx(2.23, abs=0.05)
    assert 4.6 < macs[1.0] < 4.8


# Training


def test_masked_training_computes_what_dropping_does() -> None:
    """With the same decisions: kept tokens and the answer do not see the others."""
    model = tiny(locations=(1,), keep_rate=0.5)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        evaluated = model.eval().forward_decided(x)
        kept = evaluated.decisions[0]
    reducer = model.blocks[1].reducer
    reducer.predictor.register_forward_hook(
        lambda *call: torch.stack([kept.log(), (1 - kept).log()], -1).clamp(min=-200)  # sure of just this
    )
    trained = model.train().forward_decided(x)
    assert torch.equal(trained.decisions[0], kept) and torch.equal(trained.mask, kept)
    assert (trained.logits - evaluated.logits).abs().max() < 1e-3 * evaluated.logits.abs().max()
    by_raster = trained.tokens[kept.bool()].sort(0)[0]
    assert torch.allclose(by_raster, evaluated.tokens.flatten(0, 1).sort(0)[0], atol=2e-3)


@pytest.mark.parametrize("name", ["dynamicvit_deit_small_patch16_224", "dynamicvit_lvvit_small"])
def test_decisions_learn_and_are_never_taken_back(name: str) -> None:
    model = tiny(name).train()
    decided = model.forward_decided(torch.randn(4, 3, 96, 64))
    first, second, third = decided.decisions
    assert all(
        decision.shape == (4, 24) and set(decision.unique().tolist()) == {0.0, 1.0} for decision in (first, third)
    )
    assert (second <= first).all() and (third <= second).all() and torch.equal(decided.mask, third)
    assert decided.tokens.shape == (4, 24, 64)
    assert model.target_keep_rates == [0.7, 0.7**2, 0.7**3]
    targets = model.target_keep_rates
    rates = sum((d.mean(1) - rate).square().mean() for d, rate in zip(decided.decisions, targets, strict=True))
    for loss in (rates, decided.logits.square().sum()):
        for predictor in predictors(model):
            weight = predictor.in_conv[1].weight
            assert torch.autograd.grad(loss, weight, retain_graph=True)[0].any()


def test_the_answer_of_lv_vit_is_of_kept_patches_while_training() -> None:
    model = tiny("dynamicvit_lvvit_small").train()
    normed: list[Tensor] = []
    model.norm.register_forward_hook(lambda *call: normed.append(call[2]))
    decided = model.forward_decided(torch.randn(6, 3, 64, 64))
    assert decided.mask is not None and not decided.mask.all()
    for tokens, mask, logits in zip(normed[0], decided.mask.bool(), decided.logits, strict=True):
        patches = tokens[1:][mask] if mask.any() else tokens[1:]
        assert torch.allclose(logits, model.head(tokens[0]) + 0.5 * model.aux_head(patches).amax(0), atol=1e-5)
    decide(model, False)
    assert model.forward_decided(torch.randn(1, 3, 64, 64)).logits.isfinite().all()  # none is kept


def test_a_mean_over_patches_is_of_kept_ones_while_training() -> None:
    model = tiny(locations=(1,), keep_rate=0.5, class_token=False, global_pool="avg").train()
    decided = model.forward_decided(torch.randn(3, 3, 64, 64))
    kept = decided.mask.unsqueeze(2)
    assert 0 < decided.mask.mean() < 1
    mean = (decided.tokens * kept).sum(1) / kept.sum(1).clamp(min=1)
    torch.testing.assert_close(decided.logits, model.head(model.fc_norm(mean)))
    with pytest.raises(ValueError, match=r"global_pool=.map.\. Use tome"):
        tiny(class_token=False, global_pool="map")
    model.reset_classifier(10, "max")
    with pytest.raises(ValueError, match="cannot leave out masked patches"):
        model(torch.randn(1, 3, 64, 64))


def test_a_mean_that_includes_the_class_token_is_that_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(locations=(1,), keep_rate=0.5, global_pool="avg", pool_include_prefix=True).eval()
    x = torch.randn(2, 3, 64, 64)
    evaluated = model.forward_decided(x)
    monkeypatch.setattr(token_predictor, "draw_decision", lambda *_: evaluated.decisions[0])
    torch.testing.assert_close(model.train().forward_decided(x).logits, evaluated.logits, atol=1e-3, rtol=1e-3)


def test_training_with_decisions_checkpoints_too() -> None:
    model = tiny().train()
    x, calls, grads = torch.randn(2, 3, 64, 64), [], []
    model.blocks[2].register_forward_pre_hook(lambda *call: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        decided = model.forward_decided(x)
        (decided.logits.square().sum() + decided.tokens.square().mean() + sum(decided.decisions).mean()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(calls) == 3, "the second time it was computed again for the backward pass"
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# As a tool


@torch.no_grad()
def test_dropped_patches_keep_their_last_value_in_features() -> None:
    model = tiny(locations=(2,), keep_rate=0.5).eval()
    x = torch.randn(1, 3, 64, 64)
    kept = model.forward_decided(x).decisions[0][0].bool()
    maps = [level.flatten(2)[0].T for level in model.forward_intermediates(x, intermediates_only=True)]
    assert torch.equal(maps[1][~kept], maps[2][~kept]) and torch.equal(maps[2][~kept], maps[3][~kept])
    assert not torch.isclose(maps[1][kept], maps[2][kept]).all(1).any()


def test_features_while_training_are_those_of_evaluation_for_the_same_decisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head that is trained on them sees what it will see: masked patches keep their last value, too."""
    model, x = tiny(locations=(1, 2), keep_rate=[0.6, 0.3]).eval(), torch.randn(2, 3, 64, 64)
    decisions = iter(model.forward_decided(x).decisions)
    evaluated = model.forward_intermediates(x, intermediates_only=True)
    monkeypatch.setattr(token_predictor, "draw_decision", lambda *_: next(decisions))
    training = model.train().forward_intermediates(x, intermediates_only=True)
    for there, here in zip(training, evaluated, strict=True):
        torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)  # masked keys keep a trace of weight


def test_a_loss_on_features_teaches_the_predictors() -> None:
    model = tiny().train()
    model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)[-1].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in predictors(model)[-1].parameters())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "init_values": 0.1, "qk_norm": True}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("lvvit_small", {}),
    ],
)
def test_any_transformer(name: str, settings: dict[str, Any]) -> None:
    dense = timm.create_model(name, **TINY, **settings, img_size=64).eval()
    model = reduce_tokens(dense, "dynamicvit", keep_rate=0.5, locations=(1, 2))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        assert [d.sum().item() for d in model.forward_decided(x).decisions] == [16, 8]
        everything = reduce_tokens(dense, "dynamicvit", keep_rate=1.0)
        assert torch.allclose(everything(x), dense(x), atol=1e-5)
    decided = model.train().forward_decided(x)
    decided.logits.square().sum().backward()
    assert all(p.grad is not None for predictor in predictors(model) for p in predictor.parameters())
    back = restore_tokens(model)
    assert not predictors(back) and isinstance(back, LVViT) == (name == "lvvit_small")


def test_fresh_predictors() -> None:
    model = reduce_tokens(timm.create_model("vit_tiny_patch16_224", **TINY), "dynamicvit")
    assert isinstance(model, TokenReducedViT)
    assert [i for i, r in enumerate(model.reducers) if isinstance(r, PredictedPruning)] == [1, 2, 3]
    weights = torch.cat([p.in_conv[1].weight.flatten() for p in predictors(model)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_arguments() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    with pytest.raises(ValueError, match=r"may not rise; got \(0.5, 0.7\)"):
        reduce_tokens(model, "dynamicvit", keep_rate=(0.5, 0.7), locations=(1, 2))
    with pytest.raises(ValueError, match=r"blocks in order.*\(2, 1\)"):
        reduce_tokens(model, "dynamicvit", locations=(2, 1))
    with pytest.raises(ValueError, match=r"above 0 and up to 1; got \[1\.5\]"):
        reduce_tokens(model, "dynamicvit", keep_rate=1.5, locations=(2,))
    with pytest.raises(ValueError, match="patch_size must be even, got"):
        timm.create_model("lvvit_small", patch_size=7)


# LV-ViT


def test_lv_vit() -> None:
    small = timm.create_model("lvvit_small", device="meta")
    assert round(sum(p.numel() for p in small.parameters()) / 1e6, 2) == 26.15
    assert round(sum(p.numel() for p in timm.create_model("lvvit_medium", device="meta").parameters()) / 1e6, 1) == 55.8
    model = tiny("lvvit_small", num_classes=5).eval()
    model.reset_classifier(7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]
    assert not any("qkv.bias" in name for name in model.state_dict())
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    x = torch.randn(1, 3, 64, 64)
    fixed = timm.create_model("lvvit_small", **TINY, img_size=64, dynamic_img_size=False).eval()
    same = tiny("lvvit_small", img_size=64).eval()
    fixed.load_state_dict(same.state_dict())
    with torch.no_grad():
        assert torch.equal(fixed(x), same(x)) and model(x).shape == (1, 7)
