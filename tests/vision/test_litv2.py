"""LITv2: official outputs, the deformable merging against torchvision's, published tables and files, arguments."""

from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.vision.backbones import litv2
from mixerzoo.vision.backbones.litv2 import DeformableTokenMerging, sample_taps
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

PARAMETERS = {"litv2_s": 27_844_000, "litv2_m": 48_830_368, "litv2_b": 86_520_704}
SHALLOW: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_classes": 5}


def load(checkpoint: Any, folder: Path, *, classes: int = 1000, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": classes}
    kwargs = {"num_classes": classes, **kwargs}
    return timm.create_model("litv2_s", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize(("record", "alpha"), [("litv2_s", 0.9), ("litv2_s_alpha0.5", 0.5)])
@torch.no_grad()
def test_official_outputs(golden, tmp_path: Path, record: str, alpha: float) -> None:
    gold = golden(record)
    model = load({"model": gold.checkpoint()}, tmp_path, alpha=alpha)
    features, stages = model.forward_intermediates(gold.picture())
    got = {"logits": model.forward_head(features), **{f"stage{i}": stage for i, stage in enumerate(stages)}}
    assert got.keys() == gold.record["outputs"].keys()
    errors = {output: gold.error(output, tensor) for output, tensor in got.items()}
    assert max(errors.values()) < 1e-5, errors


@torch.no_grad()
def test_official_segmentation_backbone(golden, tmp_path: Path) -> None:
    """216 x 248: every map from the second stage on is odd somewhere."""
    gold = golden("litv2_s_seg")
    checkpoint = {f"backbone.{name}": tensor for name, tensor in gold.checkpoint().items()}
    checkpoint["decode_head.conv_seg.weight"] = torch.zeros(2, 2)
    stages = load({"state_dict": checkpoint}, tmp_path, features_only=True, out_norms=True)(gold.picture())
    assert [tuple(stage.shape[2:]) for stage in stages] == [(54, 62), (27, 31), (13, 15), (6, 7)]
    errors = [gold.error(f"seg_stage{i}", stage) for i, stage in enumerate(stages)]
    assert len(errors) == len(gold.record["outputs"]) and max(errors) < 1e-5, errors


# Deformable merging


def displaced(dim: int, spread: float) -> DeformableTokenMerging:
    """With offsets of about so many positions."""
    merging = DeformableTokenMerging(dim)
    nn.init.normal_(merging.offset.weight, std=spread / (4 * dim) ** 0.5)
    nn.init.normal_(merging.offset.bias, std=spread)
    return merging.eval()


def test_official_merging(operator_case) -> None:
    case = operator_case("lka_ops", "dtm_32_14x10")
    names = {"dconv.conv_offset.": "offset.", "dconv.": "proj.", "norm_layer.": "norm."}

    def ours(name: str) -> str:
        return next(name.replace(theirs, our, 1) for theirs, our in names.items() if name.startswith(theirs))

    merging = DeformableTokenMerging(32).eval()
    merging.load_state_dict({ours(name): tensor for name, tensor in case.state().items()})
    x = case.draw("x", case.record["x_shape"]).requires_grad_()
    y = merging(x.unflatten(1, (14, 10))).flatten(1, 2)
    (y * case.draw("g", y.shape)).sum().backward()
    assert case.error(case.record["y"], y) < 5e-6
    assert case.error(case.record["grad_x"], x.grad) < 5e-6
    gradients = {name: parameter.grad for name, parameter in merging.named_parameters()}
    for name, want in case.record["param_grads"].items():
        assert case.error(want, gradients[ours(name)]) < 2e-5, name


@pytest.mark.parametrize("size", [(2, 2), (8, 6), (7, 9), (14, 3)])
@pytest.mark.parametrize("spread", [0.0, 0.7, 5.0])
def test_taps_equal_torchvision(size: tuple[int, int], spread: float) -> None:
    """Output and every gradient; also from whole positions, where a derivative has two sides, and from far outside."""
    rows, columns = size[0] // 2, size[1] // 2
    x = torch.randn(2, *size, 6, dtype=torch.double, requires_grad=True)
    offset = (spread * torch.randn(2, 8, rows, columns, dtype=torch.double)).requires_grad_()
    weight = torch.randn(5, 6, 2, 2, dtype=torch.double, requires_grad=True)
    taps = sample_taps(x, offset)
    assert taps.shape == (2, rows, columns, 24)
    ours = taps @ weight.permute(2, 3, 1, 0).flatten(0, 2)
    theirs = deform_conv2d(x.permute(0, 3, 1, 2), offset, weight, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs)
    fed, leaves = torch.randn_like(ours), [x, offset, weight]
    for got, want in zip(torch.autograd.grad(ours, leaves, fed), torch.autograd.grad(theirs, leaves, fed), strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 8), (7, 9), (1, 5)])
def test_torchvision_merges_alike(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA devices, on the CPU."""
    merging, x = displaced(6, 0.7), torch.randn(2, *size, 6)
    want = merging(x)
    used = []
    monkeypatch.setattr(litv2, "takes_torchvision", lambda x: used.append(x) or True)
    torch.testing.assert_close(merging(x), want)
    assert used


@torch.no_grad()
def test_without_offsets_it_is_a_convolution() -> None:
    merging = DeformableTokenMerging(8).eval()
    x = torch.randn(2, 7, 10, 8)
    plain = merging.act(merging.norm(merging.proj(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
    torch.testing.assert_close(merging(x), plain)


@torch.no_grad()
@pytest.mark.parametrize(("size", "merged"), [((1, 1), (1, 1)), ((1, 5), (1, 2)), ((9, 2), (4, 1))])
def test_odd_maps_round_down_and_never_vanish(size: tuple[int, int], merged: tuple[int, int]) -> None:
    assert displaced(4, 0.5)(torch.randn(1, *size, 4)).shape == (1, *merged, 8)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_half_precision(dtype: torch.dtype) -> None:
    """Positions stay exact: in bfloat16 the taps of a map of 600 columns would fall together."""
    merging = DeformableTokenMerging(4).eval()
    nn.init.constant_(merging.offset.bias, 0.5)
    x = torch.randn(1, 2, 600, 4)
    want = merging(x)
    got = merging.to(dtype)(x.to(dtype))
    assert got.dtype == dtype and (got.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_an_overflown_offset_is_no_crash(value: float) -> None:
    offset = torch.zeros(1, 8, 2, 2)
    offset[0, 0, 0, 0] = value
    taps = sample_taps(torch.ones(1, 4, 4, 3), offset)
    assert torch.equal(taps.flatten(0, 2)[1:], torch.ones(3, 12))
    assert taps[0, 0, 0, :3].isnan().all() or (value == 1e30 and taps[0, 0, 0, :3].eq(0).all())


@torch.no_grad()
def test_exported_merging_samples_alike() -> None:
    merging = displaced(8, 1.0)
    shapes = ({axis: torch.export.Dim.DYNAMIC for axis in range(3)},)
    program = torch.export.export(merging, (torch.randn(2, 6, 9, 8),), dynamic_shapes=shapes)
    assert not [node for node in program.graph.nodes if "embedding" in str(node.target)]
    for size in [(5, 8), (12, 7)]:
        x = torch.randn(3, *size, 8)
        torch.testing.assert_close(program.module()(x), merging(x), atol=1e-5, rtol=1e-5)


# Tables and files


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_count(name: str, count: int) -> None:
    model = timm.create_model(name, device="meta", num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == count


def test_published_settings() -> None:
    registered = {n for n in timm.list_models("*") if timm.models.model_entrypoint(n).__module__.endswith(".litv2")}
    assert registered == PARAMETERS.keys()
    model = timm.create_model("litv2_b.in1k_384", device="meta")
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"], cfg["crop_mode"]) == ((3, 384, 384), 1.0, "squash")
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"none"}
    windows = [[getattr(getattr(b, "attn", None), "window_size", 0) for b in stage.blocks] for stage in model.stages]
    assert windows == [[0] * 2, [0] * 2, [2] * 18, [1] * 2]
    heads = [(m.h_heads, m.l_heads) for m in (model.stages[2].blocks[0].attn, model.stages[3].blocks[0].attn)]
    assert heads == [(2, 14), (0, 32)]
    tags = {name.split(".")[1] for name in timm.list_pretrained("litv2_s.*")}
    assert tags == {"in1k", *(f"alpha{alpha}_in1k" for alpha in ("00", "02", "04", "05", "07", "10"))}


def test_initial_weights() -> None:
    model = timm.create_model("litv2_s", **SHALLOW)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if ".offset." in name:
            assert not parameter.any(), name
        if name.endswith("dwconv.weight"):
            assert abs(parameter.std() / (2 / 9) ** 0.5 - 1) < 0.1, name


@pytest.mark.parametrize(("made", "wanted"), [(0.5, 0.9), (0.9, 0.5), (0.0, 0.9), (1.0, 0.9), (0.5, 0.0)])
def test_a_file_of_another_alpha_names_the_remedy(tmp_path: Path, made: float, wanted: float) -> None:
    source = timm.create_model("litv2_s", alpha=made, **SHALLOW)
    with pytest.raises(ValueError, match=r"of 12 heads to the pooled map, .*create the model with alpha=") as error:
        load(source.state_dict(), tmp_path, classes=5, alpha=wanted, depths=(1, 1, 1, 1))
    remedy = float(str(error.value).split("alpha=")[1])
    model = load(source.state_dict(), tmp_path, classes=5, alpha=remedy, depths=(1, 1, 1, 1))
    assert torch.equal(model.stages[2].blocks[0].mlp.fc1.weight, source.stages[2].blocks[0].mlp.fc1.weight)


def test_windows_are_no_part_of_the_weights(tmp_path: Path) -> None:
    source = timm.create_model("litv2_s", **SHALLOW)
    wide = load(source.state_dict(), tmp_path, classes=5, depths=(1, 1, 1, 1), window_sizes=(0, 0, 4, 1))
    assert wide.stages[2].blocks[0].attn.window_size == 4


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not belong to litv2_s.*missing"):
        load({"fc.weight": torch.zeros(5, 3)}, tmp_path, classes=5)


@pytest.mark.parametrize("stride", [4, 2, 1])
@torch.no_grad()
def test_stem_stride_for_small_pictures(stride: int) -> None:
    model = timm.create_model("litv2_s", stem_stride=stride, features_only=True, **SHALLOW).eval()
    assert model.feature_info.reduction() == [stride * 2**i for i in range(4)]
    sides = [28 // stride, 28 // stride // 2, 28 // stride // 4, max(28 // stride // 8, 1)]
    assert [tuple(y.shape[2:]) for y in model(torch.randn(1, 3, 28, 28))] == [(side, side) for side in sides]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": (3, 6)}, r"num_heads needs one entry per stage, 4; got \(3, 6\)"),
        ({"window_sizes": (2, 1)}, r"window_sizes needs one entry per stage, 4; got \(2, 1\)"),
        ({"window_sizes": (0, 0, -2, 1)}, "window_size must be 1 or more"),
        ({"alpha": 2.0}, "from 0 to 1; got 2.0"),
        ({"stem_stride": 3}, "stem_stride must be 4, 2 or 1; got 3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("litv2_s", device="meta", **arguments)


def test_training_reaches_the_offsets() -> None:
    model = timm.create_model("litv2_s", **SHALLOW)
    loss: Tensor = model(torch.randn(2, 3, 64, 64)).square().mean()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
