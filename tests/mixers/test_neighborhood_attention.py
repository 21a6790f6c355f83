"""Neighborhood attention as a module: sizes, the padding rule, and arguments that do not go together."""

import pytest
import torch
from mixerzoo.kernels.neighborhood_attention import na2d
from mixerzoo.mixers import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from torch import Tensor, nn
from torch.nn import functional as F

MODULES = {1: NeighborhoodAttention1d, 2: NeighborhoodAttention2d, 3: NeighborhoodAttention3d}


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


@pytest.mark.parametrize("rank", MODULES)
def test_any_size_keeps_its_shape_and_trains_every_parameter(rank: int) -> None:
    module = MODULES[rank](8, 2, 3, dilation=2, rpb=True)
    for size in [(9, 6, 7), (2, 1, 8)]:
        x = torch.randn(2, *size[:rank], 8)
        out = module(x)
        assert out.shape == x.shape
        out.square().sum().backward()
    assert {name for name, parameter in module.named_parameters() if parameter.grad is None} == set()
    assert set(module.state_dict()) == {"rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


@pytest.mark.parametrize(("size", "padded"), [((3, 9), (6, 9)), ((4, 2), (6, 6)), ((6, 6), (6, 6))])
def test_a_small_map_is_padded_before_the_projection(size: tuple[int, int], padded: tuple[int, int]) -> None:
    """NATTEN 0.14's rule, step by step: zeros in, so that padded keys and values are the projection's bias."""
    module = randomized(NeighborhoodAttention2d(8, 2, 3, dilation=2, rpb=True))
    x = torch.randn(1, *size, 8)
    full = F.pad(x, (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
    query, key, value = module.qkv(full).unflatten(-1, (3, 2, 4)).unbind(-3)
    out = na2d(query, key, value, 3, dilation=2, rpb=module.rpb).flatten(-2)[:, : size[0], : size[1]]
    torch.testing.assert_close(module(x), module.proj(out))


@pytest.mark.parametrize("rank", MODULES)
def test_torchscript_takes_the_same_operator(rank: int) -> None:
    module = randomized(MODULES[rank](8, 2, 3, dilation=2, stride=2, is_causal=True, rpb=True))
    scripted = torch.jit.script(module)
    for size in [(9, 6, 7), (2, 1, 8)]:
        x = torch.randn(1, *size[:rank], 8)
        torch.testing.assert_close(scripted(x), module(x), rtol=1e-5, atol=1e-5)


def test_autocast_keeps_the_table_and_gives_half_precision() -> None:
    module = randomized(NeighborhoodAttention2d(8, 2, 3, rpb=True))
    x = torch.randn(1, 9, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    want = module(x)
    assert (out.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10, "num_heads": 4}, "multiple of num_heads; got dim 10 and num_heads 4"),
        ({"kernel_size": 4, "rpb": True}, "odd windows.*kernel_size is 4: take 5, or rpb=False"),
        ({"kernel_size": (3, 3, 3)}, "one value or 2"),
        ({"stride": 4}, "stride 4 and kernel_size 3"),
        ({"dilation": 0}, "at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2d(**{"dim": 8, "num_heads": 2, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("x", [torch.zeros(1, 8, 8), torch.zeros(1, 5, 5, 9)])
def test_an_input_of_another_shape_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"needed \[B, 2 spatial axes, 8 channels\]; got shape"):
        NeighborhoodAttention2d(8, 2, 3)(x)
