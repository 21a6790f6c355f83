"""The MLP with a convolution inside: by parts as at once, and at once where parts must not be."""

import pytest
import torch
from mixerzoo.kernels import conv_mlp as module
from mixerzoo.kernels.conv_mlp import conv_mlp, conv_mlp_reference, goes_by_parts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def make_inputs(batch: int, size: tuple[int, int], dim: int, hidden: int, out: int) -> list[Tensor]:
    shapes = [(batch, *size, dim), (hidden, dim), (hidden,), (hidden, 1, 3, 5), (hidden,), (out, hidden), (out,)]
    return [torch.randn(shape) for shape in shapes]


@torch.no_grad()
@pytest.mark.parametrize("part", [1, 4000, 30_000])
@pytest.mark.parametrize("shape", [(1, (13, 9), 8, 100, 8), (5, (7, 7), 6, 64, 3), (2, (1, 1), 3, 5, 4)], ids=str)
def test_parts_give_the_whole(shape: tuple, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", part)
    inputs = make_inputs(*shape)
    assert goes_by_parts(inputs[0])
    exact = conv_mlp_reference(*(tensor.double() for tensor in inputs))
    error = (conv_mlp(*inputs).double() - exact).abs().max()
    assert error <= 3e-6 * exact.abs().max()
    strided = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(conv_mlp(strided, *inputs[1:]), conv_mlp(*inputs), rtol=1e-5, atol=1e-4)


def test_the_hidden_map_is_not_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(4, (16, 16), 4, 512, 4)
    monkeypatch.setattr(module, "PART", 16 * 16 * 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with torch.no_grad(), Watch():
        conv_mlp(*inputs)
    assert largest <= 16 * 16 * 64 < 4 * 16 * 16 * 512


def test_parts_only_where_nothing_else_follows() -> None:
    x = torch.randn(1, 4, 4, 8)
    assert not goes_by_parts(x), "gradients need the hidden map"
    with torch.no_grad():
        assert goes_by_parts(x)
        assert not goes_by_parts(x.double()) and not goes_by_parts(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not goes_by_parts(x)
        seen = []
        torch.func.vmap(lambda x: seen.append(goes_by_parts(x)) or x)(x[None])
        assert seen == [False]
    inputs = make_inputs(1, (4, 4), 8, 32, 8)
    program = torch.export.export(_Module(inputs[1:]), (inputs[0],))
    assert len([node for node in program.graph.nodes if "linear" in str(node.target)]) == 2


class _Module(torch.nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        return conv_mlp(x, *self.weights)


def test_gradients() -> None:
    inputs = [tensor.double().requires_grad_() for tensor in make_inputs(1, (3, 4), 2, 4, 3)]
    torch.autograd.gradcheck(conv_mlp, inputs)


@pytest.mark.parametrize("position", [0, 1, 3, 5])
def test_bad_input(position: int) -> None:
    inputs = make_inputs(1, (4, 4), 8, 32, 8)
    inputs[position] = torch.zeros(7, 1, 2, 2)
    with pytest.raises(ValueError, match=r"x must be \[B, H, W, C\].*got"):
        conv_mlp(*inputs)
