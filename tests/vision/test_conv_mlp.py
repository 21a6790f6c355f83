"""The MLPs of VAN and LITv2: by parts as layer by layer, and layer by layer where something is put in between."""

from collections.abc import Callable

import pytest
import torch
from mixerzoo.kernels import conv_mlp as kernel
from mixerzoo.vision.backbones import litv2, van
from mixerzoo.vision.backbones._conv_mlp import evaluate_by_parts
from torch import Tensor, nn

MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "van": (lambda: van.ConvMlp(8, 64, drop=0.1), (2, 8, 6, 7)),
    "litv2": (lambda: litv2.ConvMlp(8, 64, drop=0.1), (2, 6, 7, 8)),
}


@pytest.fixture(params=MAKERS)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor]:
    monkeypatch.setattr(kernel, "PART", 1)
    make, shape = MAKERS[request.param]
    return make().eval(), torch.randn(shape)


def test_parts_equal_layers(case: tuple[nn.Module, Tensor]) -> None:
    mlp, x = case
    layer_by_layer = mlp(x)  # with gradients
    with torch.no_grad():
        assert evaluate_by_parts(mlp, torch.randn(1, 3, 3, 8)) is not None
        torch.testing.assert_close(mlp(x), layer_by_layer)


@pytest.mark.parametrize("name", ["fc1", "dwconv", "act", "fc2"])
def test_hooks_are_called(case: tuple[nn.Module, Tensor], name: str) -> None:
    mlp, x = case
    seen: list[Tensor] = []
    mlp.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        mlp(x)
    assert len(seen) == 1


def test_an_adapter_is_not_passed_by(case: tuple[nn.Module, Tensor]) -> None:
    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    mlp, x = case
    with torch.no_grad():
        before = mlp(x)
        mlp.fc2 = Adapter(mlp.fc2)
        torch.testing.assert_close(mlp(x), 2 * before)


def test_dropout_while_training(case: tuple[nn.Module, Tensor]) -> None:
    mlp, x = case
    mlp.train()
    with torch.no_grad():
        assert not torch.equal(mlp(x), mlp(x))
