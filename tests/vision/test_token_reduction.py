"""reduce_tokens: any ViT of timm, exact where nothing or only duplicates are reduced, shared weights, the way back."""

import copy
import dataclasses
import pickle
from typing import Any, ClassVar

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.mixers.token_reduction import AttentivePruning, TokenMerging, TokenReducer
from mixerzoo.vision.backbones import TokenReducedViT, reduce_tokens, restore_tokens
from mixerzoo.vision.backbones.evit import EViT
from mixerzoo.vision.backbones.tome import ToMe
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}

# What differs between the vision transformers of timm.
KINDS: dict[str, dict[str, Any]] = {
    "vit": {},
    "average": {"global_pool": "avg"},
    "deit3": {"init_values": 0.5, "no_embed_class": True},
    "dinov2": {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True, "mlp_layer": timm.layers.SwiGLUPacked},
    "siglip": {"class_token": False, "global_pool": "map"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "query and key norms": {"qk_norm": True, "scale_attn_norm": True, "norm_layer": nn.LayerNorm},
    "post-norm": {"block_fn": ResPostBlock, "init_values": 0.5},
    "any size": {"dynamic_img_size": True},
    "distilled": {"distilled": True},
}


def make(kind: str = "vit", **kwargs: Any) -> VisionTransformer:
    """A small one with weights large enough that every part shows in the output."""
    arguments = {**TINY, **KINDS[kind], **kwargs}
    distilled = arguments.pop("distilled", False)
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "token" in name:
                parameter.normal_(std=0.2 if "attn" in name else 0.1)
    return model.eval()


def make_seeded() -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make()


def pictures(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rates_of_nothing_leave_the_model_as_it_is(kind: str) -> None:
    model, x = make(kind), pictures()
    want = model(x)
    torch.testing.assert_close(reduce_tokens(model, "tome", r=0)(x), want)
    if model.cls_token is not None:
        torch.testing.assert_close(reduce_tokens(model, "evit", keep_rate=1.0)(x), want)
    assert torch.equal(model(x), want), "the model that went in is as it was"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merging_duplicates_changes_nothing(kind: str) -> None:
    """Two equal tokens or one of twice the size are the same to attention and to every kind of pooling."""
    model = make(kind)
    assert isinstance(model.pos_embed, Tensor)
    model.pos_embed[:] = 0
    rows = pictures().unflatten(2, (4, 16)).unflatten(4, (4, 16))
    rows[:, :, :, :, 1::2] = rows[:, :, :, :, ::2]  # each patch and the one at its right are alike
    x = rows.flatten(4, 5).flatten(2, 3)
    reduced = reduce_tokens(model, ToMe([0, 8]))
    torch.testing.assert_close(reduced(x), model(x))
    assert reduced.trace_tokens(x)[-1].assign.amax() == 8 + model.num_prefix_tokens - 1
    if model.num_prefix_tokens:  # without, all tokens are of size two, and draw attention alike
        assert not torch.allclose(reduce_tokens(model, ToMe([0, 8], prop_attn=False))(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [ToMe(3), EViT(0.5), EViT(0.5, fuse_token=False)], ids=["tome", "evit", "unfused"])
@torch.no_grad()
def test_prefix_stays_and_features_are_dense(kind: str, method: Any) -> None:
    model, x = make(kind), pictures()
    if model.cls_token is None and isinstance(method, EViT):
        with pytest.raises(ValueError, match="has none"):
            reduce_tokens(model, method)
        return
    prefix = model.num_prefix_tokens
    reduced = reduce_tokens(model, method)
    final, features = reduced.forward_intermediates(x, norm=True)
    assert torch.equal(final, reduced.forward_features(x))
    assert [tuple(feature.shape) for feature in features] == [(2, 32, 4, 4)] * 4
    stages = reduced.trace_tokens(x)
    for stage in stages:
        assert torch.equal(stage.assign[:, :prefix], torch.arange(prefix).expand(2, -1))
    alive = stages[-1].assign[:, prefix:] >= 0
    assert alive.sum() > 0 and len(stages[-1].assign[0, prefix:].unique()) < 16
    *_, (last, state) = reduced._walk(x)
    dense, normed = features[-1].flatten(2).transpose(1, 2), model.norm(last)
    want = normed.gather(1, state.assign[:, prefix:].clamp(min=0)[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(dense[alive], want[alive])


@torch.no_grad()
def test_dropped_tokens_keep_their_last_value() -> None:
    model, x = make(), pictures(1)
    reduced = reduce_tokens(model, "evit", keep_rate=0.5, locations=[1])
    features = reduced.forward_intermediates(x, intermediates_only=True)
    dropped = reduced.trace_tokens(x)[1].assign[0, 1:] < 0
    assert dropped.sum() == 8
    behind = features[1][0].flatten(1)[:, dropped]
    torch.testing.assert_close(features[3][0].flatten(1)[:, dropped], behind)
    assert not torch.allclose(features[3][0].flatten(1)[:, ~dropped], features[1][0].flatten(1)[:, ~dropped])


def test_gradients_reach_dense_features_of_dropped_tokens() -> None:
    reduced = reduce_tokens(make().train(), "evit", keep_rate=0.5, locations=[1])
    features = reduced.forward_intermediates(pictures(), intermediates_only=True)
    features[-1].square().mean().backward()
    assert all(p.grad is not None for name, p in reduced.blocks[0].named_parameters() if "bias" in name)


def test_weights_are_shared_and_nothing_is_patched() -> None:
    model = make()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reduced = reduce_tokens(model, "tome", r=2)
    assert isinstance(reduced, TokenReducedViT) and isinstance(reduced, VisionTransformer)
    assert reduced.state_dict().keys() == state.keys()
    assert all(p is q for p, q in zip(model.parameters(), reduced.parameters(), strict=True))
    assert type(model) is VisionTransformer and all(type(block) is Block for block in model.blocks)
    reduced.load_state_dict({name: tensor + 1 for name, tensor in state.items()})
    assert all(torch.equal(tensor, state[name] + 1) for name, tensor in model.state_dict().items())
    reduced.reset_classifier(3)
    assert model.num_classes == 5 and model(pictures()).shape == (2, 5)
    assert reduced(pictures()).shape == (2, 3)


@pytest.mark.parametrize("kind", ["vit", "post-norm", "distilled"])
@torch.no_grad()
def test_the_way_back(kind: str) -> None:
    model, x = make(kind), pictures()
    reduced = reduce_tokens(reduce_tokens(model, "tome", r=4), "evit", keep_rate=0.6)
    assert isinstance(reduced.method, EViT), "the second method takes the place of the first"
    plain = restore_tokens(reduced)
    assert type(plain) is type(model) and torch.equal(plain(x), model(x))
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert [type(block) for block in plain.blocks] == [type(block) for block in model.blocks]
    with pytest.raises(ValueError, match="takes what reduce_tokens returned; got VisionTransformer"):
        restore_tokens(model)  # type: ignore[arg-type]


@torch.no_grad()
def test_neither_compiled_code_nor_hooks_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    x = pictures()
    want = reduce_tokens(make_seeded(), "tome", r=3)(x)
    model = make_seeded()
    calls: list[str] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append("hook"))
    for module in (model, *model.blocks):
        monkeypatch.setattr(module, "_compiled_call_impl", lambda *_: pytest.fail("the compiled original ran"))
    torch.testing.assert_close(reduce_tokens(model, "tome", r=3)(x), want)
    assert calls == []
    model.blocks[1].attn.forward = lambda x: x
    with pytest.raises(ValueError, match="Attention has a forward of its own"):
        reduce_tokens(model, "tome", r=3)


@torch.no_grad()
def test_a_shallow_model_takes_its_own_rate_again() -> None:
    """Of three locations in two blocks the later one counts, before and after."""
    model = reduce_tokens(make(depth=2), "dynamicvit", keep_rate=0.7)
    want = model.target_keep_rates
    model.set_keep_rate(0.7)
    assert model.target_keep_rates == want == pytest.approx([0.7, 0.343])


@pytest.mark.parametrize(("method", "rates"), [("evit", [0.5, 0.5]), ("dynamicvit", [0.5, 0.25])])
def test_a_cut_model_takes_a_new_rate(method: str, rates: list[float]) -> None:
    """`features_only` has cut the last pruning block off: the others stay where they are."""
    model = reduce_tokens(make(depth=12), method, keep_rate=0.7)
    model.prune_intermediate_layers([7])
    for _ in range(2):
        model.set_keep_rate(0.5)
        found = {i: r.keep_rate for i, r in enumerate(model.reducers) if hasattr(r, "keep_rate")}
        assert found == pytest.approx(dict(zip([3, 6], rates, strict=True)))
    model.set_keep_rate([0.6, 0.4])
    assert [model.reducers[3].keep_rate, model.reducers[6].keep_rate] == [0.6, 0.4]


@pytest.mark.parametrize("kind", ["vit", "siglip", "dinov2"])
@torch.no_grad()
def test_intermediates_come_in_the_forms_of_timm(kind: str) -> None:
    model, x = make(kind), pictures()
    reduced = reduce_tokens(model, "tome", r=0)
    for options in (
        {"return_prefix_tokens": True},
        {"output_dict": True},
        {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True, "output_fmt": "NLC"},
    ):
        want, got = (m.forward_intermediates(x, indices=2, norm=True, **options) for m in (model, reduced))
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_merging_may_be_followed_by_pruning() -> None:
    """Sizes move with their tokens, so that attention stays proportional to them."""

    @dataclasses.dataclass(frozen=True)
    class MergeThenPrune:
        merges: ClassVar[bool] = True

        def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
            return [TokenMerging(5), AttentivePruning(0.5, fuse=True), TokenMerging(0), TokenReducer()]

    model = reduce_tokens(make(), MergeThenPrune())
    merged, pruned = model.trace_tokens(pictures())[:2]
    assert merged.size is not None and pruned.size is not None
    assert pruned.size.shape == (2, 1 + 6 + 1)
    for old, new in zip(merged.assign[0], pruned.assign[0], strict=True):
        assert new < 0 or pruned.size[0, new] == merged.size[0, old]
    assert pruned.size[:, -1].tolist() == [1, 1], "the fused token counts as one"


@torch.no_grad()
def test_copies_live_their_own_life() -> None:
    reduced, x = reduce_tokens(make(), "tome", r=2), pictures()
    want = reduced(x)
    copied = copy.deepcopy(reduced)
    loaded = pickle.loads(pickle.dumps(reduced))
    for parameter in copied.parameters():
        parameter.zero_()
    assert torch.equal(reduced(x), want) and torch.equal(loaded(x), want)


@pytest.mark.parametrize("method", [ToMe(2), EViT(0.5)], ids=["tome", "evit"])
def test_checkpointing_gives_the_same_gradients(method: Any) -> None:
    reduced, x = reduce_tokens(make().train(), method), pictures()
    grads = []
    for enable in (False, True):
        reduced.set_grad_checkpointing(enable)
        reduced.zero_grad()
        reduced(x).square().sum().backward()
        grads.append([p.grad.clone() for p in reduced.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_two_pictures_under_way_at_once_do_not_meet() -> None:
    reduced, x = reduce_tokens(make(), "tome", r=3), pictures(3)
    together, alone = reduced(x), torch.cat([reduced(picture[None]) for picture in x])
    torch.testing.assert_close(together, alone)
    halted = reduced._walk(x[:1])
    next(halted)
    assert torch.equal(reduced(x), together)


@torch.no_grad()
def test_rates_change_without_new_weights() -> None:
    reduced, x = reduce_tokens(make(), "evit", keep_rate=0.5), pictures()
    half = reduced(x)
    reduced.set_keep_rate(1.0)
    torch.testing.assert_close(reduced(x), restore_tokens(reduced)(x))
    reduced.set_keep_rate([0.5, 0.5, 0.5])
    assert torch.equal(reduced(x), half)
    assert reduced.method == EViT([0.5, 0.5, 0.5], locations=[1, 2, 3]), "the method says what holds"
    for wrong in (0.0, 1.5, [0.5, 0.5], "0.5"):
        with pytest.raises(ValueError, match="keep_rate"):
            reduced.set_keep_rate(wrong)  # type: ignore[arg-type]
        assert torch.equal(reduced(x), half)
    with pytest.raises(ValueError, match="ToMe has no keep rate that can be changed; reduce_tokens makes another"):
        reduce_tokens(make(), "tome").set_keep_rate(0.5)


@pytest.mark.parametrize(
    ("method", "rate"), [("dynamicvit", 0.6), ("dynamicvit", [0.8, 0.5, 0.1]), ("eet", [0.6, 0.5, 0.1])]
)
def test_a_new_rate_means_what_it_means_at_the_beginning(method: str, rate: Any) -> None:
    model = make()
    changed, fresh = reduce_tokens(model, method), reduce_tokens(model, method, keep_rate=rate)
    changed.set_keep_rate(rate)
    rates = [[getattr(reducer, "keep_rate", None) for reducer in reduced.reducers] for reduced in (changed, fresh)]
    assert rates[0] == rates[1]
    with pytest.raises(ValueError, match="may not rise"):
        changed.set_keep_rate([0.1, 0.5, 0.8])


@torch.no_grad()
def test_each_view_has_its_own_picture_size() -> None:
    model, x = make(), pictures()
    reduced = reduce_tokens(model, "tome", r=2)
    want, wanted = model(x), reduced(x)
    reduced.set_input_size(img_size=96)
    plain = restore_tokens(reduced)
    plain.set_input_size(img_size=32)
    assert reduced(pictures(size=96)).shape == (2, 5) and plain(pictures(size=32)).shape == (2, 5)
    assert torch.equal(model(x), want)
    again = reduce_tokens(model, "tome", r=2)
    model.set_input_size(img_size=48)
    assert torch.equal(again(x), wanted)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("top_k", {}, "method must be one of .*tome.*; got 'top_k'"),
        ("tome", {"keep_rate": 0.5}, "keep_rate"),
        ("tome", {"r": -1}, "each 0 or more; got"),
        ("tome", {"r": [1] * 5}, "up to 4 counts, one per block"),
        ("tome", {"r": (8, 2.0)}, "from -1 to 1; got 2.0"),
        ("evit", {"keep_rate": 0.0}, "above 0 and up to 1; got 0.0"),
        ("evit", {"keep_rate": [0.5, 0.5]}, "one number, or one per location, 3"),
        ("evit", {"locations": [1, 1, 2]}, "each once, from 0 to 3"),
        ("evit", {"locations": [4], "keep_rate": [0.5]}, "from 0 to 3; got"),
        ("evit", {"keep_rate": "0.5"}, "keep_rate must be a number or a sequence of numbers; got '0.5'"),
        ("evit", {"locations": 3}, "locations must be a sequence of whole numbers; got 3"),
        ("eet", {"keep_rate": 0.5}, "keep_rate must be a sequence of numbers; got 0.5"),
        ("spatten", {"head_keep_rate": None}, "keep rates must be a number or a sequence of numbers; got None"),
        ("tome", {"r": "13"}, "r must be a number or a sequence of numbers; got '13'"),
        ("tome", {"r": 2.7}, r"r must be a sequence of whole numbers; got \[2.7\]"),
        ("tome", {"r": float("nan")}, "whole numbers; got .*nan"),
        ("tome", {"r": torch.tensor(3)}, r"sequence of numbers; got tensor\(3\)"),
        ("tome", {"prop_attn": "false"}, "prop_attn must be True or False; got 'false'"),
        ("evit", {"fuse_token": 0}, "fuse_token must be True or False; got 0"),
        ("evit", {"locations": [1.5]}, r"locations must be a sequence of whole numbers; got \[1.5\]"),
        ("evit", {"locations": []}, "locations are blocks of the model"),
        ("dynamicvit", {"keep_rate": 1.5}, "above 0 and up to 1"),
        ("dynamicvit", {"keep_rate": -0.1}, "above 0 and up to 1"),
        (ToMe, {}, r"an instance with reducers\(model\), such as ToMe\(r=13\); got <class"),
        (None, {}, "method must be a name or an instance"),
        (ToMe(), {"r": 3}, "settings belong to a method that is named"),
    ],
)
def test_bad_settings(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce_tokens(make(), method, **settings)


def test_models_of_another_make_are_refused() -> None:
    parallel = VisionTransformer(**TINY, block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    with pytest.raises(ValueError, match="made of ParallelScalingBlock"):
        reduce_tokens(parallel, "tome")
    with pytest.raises(ValueError, match=r"attn_drop_rate=0.1"):
        reduce_tokens(make(attn_drop_rate=0.1), "tome")
    with pytest.raises(ValueError, match="got ResNet"):
        reduce_tokens(timm.create_model("resnet10t"), "tome")  # type: ignore[arg-type]
    assert reduce_tokens(make(), "evit").target_keep_rates == []  # it learns nothing about what to keep


@pytest.mark.slow
@pytest.mark.parametrize("method", [ToMe(2), EViT(0.6)], ids=["tome", "evit"])
def test_compiles_and_exports(method: Any) -> None:
    reduced, x = reduce_tokens(make("deit3"), method), pictures()
    want = reduced(x)
    torch.testing.assert_close(torch.compile(reduced, backend="aot_eager", fullgraph=True)(x), want)
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(reduced, (x,), dynamic_shapes=({0: batch},))
    more = pictures(5)
    torch.testing.assert_close(program.module()(more), reduced(more))
    assert "mixerzoo" not in str(program.graph), "standard operators only"
