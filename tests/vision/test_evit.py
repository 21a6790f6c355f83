"""EViT: official outputs and kept tokens, counts at any size, the fused token, published files."""

import json
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.mixers.token_reduction import AttentivePruning, initial_state
from mixerzoo.vision import reduce_tokens, restore_tokens
from torch import Tensor

RECORDS = {  # the tag of the published file, which brings its settings
    "evit_deit_small_k07_fuse": "evit_deit_small_patch16_224.k07_fuse_in1k",
    "evit_deit_small_k05_nofuse": "evit_deit_small_patch16_224.k05_in1k",
}


@pytest.fixture(scope="module", params=RECORDS)
def official(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A record and our model with its weights, loaded as a user would load a downloaded file."""
    record = request.getfixturevalue("golden")(request.param)
    file = tmp_path_factory.mktemp("evit") / "checkpoint.pth"
    torch.save({"model": record.checkpoint()}, file)
    overlay = {"file": str(file), "num_classes": 1000}
    model = timm.create_model(RECORDS[request.param], pretrained=True, pretrained_cfg_overlay=overlay)
    return record, model.eval()


def slots(assign: Tensor) -> list[int]:
    """The patches of the first block in the order of the tokens of now; those of no patch (prefix, fused) left out."""
    kept = torch.nonzero(assign[1:] >= 0).flatten()
    return kept[assign[1:][kept].argsort()].tolist()


@torch.no_grad()
def test_official_outputs(official: tuple[Any, Any]) -> None:
    record, model = official
    x = record.picture()
    tokens = model.forward_features(x)
    assert record.error("norm_tokens", tokens) < 2e-5
    assert record.error("logits", model.forward_head(tokens)) < 2e-5
    if "logits_288" in record.record["outputs"]:
        assert record.error("logits_288", model(record.picture((288, 288)))) < 2e-5


@pytest.mark.parametrize(
    ("tag", "keep_rate", "fuse_token"),
    [("", 0.7, True), (".k09_in1k", 0.9, False), (".k06_fuse_in1k", 0.6, True), (".k08_in1k", 0.8, False)],
)
def test_tags_bring_the_settings_of_their_training(tag: str, keep_rate: float, fuse_token: bool) -> None:
    name = f"evit_deit_small_patch16_224{tag}"
    method = timm.create_model(name, depth=4).method
    assert (method.keep_rate, method.fuse_token) == (keep_rate, fuse_token)
    method = timm.create_model(name, depth=4, keep_rate=0.75, fuse_token=not fuse_token).method
    assert (method.keep_rate, method.fuse_token) == (0.75, not fuse_token)


@torch.no_grad()
def test_positions_are_resized_as_published_after_a_change_of_method() -> None:
    model = timm.create_model("evit_deit_small_patch16_224", depth=4, embed_dim=32, num_heads=2).eval()
    model.pos_embed.normal_()
    x = torch.randn(1, 3, 160, 128)
    again = reduce_tokens(model, "evit", keep_rate=0.7)
    assert torch.equal(again(x), model(x))
    every = reduce_tokens(model, "evit", keep_rate=1.0)
    torch.testing.assert_close(restore_tokens(model)(x), every(x))


@torch.no_grad()
def test_official_decisions(official: tuple[Any, Any]) -> None:
    record, model = official
    stages = model.trace_tokens(record.picture())
    before = list(range(196))  # the patch of each token; -1 for a fused one, which upstream calls patch 0
    for block, decision in zip((3, 6, 9), record.record["keep_decisions"], strict=True):
        kept = [before[local] for local in decision["kept_local"]]
        assert slots(stages[block].assign[0]) == [patch for patch in kept if patch >= 0]
        before = [*kept, -1] if model.method.fuse_token else kept


def test_recorded_counts(repository: Path) -> None:
    for rate, cases in json.loads((repository / "tests/goldens/token_ops.json").read_text())["evit"][
        "left_tokens"
    ].items():
        for tokens, want in cases:
            x, scores = torch.randn(1, tokens + 1, 2), torch.rand(1, tokens)
            kept, _ = AttentivePruning(float(rate), fuse=False).between(x, initial_state(x, False), scores)
            assert kept.shape[1] == want + 1


def test_drive_files_are_refused_with_their_address() -> None:
    with pytest.raises(ValueError, match=r"download https://drive.google.com"):
        timm.create_model("evit_deit_small_patch16_224", pretrained=True)


@pytest.mark.parametrize(
    "settings", [{"reg_tokens": 4}, {"no_embed_class": True}, {"dynamic_img_size": False}, {"pos_embed": "none"}]
)
def test_what_was_not_published_is_left_to_reduce_tokens(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"as published: a class token, .*reduce_tokens"):
        timm.create_model("evit_deit_small_patch16_224", embed_dim=24, num_heads=2, **settings)
