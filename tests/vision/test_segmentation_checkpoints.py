"""Files of whole segmenters: published layouts around recorded backbones, our own, and what does not fit."""

from __future__ import annotations

import pathlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import numpy as np
import pytest
import timm
import torch
from mixerzoo.vision.backbones._patterns import per_stage
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.segmentation.published import KWARGS, backbone_kwargs
from mixerzoo.vision.training.build import build_model
from mixerzoo.vision.training.settings import ConfigError, load
from torch import Tensor
from torch.nn import functional as F

TINY = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "kernel_size": 3}
UPERNET = {"name": "upernet", "channels": 8}
FPN = {"name": "semantic_fpn", "channels": 8}

State = dict[str, Tensor]


def _heads(model: Any) -> State:
    """New weights for all that is not backbone, under its published names."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in state.items()}


def _write(path: Path, backbone: State, heads: State) -> Path:
    """As mmcv writes it."""
    state = {f"backbone.{name}": tensor for name, tensor in backbone.items()} | heads
    torch.save({"meta": {"CLASSES": ("a", "b"), "iter": 160_000}, "state_dict": state}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "record", "head", "dropped"),
    [
        ("nat_mini", "seg_nat_mini", UPERNET, ()),
        ("litv2_s", "litv2_s_seg", FPN, ()),
        pytest.param("van_b0", "van_b0", UPERNET, ("head.",), marks=pytest.mark.exhaustive),
        ("van_b0", "van_b0", FPN, ("head.",)),
    ],
)
@torch.no_grad()
def test_a_published_segmenter_loads_whole(
    name: str, record: str, head: dict[str, Any], dropped: tuple[str, ...], golden: Callable, tmp_path: Path
) -> None:
    """Its backbone then gives the recorded maps, without a word about norms; its heads have the file's weights."""
    gold = golden(record)
    backbone = {key: tensor for key, tensor in gold.checkpoint().items() if not key.startswith(dropped or "-")}
    heads = _heads(build_segmenter(name, 7, head=head))
    file = _write(tmp_path / "iter_160000.pth", backbone, heads)
    model = build_segmenter(name, 7, head=head, checkpoint=file).eval()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in heads.items())
    prefix = "seg_stage" if "seg_stage0" in gold.record["outputs"] else "stage"
    errors = [gold.error(f"{prefix}{i}", level) for i, level in enumerate(model.backbone(gold.picture()))]
    assert len(errors) == 4 and max(errors) < 1e-5, errors


@pytest.mark.slow
@torch.no_grad()
def test_a_published_vmamba_loads_whole(golden: Callable, tmp_path: Path) -> None:
    """No record has its norms of the maps: those of the classifier, normalised here, are what has to come."""
    depths = {"depths": (1, 1, 1, 1)}
    official = {
        key: tensor
        for key, tensor in golden("vmamba_tiny_s1l8").checkpoint().items()
        if ".blocks." not in key or ".blocks.0." in key
    }
    plain = timm.create_model("vmamba_tiny_s1l8", features_only=True, **depths).eval()
    inner = timm.create_model("vmamba_tiny_s1l8", **depths)
    convert: Any = __import__(type(inner).__module__, fromlist=["checkpoint_filter_fn"]).checkpoint_filter_fn
    plain.model.load_state_dict(convert(official, inner), strict=False)
    norms = {f"outnorm{i}.{leaf}": torch.rand(96 * 2**i) for i in range(4) for leaf in ("weight", "bias")}
    backbone = {key: tensor for key, tensor in official.items() if not key.startswith("classifier.")} | norms
    file = _write(
        tmp_path / "tiny.pth", backbone, _heads(build_segmenter("vmamba_tiny_s1l8", 3, head=UPERNET, **depths))
    )
    model = build_segmenter("vmamba_tiny_s1l8", 3, head=UPERNET, checkpoint=file, **depths).eval()
    picture = golden("vmamba_tiny_s1l8").picture()[..., :64, :96]
    for i, (got, stage) in enumerate(zip(model.backbone(picture), plain(picture), strict=True)):
        weight, bias = norms[f"outnorm{i}.weight"], norms[f"outnorm{i}.bias"]
        want = F.layer_norm(stage.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _tiny(classes: int = 3, head: dict[str, Any] = UPERNET, **arguments: Any) -> Any:
    return build_segmenter("dinat_mini", classes, head=head, **{**TINY, **arguments})


def _published_names(model: Any) -> State:
    """A DiNAT's weights as its authors call them."""
    state = {}
    for name, tensor in model.backbone.state_dict().items():
        name = name.removeprefix("model.").replace("stem.", "patch_embed.", 1)
        if ".out_norm." in name:
            stage, leaf = name.split(".")[1], name.split(".")[-1]
            name = f"norm{stage}.{leaf}"
        elif ".downsample." in name:
            stage, rest = name.split(".", 2)[1:]
            name = f"levels.{int(stage) - 1}.{rest}"
        state[name.replace("stages.", "levels.", 1)] = tensor
    return state


def _assert_same(model: Any, other: Any) -> None:
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in other.state_dict().items())


def test_every_tensor_of_a_file_has_a_place_and_every_place_a_tensor(tmp_path: Path) -> None:
    source = _tiny()
    backbone, heads = _published_names(source), _heads(source)
    source.load_state_dict(heads, strict=False)
    _assert_same(_tiny(checkpoint=_write(tmp_path / "whole.pth", backbone, heads)), source)

    # A norm that the file lacks does not begin anew in silence.
    file = _write(tmp_path / "a.pth", {k: t for k, t in backbone.items() if not k.startswith("norm2")}, heads)
    with pytest.raises(ValueError, match=r"the backbone in .*missing: 2 \(stages\.2\.out_norm\.weight, "):
        _tiny(checkpoint=file)
    file = _write(tmp_path / "a.pth", {k: t for k, t in backbone.items() if not k.startswith("norm")}, heads)
    with pytest.raises(ValueError, match=r"missing: 8 \(backbone\.model\.stages\.0\.out_norm\.weight, "):
        _tiny(checkpoint=file)
    file = _write(tmp_path / "b.pth", backbone | {"levels.0.blocks.7.norm1.weight": torch.ones(8)}, heads)
    with pytest.raises(ValueError, match=r"(?s)the backbone in .*unexpected: 1 \(stages\.0\.blocks\.7"):
        _tiny(checkpoint=file)
    file = _write(tmp_path / "c.pth", backbone, heads | {"decode_head.extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"left over: 1 \(decode_head\.extra\.weight\)\. Build the model"):
        _tiny(checkpoint=file)
    with pytest.raises(
        ValueError, match=r"of another shape: .*\(decode_head\.conv_seg\.weight .*\(3, 8, 1, 1\) instead of"
    ):
        _tiny(head=UPERNET | {"channels": 16}, checkpoint=tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"missing: .*\(neck\.lateral_convs.*left over: "):
        _tiny(head=FPN, checkpoint=tmp_path / "whole.pth")


def test_other_classes_begin_anew_and_an_unwanted_head_stays_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _tiny(150)
    file = _write(tmp_path / "ade.pth", _published_names(source), _heads(source))
    caplog.set_level("INFO")
    model = _tiny(19, checkpoint=file)
    assert "has 150 classes; those of 19 begin anew" in caplog.text
    heads = torch.load(file, weights_only=True)["state_dict"]
    same = [k for k, t in model.state_dict().items() if k in heads and torch.equal(t, heads[k])]
    new = {k for k in model.state_dict() if k in heads} - set(same)
    assert new == {
        f"{head}.conv_seg.{leaf}" for head in ("decode_head", "auxiliary_head") for leaf in ("weight", "bias")
    }
    assert model.decode_head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert _tiny(150, UPERNET | {"auxiliary": False}, checkpoint=file).auxiliary_head is None


@pytest.mark.slow
def test_our_own_files_and_backbones_alone(tmp_path: Path) -> None:
    source = _tiny()
    torch.save(source.state_dict(), tmp_path / "own.pth")
    _assert_same(_tiny(checkpoint=tmp_path / "own.pth"), source)
    whole = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}  # as in train.py's files
    torch.save({"state_dict": whole, "mixerzoo": {"head": UPERNET}}, tmp_path / "run.ckpt")
    _assert_same(_tiny(checkpoint=tmp_path / "run.ckpt"), source)

    torch.save(_published_names(source), tmp_path / "backbone.pth")
    model = _tiny(checkpoint=tmp_path / "backbone.pth")
    _assert_same_backbone(model, source)
    classifier = timm.create_model("dinat_mini", **TINY)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    loaded = _tiny(checkpoint=tmp_path / "classifier.pth").backbone.state_dict()
    own = classifier.state_dict()
    assert all(torch.equal(t, own[k[6:]]) for k, t in loaded.items() if "out_norm" not in k)


def _assert_same_backbone(model: Any, other: Any) -> None:
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in other.backbone.state_dict().items())


def test_a_published_file_is_for_our_models(tmp_path: Path) -> None:
    file = _write(tmp_path / "whole.pth", {"stem.weight": torch.ones(1)}, _heads(_tiny()))
    with pytest.raises(ValueError, match="can only be read into the models of mixerzoo; this is ConvNeXt"):
        build_segmenter("test_convnext", 3, head=UPERNET, checkpoint=file)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        _tiny(checkpoint=tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("van_b2", {}, {"norm_eps": 1e-5}),
        ("van_b4.in22k", {"norm_eps": 1e-6}, {}),
        ("litv2_b", {}, {"out_norms": True}),
        ("vmamba_base_s2l15", {}, {"out_norms": True}),
        ("vmambav0_tiny", {}, {"out_norms": True}),
        ("nat_small", {}, {"out_norms": True}),
        ("nat_isotropic_small", {}, {}),
        ("dinat_isotropic_base", {}, {}),
        ("dinat_tiny", {"depths": (1, 1, 1, 1)}, {"out_norms": True}),
        ("dinat_base", {"out_norms": False}, {"dilations": ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))}),
        ("vim_tiny", {}, {}),
        ("convnext_tiny", {}, {}),
    ],
)
def test_published_settings_are_applied_unless_others_are_given(
    name: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert backbone_kwargs(name, given) == expected


PUBLISHED_DILATIONS = {
    "dinat_mini": [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]],
    "dinat_small": [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]],
    "dinat_large": [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2, 1, 2, 1]],
    "dinat_s_tiny": [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]],
    "dinat_s_base": [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2]],
    "dinat_s_large": [[1, 20], [1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2]],
}


@pytest.mark.parametrize("name", PUBLISHED_DILATIONS)
def test_dilations_are_those_of_the_published_configurations(name: str) -> None:
    expected = PUBLISHED_DILATIONS[name]
    depths = [len(stage) for stage in expected]
    assert per_stage(backbone_kwargs(name, {})["dilations"], depths, "dilations") == expected


@pytest.mark.parametrize("pattern", KWARGS)
def test_every_rule_is_of_models_that_take_it(pattern: str) -> None:
    names = timm.list_models(pattern)
    assert names and all(timm.models.model_entrypoint(name).__module__.startswith("mixerzoo.") for name in names)
    with torch.device("meta"):
        timm.create_model(names[0], depths=(1, 1, 1, 1), **backbone_kwargs(names[0], {"depths": None}))


@pytest.mark.slow
def test_training_begins_with_a_whole_segmenter(repository: Path, tmp_path: Path) -> None:
    source = _tiny()
    file = _write(tmp_path / "whole.pth", _published_names(source), _heads(source))
    kwargs = [f"model.kwargs.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in TINY.items()]
    more = ["model.kwargs.mlp_ratio=3", "model.kwargs.stem_stride=4", "head.channels=8", "augment.sizes={}"]
    more.append("model.kwargs.out_indices=[0, 1, 2, 3]")
    arguments = ["recipe=segmentation", "model=nat_mini", *kwargs, *more, f"model.checkpoint={file}"]
    splits: Any = SimpleNamespace(classes=("a", "b", "c"), size=64, channels=3, dense=True)
    model: Any = build_model(load([*arguments, "head.name=upernet"], repository / "configs"), splits)
    assert torch.equal(model.decode_head.conv_seg.weight, torch.load(file)["state_dict"]["decode_head.conv_seg.weight"])
    with pytest.raises(
        ConfigError, match=r"whole\.pth: the weights of .*missing: 25 \(decode_head\.convs.*left over: "
    ):
        build_model(load([*arguments, "head.name=segformer"], repository / "configs"), splits)


def test_what_mmengine_writes_beside_the_tensors_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files hold histories: a class, numpy arrays and bound functions, which torch's reader refuses."""
    source = _tiny()
    state = {f"backbone.{name}": tensor for name, tensor in _published_names(source).items()} | _heads(source)
    history: Any = types.ModuleType("mmengine.logging.history_buffer")
    exec(HISTORY, history.__dict__)
    for part in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, history.__name__, history)
    hub = {"log_scalars": {"loss": history.HistoryBuffer()}, "runtime_info": {"iter": np.int64(3)}}
    torch.save({"meta": {"iter": 3}, "state_dict": state, "message_hub": hub}, tmp_path / "iter_160000.pth")
    model = _tiny(checkpoint=tmp_path / "iter_160000.pth")
    assert torch.equal(model.decode_head.conv_seg.weight, state["decode_head.conv_seg.weight"])

    torch.save({"state_dict": state, "other": pathlib.PurePosixPath("x")}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .* blocked loading"):
        _tiny(checkpoint=tmp_path / "other.pth")


HISTORY = """
import numpy as np

class HistoryBuffer:
    def __init__(self):
        self.history, self.methods = np.arange(3.0), {"mean": HistoryBuffer.mean}

    def mean(self): ...

    def __setstate__(self, state):
        raise SystemExit("executed")
"""
