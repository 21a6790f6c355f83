"""VAN: official outputs, published tables and files, memory format, half precision, arguments."""

from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.mixers import DepthwiseConv2d, LargeKernelAttention
from mixerzoo.vision.backbones.van import Attention, VANBlock
from timm.layers import LayerNorm2d
from torch import Tensor, nn

# Millions of parameters with 1000 classes, of the authors' code.
PARAMETERS = {
    "van_b0": 4.11,
    "van_b1": 13.86,
    "van_b2": 26.58,
    "van_b3": 44.77,
    "van_b4": 60.28,
    "van_b5": 89.97,
    "van_b6": 199.83,
}


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": 1000}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})


@pytest.mark.parametrize("record", ["van_b0", "van_b0_odd", pytest.param("van_b3", marks=pytest.mark.slow)])
@torch.no_grad()
def test_official_outputs(golden, tmp_path: Path, record: str) -> None:
    gold = golden(record)
    name, picture = record.removesuffix("_odd"), gold.picture()
    model = load(name, {"state_dict": gold.checkpoint()}, tmp_path).eval()
    features, stages = model.forward_intermediates(picture)
    got = {"logits": model.forward_head(features), **{f"stage{i}": stage for i, stage in enumerate(stages)}}
    # The segmentation backbone: the same weights without the head, another epsilon.
    backbone = {f"backbone.{key}": w for key, w in gold.checkpoint().items() if not key.startswith("head.")}
    segmenter = {"state_dict": {**backbone, "decode_head.conv_seg.weight": torch.zeros(2, 2)}}
    stages = load(name, segmenter, tmp_path, features_only=True, norm_eps=1e-5).eval()(picture)
    got |= {f"seg_stage{i}": stage for i, stage in enumerate(stages)}
    assert got.keys() == gold.record["outputs"].keys()
    errors = {output: gold.error(output, tensor) for output, tensor in got.items()}
    noise = gold.record["fp64_rel_err"]
    assert all(error < max(10 * noise[output], 5e-6) for output, error in errors.items()), errors


def official_names(module: nn.Module) -> dict[str, str]:
    """Ours to the authors'."""
    return {name: name.replace("mlp.dwconv.", "mlp.dwconv.dwconv.") for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("van_attention_64_28x28", lambda: Attention(64)),
        (
            "van_block_64_28x28",
            lambda: VANBlock(64, mlp_ratio=8, init_values=1.0, proj_drop=0.0, drop_path=0.0),
        ),
    ],
)
def test_official_parts(operator_case, name: str, build) -> None:
    case = operator_case("lka_ops", name)
    part = build().eval()
    part.load_state_dict({key.replace("dwconv.dwconv", "dwconv"): w for key, w in case.state().items()})
    x = case.draw("x", case.record["x_shape"]).requires_grad_()
    y = part(x)
    (y * case.draw("g", y.shape)).sum().backward()
    assert case.error(case.record["y"], y) < 5e-6
    assert case.error(case.record["grad_x"], x.grad) < 5e-6
    theirs = official_names(part)
    assert set(theirs.values()) == case.record["param_grads"].keys()
    for key, parameter in part.named_parameters():
        assert case.error(case.record["param_grads"][theirs[key]], parameter.grad) < 2e-5, key


# Tables and files


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_parameter_count(golden, name: str, millions: float) -> None:
    model = timm.create_model(name, device="meta", num_classes=1000)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == millions
    if name in ("van_b0", "van_b3"):
        assert count == golden(name).record["params"]


def test_published_settings() -> None:
    model = timm.create_model("van_b0", device="meta")
    assert {m.eps for m in model.modules() if isinstance(m, LayerNorm2d)} == {1e-6}
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"none"}
    registered = {n for n in timm.list_models("van_*") if timm.models.model_entrypoint(n).__module__.endswith(".van")}
    assert registered == PARAMETERS.keys()


def test_initial_weights() -> None:
    model = timm.create_model("van_b0")
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            outputs = module.weight[0, 0].numel() * module.out_channels / module.groups
            assert not module.bias.any()
            assert module.weight.std().item() == pytest.approx((2 / outputs) ** 0.5, rel=0.15)
        elif isinstance(module, VANBlock):
            assert (module.layer_scale_1 == 1e-2).all() and (module.layer_scale_2 == 1e-2).all()
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.05) and not model.head.fc.bias.any()


def as_mmpretrain(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        for ours, theirs in [
            (".proj.", ".projection."),
            ("block", "blocks"),
            (".conv0.", ".DW_conv."),
            (".conv_spatial.", ".DW_D_conv."),
            ("mlp.dwconv.dwconv.", "mlp.dwconv."),
            ("head.", "head.fc."),
        ]:
            name = name.replace(ours, theirs)
        renamed[name if name.startswith("head.") else f"backbone.{name}"] = tensor
    return renamed


def test_checkpoints(golden, tmp_path: Path) -> None:
    official = golden("van_b0").checkpoint()
    want = load("van_b0", official, tmp_path).state_dict()
    for checkpoint in (as_mmpretrain(official), {"state_dict": {f"module.{k}": w for k, w in official.items()}}, want):
        got = load("van_b0", checkpoint, tmp_path).state_dict()
        assert all(torch.equal(got[key], want[key]) for key in want)
    assert load("van_b0", official, tmp_path, num_classes=7).head.fc.weight.shape == (7, 256)
    del official["block3.4.layer_scale_2"]
    with pytest.raises(ValueError, match=r"missing: 1 \(stages\.2\.blocks\.4\.layer_scale_2\)"):
        load("van_b0", official, tmp_path)
    with pytest.raises(ValueError, match="does not belong to van_b1"):
        load("van_b1", official, tmp_path)


# How it runs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_are_channels_last_everywhere(layout: torch.memory_format) -> None:
    model = timm.create_model("van_b0", depths=(1, 1, 1, 1))
    checked = []

    def check(module: nn.Module, inputs: Any, output: Tensor) -> None:
        tensors = output if module is model.stem else (*inputs, output)
        if not isinstance(module, nn.GELU):
            checked.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.ndim == 4))

    kinds = (nn.Conv2d, DepthwiseConv2d, LargeKernelAttention, nn.BatchNorm2d, LayerNorm2d, VANBlock, Attention)
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(check)
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 96, 64).to(memory_format=layout))
    assert len(checked) >= 40
    assert all(checked[1:])  # the stem's convolution is the first: a picture comes in any format


@torch.no_grad()
def test_half_precision_at_the_initial_scales(golden) -> None:
    picture = golden("van_b0").picture()[..., 60:156, 60:156]
    for name, size in (("van_b0", 96), ("van_b3", 64)):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        x = picture[..., :size, :size]
        want = model(x)
        for dtype, tolerance in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
            got = model.to(dtype)(x.to(dtype)).float()
            assert got.isfinite().all()
            assert (got - want).abs().max() < tolerance * want.abs().max(), (name, dtype)


@torch.no_grad()
def test_float16_overflows_at_large_scales(golden) -> None:
    """What the docstring of `LargeKernelAttention` says of layer scales."""
    x = golden("van_b0").picture()[..., 60:124, 60:124]
    for scale, finite in ((3e-2, True), (1e-1, False)):
        torch.manual_seed(0)
        model = timm.create_model("van_b3", init_values=scale).eval()
        assert model.half()(x.half()).isfinite().all() == finite


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": (32, 64)}, r"dims needs one entry per stage, 4; got \(32, 64\)"),
        ({"mlp_ratios": (4,)}, r"mlp_ratios needs one entry per stage, 4; got \(4,\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("van_b0", device="meta", **arguments)
