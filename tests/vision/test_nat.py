"""NAT, DiNAT, DiNAT_s and the isotropic models: official outputs, published tables, checkpoints, arguments."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from torch import Tensor

PARAMETERS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_11x11": 201_144_250,
    "dinat_large_11x11_384": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_small": 21_999_736,
    "dinat_isotropic_base": 86_465_800,
    "vitrpb_small": 22_080_376,
    "vitrpb_base": 86_627_080,
}

FILES = ("backbones.nat", "backbones.dinat_s", "backbones.nat_isotropic")

# Record and model.
RECORDS = [
    ("nat_mini", "nat_mini"),
    ("nat_mini_160x192", "nat_mini"),
    ("dinat_mini", "dinat_mini"),
    ("dinat_mini_200x264", "dinat_mini"),
    ("dinat_s_tiny", "dinat_s_tiny"),
    ("nat_isotropic_small", "nat_isotropic_small"),
    ("vitrpb_small", "vitrpb_small"),
    pytest.param("dinat_large_384_11x11", "dinat_large_11x11_384", marks=pytest.mark.slow),
]


def load(
    name: str, checkpoint: Any, folder: Path, *, file_classes: int | None = None, **kwargs: Any
) -> torch.nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file; by default with the file's classes."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": file_classes or kwargs.get("num_classes", 1000)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize(("record", "name"), RECORDS)
@torch.no_grad()
def test_official_outputs(golden, tmp_path: Path, record: str, name: str) -> None:
    gold = golden(record)
    model = load(name, gold.checkpoint(), tmp_path)
    picture = gold.picture()
    isotropic = not hasattr(model, "stages")
    features, stages = model.forward_intermediates(picture, indices=[2, 5, 8, 11] if isotropic else None)
    embedded = model.patch_embed(picture) if isotropic else model.stem(picture)
    got = {
        "logits": model(picture),
        "features": model.forward_head(features, pre_logits=True),
        "patch_embed": embedded.permute(0, 3, 1, 2),
        **{f"stage{i}": stage for i, stage in enumerate(stages)},
    }
    assert got.keys() == gold.record["outputs"].keys()
    errors = {output: gold.error(output, tensor) for output, tensor in got.items()}
    assert max(errors.values()) < 1e-5, errors


@torch.no_grad()
def test_official_segmentation_backbone(golden, tmp_path: Path) -> None:
    gold = golden("seg_nat_mini")
    model = load("nat_mini", gold.checkpoint(), tmp_path, features_only=True, out_norms=True)
    stages = model(gold.picture())
    assert max(gold.error(f"stage{i}", stage) for i, stage in enumerate(stages)) < 1e-5
    assert len(stages) == len(gold.record["outputs"]) == 4


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_count(name: str, count: int) -> None:
    model = timm.create_model(name, device="meta", num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_table_is_complete() -> None:
    registered = {n for n in timm.list_models("*") if timm.models.model_entrypoint(n).__module__.endswith(FILES)}
    assert registered == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_settings(name: str) -> None:
    model = timm.create_model(name, device="meta", num_classes=1000)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-5
        if isinstance(module, torch.nn.GELU):
            assert module.approximate == "none"
    at_384 = name.endswith("384")
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == ((3, 384, 384) if at_384 else (3, 224, 224))
    assert cfg["crop_pct"] == (1.0 if at_384 else 0.875)
    assert cfg["license"] == "mit" and cfg["url"].startswith("https://shi-labs.com/projects/")
    scaled = any(parameter.endswith("gamma") for parameter, _ in model.named_parameters())
    assert scaled == (name in ("nat_small", "nat_base", "dinat_base"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nat_mini", [[1] * 3, [1] * 4, [1] * 6, [1] * 5]),
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_11x11_384", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_tiny", [[1, 8], [1, 4], [1, 2] * 3, [1] * 2]),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1] * 2]),
    ],
)
def test_dilations(name: str, expected: list[list[int]]) -> None:
    model = timm.create_model(name, device="meta")
    assert [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages] == expected


def test_dilations_are_no_part_of_the_weights(golden, tmp_path: Path) -> None:
    gold = golden("nat_mini")
    model = load("dinat_mini", gold.checkpoint(), tmp_path, dilations=1)
    with torch.no_grad():
        assert gold.error("logits", model(gold.picture())) < 1e-5
    isotropic = timm.create_model("nat_isotropic_small", dilations=(1, 3), depth=3, device="meta")
    assert [block.attn.dilation[0] for block in isotropic.blocks] == [1, 3, 1]


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny"])
@pytest.mark.parametrize("stride", [4, 2, 1])
@torch.no_grad()
def test_stem_stride_for_small_pictures(name: str, stride: int) -> None:
    published = timm.create_model(name, device="meta").state_dict()
    model = timm.create_model(name, stem_stride=stride, depths=(1, 1, 1, 1), features_only=True).eval()
    assert model.feature_info.reduction() == [stride, 2 * stride, 4 * stride, 8 * stride]
    for size in (28, 30):
        sides = [-(-size // reduction) for reduction in model.feature_info.reduction()]
        assert [tuple(y.shape[2:]) for y in model(torch.randn(1, 3, size, size))] == [(side, side) for side in sides]
    weights = {key: w.shape for key, w in model.model.state_dict().items() if key.startswith("stem.")}
    assert weights == {key: w.shape for key, w in published.items() if key.startswith("stem.")}


def test_overlapping_patches_are_centred() -> None:
    """At stride 1 the 4 x 4 patch of a position must reach one pixel before and two behind."""
    stem = timm.create_model("dinat_s_tiny", stem_stride=1, depths=(1,), num_heads=(3,), dilations=1).stem
    with torch.no_grad():
        picture = torch.zeros(1, 3, 9, 9)
        picture[0, :, 4, 4] = 1
        touched = (
            (stem.proj(torch.nn.functional.pad(picture, [1, 2, 1, 2])) - stem.proj.bias[:, None, None]).abs().sum(1)
        )
        embedded = stem(picture)
        background = stem(torch.zeros_like(picture))
    changed = (embedded - background).abs().sum(-1) > 1e-6
    assert torch.equal(changed, touched > 1e-6)
    assert changed.nonzero()[:, 1].unique().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dilations": (1, 2)}, r"dilations needs one number, or one entry per stage, 4; got \(1, 2\)"),
        ({"dilations": ((1,), (1,), (), (1,))}, r"each 1 or more; got \[\]"),
        ({"dilations": 0}, r"each 1 or more; got \[0\]"),
        ({"num_heads": (2, 4)}, r"num_heads needs one entry per stage, 4; got \(2, 4\)"),
        ({"num_heads": (3, 4, 8, 16)}, "dim must be a multiple of num_heads; got dim 64 and num_heads 3"),
        ({"kernel_size": 6}, "rpb needs odd windows"),
        ({"stem_stride": 3}, "stem_stride must be 4, 2 or 1; got 3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("nat_mini", device="meta", **arguments)


# Checkpoints: published layouts in, anything else refused


TINY: dict[str, Any] = {"depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2)}


def tiny(**kwargs: Any) -> torch.nn.Module:
    return timm.create_model("nat_mini", num_classes=5, **TINY, **kwargs)


def load_tiny(checkpoint: Any, folder: Path, classes: int) -> torch.nn.Module:
    """A file of five classes into a model of so many."""
    return load("nat_mini", checkpoint, folder, file_classes=5, num_classes=classes, **TINY)


def published(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict of a NAT under its official names."""
    names = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^stem\.", "patch_embed.", name)
        name = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"levels.{int(m[1]) - 1}.downsample", name)
        name = re.sub(r"^stages\.", "levels.", name)
        name = re.sub(r"\.ls(\d)\.gamma", r".gamma\1", name)
        names[re.sub(r"^head\.fc\.", "head.", name)] = tensor
    return names


def same_weights(a: torch.nn.Module, b: torch.nn.Module, but: tuple[str, ...] = ()) -> bool:
    state, other = a.state_dict(), b.state_dict()
    return all(torch.equal(state[key], other[key]) for key in state if not key.startswith(but or ("\0",)))


@pytest.mark.parametrize("envelope", ["plain", "model", "state_dict", "module", "backbone"])
def test_layouts_of_a_checkpoint(tmp_path: Path, envelope: str) -> None:
    source = tiny(init_values=1e-3)
    checkpoint: Any = published(source)
    if envelope in ("module", "backbone"):
        checkpoint = {f"{envelope}.{name}": tensor for name, tensor in checkpoint.items()}
        checkpoint |= {"decode_head.conv.weight": torch.zeros(1)} if envelope == "backbone" else {}
    elif envelope != "plain":
        checkpoint = {envelope: checkpoint, "epoch": 3}
    model = load("nat_mini", checkpoint, tmp_path, num_classes=5, init_values=1e-3, **TINY)
    assert same_weights(source, model)


def test_another_number_of_classes_or_channels(tmp_path: Path) -> None:
    source = tiny()
    model = load("nat_mini", published(source), tmp_path, file_classes=5, num_classes=7, in_chans=1, **TINY)
    assert model.head.fc.out_features == 7
    assert same_weights(source, model, but=("head.", "stem.proj.0."))
    torch.testing.assert_close(model.stem.proj[0].weight, source.stem.proj[0].weight.sum(1, keepdim=True))


@pytest.mark.parametrize("classes", [5, 7])
def test_incomplete_checkpoint_is_refused(tmp_path: Path, classes: int) -> None:
    """Also with a new head, when timm itself would only log it."""
    checkpoint = published(tiny())
    del checkpoint["levels.0.blocks.0.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"missing: 1 \(stages.0.blocks.0.attn.qkv.weight\)"):
        load_tiny(checkpoint, tmp_path, classes)


@pytest.mark.parametrize("classes", [5, 7])
def test_foreign_checkpoint_is_refused(tmp_path: Path, classes: int) -> None:
    checkpoint = published(tiny(init_values=1e-3))
    with pytest.raises(ValueError, match=r"unexpected: 4 \(stages.0.blocks.0.ls1.gamma, "):
        load_tiny(checkpoint, tmp_path, classes)
    with pytest.raises(ValueError, match=r"missing: .*unexpected: 2 \(fc.weight, fc.bias\)"):
        load_tiny({"fc.weight": torch.zeros(5, 3), "fc.bias": torch.zeros(5)}, tmp_path, classes)


def test_checkpoint_of_another_width_is_refused(tmp_path: Path) -> None:
    wide = timm.create_model("nat_mini", depths=(1, 1), embed_dim=64, num_heads=(2, 4), num_classes=5)
    with pytest.raises(RuntimeError, match=r"size mismatch for stem\.proj\.0\.weight"):
        load_tiny(published(wide), tmp_path, 5)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    torch.save(published(tiny()), file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(RuntimeError):
        timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **TINY)


class RunsCode:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda thing, file: Path(file).write_bytes(pickle.dumps(thing))])
def test_pickle_with_code_is_refused(tmp_path: Path, save: Any) -> None:
    target, file = tmp_path / "harm", tmp_path / "checkpoint.pth"
    save({"model": published(tiny()), "extra": RunsCode(target)}, file)
    with pytest.raises(RuntimeError, match="weights_only"):
        timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **TINY)
    assert not target.exists()


def test_bias_tables_follow_the_window(tmp_path: Path) -> None:
    source = tiny()
    with torch.no_grad():  # rises by 1 a row and 2 a column
        ramp = torch.arange(13.0) - 6
        source.stages[0].blocks[0].attn.rpb.copy_((ramp[:, None] + 2 * ramp[None])[None])
    model = load("nat_mini", published(source), tmp_path, num_classes=5, kernel_size=11, **TINY)
    table = model.stages[0].blocks[0].attn.rpb[0]
    assert table.shape == (21, 21)
    assert abs(table[10, 10]) < 1e-5  # no offset, no bias, before and after
    down, right = table.diff(dim=0)[4:16, 4:16], table.diff(dim=1)[4:16, 4:16]
    assert abs(down.mean() / (13 / 21) - 1) < 0.02 and abs(right.mean() / (26 / 21) - 1) < 0.02
    assert same_weights(source, model, but=tuple(k for k in source.state_dict() if k.endswith("rpb")))


def test_output_norms_start_fresh_from_a_classifier(tmp_path: Path) -> None:
    source = tiny()
    model = load("nat_mini", published(source), tmp_path, num_classes=5, out_norms=True, **TINY)
    assert same_weights(source, model)
    assert all(torch.equal(stage.out_norm.weight, torch.ones(stage.dim)) for stage in model.stages)


@torch.no_grad()
def test_output_norms_see_no_other_stage() -> None:
    plain, normed = tiny().eval(), tiny(out_norms=True).eval()
    normed.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(plain(x), normed(x))
    for raw, out, stage in zip(
        plain.forward_intermediates(x, intermediates_only=True),
        normed.forward_intermediates(x, intermediates_only=True),
        normed.stages,
        strict=True,
    ):
        want = torch.nn.functional.layer_norm(raw.permute(0, 2, 3, 1), (stage.dim,)).permute(0, 3, 1, 2)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert normed.prune_intermediate_layers([1]) == [1]
    assert [type(stage.out_norm).__name__ for stage in normed.stages] == ["Identity", "LayerNorm"]


# Isotropic models


@torch.no_grad()
def test_global_attention_equals_a_window_that_spans_the_map() -> None:
    """At 7 x 7 patches a 7 x 7 window sees all of them, by another code path."""
    windows = timm.create_model("nat_isotropic_small", depth=2).eval()
    whole = timm.create_model("vitrpb_small", depth=2, img_size=112).eval()
    whole.load_state_dict(windows.state_dict())
    x = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(whole(x), windows(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_global_attention_on_another_grid_resizes_its_table(tmp_path: Path) -> None:
    small = timm.create_model("vitrpb_small", depth=1, num_classes=5).eval()
    large = load("vitrpb_small", small.state_dict(), tmp_path, depth=1, num_classes=5, img_size=(256, 320))
    assert large.blocks[0].attn.rpb.shape == (12, 31, 39)
    x = torch.randn(1, 3, 250, 320)
    torch.testing.assert_close(large(x), small(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_follow_their_size(tmp_path: Path) -> None:
    source = timm.create_model("nat_isotropic_small", depth=1, num_classes=5)
    model = load("nat_isotropic_small", source.state_dict(), tmp_path, depth=1, num_classes=5, patch_size=4)
    assert model.patch_embed.proj.weight.shape == (384, 3, 4, 4)
    assert model.forward_features(torch.randn(1, 3, 28, 30)).shape == (1, 7 * 8, 384)
