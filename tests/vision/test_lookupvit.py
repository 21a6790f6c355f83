"""LookupViT: the definition written out, sizes of the compressed map, cost, arguments."""

from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

NAME = "lookupvit_tiny_patch16_224"


def noisy(**kwargs: Any) -> nn.Module:
    """Weights large enough that every part shows in the output."""
    model = timm.create_model(NAME, **{"depth": 3, "img_size": 64, "compressed_size": (2, 3), **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def heads_apart(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def by_definition(block: Any, lookup: Tensor, compressed: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """A block with its matrix of attention, as in the paper."""
    heads = block.gather.num_heads
    tokens = block.norm_lookup(lookup)
    key, value = block.gather.kv(tokens).chunk(2, -1)
    query = heads_apart(block.gather.q(block.norm_query(compressed)), heads)
    logits = query @ heads_apart(key, heads).transpose(-2, -1) / query.shape[-1] ** 0.5
    gathered = (logits.softmax(-1) @ heads_apart(value, heads)).transpose(1, 2).flatten(2)
    compressed = compressed + block.gather.proj(gathered)
    compressed = compressed + block.attn(block.norm1(compressed))
    compressed = compressed + block.mlp(block.norm2(compressed))
    if block.gives_back:
        weights = logits.transpose(-2, -1).softmax(-1) if renormalize else logits.softmax(-1).transpose(-2, -1)
        value = heads_apart(block.back.v(block.norm_back(compressed)), heads)
        lookup = lookup + block.back.proj((weights @ value).transpose(1, 2).flatten(2))
        lookup = lookup + block.lookup_mlp(block.norm_lookup2(lookup))
    return lookup, compressed


@pytest.mark.parametrize("renormalize", [True, False])
@torch.no_grad()
def test_definition(renormalize: bool) -> None:
    model = noisy(renormalize=renormalize)
    picture = torch.randn(2, 3, 64, 64)
    raster = model.patch_embed(picture) + model.pos_embed.unflatten(1, (4, 4))
    lookup = raster.flatten(1, 2)
    compressed = F.interpolate(raster.permute(0, 3, 1, 2), (2, 3), mode="bilinear").flatten(2).transpose(1, 2)
    maps = []
    for block in model.blocks:
        lookup, compressed = by_definition(block, lookup, compressed, renormalize)
        maps.append(lookup.transpose(1, 2).unflatten(2, (4, 4)))
    logits = model.head(model.norm(compressed).mean(1))
    torch.testing.assert_close(model(picture), logits)

    final, got = model.forward_intermediates(picture, return_prefix_tokens=True)
    assert len(got) == 2, "the last block gives nothing back"
    for (patches, prefix), want in zip(got, maps, strict=False):
        torch.testing.assert_close(patches, want)
        assert prefix.shape == (2, 6, 192)
    torch.testing.assert_close(final, model.norm(compressed))


def test_attention_both_ways_is_one_matrix() -> None:
    """Without renormalisation the way back is the adjoint of the way there; with it, rows of weights are means."""
    block = noisy(renormalize=False).blocks[0]
    query, key = torch.randn(2, 3, 6, 64), torch.randn(2, 3, 16, 64)
    for part in (block.back.v, block.back.proj):
        nn.init.eye_(part.weight)
        nn.init.zeros_(part.bias)
    compressed, lookup = torch.randn(2, 6, 192), torch.randn(2, 16, 192)
    value = heads_apart(lookup, 3)
    there = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    back = block.back(compressed, query, key)
    torch.testing.assert_close((there * compressed).sum(), (lookup * back).sum())
    block.back.renormalize = True
    torch.testing.assert_close(block.back(torch.ones(2, 6, 192), query, key), torch.ones(2, 16, 192))


@torch.no_grad()
def test_one_model_many_budgets() -> None:
    model = noisy(compressed_size=5)
    picture, logits = torch.randn(1, 3, 64, 80), {}
    for size in (1, 3, (5, 2), 7):
        model.set_compressed_size(size)
        assert model.forward_features(picture).shape[1] == (size**2 if isinstance(size, int) else 10)
        assert model.forward_intermediates(picture, intermediates_only=True)[-1].shape == (1, 192, 4, 5)
        logits[size] = model(picture)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        noisy(compressed_size=size).load_state_dict(state)
    assert not torch.allclose(logits[3], logits[7])
    for bad in (0, (3, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="compressed_size is a number of rows and columns"):
            model.set_compressed_size(bad)
    for bad in ("5", 2.5):
        with pytest.raises(ValueError, match="compressed_size must be a number or a sequence of whole numbers"):
            model.set_compressed_size(bad)  # type: ignore[arg-type]


def multiply_adds(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.slow
def test_cost_of_the_base_model() -> None:
    """6.7, 8.5, 11.2 and 17.0 G for 9, 25, 49 and 100 tokens, by the formula of whole blocks.

    Ours has less by the last block's way back, and computes the logits of the others' once more.
    """
    model = timm.create_model("lookupvit_base_patch16_224", device="meta").eval()
    dim, patches = 768, 196
    for side, billions in ((3, 6.7), (5, 8.5), (7, 11.2), (10, 17.0)):
        model.set_compressed_size(side)
        tokens = side * side
        block = (4 * patches + 15 * tokens) * dim**2 + (3 * patches + 2 * tokens) * tokens * dim
        whole = 12 * block + patches * dim * dim + 1000 * dim
        assert whole / 1e9 == pytest.approx(billions, abs=0.05)
        back = (2 * patches + tokens) * dim**2 + patches * tokens * dim
        again = 11 * patches * tokens * dim
        assert multiply_adds(model) == whole - back + again
    vit = timm.create_model("vit_base_patch16_224", device="meta").eval()
    model.set_compressed_size(5)
    assert 2 * multiply_adds(model) < multiply_adds(vit)


def test_pruning_leaves_the_last_block_to_the_head() -> None:
    model = noisy()
    with pytest.raises(ValueError, match="depth must be 2 or more"):
        timm.create_model(NAME, depth=1, device="meta")
    assert model.prune_intermediate_layers(1, prune_head=False) == [1] and len(model.blocks) == 3
    assert model.prune_intermediate_layers(1) == [1] and len(model.blocks) == 2
    assert all(block.gives_back for block in model.blocks)
