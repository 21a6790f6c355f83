"""MobileMamba: official outputs, published tables and files, folded batch norms, memory format, arguments."""

import copy
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.mixers.conv_norm import ConvNorm
from mixerzoo.vision.backbones.mobilemamba import MobileMamba, MobileMambaBlock
from timm.layers import DropPath
from timm.utils import reparameterize_model
from torch import Tensor, nn

# Of the authors: millions of parameters with 1000 classes, image size, channels of the three parts of each stage.
MODELS = {
    "mobilemamba_t2": (8.837, 192, [[112, 28, 4], [192, 54, 26], [224, 110, 34]]),
    "mobilemamba_t4": (14.176, 192, [[144, 32, 0], [256, 73, 39], [272, 134, 42]]),
    "mobilemamba_s6": (15.037, 224, [[160, 32, 0], [272, 76, 36], [272, 134, 42]]),
    "mobilemamba_b1": (17.123, 256, [[160, 40, 0], [256, 75, 45], [272, 134, 42]]),
    "mobilemamba_b2": (17.123, 384, [[160, 40, 0], [256, 75, 45], [272, 134, 42]]),
    "mobilemamba_b4": (17.123, 512, [[160, 40, 0], [256, 75, 45], [272, 134, 42]]),
}
TINY = {"depths": (1, 1, 1), "dims": (48, 40, 48), "num_classes": 5}
HAAR = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2


def load(name: str, checkpoint: Any, folder: Path, *, file_classes: int = 1000, **kwargs: Any) -> Any:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": file_classes}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})


def with_haar(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: HAAR.repeat(len(t) // 4, 1, 1)[:, None] if n.endswith("wt_filter") else t for n, t in state.items()}


def lively(**kwargs: Any) -> MobileMamba:
    """In evaluation, with weights and statistics that make every part count."""
    model = timm.create_model("mobilemamba_t2", **{**TINY, **kwargs}).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim > 1 and "scan" not in name:
                nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point() and "scan" not in name:
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return model


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("name", ["mobilemamba_t2", pytest.param("mobilemamba_b1", marks=pytest.mark.slow)])
@torch.no_grad()
def test_official_outputs(golden, tmp_path: Path, name: str) -> None:
    """At 192 pixels the last map is 3 x 3, so odd sizes are among them. With drawn wavelet filters, and with Haar's."""
    gold = golden(name)
    drawn = gold.checkpoint()
    errors, noise = {}, {}
    for suffix, state in (("", drawn), ("_haar", with_haar(drawn))):
        model = load(name, state, tmp_path).eval()
        assert any("analysis" in key for key in model.state_dict()) == (suffix == "")
        for form in (model, reparameterize_model(model)):
            features, stages = form.forward_intermediates(gold.picture())
            got = {f"stage{i}": stage for i, stage in enumerate(stages)} | {"logits": form.forward_head(features)}
            got["patch_embed"] = form.stem(gold.picture())
            errors = {output + suffix: gold.error(output + suffix, tensor) for output, tensor in got.items()}
            noise = {output: 1e-5 * gold.record["sensitivity"][output] for output in errors}
            assert all(error < noise[output] for output, error in errors.items()), errors
    assert len(gold.record["outputs"]) == 2 * len(errors)


# Tables and files


@pytest.mark.parametrize(("name", "facts"), MODELS.items())
def test_published_settings(golden, name: str, facts: tuple[float, int, list[list[int]]]) -> None:
    millions, size, parts = facts
    model = timm.create_model(name, device="meta")
    count = sum(p.numel() for p in model.parameters())
    filters = sum(2 * 16 * b.mixer.global_op.dim for b in model.modules() if isinstance(b, MobileMambaBlock))
    assert round((count + filters) / 1e6, 3) == millions  # the published count has the wavelet filters
    if name in ("mobilemamba_t2", "mobilemamba_b1"):
        assert count + filters == golden(name).record["params"]
    assert [stage.blocks[0].mixer.parts for stage in model.stages] == parts
    assert [block.mixer.global_op.conv.kernel_size[0] for stage in model.stages for block in stage.blocks[:1]] == [
        7,
        5,
        3,
    ]
    for tag in ("in1k", "dist_in1k"):
        cfg = timm.get_pretrained_cfg(f"{name}.{tag}")
        assert cfg.input_size == (3, size, size) and cfg.crop_pct == 0.875 and cfg.interpolation == "bicubic"
    assert timm.get_pretrained_cfg(name).tag == "in1k"
    rate = 0.03 if name[-2] == "b" else 0.0
    last = model.stages[-1].blocks[-1].drop_path
    assert (last.drop_prob if isinstance(last, DropPath) else 0.0) == pytest.approx(rate)


def test_the_table_is_complete() -> None:
    assert set(timm.list_models("mobilemamba*")) == MODELS.keys()
    urls = [timm.get_pretrained_cfg(n).url for n in timm.list_models("mobilemamba*", include_tags=True) if "." in n]
    assert len(urls) == len(set(urls)) == 12


def test_residual_branches_start_at_zero() -> None:
    model = timm.create_model("mobilemamba_t2", **TINY)
    model.init_weights()
    norms = {name: m.norm.weight for name, m in model.named_modules() if isinstance(m, ConvNorm)}
    for name, weight in norms.items():
        assert (weight == (0 if name.endswith(("dw0", "dw1", "pw2", "mixer.proj")) else 1)).all(), name
    mixer = model.stages[0].blocks[0].mixer.global_op
    assert (mixer.base_scale == 1).all() and torch.allclose(mixer.wavelet_scale, torch.tensor(0.1))


def test_weights_by_hand(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"download https://drive.google.com/file/d/1LXh\S+ and pass pretrained_cfg_overlay"
    ):
        timm.create_model("mobilemamba_t2", pretrained=True, **TINY)
    with pytest.raises(ValueError, match=r"weights of mobilemamba_b4 cannot be fetched by a program"):
        timm.create_model("mobilemamba_b4.dist_in1k", pretrained=True)


@torch.no_grad()
def test_checkpoints(golden, tmp_path: Path) -> None:
    official = with_haar(golden("mobilemamba_t2").checkpoint())
    other = {name: torch.zeros_like(tensor) for name, tensor in official.items()}
    want = load("mobilemamba_t2", official, tmp_path).state_dict()
    for checkpoint in (
        {"net": official, "net_E": other, "epoch": 1},
        {"net_E": official},
        {"state_dict": {f"module.{name}": tensor for name, tensor in official.items()}},
        want,
    ):
        got = load("mobilemamba_t2", checkpoint, tmp_path).state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    seven = load("mobilemamba_t2", official, tmp_path, num_classes=7)
    assert seven.head.fc.weight.shape == (7, 368)
    assert torch.equal(seven.head.norm.running_var, want["head.norm.running_var"])
    with pytest.raises(ValueError, match="does not belong to mobilemamba_t4"):
        load("mobilemamba_t4", official, tmp_path)
    del official["blocks2.4.mixer.m.attn.global_op.base_scale.weight"]
    with pytest.raises(ValueError, match=r"missing: 1 \(stages\.1\.blocks\.1\.mixer\.global_op\.base_scale\)"):
        load("mobilemamba_t2", official, tmp_path)


# Folding


def test_folding(tmp_path: Path) -> None:
    model = lively()
    folded = reparameterize_model(model)
    x = torch.randn(2, 3, 100, 72)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    with torch.no_grad():
        assert_near(folded(x), model(x), 1e-5)
        assert_near(folded.forward_head(folded.forward_features(x), pre_logits=True),
                    model.forward_head(model.forward_features(x), pre_logits=True), 1e-5)  # fmt: skip
    folded.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in folded.parameters())
    assert reparameterize_model(folded).state_dict().keys() == folded.state_dict().keys()
    loaded = load("mobilemamba_t2", folded.state_dict(), tmp_path, file_classes=5, **TINY).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), folded.eval()(x))
    headless = reparameterize_model(lively(num_classes=0))
    assert headless(x).shape == (2, 48)


@pytest.mark.slow
@torch.no_grad()
def test_folded_models_export() -> None:
    one_stage = {"depths": (1,), "dims": (48,), "global_ratios": (0.8,), "local_ratios": (0.2,), "kernel_sizes": (7,)}
    folded = reparameterize_model(lively(**one_stage))
    dynamic = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    program = torch.export.export(folded, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(dynamic,))
    assert not [node for node in program.graph.nodes if "mixerzoo" in str(node.target)]
    for batch, height, width in [(1, 64, 64), (3, 113, 75)]:
        x = torch.randn(batch, 3, height, width)
        assert_near(program.module()(x), folded(x), 1e-4)


# How it runs


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_are_channels_last_everywhere(layout: torch.memory_format) -> None:
    model = lively()
    checked = []

    def check(module: nn.Module, inputs: Any, output: Tensor) -> None:
        checked.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, ConvNorm | MobileMambaBlock):
            module.register_forward_hook(check)
    model(torch.randn(2, 3, 192, 128).to(memory_format=layout))
    assert len(checked) > 40 and all(checked)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("mobilemamba_t2", **TINY).eval(), torch.randn(2, 3, 96, 64)
    want = model(x)
    for half in (copy.deepcopy(model).to(dtype), model):
        with torch.autocast("cpu", dtype, enabled=half is model):
            got = half(x if half is model else x.to(dtype)).float()
        assert (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": (32, 64)}, r"dims needs one entry per stage, 3; got \(32, 64\)"),
        ({"kernel_sizes": (3,)}, r"kernel_sizes needs one entry per stage, 3; got \(3,\)"),
        ({"kernel_sizes": (4, 5, 3)}, "kernel_size must be odd"),
        ({"global_ratios": (0.0, 0.5, 0.5)}, "must leave channels to both parts"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("mobilemamba_t2", device="meta", **arguments)
