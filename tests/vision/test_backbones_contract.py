"""What every backbone of ours owes to timm and to its users. A new model is tested by being registered.

Checks on the meta device run for every name and weight tag. The others run for one model of each group: the first
that its file registers of a name's first word (nat.py: nat_mini, dinat_mini), so a file registers its smallest
variants first. Those are made shallower where that is all a check needs.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import mixerzoo.vision
import pytest
import timm
import torch
from backbones import (
    FIRST,
    NAMES,
    TAGGED,
    assert_near,
    fits,
    minimal_on_meta,
    on_meta,
    picture,
    shallow,
    shallow_args,
    tap_count,
    training_pictures,
    uncovered,
)
from mixerzoo.vision.backbones import HierarchicalBackbone, TokenReducedViT
from timm.models import model_entrypoint
from timm.optim import create_optimizer_v2
from torch import Tensor, nn


def test_every_file_is_exported() -> None:
    files = {model_entrypoint(name).__module__.rsplit(".", 1)[-1] for name in NAMES}
    assert files <= set(mixerzoo.vision.backbones.__all__)


# Every name and tag, on the meta device


@pytest.mark.parametrize("name", TAGGED)
def test_configuration(name: str) -> None:
    model = minimal_on_meta(name)
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert cfg["architecture"] == name.split(".")[0] and cfg["license"] and cfg["origin_url"] and cfg["paper_ids"]
    assert cfg.get("url") or cfg.get("hf_hub_id"), "published weights have an address"
    assert model.in_chans == cfg["input_size"][0] and model.num_classes == cfg["num_classes"]
    for key in ("classifier", "first_conv"):
        layers = [cfg[key]] if isinstance(cfg[key], str) else cfg[key]
        assert all(f"{layer}.weight" in state for layer in layers)
    if cfg["pool_size"]:
        features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
        assert tuple(features.shape[1:3] if model.output_fmt == "NHWC" else features.shape[2:]) == tuple(
            cfg["pool_size"]
        )


@pytest.mark.parametrize("name", NAMES)
def test_head_and_widths(name: str) -> None:
    model = minimal_on_meta(name)
    x = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
    features = model.forward_features(x)
    channels = 1 if features.ndim == 4 and model.output_fmt == "NCHW" else -1
    assert features.shape[channels] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16

    features = features.double()
    model.train().to(torch.float64).reset_classifier(0)
    assert model.num_classes == 0 and model.forward_head(features).shape == (2, model.head_hidden_size)
    model.reset_classifier(7)
    assert model.forward_head(features).shape == (2, 7)
    classifier = model.get_classifier()
    for layer in classifier if isinstance(classifier, tuple) else (classifier,):
        assert layer.weight.dtype == torch.float64 and layer.weight.device.type == "meta" and layer.training
    if isinstance(classifier, tuple):
        return  # DeiT's two classifiers have a token each: timm pools them whatever is asked
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape
    headless = minimal_on_meta(name, num_classes=0, global_pool="")
    assert headless.forward_head(features.float()).shape == features.shape


@pytest.mark.parametrize("name", NAMES)
def test_features_on_the_meta_device(name: str) -> None:
    fewer = shallow_args(name)
    model = on_meta(name, features_only=True, **(fewer if "depths" in fewer else {}))  # taps are counted in blocks
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3 and reductions == sorted(reductions)
    misplaced = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type != "meta"]
    assert not misplaced
    features = model(torch.empty(1, 3, 97, 250, device="meta"))
    image = [side - uncovered(model.model) for side in (97, 250)]
    for feature, count, reduction in zip(features, channels, reductions, strict=True):
        assert tuple(feature.shape[:2]) == (1, count)
        assert all(fits(*sides, reduction, reductions[0]) for sides in zip(feature.shape[2:], image, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments_and_pooling_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="not_an_argument"):
        on_meta(name, not_an_argument=1)
    with pytest.raises((AssertionError, ValueError)):
        minimal_on_meta(name).reset_classifier(10, "no such pooling")


@pytest.mark.parametrize("name", NAMES)
def test_weight_groups(name: str) -> None:
    model = on_meta(name)
    names = dict(model.named_parameters())
    exempt = model.no_weight_decay()
    unknown = [entry for entry in exempt if entry not in names and getattr(model, entry, None) is not None]
    assert not unknown, f"exempt from weight decay, but no parameters: {unknown}"
    tables = {key for key in names if key.endswith(("rpb", "pos_embed", "A_log", "A_logs", "dt_bias"))}
    assert tables <= exempt

    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups
    of_parameter = {id(p): group for group in groups for p in group["params"]}
    assert of_parameter.keys() == {id(p) for p in names.values()}
    scale = {key: of_parameter[id(p)]["lr_scale"] for key, p in names.items()}
    decay = {key: of_parameter[id(p)]["weight_decay"] for key, p in names.items()}
    assert all(decay[key] == 0 for key in tables) and 0.05 in decay.values()
    classifier = model.pretrained_cfg["classifier"]
    first = model.pretrained_cfg["first_conv"]
    for head in [classifier] if isinstance(classifier, str) else classifier:
        assert scale[f"{head}.weight"] == 1
    assert scale[f"{first}.weight"] == min(scale.values())
    order = [key for key in names if "blocks." in key and key.endswith("weight")]
    assert [scale[key] for key in order] == sorted(scale[key] for key in order), "later blocks learn faster"
    blocks = {re.sub(r"(blocks\.\d+)\..*", r"\1", key) for key in order}
    assert len(set(scale.values())) > len(blocks), "every block has a rate of its own"


# One model of each group, with weights


@pytest.fixture(params=FIRST, scope="module")
def first(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared(first: str) -> Iterator[nn.Module]:
    """A shallow model that tests may run but not change."""
    torch.manual_seed(0)
    yield shallow(first)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (33, 61), (96, 17), (7, 50), (1, 1)])
def test_any_size_and_aspect(shared: nn.Module, size: tuple[int, int]) -> None:
    x = picture(*size, batch=2)
    logits = shared(x)
    assert logits.shape == (2, 1000) and logits.isfinite().all() and logits.std() > 0
    assert_near(shared(x[1:]), logits[1:])  # a picture does not depend on its company


@torch.no_grad()
def test_forward_intermediates(shared: nn.Module) -> None:
    x = picture(50, 70)
    count = tap_count(shared)
    final, every = shared.forward_intermediates(x)
    assert_near(final, shared.forward_features(x), 1e-5)
    assert len(every) == count and all(y.ndim == 4 for y in every)
    info = shared.feature_info
    assert [y.shape[1] for y in every] == [entry["num_chs"] for entry in info]

    last_two = shared.forward_intermediates(x, indices=2, intermediates_only=True)
    chosen = shared.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip([*last_two, *chosen], [*every[-2:], every[0], every[-1]], strict=True))
    early = shared.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert len(early) == 1 and torch.equal(early[0], every[0])
    normed = shared.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    in_head = isinstance(shared.norm, nn.Identity)  # some models normalise only what is pooled
    assert normed.shape == every[-1].shape and torch.equal(normed, every[-1]) == in_head

    other = "NHWC" if isinstance(shared, HierarchicalBackbone) else "NLC"
    for a, b in zip(shared.forward_intermediates(x, output_fmt=other, intermediates_only=True), every, strict=True):
        assert torch.equal(a if other == "NHWC" else a.unflatten(1, b.shape[2:]), b.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="output_fmt"):
        shared.forward_intermediates(x, output_fmt="CHW")


def test_pruned_models_keep_their_features_and_no_dead_weight(first: str, shared: nn.Module) -> None:
    x = picture()
    with torch.no_grad():
        every = shared.forward_intermediates(x, intermediates_only=True)
    for index in range(tap_count(shared)):
        model = copy.deepcopy(shared)
        assert model.prune_intermediate_layers([index], prune_norm=True) == [index]
        with torch.no_grad():
            feature = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
        assert_near(feature, every[index], 1e-5)
        assert model.num_features == shared.feature_info[index]["num_chs"]
        model.train()  # what chooses tokens learns only then
        feature = model.forward_intermediates(training_pictures(model), indices=[index], intermediates_only=True)[0]
        feature.square().mean().backward()
        assert [key for key, p in model.named_parameters() if p.grad is None] == []
    untouched = copy.deepcopy(shared)
    untouched.prune_intermediate_layers(1, prune_head=False)
    with torch.no_grad():
        assert torch.equal(untouched(x), shared(x))


def test_every_parameter_learns(first: str) -> None:
    model = shallow(first, num_classes=5).train()
    model(training_pictures(model)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [key for key, p in model.named_parameters() if not p.grad.any()] == []


def test_features_only(first: str) -> None:
    count = tap_count(on_meta(first, **shallow_args(first)))
    indices = [0, count - 1]
    model = shallow(first, features_only=True, out_indices=indices)
    with torch.no_grad():
        features = model(picture(40, 56))
    reductions = model.feature_info.reduction()
    for feature, channels, reduction in zip(features, model.feature_info.channels(), reductions, strict=True):
        assert tuple(feature.shape[:2]) == (1, channels)
        assert all(fits(*sides, reduction, reductions[0]) for sides in zip(feature.shape[2:], (40, 56), strict=True))
        formats = (torch.contiguous_format, torch.channels_last)
        assert any(feature.is_contiguous(memory_format=dense) for dense in formats) and feature.isfinite().all()


def test_gradient_checkpointing_changes_nothing(shared: nn.Module) -> None:
    x = training_pictures(shared)
    results = []
    for enable in (False, True):
        model = copy.deepcopy(shared).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)  # for models that draw what they keep
        final, taps = model.forward_intermediates(x)
        out = model.forward_head(final)
        (out.square().mean() + sum(tap.square().mean() for tap in taps)).backward()
        out2 = model(x)
        results.append([out.detach(), out2.detach(), *(p.grad for p in model.parameters())])
    for without, with_ in zip(*results, strict=True):
        assert_near(with_, without, 1e-5)


def test_checkpointing_saves_memory(shared: nn.Module) -> None:
    """The blocks' inner activations must not be kept: counted by what autograd packs away."""
    kept = []
    for enable in (False, True):
        model = copy.deepcopy(shared).train()
        model.set_grad_checkpointing(enable)
        elements = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel() if not isinstance(tensor, nn.Parameter) else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(training_pictures(model))
        kept.append(elements)
    assert kept[1] < kept[0] / 2


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts(first: str, tmp_path: Path, channels: int) -> None:
    """Also from three-channel weights."""
    source = shallow(first)
    file = tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    args = {**shallow_args(first), "in_chans": channels, "pretrained_cfg_overlay": {"file": str(file)}}
    model = timm.create_model(first, pretrained=True, **args).eval()
    assert model.in_chans == channels
    gray = picture()
    gray[:, 1:] = gray[:, :1]
    if channels == 1:  # the three channels' weights are summed
        assert_near(model(gray[:, :1]), source(gray))
    else:
        assert model(picture(channels=channels)).isfinite().all()


@torch.no_grad()
def test_bfloat16_autocast(shared: nn.Module) -> None:
    x = picture(64, 80)
    with torch.autocast("cpu", torch.bfloat16):
        half = shared.forward_features(x)
    full = shared.forward_features(x)
    if isinstance(shared, TokenReducedViT):  # of tokens that score alike another one may stay, or come first
        half, full = half[:, 0], full[:, 0]
    assert ((half.float() - full).norm() / full.norm()) < 0.05


def test_autocast_trains(first: str) -> None:
    model = shallow(first).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(training_pictures(model)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_channels_last_input(shared: nn.Module) -> None:
    x = picture(40, 72, batch=2)
    assert_near(shared(x.to(memory_format=torch.channels_last)), shared(x))
    model = copy.deepcopy(shared).to(memory_format=torch.channels_last)
    assert_near(model(x.to(memory_format=torch.channels_last)), shared(x))


@torch.no_grad()
def test_weights_can_be_made_on_the_spot(first: str) -> None:
    """Built on the meta device, allocated as garbage, initialised: large models are made so."""
    model = on_meta(first, **shallow_args(first)).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()
    model.init_weights()
    if hasattr(model, "init_non_persistent_buffers"):
        model.init_non_persistent_buffers()
    assert [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()] == []
    plain = timm.create_model(first, **shallow_args(first)).state_dict()
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() > 1000:
            assert abs(tensor.std() - plain[key].std()) < 0.1 * plain[key].std() + 1e-6, key


@torch.no_grad()
def test_hub_round_trip(first: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = shallow(first)
    model.reset_classifier(3)
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(loaded) is type(model) and loaded.num_classes == 3
    x = picture()
    assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_torchscript_and_fx(shared: nn.Module, tmp_path: Path) -> None:
    from timm.layers import create_feature_extractor, get_graph_node_names

    torch.jit.save(torch.jit.script(shared), str(tmp_path / "model.pt"))
    scripted = torch.jit.load(str(tmp_path / "model.pt"))
    traced = create_feature_extractor(shared, {get_graph_node_names(shared)[1][-1]: "out"})
    for x in (picture(), picture(50, 40, batch=2)):
        assert_near(scripted(x), shared(x), 1e-5)
        assert torch.equal(traced(x)["out"], shared(x))
