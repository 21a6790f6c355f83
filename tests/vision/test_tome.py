"""ToMe: official outputs and groups for every recorded rate, schedules, pooling by size, published files."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import numpy
import pytest
import timm
import torch
from mixerzoo.vision.backbones import reduce_tokens
from mixerzoo.vision.backbones.tome import merge_schedule
from torch import Tensor, nn

RATES: dict[str, Any] = {"r0": 0, "r8": 8, "r13": 13, "r16": 16, "r16dec": (16, -1.0), "r25x4": [25] * 4}
CASES = [
    *[f"deit_tiny_patch16_224.{rate}_{prop}" for rate in RATES for prop in ("prop", "noprop")],
    "deit_small_distilled_patch16_224.r13_prop",
    *[f"mae_vit_tiny_patch16_224.{rate}_{prop}" for rate in ("r8", "r16") for prop in ("prop", "noprop")],
]


def overlay(checkpoint: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    file = folder / "checkpoint.pth"
    torch.save({"model": checkpoint}, file)
    return {"file": str(file), "num_classes": 1000}


@pytest.fixture(scope="module")
def official(golden: Callable[..., Any]) -> Callable[[str], tuple[Any, nn.Module]]:
    """A record and timm's own model with its weights."""

    @functools.cache
    def make(name: str) -> tuple[Any, nn.Module]:
        record = golden(f"tome_{name}")
        pooled = {"global_pool": "avg"} if name.startswith("mae_") else {}
        model = timm.create_model(name.removeprefix("mae_"), **pooled).eval()
        model.load_state_dict(record.checkpoint())
        return record, model

    return make


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_official_outputs_and_groups(case: str, official: Callable[[str], tuple[Any, Any]]) -> None:
    name, _, setting = case.partition(".")
    rate, _, prop = setting.partition("_")
    record, model = official(name)
    reduced = reduce_tokens(model, "tome", r=RATES[rate], prop_attn=prop == "prop")
    x = record.picture()
    assert record.error(f"logits_{setting}", reduced(x)) < 2e-5
    if rate == "r0":
        return
    groups, last = record.record["tome"][setting], reduced.trace_tokens(x)[-1]
    assert last.assign[0].tolist() == groups["group_of_input_token"]
    assert last.size is not None and last.size[0].tolist() == groups["size"]


@torch.no_grad()
def test_registered_name_loads_the_checkpoint(golden: Callable[..., Any], tmp_path: Path) -> None:
    record = golden("tome_deit_tiny_patch16_224")
    given = overlay(record.checkpoint(), tmp_path)
    model = timm.create_model("tome_deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=given, r=16).eval()
    assert record.error("logits_r16_prop", model(record.picture())) < 2e-5
    incomplete = record.checkpoint()
    del incomplete["blocks.3.attn.qkv.bias"]
    with pytest.raises(ValueError, match=r"missing: 1 \(blocks.3.attn.qkv.bias\)"):
        timm.create_model(
            "tome_deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay(incomplete, tmp_path)
        )


@pytest.mark.parametrize(
    ("r", "depth", "want"),
    [
        (8, 3, [8, 8, 8]),
        ((16, -1.0), 12, [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        ((13, 1.0), 12, [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]),
        ([16, -1.0], 4, [32, 21, 10, 0]),  # a list of a configuration file
        (numpy.int64(8), 2, [8, 8]),  # as of numpy.linspace
        ((8, 1.0), 1, [0]),
        ([25, 25], 4, [25, 25, 0, 0]),
        ([], 2, [0, 0]),
    ],
)
def test_schedules(r: int | Sequence[float], depth: int, want: list[int]) -> None:
    assert merge_schedule(r, depth) == want


@pytest.mark.parametrize("r", [[8, 0], (8, 1), [8, -1]])
def test_two_integers_that_could_be_either_are_refused(r: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"write \[8, -?[01]\.0\] for the first, \[8, -?[01], 0\] for the second"):
        merge_schedule(r, 12)


def test_recorded_schedules(repository: Path) -> None:
    for case in json.loads((repository / "tests/goldens/token_ops.json").read_text())["tome"]["parse_r"]:
        r = tuple(case["r"]) if case["kind"] == "tuple" else case["r"]
        if isinstance(r, tuple):
            r = (r[0], float(r[1]))
        assert merge_schedule(r, case["layers"]) == case["out"]


@pytest.mark.parametrize("size", [(96, 64), (50, 37)])
@torch.no_grad()
def test_any_size(size: tuple[int, int]) -> None:
    model = timm.create_model("tome_deit_tiny_patch16_224", depth=2, num_classes=3, r=200).eval()
    x = torch.randn(1, 3, *size)
    patches = -(-size[0] // 16) * -(-size[1] // 16)
    stages = model.trace_tokens(x)
    counts = [patches - patches // 2, patches - patches // 2 - (patches - patches // 2) // 2]
    assert [int(stage.assign.max()) for stage in stages] == counts, "no more than half can merge in a block"
    assert model(x).shape == (1, 3)
