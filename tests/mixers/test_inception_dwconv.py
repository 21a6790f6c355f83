"""The Inception depth-wise convolution against timm's, and the depth-wise convolution that it is made of."""

import copy
from typing import Any

import pytest
import torch
from mixerzoo.mixers import DepthwiseConv2d, InceptionDWConv
from timm.models.inception_next import InceptionDWConv2d
from torch import Tensor, nn

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"square_kernel_size": 5, "band_kernel_size": 7},
    {"square_kernel_size": 1, "band_kernel_size": 21, "branch_ratio": 0.25},
    {"dilation": 2, "branch_ratio": 1 / 3},
]


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("size", [(14, 14), (1, 1), (3, 29), (17, 8)])
def test_equals_timm(arguments: dict[str, Any], size: tuple[int, int]) -> None:
    ours, theirs = InceptionDWConv(24, **arguments), InceptionDWConv2d(24, **arguments)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 24, *size)
    for got, want in zip(run(ours, x), run(theirs, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_starts_like_timms() -> None:
    torch.manual_seed(1)
    ours = InceptionDWConv(64)
    torch.manual_seed(1)
    theirs = InceptionDWConv2d(64)
    for (name, got), (other, want) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and torch.equal(got, want)


def test_untouched_channels_come_first() -> None:
    module = InceptionDWConv(16, branch_ratio=0.125)
    x = torch.randn(1, 16, 6, 6)
    same = (module(x) == x).flatten(2).all(-1)[0]
    assert same.tolist() == [True] * 10 + [False] * 6


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format: torch.memory_format) -> None:
    for module in (InceptionDWConv(24), DepthwiseConv2d(24, (3, 11))):
        x = torch.randn(2, 24, 9, 10).contiguous(memory_format=memory_format)
        assert module(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    module = InceptionDWConv(24, device="cpu", dtype=dtype)
    x = torch.randn(1, 24, 9, 9, dtype=dtype)
    want = copy.deepcopy(module).double()(x.double())
    got = module(x)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
    assert InceptionDWConv(24, device="meta")(torch.empty(1, 24, 5, 5, device="meta")).shape == (1, 24, 5, 5)


@torch.no_grad()
def test_compilers() -> None:
    module, x = InceptionDWConv(24), torch.randn(1, 24, 8, 8)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    program = torch.export.export(module, (x,))
    assert not [node for node in program.graph.nodes if "mixerzoo" in str(node.target)]
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"square_kernel_size": 4}, "kernel_size must be odd and at least 1, so that a filter has a centre; got 4"),
        ({"band_kernel_size": 10}, r"must be odd .* got \(1, 10\)"),
        (
            {"branch_ratio": 0.01},
            "need 1 to dim // 3 = 8 channels each; got dim 24 and branch_ratio 0.01",
        ),
        ({"branch_ratio": 0.5}, "which give 12"),
        ({"dilation": 0}, "dilation must be at least 1; got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InceptionDWConv(24, **arguments)


def test_bad_input() -> None:
    for shape in [(1, 25, 8, 8), (24, 8, 8)]:
        with pytest.raises(ValueError, match=r"needed \[B, 24 channels, H, W\]; got shape"):
            InceptionDWConv(24)(torch.randn(shape))


# The depth-wise convolution


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), ((1, 9), (1, 2)), ((5, 3), (3, 1)), (13, 1)])
def test_depthwise_equals_torch(kernel_size: Any, dilation: Any, bias: bool) -> None:
    module = DepthwiseConv2d(6, kernel_size, dilation=dilation, bias=bias)
    plain = nn.Conv2d(6, 6, kernel_size, padding="same", dilation=dilation, groups=6, bias=bias)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 6, 11, 8)
    for got, want in zip(run(module, x), run(plain, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.script(module)(x), plain(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == plain(x).dtype == torch.bfloat16
    if dilation == 1:
        again = DepthwiseConv2d.from_weight(module.weight, module.bias)
        assert torch.equal(again(x), module(x))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(2, 1), ((3, 4), 1), (0, 1), (3, 0), (3, (1, -1))])
def test_depthwise_bad_arguments(kernel_size: Any, dilation: Any) -> None:
    with pytest.raises(ValueError, match=r"must be .*at least 1.* got"):
        DepthwiseConv2d(6, kernel_size, dilation=dilation)
