"""VMamba: official outputs, published tables and files of every dialect, half precision, arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mixerzoo.mixers import SelectiveScan2d
from mixerzoo.vision.backbones.vmamba import VSSBlock, VSSBlockV0, checkpoint_filter_fn
from torch import Tensor, nn

# Thousands of parameters with 1000 classes, of the authors' code.
PARAMETERS = {
    "vmamba_tiny_s1l8": 30249,
    "vmamba_tiny_s2l5": 30706,
    "vmamba_small_s1l20": 49013,
    "vmamba_small_s2l15": 50148,
    "vmamba_base_s1l20": 86615,
    "vmamba_base_s2l15": 88558,
    "vmambav0_tiny": 22893,
    "vmambav0_small": 44417,
    "vmambav0_base": 76254,
}


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": 1000}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})


@pytest.mark.parametrize(
    "name", ["vmamba_tiny_s1l8", pytest.param("vmamba_tiny_s2l5", marks=pytest.mark.slow), "vmambav0_tiny"]
)
@torch.no_grad()
def test_official_outputs(golden: Callable, tmp_path: Path, name: str) -> None:
    gold = golden(name)
    picture = gold.picture()
    model = load(name, {"model": gold.checkpoint()}, tmp_path).eval()
    features, stages = model.forward_intermediates(picture)
    got = {"patch_embed": model.stem(picture).permute(0, 3, 1, 2), "logits": model.forward_head(features)}
    got |= {f"stage{i}": stage for i, stage in enumerate(stages)}
    assert got.keys() == gold.record["outputs"].keys()
    sensitivity = gold.record["sensitivity"]
    errors = {output: gold.error(output, tensor) for output, tensor in got.items()}
    assert all(error < 2e-6 * max(sensitivity[output], 1) for output, error in errors.items()), errors


# Tables and files


@pytest.mark.parametrize(("name", "thousands"), PARAMETERS.items())
def test_parameter_count(golden: Callable, name: str, thousands: int) -> None:
    model = timm.create_model(name, device="meta", num_classes=1000)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e3) == thousands
    if name in ("vmamba_tiny_s1l8", "vmamba_tiny_s2l5", "vmambav0_tiny"):
        assert count == golden(name).record["params"]


def test_published_settings() -> None:
    registered = {n for n in timm.list_models("vmamba*") if timm.model_entrypoint(n).__module__.endswith(".vmamba")}
    assert registered == PARAMETERS.keys()
    for name, state, ratio in (("vmamba_tiny_s1l8", 1, 1), ("vmamba_base_s2l15", 1, 2), ("vmambav0_base", 16, 2)):
        model = timm.create_model(name, device="meta")
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
        for block in (m for m in model.modules() if isinstance(m, VSSBlock | VSSBlockV0)):
            scan = block.mixer.scan
            assert scan.state_dim == state and scan.dim == ratio * block.mixer.dim
            assert scan.dt_rank == block.mixer.dim // 16


def test_what_is_not_decayed() -> None:
    for name, blocks in (("vmamba_tiny_s1l8", 14), ("vmambav0_tiny", 15)):
        model = timm.create_model(name, device="meta")
        spared = model.no_weight_decay()
        assert len(spared) == 3 * blocks
        assert {key.rsplit(".", 1)[1] for key in spared} == {"A_log", "D", "dt_bias"}


SHALLOW = {"depths": (1, 2, 1, 1)}


def shallow_checkpoint(golden: Callable, name: str) -> dict[str, Tensor]:
    """Of the official file, the blocks of `SHALLOW`."""
    kept = {(stage, block) for stage, depth in enumerate(SHALLOW["depths"]) for block in range(depth)}
    checkpoint = golden(name).checkpoint()
    parts = {key: key.split(".") for key in checkpoint}
    return {
        key: checkpoint[key]
        for key, part in parts.items()
        if part[0] != "layers" or part[2] != "blocks" or (int(part[1]), int(part[3])) in kept
    }


def renamed(checkpoint: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    result = {}
    for key, tensor in checkpoint.items():
        for old, new in pairs:
            key = key.replace(old, new)
        result[key] = tensor
    return result


def single_file(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the one-file vmamba.py saves: projections as grouped convolutions of sequences, 1 x 1 convolutions as such."""
    result = {}
    for key, tensor in checkpoint.items():
        if key.endswith(("x_proj_weight", "dt_projs_weight")):
            key, tensor = key.replace("_weight", ".weight"), tensor.flatten(0, 1).unsqueeze(-1)
        elif key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            tensor = tensor[:, :, None, None]
        result[key] = tensor
    return result


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmambav0_tiny"])
def test_dialects(golden: Callable, tmp_path: Path, name: str) -> None:
    official = shallow_checkpoint(golden, name)
    want = load(name, official, tmp_path, **SHALLOW).state_dict()
    assert torch.equal(want["norm.weight"], official["classifier.norm.weight"])
    a_log = want["stages.1.blocks.1.mixer.scan.A_log"]
    assert torch.equal(a_log.flatten(0, 1), official["layers.1.blocks.1.op.A_logs"])

    old = [
        ("classifier.", ""),
        (".norm.", ".ln_1."),
        (".op.", ".self_attention."),
        ("downsample.ln_1", "downsample.norm"),
    ]
    dialects = {
        "years": renamed(
            official, *old, ("patch_embed.0.", "patch_embed.proj."), ("patch_embed.2.", "patch_embed.norm.")
        )
        if name == "vmambav0_tiny"
        else renamed(official, *old),
        "single file": single_file(official),
        "one bias a scan and channel": {
            key: tensor.flatten() if key.endswith("dt_projs_bias") else tensor for key, tensor in official.items()
        },
        "ema alone": {"model_ema": official, "epoch": 3},
        "wrapped twice": {"state_dict": renamed({f"module.module.{key}": t for key, t in official.items()})},
        "ours": want,
    }
    for dialect, checkpoint in dialects.items():
        got = load(name, checkpoint, tmp_path, **SHALLOW).state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), dialect


def test_trained_weights_before_averaged(golden: Callable) -> None:
    """Of a downloaded file with both; timm's own reader of local files is not asked."""
    official = shallow_checkpoint(golden, "vmamba_tiny_s1l8")
    averaged = {key: torch.zeros_like(tensor) for key, tensor in official.items()}
    model = timm.create_model("vmamba_tiny_s1l8", **SHALLOW)
    filtered = checkpoint_filter_fn({"model": official, "model_ema": averaged}, model)
    assert torch.equal(filtered["head.fc.weight"], official["classifier.head.weight"])


def test_other_heads_and_segmentation(golden: Callable, tmp_path: Path) -> None:
    name = "vmamba_tiny_s1l8"
    official = shallow_checkpoint(golden, name)
    tuned = load(name, official, tmp_path, num_classes=7, **SHALLOW)
    assert tuned.head.fc.weight.shape == (7, 768)

    backbone = {f"backbone.{key}": t for key, t in official.items() if not key.startswith("classifier.")}
    for i, dim in enumerate((96, 192, 384, 768)):
        backbone |= {f"backbone.outnorm{i}.weight": torch.full((dim,), i + 2.0)}
        backbone |= {f"backbone.outnorm{i}.bias": torch.full((dim,), 0.5)}
    whole = {"state_dict": {**backbone, "decode_head.conv_seg.weight": torch.zeros(2, 2)}}
    segmenter = load(name, whole, tmp_path, features_only=True, out_norms=True, **SHALLOW).eval()
    with torch.no_grad():
        features = segmenter(golden(name).picture()[..., :64, :96])
    for i, feature in enumerate(features):
        assert feature.mean(1).sub(0.5).abs().max() < 1e-4  # normalised, times i + 2, plus a half
        assert (feature.std(1, unbiased=False) / (i + 2) - 1).abs().max() < 1e-2
    # A classifier's weights for a backbone with fresh norms at its taps.
    assert (load(name, official, tmp_path, out_norms=True, **SHALLOW).stages[0].out_norm.weight == 1).all()


def test_files_that_do_not_fit(golden: Callable, tmp_path: Path) -> None:
    official = shallow_checkpoint(golden, "vmamba_tiny_s1l8")
    with pytest.raises(ValueError, match="does not belong to vmambav0_tiny"):
        load("vmambav0_tiny", official, tmp_path, **SHALLOW)
    with pytest.raises(RuntimeError, match=r"size mismatch for stages\.0\.blocks\.0\.mixer\.scan\.x_proj_weight"):
        load("vmamba_tiny_s2l5", official, tmp_path, **SHALLOW)
    del official["layers.1.blocks.1.op.Ds"]
    with pytest.raises(ValueError, match=r"missing: 1 \(stages\.1\.blocks\.1\.mixer\.scan\.D\)"):
        load("vmamba_tiny_s1l8", official, tmp_path, **SHALLOW)


# How it runs


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmambav0_tiny"])
def test_maps_stay_channels_last(name: str) -> None:
    """No block gets a map that has to be laid out anew: all are dense [B, H, W, C]."""
    model = timm.create_model(name, depths=(1, 1, 1, 1)).eval()
    checked = []
    for module in model.modules():
        if isinstance(module, VSSBlock | VSSBlockV0 | SelectiveScan2d):
            module.register_forward_hook(lambda _, inputs, output: checked.extend((*inputs, output)))
    with torch.no_grad():
        model(torch.randn(2, 3, 96, 64))
    assert len(checked) == 16 and all(tensor.is_contiguous() for tensor in checked)


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmambav0_tiny"])
@torch.no_grad()
def test_half_precision(golden: Callable, name: str) -> None:
    picture = golden(name).picture()[..., 60:124, 60:156]
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 1, 2, 1)).eval()
    want = model.forward_features(picture)
    for dtype, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        with torch.autocast("cpu", dtype):
            cast = model.forward_features(picture).float()
        half = timm.create_model(name, depths=(1, 1, 2, 1)).eval()
        half.load_state_dict(model.state_dict())
        half = half.to(dtype).forward_features(picture.to(dtype)).float()
        for got in (cast, half):
            assert (got - want).norm() < tolerance * want.norm(), (dtype, got)


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmambav0_tiny"])
def test_odd_maps_are_padded_below_and_right(name: str) -> None:
    """The map of an odd image is that of the image with zeros beside it, as far as it was seen."""
    stage = timm.create_model(name, depths=(1, 1)[:2], **({} if "v0" in name else {"dims": (96, 192)})).stages[1]
    x = torch.randn(1, 5, 7, 96)
    with torch.no_grad():
        got = stage.downsample(x)
        want = stage.downsample(nn.functional.pad(x, [0, 0, 0, 1, 0, 1]))
    assert got.shape == (1, 3, 4, 192) and torch.allclose(got, want, atol=1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"dims needs one entry per stage, 4; got \(32, 64\)"):
        timm.create_model("vmamba_tiny_s1l8", device="meta", dims=(32, 64))
