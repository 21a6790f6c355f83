"""EET: recorded outputs, codes and kept patches, shares at any size, the hash head, the way back, arguments."""

import json
import zlib
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import numpy as np
import pytest
import timm
import torch
from mixerzoo.mixers.token_cascade import ContentPruning
from mixerzoo.mixers.token_reduction import initial_state
from mixerzoo.vision.backbones import reduce_tokens, restore_tokens
from mixerzoo.vision.backbones.eet import EETViT, HashingViT
from torch import Tensor, nn


def load(state_dict: dict[str, Tensor], folder: Path, classes: int = 200, **kwargs: Any) -> Any:
    """Through timm's ordinary route, as a user would load a file; it is of 200 classes."""
    file = folder / "checkpoint.pth"
    torch.save(state_dict, file)
    overlay = {"file": str(file), "num_classes": 200}
    settings = {"num_classes": classes, **kwargs}
    return timm.create_model("eet_vit_small", pretrained=True, pretrained_cfg_overlay=overlay, **settings).eval()


TINY = {"depth": 4, "embed_dim": 32, "num_heads": 4}


def little(**kwargs: Any) -> nn.Module:
    return timm.create_model("eet_vit_small", **{**TINY, "num_classes": 10, **kwargs}).eval()


@torch.no_grad()
def test_recorded_outputs_and_decisions(golden, tmp_path: Path) -> None:
    gold = golden("eet_vit_small")
    model, x = load(gold.checkpoint(), tmp_path, bits=16), gold.picture()
    tokens = model.forward_features(x)
    logits = model.forward_head(tokens)
    assert gold.error("norm_tokens", tokens) < 2e-6
    assert gold.error("cls", logits) < 2e-6 and torch.equal(model(x), logits)
    assert gold.error("hash_code", model.forward_hash(x)) < 1e-5
    stages = model.trace_tokens(x)
    for block, decision in zip((3, 7, 9), gold.record["keep_decisions"], strict=True):
        assign = stages[block].assign[0, 1:]
        kept = (assign >= 0).nonzero().flatten()
        assert kept[assign[kept].argsort()].tolist() == decision["kept_absolute"]


def normal(name: str, *shape: int) -> Tensor:
    """The inputs of tests/goldens/token_ops.json, as it says there."""
    stream = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    return torch.from_numpy(stream.standard_normal(shape)).float()


@torch.no_grad()
def test_recorded_score(golden, repository: Path) -> None:
    case = json.loads((repository / "tests/goldens/token_ops.json").read_text())["eet"]
    x = normal("eet.x", 2, 197, 64)
    weight, bias = normal("eet_attn.qkv.weight", 192, 64) / 8, normal("eet_attn.qkv.bias", 192) * 0.05
    query, key, value = (x @ weight.T + bias).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    state, reducer = initial_state(x, False), ContentPruning(0.5)
    _, score = reducer.attend(query, key, value, state)
    assert score is not None and score.shape == (2, 196)
    samples = score.flatten()[torch.linspace(0, score.numel() - 1, 32).long()]
    torch.testing.assert_close(samples, torch.tensor(case["score"]["samples"]), rtol=1e-5, atol=1e-8)
    kept, state = reducer.after(x, state, score)
    top = torch.tensor(case["top98"])
    assert torch.equal(kept[:, 1:], x[:, 1:].gather(1, top[..., None].expand(-1, -1, 64)))
    assert torch.equal(kept[:, 0], x[:, 0])


@torch.no_grad()
def test_shares_are_of_the_first_blocks_patches_at_any_size() -> None:
    model = little(depth=12)
    for height, width in [(224, 224), (112, 240), (33, 70), (16, 16)]:
        patches = -(-height // 16) * -(-width // 16)
        counts = [
            (stage.assign >= 0).sum().item() - 1 for stage in model.trace_tokens(torch.randn(1, 3, height, width))
        ]
        half, quarter, sixteenth = (max(1, int(patches * share)) for share in (1 / 2, 1 / 4, 1 / 16))
        assert counts == [patches] * 3 + [half] * 4 + [quarter] * 2 + [sixteenth] * 3


@torch.no_grad()
def test_codes_are_the_signs_of_the_hash() -> None:
    model, x = little(bits=12), torch.randn(5, 3, 64, 64)
    nn.init.normal_(model.head.weight)
    real, codes = model.forward_hash(x), model.hash_codes(x)
    torch.testing.assert_close(real, model.head_hash(model(x)))
    assert codes.dtype == torch.bool and codes.shape == (5, 12) and torch.equal(codes, real > 0)
    assert codes.any() and not codes.all()


def test_hash_follows_the_classifier() -> None:
    model = little(bits=12).double()
    model.reset_classifier(7)
    assert model.head_hash.weight.shape == (12, 7) and model.head_hash.weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())
    assert model.forward_hash(torch.randn(1, 3, 32, 32).double()).shape == (1, 12)
    model.reset_classifier(0)
    assert not [name for name in model.state_dict() if "hash" in name]
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="num_classes=0"):
        model.forward_hash(torch.randn(1, 3, 32, 32).double())
    model.reset_classifier(3)
    assert model.hash_codes(torch.randn(1, 3, 32, 32).double()).shape == (1, 12)


def test_without_bits_it_is_a_classifier() -> None:
    model = little()
    assert not [name for name in model.state_dict() if "hash" in name]
    with pytest.raises(ValueError, match="bits=16"):
        model.hash_codes(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="got -1"):
        little(bits=-1)
    with pytest.raises(ValueError, match=r"got 2\.5"):
        little(bits=2.5)


def test_gradients_of_the_hash_reach_all_weights() -> None:
    model = little(bits=8).train()
    model.forward_hash(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_hash_heads_of_files(tmp_path: Path) -> None:
    given = little(num_classes=200, bits=16).state_dict()
    hashless = {name: tensor for name, tensor in given.items() if "hash" not in name}

    def loaded(state_dict: dict[str, Tensor] = given, **kwargs: Any) -> dict[str, Tensor]:
        return load(state_dict, tmp_path, **TINY, **kwargs).state_dict()

    assert torch.equal(loaded(bits=16)["head_hash.weight"], given["head_hash.weight"])
    assert loaded(bits=32)["head_hash.weight"].shape == (32, 200), "another length starts anew"
    assert loaded(hashless, bits=16)["head_hash.weight"].shape == (16, 200), "as from DeiT's files"
    other = loaded(classes=5, bits=16)
    assert other["head_hash.weight"].shape == (16, 5) and torch.equal(other["norm.weight"], given["norm.weight"])
    assert loaded().keys() == hashless.keys()
    del given["blocks.3.attn.proj.bias"]
    with pytest.raises(ValueError, match=r"blocks\.3\.attn\.proj\.bias"):
        loaded(bits=16)


@torch.no_grad()
def test_the_way_back_keeps_the_hash() -> None:
    model, x = little(bits=6), torch.randn(2, 3, 64, 64)
    dense = restore_tokens(model)
    assert type(dense) is HashingViT and dense.state_dict().keys() == model.state_dict().keys()
    assert dense.head_hash.weight is model.head_hash.weight and dense.forward_features(x).shape == (2, 17, 32)
    again = reduce_tokens(dense, "eet")
    assert type(again) is EETViT and torch.equal(again.forward_hash(x), model.forward_hash(x))
    assert not torch.equal(dense.forward_hash(x), model.forward_hash(x))
    assert reduce_tokens(model, "tome", r=4).hash_codes(x).shape == (2, 6)


@torch.no_grad()
def test_any_vit_with_a_class_token() -> None:
    settings = {"depth": 4, "embed_dim": 32, "num_heads": 4, "img_size": 64}
    x = torch.randn(2, 3, 64, 64)
    vit = timm.create_model("deit_tiny_distilled_patch16_224", **settings).eval()
    model = reduce_tokens(vit, "eet", keep_rate=(0.5, 0.25), locations=(0, 2))
    counts = [(stage.assign >= 0).sum(1).tolist() for stage in model.trace_tokens(x)]
    assert counts == [[10, 10], [10, 10], [6, 6], [6, 6]], "two tokens are before the patches"
    assert torch.equal(reduce_tokens(vit, "eet", keep_rate=(1, 1, 1))(x), vit(x))
    without = timm.create_model("vit_base_patch16_siglip_224", **settings)
    with pytest.raises(ValueError, match="class token"):
        reduce_tokens(without, "eet")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": (0.5, 0.6, 0.1)}, "may not rise"),
        ({"keep_rate": (0.5, 0.1)}, "three numbers"),
        ({"keep_rate": (0.5, 0.1), "locations": (1,)}, "one per location"),
        ({"keep_rate": (0.5, 0.1), "locations": (3, 1)}, "in order"),
        ({"keep_rate": (0.5, 0.1), "locations": (1, 4)}, "from 0 to 3"),
        ({"keep_rate": (2, 0.5, 0.1)}, "above 0"),
        ({"rate": 1}, "rate"),
    ],
)
def test_unfit_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce_tokens(little(), "eet", **settings)


def test_unfit_reducers_are_named() -> None:
    with pytest.raises(ValueError, match="keep_rate"):
        ContentPruning(0.0)
    with pytest.raises(ValueError, match="class token"):
        ContentPruning(0.5, num_prefix=0)
