"""The names of our backbones, small models of them and inputs, for all tests that run over the names."""

import functools
import inspect
import sys
from typing import Any
from unittest import mock

import mixerzoo.vision  # noqa: F401  registers the models
import timm
import torch
from mixerzoo.vision.backbones import HierarchicalBackbone, IsotropicBackbone
from mixerzoo.vision.backbones._token_reduction import TokenReducedViT
from timm.models import model_entrypoint
from torch import Tensor, nn

NAMES = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("mixerzoo.")]
TAGGED = sorted(
    tagged
    for name in NAMES
    for tagged in timm.list_models(f"{name}.*", include_tags=True)
    if tagged.split(".")[0] == name
)


def _first_of_each_group() -> list[str]:
    groups = {}
    for module in sorted({model_entrypoint(name).__module__ for name in NAMES}):
        for name in sys.modules[module].__all__:  # register_model appends to it, in the order of the file
            if name in NAMES:
                groups.setdefault((module, name.split("_")[0]), name)
    return list(groups.values())


FIRST = _first_of_each_group()

SAMPLE = {  # compiled and exported whole by the slow tests; the others have the mark "exhaustive"
    "dynamicvit_deit_256_patch16_224",
    "nat_mini",
    "unireplknet_a",
    "vig_tiny",
    "vim_tiny",
}
assert set(FIRST) >= SAMPLE


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    # Without timm's draws of weights: on this device they hold nothing and take most of the time.
    with mock.patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor):
        return timm.create_model(name, device="meta", dtype=torch.float32, **kwargs).eval()


@functools.cache
def shallow_args(name: str, most: int = 2) -> dict[str, Any]:
    """Arguments that leave a model its widths and at most so many blocks per stage, twice as many without stages."""
    model = on_meta(name)
    accepted = inspect.signature(type(model).__init__).parameters
    if isinstance(model, HierarchicalBackbone) and "depths" in accepted:
        depths = tuple(min(len(stage.blocks), most) for stage in model.stages)
        # Where tokens are chosen must lie within the depth.
        locations = {"locations": tuple(range(depths[2]))} if "locations" in accepted else {}
        return {"depths": depths, "drop_path_rate": 0.0, **locations}
    if isinstance(model, IsotropicBackbone) and ("depth" in accepted or isinstance(model, TokenReducedViT)):
        return {"depth": min(len(model.blocks), 2 * most), "drop_path_rate": 0.0}
    return {}


def shallow(name: str, **kwargs: Any) -> nn.Module:
    """With weights large enough that every part shows in the output."""
    model = timm.create_model(name, **{**shallow_args(name), **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=max(parameter[0].numel(), 1) ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def minimal(name: str) -> nn.Module:
    """One block a stage, two in all without stages: what is traced block by block takes its time."""
    return shallow(name, **shallow_args(name, 1))


def minimal_on_meta(tagged: str, **kwargs: Any) -> nn.Module:
    """For what does not depend on the number of blocks."""
    return on_meta(tagged, **shallow_args(tagged.split(".")[0], 1), **kwargs)


def tap_count(model: nn.Module) -> int:
    return len(model.feature_info)


def uncovered(model: nn.Module) -> int:
    """By how many pixels the patches of a model without stages overlap: so much less of an image counts."""
    proj = model.patch_embed.proj if isinstance(model, IsotropicBackbone) else None
    return proj.kernel_size[0] - proj.stride[0] if isinstance(proj, nn.Conv2d) else 0


def fits(side: int, image: int, reduction: int, first: int) -> bool:
    """Whether a map's side fits the image's: rounded up, or down behind the stem as the official LITv2 does."""
    stem = -(-image // first)
    return side in (-(-image // reduction), max(stem // (reduction // first), 1))


def picture(height: int = 64, width: int = 64, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width)


def training_pictures(model: nn.Module) -> Tensor:
    """Two, with more than one position on the smallest map: batch norms need two values, scans two steps."""
    side = max(64, 2 * model.feature_info[-1]["reduction"])
    return picture(side, side, batch=2)


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for rounding, which is measured against the largest value."""
    assert got.shape == want.shape
    error = (got - want).abs().max() / want.abs().max().clamp(min=1e-12)
    assert error < tolerance, f"relative error {error:.1e}"
