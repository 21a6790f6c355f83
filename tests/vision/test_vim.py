"""Vim: official outputs, published tables and files, where the class token stands, sizes, the stream's precision."""

import re
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.vision.backbones.vim import StreamNorm, Vim
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

# Of the authors' code with 1000 classes: parameters, tokens at 224 pixels.
MODELS = {
    "vim_tiny": (7.148, 197),
    "vim_tiny_stride8": (7.250, 730),
    "vim_small": (25.797, 197),
    "vim_small_stride8": (26.001, 730),
    "vim_base": (97.598, 197),
}

# Small, and with patches that lie on all sides of the class token.
TINY = {"embed_dim": 32, "depth": 2, "num_classes": 5, "img_size": 64}


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> Any:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": kwargs.pop("file_classes", 1000)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})


def published(model: Vim) -> dict[str, Tensor]:
    """The state dict under its official names, in its official order of tokens."""
    pairs = {
        "conv_weight": ("conv1d.weight", "conv1d_b.weight"),
        "conv_bias": ("conv1d.bias", "conv1d_b.bias"),
        "scan.x_proj_weight": ("x_proj.weight", "x_proj_b.weight"),
        "scan.dt_weight": ("dt_proj.weight", "dt_proj_b.weight"),
        "scan.dt_bias": ("dt_proj.bias", "dt_proj_b.bias"),
        "scan.A_log": ("A_log", "A_b_log"),
        "scan.D": ("D", "D_b"),
    }
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = f"norm_f.{name[5:]}" if name.startswith("norm.") else name.replace("blocks.", "layers.")
        prefix, _, part = name.partition(".mixer.")
        if part in pairs:
            tensor = tensor.unsqueeze(2) if part == "conv_weight" else tensor
            renamed |= {f"{prefix}.mixer.{pairs[part][i]}": tensor[i].clone() for i in range(2)}
        elif name == "pos_embed":
            middle = (tensor.shape[1] - 1) // 2
            renamed[name] = torch.cat([tensor[:, 1 : middle + 1], tensor[:, :1], tensor[:, middle + 1 :]], 1)
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("name", ["vim_tiny", pytest.param("vim_tiny_stride8", marks=pytest.mark.slow)])
@torch.no_grad()
def test_official_outputs(golden, tmp_path: Path, name: str) -> None:
    gold = golden(name)
    model = load(name, {"model": gold.checkpoint(), "epoch": 1}, tmp_path).eval()
    assert {key: list(tensor.shape) for key, tensor in published(model).items()} == gold.record["state"]
    got: dict[str, Tensor] = {}
    for i in (0, 11):  # what the published blocks hand on beside the residual
        hook = lambda *args, i=i: got.update({f"layer{i}": args[2]})  # noqa: E731
        model.blocks[i].mixer.register_forward_hook(hook)
    got["tokens"] = model.forward_features(gold.picture())
    got["pre_logits"] = model.forward_head(got["tokens"], pre_logits=True)
    got["logits"] = model.forward_head(got["tokens"])
    assert got.keys() == gold.record["outputs"].keys()
    errors = {output: gold.error(output, tensor) for output, tensor in got.items()}
    assert all(error < 1e-5 * gold.record["sensitivity"][output] for output, error in errors.items()), errors


# Tables and files


@pytest.mark.parametrize(("name", "facts"), MODELS.items())
def test_published_settings(name: str, facts: tuple[float, int]) -> None:
    model = timm.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == facts[0]
    assert len(model.blocks) == 24 and model.pos_embed.shape[1] == facts[1]
    assert model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape[1] == facts[1]
    assert {m.eps for m in model.modules() if isinstance(m, StreamNorm)} == {1e-5}
    assert {block.mixer.scan.state_dim for block in model.blocks} == {16}
    assert {block.mixer.scan.dt_rank for block in model.blocks} == {model.embed_dim // 16}
    assert model.feature_info[0]["reduction"] == (8 if "stride8" in name else 16)


def test_the_table_is_complete() -> None:
    registered = {n for n in timm.list_models("vim_*") if timm.models.model_entrypoint(n).__module__.endswith(".vim")}
    assert registered == MODELS.keys()


def test_stochastic_depth_rises_from_the_first_block_to_the_last() -> None:
    model = timm.create_model("vim_tiny", device="meta", depth=5, drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0 for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_rates_of_the_scans_are_not_decayed() -> None:
    model = timm.create_model("vim_tiny", device="meta", depth=2)
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    kept = {re.sub(r"blocks\.\d\.", "", name) for name, p in model.named_parameters() if decay[id(p)] == 0}
    rates = {f"mixer.scan.{name}" for name in ("A_log", "D", "dt_bias")}
    biases = {"mixer.conv_bias", "patch_embed.proj.bias", "head.bias"}
    assert kept == rates | biases | {"norm.weight", "pos_embed", "cls_token"}


def test_initial_weights() -> None:
    model = timm.create_model("vim_tiny", depth=16)
    for block in model.blocks:
        assert block.mixer.out_proj.weight.abs().max().item() == pytest.approx((384 * 16) ** -0.5, rel=0.01)
        assert block.mixer.in_proj.weight.abs().max().item() == pytest.approx(192**-0.5, rel=0.01)
    for tensor in (model.pos_embed, model.head.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.05)
    assert not model.head.bias.any() and not model.patch_embed.proj.bias.any()


@torch.no_grad()
def test_checkpoints(tmp_path: Path) -> None:
    source = timm.create_model("vim_tiny", **TINY).eval()
    want = source.state_dict()
    x = torch.randn(1, 3, 64, 64)
    wrapped = {"model": {f"module.{name}": tensor for name, tensor in published(source).items()}}
    for checkpoint in (published(source), wrapped, want):
        model = load("vim_tiny", checkpoint, tmp_path, **TINY, file_classes=5).eval()
        assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(x), source(x))
    assert (
        load("vim_tiny", published(source), tmp_path, **{**TINY, "num_classes": 7}, file_classes=5).head.bias.numel()
        == 7
    )
    broken = published(source)
    del broken["layers.1.mixer.A_b_log"]
    with pytest.raises(
        ValueError, match=r"missing: 1 \(blocks\.1\.mixer\.scan\.A_log\); unexpected: 1 \(blocks\.1\.mix"
    ):
        load("vim_tiny", broken, tmp_path, **TINY, file_classes=5)


@torch.no_grad()
def test_weights_load_into_another_size(tmp_path: Path) -> None:
    """Positions are resampled once on loading, and give what resampling at each call gives."""
    source = timm.create_model("vim_tiny", **TINY).eval()
    x = torch.randn(1, 3, 96, 48)
    larger = load("vim_tiny", published(source), tmp_path, **{**TINY, "img_size": (96, 48)}, file_classes=5).eval()
    assert larger.pos_embed.shape[1] == 6 * 3 + 1
    assert torch.equal(larger.pos_embed[:, 0], source.pos_embed[:, 0])
    assert torch.allclose(larger(x), source(x), atol=1e-5)
    finer = load("vim_tiny_stride8", published(source), tmp_path, **TINY, file_classes=5).eval()
    assert finer.pos_embed.shape[1] == 7 * 7 + 1
    assert torch.equal(finer.pos_embed[:, 0], source.pos_embed[:, 0])
    source.set_input_size((96, 48))
    assert torch.allclose(larger(x), source(x), atol=1e-5)


# Tokens


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 7), (16, 16), (224, 100)])
def test_the_class_token_stands_in_the_middle(size: tuple[int, int]) -> None:
    model = timm.create_model("vim_tiny", **TINY).eval()
    model.pos_embed.zero_()
    x = torch.randn(2, 3, *size)
    patches = model.patch_embed(x).flatten(1, 2)
    stream = model._pos_embed(model.patch_embed(x))
    middle = patches.shape[1] // 2
    assert torch.equal(stream[:, middle], model.cls_token[0].expand(2, -1))
    assert torch.equal(torch.cat([stream[:, :middle], stream[:, middle + 1 :]], 1), patches)

    tokens = model.forward_features(x)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, middle])
    grid = tuple(-(-side // 16) for side in size)
    (patches, prefix) = model.forward_intermediates(x, 1, True, norm=True, intermediates_only=True)[0]
    assert patches.shape == (2, 32, *grid) and prefix.shape == (2, 1, 32)
    assert torch.equal(prefix[:, 0], tokens[:, middle])
    raster = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], 1)
    assert torch.equal(patches.flatten(2).transpose(1, 2), raster)
    model.reset_classifier(5, "avg")
    assert torch.allclose(model.forward_head(tokens, pre_logits=True), raster.mean(1), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "grid"), [((224, 224), (27, 27)), ((225, 97), (28, 12)), ((16, 17), (1, 2)), ((1, 40), (1, 4))]
)
def test_grid_of_overlapping_patches(size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = timm.create_model("vim_tiny_stride8", **TINY)
    x = torch.randn(1, 3, *size)
    patches = model.patch_embed(x)
    assert tuple(patches.shape[1:3]) == grid == model.patch_embed.dynamic_feat_size(size)
    whole = torch.zeros(1, 3, 16 + 8 * (grid[0] - 1), 16 + 8 * (grid[1] - 1))
    whole[:, :, : size[0], : size[1]] = x
    rows, columns = grid[0] - 1, grid[1] - 1
    corner = whole[0, :, 8 * rows : 8 * rows + 16, 8 * columns : 8 * columns + 16]
    want = (model.patch_embed.proj.weight * corner).sum((1, 2, 3)) + model.patch_embed.proj.bias
    assert torch.allclose(patches[0, -1, -1], want, atol=1e-5)


# Precision


def test_the_stream_is_float32() -> None:
    model = timm.create_model("vim_tiny", **TINY).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad():
        half = model.bfloat16()(x.bfloat16())
        features = model.forward_intermediates(x.bfloat16(), intermediates_only=True)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        model.double()(x.double())
    assert seen == [torch.float32] * 6 + [torch.float64] * 2
    assert half.dtype == torch.bfloat16 and {y.dtype for y in features} == {torch.bfloat16}
    assert (half.float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_half_precision_stays_finite(dtype: torch.dtype) -> None:
    """The authors switch mixed precision off, since theirs gives NaN."""
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny", **{**TINY, "depth": 4}).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1)
    x, labels = 3 * torch.randn(4, 3, 64, 64), torch.arange(4)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 0}, "stride must lie between 1 and patch_size, 16; got 0"),
        ({"stride": 17}, "got 17"),
        ({"global_pool": "map"}, "global_pool must be 'token', 'avg', 'max', 'avgmax' or ''; got 'map'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("vim_tiny", device="meta", **arguments)


def test_overlapping_patches_keep_their_size() -> None:
    model = timm.create_model("vim_tiny_stride8", **TINY)
    with pytest.raises(ValueError, match="size of overlapping patches cannot be changed; got patch_size 8"):
        model.set_input_size(patch_size=8)
    model.set_input_size((64, 40))
    assert model.pos_embed.shape[1] == 7 * 4 + 1
