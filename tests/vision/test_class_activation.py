"""Class activation maps hold the class score, where it can be computed, on the raster, for every kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from backbones import FIRST, minimal, picture
from mixerzoo.vision.class_activation import class_activation_maps
from torch import Tensor, nn

FAST = {
    "evit_deit_small_patch16_224": {"keep_rate": 0.5, "fuse_token": False},
    "tome_deit_small_patch16_224": {"r": 16},
}


class _MeanColour(nn.Module):
    """A classifier of three classes, one per colour: the score is the mean of that colour."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = [{"module": "patches"}]
        self.patches = nn.AvgPool2d(8)

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.patches(x)
        return x, [x]

    def forward_head(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _model(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **arguments).eval()


def _outputs(model: Any, module: str, images: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a module, and the gradient of the classes' scores, by another way than the maps: model(images)."""
    kept: list[Any] = []
    hook = model.get_submodule(module).register_forward_hook(lambda module, inputs, output: kept.append(output))
    score = model(images).gather(1, chosen[:, None]).sum()
    hook.remove()
    output = kept[0] if isinstance(kept[0], Tensor) else kept[0][0]  # tokens, and the state of their reduction
    (gradient,) = torch.autograd.grad(score, output)
    return output.detach(), gradient


def test_evidence_lies_where_it_is() -> None:
    images = torch.zeros(2, 3, 32, 48)
    images[0, 1, 8:16, 32:40] = 1.0  # a green square
    images[1, 2, 24:32, :16] = 0.5
    images[1, 1] = -0.25
    found = class_activation_maps(_MeanColour().eval(), images)
    expected = torch.zeros(2, 4, 6)
    expected[0, 1, 4] = 1 / 24
    expected[1, 3, :2] = 0.5 / 24
    torch.testing.assert_close(found.maps, expected)
    assert found.classes.tolist() == [1, 2] and found.stage == 0
    against = class_activation_maps(_MeanColour().eval(), images, [0, 1])
    torch.testing.assert_close(against.maps[1], torch.full((4, 6), -0.25 / 24))


@pytest.mark.parametrize("name", ["resnet18", "test_convnext", "van_b0"])
def test_maps_of_convolutions_sum_to_the_score(name: str) -> None:
    """Under a head of mean and linear layer, a map and the bias are the class score, exactly. A norm in between makes
    the score nonlinear: there, gradients and features of the stage are compared."""
    model, images = _model(name), torch.randn(2, 3, 96, 64)
    found = class_activation_maps(model, images, [3, 1])
    torch.testing.assert_close(found.scores, model(images))
    if name == "resnet18":
        scores = found.scores.gather(1, torch.tensor([[3], [1]]))[:, 0]
        torch.testing.assert_close(found.maps.sum((1, 2)) + model.fc.bias[[3, 1]], scores, rtol=1e-4, atol=1e-4)
    output, gradient = _outputs(model, model.feature_info[-1]["module"], images, torch.tensor([3, 1]))
    torch.testing.assert_close(found.maps, (output * gradient).sum(1), rtol=1e-4, atol=1e-5)


def test_maps_of_a_transformer_leave_out_the_class_token() -> None:
    model, images = _model("vit_tiny_patch16_224", img_size=(96, 64)), torch.randn(2, 3, 96, 64)
    found = class_activation_maps(model, images, torch.tensor([0, 4]))
    assert found.stage == 10, "of the last block, the head reads the class token only"
    output, gradient = _outputs(model, "blocks.10", images, torch.tensor([0, 4]))
    torch.testing.assert_close(found.maps, (output * gradient).sum(2)[:, 1:].view(2, 6, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_reduced_tokens_give_each_evidence_once(name: str) -> None:
    """A merged token stands at many positions and a pruned one at none; the sum over the raster is that over tokens."""
    model, images = _model(name, **FAST[name]), torch.randn(2, 3, 224, 160)
    found = class_activation_maps(model, images, [2, 2])
    output, gradient = _outputs(model, f"blocks.{found.stage}", images, torch.tensor([2, 2]))
    tokens = (output * gradient).sum(2)[:, 1:]
    assert tokens.shape[1] < found.maps[0].numel() // 2
    torch.testing.assert_close(found.maps.sum((1, 2)), tokens.sum(1), rtol=1e-3, atol=1e-5)
    live = (found.maps != 0).sum((1, 2))
    assert (live == (tokens.shape[1] if "evit" in name else 14 * 10)).all()


@pytest.mark.parametrize("name", FIRST)
def test_every_family_has_maps(name: str) -> None:
    model = minimal(name)
    images = picture(192, 128, batch=2)
    found = class_activation_maps(model, images)
    reduction = model.feature_info[found.stage]["reduction"]
    assert found.maps.shape == (2, -(-192 // reduction), -(-128 // reduction))
    assert found.maps.isfinite().all() and found.maps.any()
    torch.testing.assert_close(found.scores, model(images))
    assert torch.equal(found.classes, found.scores.argmax(1))


@pytest.mark.parametrize(("name", "stage", "side"), [("hrnet_w18_small", 4, 2), ("twins_pcpvt_small", 2, 4)])
def test_modules_that_are_not_there(name: str, stage: int, side: int) -> None:
    """Some of timm's models name modules in `feature_info` that do not exist; their maps are what later parts read."""
    model, images = _model(name), torch.randn(1, 3, 64, 64)
    assert not {info["module"] for info in model.feature_info} <= dict(model.named_modules()).keys()
    found = class_activation_maps(model, images)
    assert found.maps.shape == (1, side, side) and found.maps.any() and found.stage == stage
    torch.testing.assert_close(found.scores, model(images))


def test_frozen_models_and_earlier_stages() -> None:
    model, images = _model("test_convnext").requires_grad_(False), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        stages = [class_activation_maps(model, images, [1, 1], stage=stage) for stage in (0, 1, -1)]
    assert [found.stage for found in stages] == [0, 1, len(model.feature_info) - 1]
    assert [found.maps.shape[1] for found in stages] == [16, 8, 2]
    assert not any(module._forward_hooks for module in model.modules())
    assert not stages[0].maps.requires_grad and not images.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [5, 0]}, "2 whole numbers from 0 to 4, one per image; got [5, 0]"),
        ({"classes": [1]}, "2 whole numbers from 0 to 4"),
        ({"classes": [0.5, 1.0]}, "2 whole numbers"),
        ({"stage": 4}, "there is no stage 4; the model has 4"),
        ({"stage": -5}, "there is no stage -5"),
        ({"images": torch.zeros(3, 64, 64)}, "[B, C, H, W] with at least one image; got [3, 64, 64]"),
    ],
)
def test_what_cannot_be_explained(arguments: dict[str, Any], message: str) -> None:
    given = {"images": torch.randn(2, 3, 64, 64), **arguments}
    with pytest.raises(ValueError) as error:
        class_activation_maps(_model("test_convnext"), **given)
    assert message in str(error.value)


def test_models_without_evidence() -> None:
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="eval mode"):
        class_activation_maps(_model("test_convnext").train(), images)
    with pytest.raises(ValueError, match="no timm classifier"):
        class_activation_maps(timm.create_model("test_convnext", num_classes=0).eval(), images)
    with pytest.raises(ValueError, match="stage 11 of VisionTransformer was seen to influence the class; give another"):
        class_activation_maps(_model("vit_tiny_patch16_224", img_size=64), images, stage=11)
    model = _model("test_convnext")
    nn.init.zeros_(model.head.fc.weight)
    with pytest.raises(ValueError, match="or other weights if these are zero"):
        class_activation_maps(model, images)
