"""SpAtten: against the definition in double precision, picture by picture; shares, heads, dense maps, arguments."""

import copy
import itertools
import math
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.mixers.token_cascade import CascadePruning
from mixerzoo.vision.backbones import reduce_tokens, restore_tokens
from mixerzoo.vision.backbones.spatten import falling_rates
from torch import Tensor, nn

NAME = "spatten_deit_tiny_patch16_224"


def small_vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    """Of large weights, so that pictures and heads differ; in double precision, so that no two scores come close."""
    settings = {"depth": 6, "embed_dim": 32, "num_heads": 4, "num_classes": 10, "img_size": 64, **kwargs}
    model = timm.create_model(name, **settings).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pictures(batch: int = 3, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


class Cascade:
    """The paper's procedure on one picture, with whole attention matrices and lists of what is left."""

    def __init__(self, vit: Any, token_rates: list[float], head_counts: list[int]) -> None:
        self.vit, self.token_rates, self.head_counts = vit, token_rates, head_counts

    def __call__(self, picture: Tensor) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        vit = self.vit
        x, prefix = vit._pos_embed(vit.patch_embed(picture[None]))[0], vit.num_prefix_tokens
        patches = len(x) - prefix
        tokens, heads = list(range(len(x))), list(range(vit.blocks[0].attn.num_heads))
        drawn, put_out = torch.zeros(len(x)).double(), torch.zeros(len(heads)).double()
        tokens_of, heads_of = [], []
        for block, rate, count in zip(vit.blocks, self.token_rates, self.head_counts, strict=True):
            best = sorted(tokens[prefix:], key=lambda token: -drawn[token])
            tokens = [*tokens[:prefix], *sorted(best[: math.ceil(rate * patches)])]
            heads = sorted(sorted(heads, key=lambda head: -put_out[head])[:count])
            attn, rows = block.attn, block.norm1(x[tokens])
            qkv = attn.qkv(rows).unflatten(1, (3, attn.num_heads, attn.head_dim))
            answer = torch.zeros_like(qkv[:, 0])
            for head in heads:
                q, k, v = qkv[:, :, head].unbind(1)
                matrix = (q @ k.T * attn.head_dim**-0.5).softmax(1)
                drawn[tokens] += matrix.sum(0)
                answer[:, head] = matrix @ v
                put_out[head] += answer[:, head].abs().sum()
            x = x.clone()
            x[tokens] = x[tokens] + attn.proj(answer.flatten(1))
            x[tokens] = x[tokens] + block.mlp(block.norm2(x[tokens]))
            tokens_of.append(tokens)
            heads_of.append(heads)
        return x, tokens_of, heads_of


HEADS = [4, 4, 3, 3, 2, 1]
TOKENS = [1.0, 0.9, 0.9, 0.6, 0.5, 0.2]


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_is_the_procedure_of_the_paper(name: str) -> None:
    vit, x = small_vit(name), pictures()
    model = reduce_tokens(vit, "spatten", keep_rate=TOKENS, head_keep_rate=[count / 4 for count in HEADS])
    by_hand = Cascade(vit, TOKENS, HEADS)
    trace = model.trace_tokens(x)
    dense = model.forward_intermediates(x, indices=1, intermediates_only=True, return_prefix_tokens=True)[0]
    chosen = set()
    for i, picture in enumerate(x):
        want, tokens, heads = by_hand(picture)
        for stage, left in zip(trace, tokens, strict=True):
            assert (stage.assign[i] >= 0).nonzero().flatten().tolist() == left
        # The last values of every token, dropped or not: so all scores, choices and outputs agree.
        got = torch.cat([dense[1][i], dense[0][i].flatten(1).T])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        chosen.add((*tokens[-1], *heads[-1]))
    assert len(chosen) > 1, "pictures choose for themselves, or this test shows nothing"


@torch.no_grad()
def test_pruned_heads_take_no_part() -> None:
    """Neither keys, queries nor values of a head that was pruned for a picture can change its answer."""
    vit, x = small_vit(), pictures(1)
    rates = {"keep_rate": 1, "head_keep_rate": [1, 1, 0.5, 0.5, 0.5, 0.5]}
    heads = Cascade(vit, [1.0] * 6, [4, 4, 2, 2, 2, 2])(x[0])[2][-1]
    want = reduce_tokens(vit, "spatten", **rates)(x)
    for head in range(4):
        other = copy.deepcopy(vit)
        for block in other.blocks[2:]:
            block.attn.qkv.weight.unflatten(0, (3, 4, 8))[:, head] += 1.0
        changed = reduce_tokens(other, "spatten", **rates)(x)
        assert torch.equal(changed, want) == (head not in heads)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224"])
def test_at_rates_of_one_it_is_the_plain_model(name: str) -> None:
    vit, x = small_vit(name), pictures()
    model = reduce_tokens(vit, "spatten", keep_rate=1, head_keep_rate=1)
    assert torch.equal(model(x), vit(x))
    assert all(not reducer.scores_tokens and not reducer.scores_heads for reducer in model.reducers)
    assert not torch.equal(reduce_tokens(vit, "spatten")(x), vit(x))


@pytest.mark.parametrize("depth", [1, 2, 7, 12, 24])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.7, 1.0])
def test_shares_fall_evenly_around_their_mean(depth: int, rate: float) -> None:
    for untouched in (0.15, 0.3):
        shares = falling_rates(rate, depth, untouched)
        whole = math.ceil(untouched * depth)
        assert len(shares) == depth and shares[:whole] == [1] * whole
        assert all(0 < later <= earlier <= 1 for earlier, later in itertools.pairwise(shares))
        pruning = shares[whole:]
        if pruning:
            assert sum(pruning) / len(pruning) == pytest.approx(rate)
            steps = [earlier - later for earlier, later in itertools.pairwise(pruning)]
            assert steps == pytest.approx([steps[0]] * len(steps)) if steps else True


@torch.no_grad()
def test_counts_of_the_published_size() -> None:
    model = timm.create_model(NAME, device="meta")
    left = [math.ceil(share * 196) for share in falling_rates(0.7, 12, 0.15)]
    assert left == [196, 196, 191, 179, 167, 155, 144, 132, 120, 108, 97, 85]
    features = model.forward_features(torch.empty(1, 3, 224, 224, device="meta"))
    assert features.shape == (1, 1 + left[-1], 192)
    assert [reducer.heads for reducer in model.reducers] == [None] * 11 + [2]
    # Scores cost a second pass over the keys: only where a later block asks for them.
    assert [reducer.scores_tokens for reducer in model.reducers] == [True] * 11 + [False]
    assert [reducer.scores_heads for reducer in model.reducers] == [True] * 11 + [False]


@torch.no_grad()
def test_shares_are_of_the_first_blocks_tokens_at_any_size() -> None:
    model = small_vit(NAME, keep_rate=TOKENS, head_keep_rate=0.5)
    for height, width in [(64, 64), (80, 48), (16, 16), (33, 70)]:
        x = pictures(2, height, width)
        patches = math.ceil(height / 16) * math.ceil(width / 16)
        for stage, rate in zip(model.trace_tokens(x), TOKENS, strict=True):
            kept = (stage.assign >= 0).sum(1).tolist()
            assert kept == [1 + math.ceil(rate * patches)] * 2
            assert (stage.assign[:, 0] == 0).all(), "the class token stays first"


def test_gradients_reach_all_weights_but_pass_no_scores() -> None:
    vit, x = small_vit(), pictures(2)
    model = reduce_tokens(vit, "spatten", keep_rate=0.6, head_keep_rate=0.5).train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in vit.parameters())


@torch.no_grad()
def test_the_way_back() -> None:
    model = small_vit(NAME)
    x = pictures()
    plain = restore_tokens(model)
    assert type(plain) is timm.models.VisionTransformer and plain.state_dict().keys() == model.state_dict().keys()
    again = reduce_tokens(plain, "spatten", keep_rate=0.7, head_keep_rate=0.9)
    assert torch.equal(again(x), model(x)) and not torch.equal(plain(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0}, "above 0"),
        ({"head_keep_rate": 1.2}, "above 0"),
        ({"keep_rate": [1, 0.5]}, "6 shares"),
        ({"keep_rate": [0.9] * 6}, "first block"),
        ({"keep_rate": [1, 0.5, 0.6, 0.5, 0.5, 0.5]}, "never rise"),
        ({"head_keep_rate": [1, 1, 1, 1, 1, 0]}, "above 0"),
        ({"heads": 3}, "heads"),
    ],
)
def test_unfit_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce_tokens(small_vit(), "spatten", **settings)


def test_unfit_reducers_are_named() -> None:
    with pytest.raises(ValueError, match="token_rate"):
        CascadePruning(0.0)
    with pytest.raises(ValueError, match="heads=0"):
        CascadePruning(None, 0)
