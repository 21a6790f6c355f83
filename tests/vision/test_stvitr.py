"""STViT-R: official outputs of classifier and detector, files, sizes that the published code refuses."""

from pathlib import Path
from typing import Any

import mixerzoo.vision  # noqa: F401  registers the models
import timm
import torch
from torch import Tensor, nn

PARAMETERS = {"stvitr_swin_small": 49_625_518, "stvitr_swin_base": 87_812_336}  # of the authors' training logs
BLOCKS = ("window", "generate", "refine", "local", "mix", "recover")
RECORDED = (0, 1, 2, 4, 5, 11, 17)


def load(name: str, checkpoint: Any, folder: Path, **kwargs: Any) -> nn.Module:
    """Through timm's ordinary route, as a user would load a downloaded file."""
    file = folder / "checkpoint.pth"
    torch.save(checkpoint, file)
    overlay = {"file": str(file), "num_classes": 1000}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 1000, **kwargs})


def published(golden, name: str) -> dict[str, Tensor]:
    """With the masks that the published files hold besides."""
    gold = golden(name)
    masks = gold.record.get("checkpoint_extra_float_buffers", {})
    return {**gold.checkpoint(), **{key: torch.zeros(shape) for key, shape in masks.items()}}


@torch.no_grad()
def test_official_classifier(golden, tmp_path: Path) -> None:
    gold = golden("stvitr_swin_small")
    model = load("stvitr_swin_small", {"model": published(golden, "stvitr_swin_small")}, tmp_path).eval()
    got = {}

    def record(name: str):
        return lambda module, inputs, output: got.__setitem__(name, output.flatten(1, 2))

    for number in RECORDED:
        block = model.stages[2].blocks[number // 6].get_submodule(BLOCKS[number % 6])
        block.register_forward_hook(record(f"stage2_block{number}"))
    features, stages = model.forward_intermediates(gold.picture())
    got["logits"] = model.forward_head(features)
    got |= {f"stage{i}": stages[i].flatten(2).transpose(1, 2) for i in (0, 1, 3)}
    assert got.keys() == gold.record["outputs"].keys()
    errors = {output: gold.error(output, tensor) for output, tensor in got.items()}
    assert max(errors.values()) < 5e-6, errors


@torch.no_grad()
def test_official_detector(golden, tmp_path: Path) -> None:
    """Also at sizes of which one axis, and both, are no whole windows: then the mask is another."""
    gold = golden("stvitr_det_swin_small")
    names = gold.record["outputs"].keys()
    checkpoint = {f"backbone.{key}": w for key, w in gold.checkpoint().items()}
    checkpoint["neck.fpn_convs.0.conv.weight"] = torch.zeros(1)
    model = load("stvitr_det_swin_small", {"state_dict": checkpoint}, tmp_path, features_only=True).eval()
    assert sum(p.numel() for p in model.parameters()) == gold.record["params"]
    errors = {}
    for outputs, size in gold.record["inputs"].items():
        for i, feature in enumerate(model(gold.picture(size))):
            output = outputs.replace("*", str(i + 2))
            errors[output] = gold.error(output, feature)
    assert errors.keys() == names and max(errors.values()) < 5e-6, errors
