"""UniRepLKNet: official outputs in both forms, checkpoints of both forms, and re-parameterisation."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.mixers import DepthwiseConv2d, DilatedReparamBlock
from mixerzoo.vision.backbones.unireplknet import GlobalResponseNorm, UniRepLKNetBlock, checkpoint_filter_fn
from timm.models._features import FeatureGetterNet
from timm.utils import reparameterize_model
from torch import Tensor, nn

# Millions of parameters while training and deployed; the paper states the latter.
PARAMETERS = {
    "unireplknet_a": (4.65, 4.44),
    "unireplknet_f": (6.49, 6.24),
    "unireplknet_p": (11.08, 10.74),
    "unireplknet_n": (18.82, 18.32),
    "unireplknet_t": (31.69, 31.04),
    "unireplknet_s": (56.46, 55.65),
    "unireplknet_b": (99.09, 98.01),
    "unireplknet_l": (220.08, 218.45),
    "unireplknet_xl": (388.69, 386.53),
}

# The official names of a block's parts, and ours.
PARTS = [
    ("gamma", "ls.gamma"),
    ("dwconv.lk_origin.", "dwconv.large.conv."),
    ("dwconv.origin_bn.", "dwconv.large.norm."),
    ("dwconv.dil_conv_", "dwconv.small."),
    ("dwconv.dil_bn_", "dwconv.small."),
    ("norm.", "norm1."),
    ("se.down.", "se.fc1."),
    ("se.up.", "se.fc2."),
    ("pwconv1.1.", "fc1."),
    ("act.1.gamma", "grn.weight"),
    ("act.1.beta", "grn.bias"),
    ("pwconv2.0.", "fc2."),
    ("pwconv2.2.", "norm2."),
]


def official_part(name: str, tensor: Tensor, deployed: bool) -> tuple[str, Tensor]:
    """A name within a block, and the tensor in its official shape."""
    branch = re.fullmatch(r"dwconv\.small\.(k\d+_\d+)\.(conv|norm)\.(\w+)", name)
    if branch:
        return f"dwconv.dil_{'bn' if branch[2] == 'norm' else 'conv'}_{branch[1]}.{branch[3]}", tensor
    if deployed and name.startswith("dwconv.") and tensor.shape[-1] != 3 and tensor.ndim == 4:
        return name.replace("dwconv.", "dwconv.lk_origin."), tensor
    for theirs, ours in PARTS:
        if name.startswith(ours) and not ours.startswith("dwconv.small"):
            return name.replace(ours, theirs, 1), tensor.view(1, 1, 1, -1) if ours.startswith("grn") else tensor
    return name, tensor


def published(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under its official names."""
    state = model.state_dict()
    deployed = not any("norm1" in name for name in state)
    renamed = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name)
        if block:
            part, tensor = official_part(block[3], tensor, deployed)
            if part == "dwconv.bias" and state[name.replace("bias", "weight")].shape[-1] != 3:
                part = "dwconv.lk_origin.bias"
            name = f"stages.{block[1]}.{block[2]}.{part}"
        else:
            name = re.sub(r"^stem\.", "downsample_layers.0.", name)
            name = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
            name = re.sub(r"^stages\.(\d+)\.out_norm\.", r"norm\1.", name)
            name = name.replace("head.fc.", "head.").replace("head.norm.", "norm.")
        renamed[name] = tensor
    return renamed


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": kwargs.pop("file_classes", kwargs.get("num_classes", 1000))}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


TINY: dict[str, Any] = {"depths": (1, 2), "dims": (16, 32), "kernel_sizes": (3, (7, 5)), "num_classes": 5}


def tiny(**kwargs: Any) -> nn.Module:
    """With statistics and scales of which each shows in the output."""
    model = timm.create_model("unireplknet_a", **{**TINY, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, GlobalResponseNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif hasattr(module, "gamma"):
            nn.init.normal_(module.gamma)
    return model


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def same_weights(a: nn.Module, b: nn.Module, but: tuple[str, ...] = ("\0",)) -> bool:
    state, other = a.state_dict(), b.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state if not k.startswith(but))


# The official implementation


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ("unireplknet_a", "unireplknet_a"),
        ("unireplknet_a_odd", "unireplknet_a"),
        pytest.param("unireplknet_t", "unireplknet_t", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_official_outputs(golden: Callable, tmp_path: Path, record: str, name: str) -> None:
    gold = golden(record)
    model = load(name, gold.checkpoint(), tmp_path)
    picture = gold.picture()
    deployed = reparameterize_model(model)
    from_file = load(name, published(deployed), tmp_path)
    errors = {}
    for prefix, form in [("", model), ("deploy_", deployed), ("deploy_", from_file)]:
        features, stages = form.forward_intermediates(picture)
        got = {f"stage{i}": stage for i, stage in enumerate(stages)} | {"logits": form.forward_head(features)}
        errors |= {prefix + output: gold.error(prefix + output, tensor) for output, tensor in got.items()}
    seg = {name: shape for name, shape in gold.record["state"].items() if not name.startswith(("norm.", "head."))}
    for i, stage in enumerate(model.stages):
        seg |= {f"norm{i}.weight": [stage.dim], f"norm{i}.bias": [stage.dim]}
    gold.record["state"] = seg
    maps = load(name, gold.checkpoint(), tmp_path, features_only=True, out_norms=True)(picture)
    errors |= {f"seg_stage{i}": gold.error(f"seg_stage{i}", y) for i, y in enumerate(maps)}
    assert errors.keys() == gold.record["outputs"].keys()
    assert max(errors.values()) < 5e-6, errors


def test_official_deployed_weights(golden: Callable, tmp_path: Path) -> None:
    gold = golden("unireplknet_a")
    model = load("unireplknet_a", gold.checkpoint(), tmp_path)
    assert {k: list(t.shape) for k, t in published(model).items()} == gold.record["state"]
    deployed = reparameterize_model(model)
    state = published(deployed)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == gold.record["deploy_state"]
    assert sum(p.numel() for p in deployed.parameters()) == gold.record["deploy_params"]
    assert sum(p.numel() for p in model.parameters()) == gold.record["params"]
    for name, want in gold.record["deploy_tensors"].items():
        values = state[name].double().flatten()
        samples = torch.tensor(want["samples"], dtype=torch.float64)
        got = values[torch.linspace(0, values.numel() - 1, len(samples)).long()]
        assert (got - samples).abs().max() < 2e-6 * want["absmax"], name


@pytest.mark.parametrize("kernel_size", [3, 13])
def test_official_block(operator_case: Callable, kernel_size: int) -> None:
    case = operator_case("lka_ops", f"unireplknet_block_k{kernel_size}")
    record = case.record
    block = UniRepLKNetBlock(32, kernel_size, mlp_ratio=4, init_values=1e-6, drop_path=0).eval()
    names = {official_part(name, tensor, False)[0]: name for name, tensor in block.state_dict().items()}
    official = case.state()
    assert names.keys() == official.keys()
    block.load_state_dict({ours: official[name].view_as(block.state_dict()[ours]) for name, ours in names.items()})
    x = case.draw("x", record["x_shape"]).requires_grad_()
    y = block(x)
    y.backward(case.draw("g", y.shape))
    assert case.error(record["y"], y) < 5e-6
    assert case.error(record["grad_x"], x.grad) < 5e-6
    parameters = dict(block.named_parameters())
    assert len(parameters) == len(record["param_grads"])
    for name, want in record["param_grads"].items():
        assert case.error(want, parameters[names[name]].grad.view(want["shape"])) < 2e-5, name

    block.reparameterize()
    assert case.error(record["y_reparam"], block(x)) < 5e-6
    shapes = {official_part(name, t, True)[0] for name, t in block.state_dict().items() if name != "dwconv.bias"}
    bias = "dwconv.bias" if kernel_size == 3 else "dwconv.lk_origin.bias"
    assert shapes | {bias} == set(record["reparam_state"])


# Published tables


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_parameter_counts(name: str, millions: tuple[float, float]) -> None:
    model = timm.create_model(name, device="meta", num_classes=1000)
    for form, count in zip((model, reparameterize_model(model)), millions, strict=True):
        assert round(sum(p.numel() for p in form.parameters()) / 1e6, 2) == count


def test_the_table_is_complete() -> None:
    assert set(timm.list_models("unireplknet*")) == PARAMETERS.keys()
    tagged = timm.list_models("unireplknet*", include_tags=True)
    assert len([name for name in tagged if "." in name]) == 14


@pytest.mark.parametrize("name", timm.list_models("unireplknet*", include_tags=True))
def test_published_settings(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    arch, tag = f"{cfg.architecture}.{cfg.tag}".split(".")
    assert cfg.hf_hub_id == "DingXiaoH/UniRepLKNet" and cfg.license == "apache-2.0"
    variant = arch.removeprefix("unireplknet_")
    kind = {"in1k": "in1k_224_acc", "in22k": "in22k_pretrain", "in22k_ft_in1k": "in22k_to_in1k_384_acc"}[tag]
    assert cfg.hf_hub_filename.startswith(f"unireplknet_{variant}_{kind}")
    assert cfg.num_classes == (21841 if tag == "in22k" else 1000)
    pretrained_at = 192 if variant in ("l", "xl") else 224
    assert cfg.input_size[1] == (384 if tag == "in22k_ft_in1k" else pretrained_at)
    assert (cfg.crop_pct, cfg.crop_mode) == ((1.0, "squash") if tag == "in22k_ft_in1k" else (0.875, "center"))


@pytest.mark.parametrize(
    ("name", "third_stage"),
    [("unireplknet_n", [13] * 8), ("unireplknet_t", [13, 3] * 9), ("unireplknet_l", [13, 3, 3] * 9)],
)
def test_kernel_sizes(name: str, third_stage: list[int]) -> None:
    model = timm.create_model(name, device="meta")

    def side(block: nn.Module) -> int:
        return (
            block.dwconv.kernel_size if isinstance(block.dwconv, DilatedReparamBlock) else block.dwconv.weight.shape[2]
        )

    sides = [[side(block) for block in stage.blocks] for stage in model.stages]
    depths = [len(stage.blocks) for stage in model.stages]
    assert sides == [[3] * depths[0], [13] * depths[1], third_stage, [13] * depths[3]]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    top = {"n": 0.1, "t": 0.2, "l": 0.1}[name[-1]]
    assert rates == pytest.approx([top * i / (len(rates) - 1) for i in range(len(rates))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_sizes": (3, 13)}, r"kernel_sizes needs one number, or one entry per stage, 4; got \(3, 13\)"),
        ({"kernel_sizes": 8}, "kernel_size must be odd .* got 8"),
        ({"kernel_sizes": 31}, "branches are known for kernel_size 5, .* got 31"),
        ({"dims": (40, 80)}, r"dims needs one entry per stage, 4; got \(40, 80\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("unireplknet_a", device="meta", **arguments)


# Checkpoints


@pytest.mark.parametrize("deployed", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("layout", ["official", "envelope", "ours"])
@torch.no_grad()
def test_both_forms_load(tmp_path: Path, deployed: bool, layout: str) -> None:
    source = reparameterize_model(tiny()) if deployed else tiny()
    checkpoint: Any = source.state_dict() if layout == "ours" else published(source)
    if layout == "envelope":
        checkpoint = {"model": {f"module.{name}": tensor for name, tensor in checkpoint.items()}, "epoch": 1}
    model = load("unireplknet_a", checkpoint, tmp_path, **TINY)
    assert same_weights(source, model)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("deployed", [False, True], ids=["train", "deploy"])
@torch.no_grad()
def test_other_classes_channels_and_features(tmp_path: Path, deployed: bool) -> None:
    source = reparameterize_model(tiny()) if deployed else tiny()
    checkpoint = published(source)
    model = load("unireplknet_a", checkpoint, tmp_path, **{**TINY, "num_classes": 7}, file_classes=5, in_chans=1)
    assert model.head.fc.out_features == 7
    gray = torch.randn(1, 1, 32, 32)
    want = source.forward_features(gray.expand(-1, 3, -1, -1))
    assert_near(model.forward_features(gray), want)

    model = load("unireplknet_a", checkpoint, tmp_path, **TINY, features_only=True, out_indices=(0, 1), out_norms=True)
    maps = model(gray.expand(-1, 3, -1, -1))
    scaled = torch.nn.functional.layer_norm(want.permute(0, 2, 3, 1), [32], eps=1e-6).permute(0, 3, 1, 2)
    assert_near(maps[1], scaled)  # the norms start fresh from a classifier's file


@pytest.mark.parametrize("deployed", [False, True], ids=["train", "deploy"])
def test_incomplete_and_foreign_files_are_refused(tmp_path: Path, deployed: bool) -> None:
    checkpoint = published(reparameterize_model(tiny()) if deployed else tiny())
    missing = "stages.1.0.pwconv1.1.weight"
    with pytest.raises(ValueError, match=r"missing: 1 \(stages.1.blocks.0.fc1.weight\)"):
        load("unireplknet_a", {k: t for k, t in checkpoint.items() if k != missing}, tmp_path, **TINY)
    with pytest.raises(ValueError, match="does not belong to unireplknet_a"):
        load("unireplknet_a", checkpoint, tmp_path, **{**TINY, "kernel_sizes": (3, 9), "depths": (2, 2)})


def test_a_deployed_model_refuses_a_training_file(tmp_path: Path) -> None:
    source = tiny()
    deployed = reparameterize_model(source)
    with pytest.raises(ValueError, match="of the training form, and the model has been re-parameterised"):
        checkpoint_filter_fn(published(source), deployed)
    file = tmp_path / "weights.pth"
    torch.save(published(source), file)
    with pytest.raises(ValueError, match="Load the checkpoint into a new model"):
        timm.models.load_checkpoint(deployed, str(file), filter_fn=checkpoint_filter_fn)
    assert same_weights(reparameterize_model(source), deployed)
    other = reparameterize_model(tiny())
    torch.save(published(other), file)
    timm.models.load_checkpoint(deployed, str(file), filter_fn=checkpoint_filter_fn)
    assert same_weights(other, deployed)


@torch.no_grad()
def test_deployed_hub_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = reparameterize_model(tiny())
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert same_weights(model, loaded)


# Re-parameterisation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_reparameterised_in_any_type(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    x = torch.randn(2, 3, 40, 33, dtype=dtype)
    state = copy.deepcopy(model.state_dict())
    deployed = reparameterize_model(model)
    assert {p.dtype for p in deployed.parameters()} == {dtype} and not list(deployed.buffers())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), "a copy was made"
    exact = model.double()(x.double())
    assert_near(deployed(x).double(), exact, 20 * torch.finfo(dtype).eps)
    kinds = {type(module) for module in deployed.modules()}
    assert not kinds & {nn.BatchNorm2d, DilatedReparamBlock} and DepthwiseConv2d in kinds


def test_reparameterised_in_place_twice_and_with_other_norms() -> None:
    model = tiny()
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model))
    for form in (
        reparameterize_model(synchronised),
        reparameterize_model(frozen),
        reparameterize_model(model, inplace=True),
    ):
        assert_near(form(x), want)
    assert not [name for name in model.state_dict() if "norm1" in name or "large" in name]
    again = reparameterize_model(model)
    assert same_weights(again, model)


def test_a_deployed_model_keeps_what_was_set_and_trains() -> None:
    model = tiny().train()
    for parameter in model.stages[0].parameters():
        parameter.requires_grad_(False)
    deployed = reparameterize_model(model)
    assert all(module.training for module in deployed.modules())
    assert {p.requires_grad for p in deployed.stages[0].parameters()} == {False}
    deployed(torch.randn(2, 3, 64, 64)).square().sum().backward()
    trained = {name for name, p in deployed.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, p in deployed.named_parameters() if not name.startswith("stages.0.")}


@torch.no_grad()
def test_features_before_and_after() -> None:
    x = torch.randn(1, 3, 48, 40)
    model = tiny(out_norms=True)
    want = model.forward_intermediates(x, intermediates_only=True)
    before = tiny(out_norms=True, features_only=True, out_indices=(0, 1))
    kept = before.model.state_dict().keys()
    before.model.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in kept})
    after = reparameterize_model(model)
    wrapped = FeatureGetterNet(after, out_indices=(0, 1), out_map=None)
    for maps in (reparameterize_model(before)(x), wrapped(x)):
        for got, expected in zip(maps, want, strict=True):
            assert_near(got, expected)
    pruned = copy.deepcopy(reparameterize_model(model))
    pruned.prune_intermediate_layers([0])
    assert_near(pruned.forward_intermediates(x, indices=[0], intermediates_only=True)[0], want[0])


@torch.no_grad()
def test_deployed_under_the_compilers() -> None:
    model = reparameterize_model(tiny())
    x = torch.randn(2, 3, 64, 64)
    want = model(x)
    assert_near(torch.jit.script(model)(x), want)
    assert_near(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert_near(program.module()(x[:1]), want[:1])


@pytest.mark.slow
@torch.no_grad()
def test_deployed_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = reparameterize_model(tiny())
    x = torch.randn(2, 3, 64, 64)
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_near(torch.from_numpy(got), model(x))


@pytest.mark.slow
def test_compiled_model_follows_train_and_eval() -> None:
    torch._dynamo.reset()
    model = tiny(drop_path_rate=0.0)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(compiled(x), model(x), 1e-4)
        twin = copy.deepcopy(model).train()
        assert_near(compiled.train()(x), twin(x), 1e-4)
        compiled.eval(), twin.eval()
        assert_near(compiled(x), twin(x), 1e-4)


def test_maps_are_channels_last() -> None:
    """The memory format in which linear layers, norms and the kernels are fastest, whatever the picture's."""
    model = tiny()
    for x in (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)):
        for module in (model, reparameterize_model(model)):
            for stage in module.forward_intermediates(x, intermediates_only=True):
                assert stage.is_contiguous(memory_format=torch.channels_last)


def test_response_norm_of_an_empty_map_has_gradients() -> None:
    norm = GlobalResponseNorm(4)
    x = torch.zeros(1, 3, 3, 4, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.isfinite().all()
