"""LSKA, SDLSKA, CKS, DLKPPM and BGAF against the authors' records, and what their docstrings promise."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from mixerzoo.mixers import BGAF, CKS, DLKPPM, LSKA, SDLSKA
from mixerzoo.mixers.pyramid_pooling import pool_quarters
from mixerzoo.mixers.separable_kernel_attention import BANDS
from mixerzoo.vision.backbones.bevanet import EVANBlock, rename_parts
from mixerzoo.vision.segmentation.bevanet import from_published
from torch import Tensor, nn

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GATES: dict[str, Callable[[], nn.Module]] = {
    **{f"lska_k{k}": lambda k=k: LSKA(24, k) for k in (7, 11, 23, 35, 41, 53)},
    **{f"sdlska_k{k}": lambda k=k: SDLSKA(64, k) for k in (7, 11, 23, 35)},
}


def of_pyramid(name: str) -> str:
    """The pooling's names as they are inside a published segmenter, and ours again."""
    return next(iter(from_published({f"spp.{name}": torch.empty(0)}))).removeprefix("decode_head.pool.")


def check(case: Any, mixer: nn.Module, names: Callable[[str], str], layout: torch.memory_format) -> None:
    """Output and all gradients of `mixer` under the case's weights and inputs."""
    mixer.eval().load_state_dict({names(name): tensor for name, tensor in case.state().items()})
    shapes = case.record["x_shape"]
    several = isinstance(shapes[0], list)
    inputs = [case.draw(f"x{i}", shape) for i, shape in enumerate(shapes)] if several else [case.draw("x", shapes)]
    inputs = [x.to(memory_format=layout).requires_grad_() for x in inputs]
    y = mixer(*inputs)
    (y * case.draw("g", y.shape)).sum().backward()
    assert case.error(case.record["y"], y) < 5e-6
    for i, x in enumerate(inputs):
        assert case.error(case.record[f"grad_x{i}" if several else "grad_x"], x.grad) < 5e-6
    parameters: Mapping[str, nn.Parameter] = dict(mixer.named_parameters())
    recorded = case.record["param_grads"]
    assert {names(name) for name in recorded} == set(parameters)
    for name, want in recorded.items():
        # What nothing depends on but rounding, such as a bias before batch norm, is recorded as rounding.
        tensor = parameters[names(name)].grad
        assert case.error({**want, "absmax": max(want["absmax"], 1e-3)}, tensor) < 2e-5, name


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", GATES)
def test_official_gates(operator_case, name: str, layout: str) -> None:
    mixer = GATES[name]()
    check(operator_case("lka_ops", name), mixer, rename_parts, FORMATS[layout])
    x = torch.randn(2, mixer.dim, 9, 8).to(memory_format=FORMATS[layout])
    assert mixer(x).is_contiguous(memory_format=FORMATS[layout])


def test_official_block(operator_case) -> None:
    block = EVANBlock(64, 35)
    block.norm = nn.Identity()  # here a block holds the norm that the authors have beside it
    check(operator_case("lka_ops", "evan_k35"), block, rename_parts, torch.channels_last)


@pytest.mark.parametrize("layout", FORMATS)
def test_official_pyramid_pooling(operator_case, layout: str) -> None:
    case = operator_case("lka_ops", "dlkppm")
    config = case.record["config"]
    mixer = DLKPPM(config["inplanes"], config["branch_planes"], config["outplanes"])
    check(case, mixer, of_pyramid, FORMATS[layout])


def test_official_fusion(operator_case) -> None:
    check(operator_case("lka_ops", "bgaf"), BGAF(32), lambda name: name, torch.contiguous_format)


@pytest.mark.parametrize("kernel_size", [7, 23, 35])
def test_reach(kernel_size: int) -> None:
    """LSKA sees a square, SDLSKA the cross of its bands, each of the side that it is called by, or hardly more."""
    side, taps, dilation = BANDS[kernel_size]
    reach = side // 2 + dilation * (taps // 2)
    assert kernel_size <= 2 * reach + 1 <= kernel_size + 2
    size = 2 * reach + 5
    middle = size // 2
    x = torch.randn(1, 4, size, size, dtype=torch.double, requires_grad=True)
    seen = {}
    for mixer in (LSKA(4, kernel_size).double(), SDLSKA(4, kernel_size).double().eval()):
        if isinstance(mixer, SDLSKA):  # without what the selection takes from the whole map
            nn.init.zeros_(mixer.select.squeeze.weight)
            for expand in mixer.select.expand:
                nn.init.zeros_(expand[0].weight)
        (grad,) = torch.autograd.grad(mixer(x)[0, :, middle, middle].sum(), x)
        seen[type(mixer)] = grad[0].abs().sum(0) > 0
    places = (torch.arange(size) - middle).abs()
    assert torch.equal(seen[LSKA], (places <= reach)[:, None] & (places <= reach))
    near, far = places <= side // 2, places <= reach
    assert torch.equal(seen[SDLSKA], (near[:, None] & far) | (far[:, None] & near))


def test_selection_by_hand() -> None:
    """Without filters behind them the gates are constants: sigmoids of biases."""
    mixer = CKS(2, hidden_dim=3).eval()
    for parameter in mixer.parameters():
        nn.init.zeros_(parameter)
    mixer.squeeze.bias.data = torch.tensor([0.0, 1.0, -1.0])
    for expand in mixer.expand:
        expand[2].bias.data.fill_(2.0)
    maps = [torch.randn(1, 2, 4, 5) for _ in range(3)]
    share = 1 / (1 + math.exp(-2.0))
    want = sum(share / (1 + math.exp(-bias)) * x for bias, x in zip((0.0, 1.0, -1.0), maps, strict=True))
    torch.testing.assert_close(mixer(*maps), want)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (8, 7)])
def test_quarters_are_adaptive_pooling(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(pool_quarters(x), nn.functional.adaptive_avg_pool2d(x, 2))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=re.escape("kernel_size must be one of [7, 11, 23, 35, 41, 53]; got 9")):
        LSKA(4, 9)
    for broken in (lambda: SDLSKA(0), lambda: CKS(0), lambda: BGAF(0)):
        with pytest.raises(ValueError, match="dim must be at least 1; got 0"):
            broken()
    with pytest.raises(ValueError, match="channels must be at least 1; got 4, 0 and 4"):
        DLKPPM(4, 0, 4)
    x = torch.randn(1, 4, 5, 6)
    for mixer in (LSKA(8, 7), SDLSKA(8, 7).eval(), DLKPPM(8, 4, 4).eval()):
        with pytest.raises(ValueError, match=r"needed \[B, 8, H, W\]; got shape \[1, 4, 5, 6\]"):
            mixer(x)
    for mixer in (CKS(4).eval(), BGAF(4).eval()):
        with pytest.raises(ValueError, match=r"three maps of one shape; got \[1, 4, 5, 6\], \[1, 4, 5, 5\]"):
            mixer(x, x[..., 1:], x)


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer", [LSKA(4, 7), SDLSKA(4, 7), DLKPPM(4, 4, 4, kernel_size=7), BGAF(4)], ids=lambda m: type(m).__name__
)
def test_scripted_and_in_other_types(mixer: nn.Module) -> None:
    mixer.eval()
    inputs: list[Tensor] = [torch.randn(2, 4, 9, 7) for _ in range(3 if isinstance(mixer, BGAF) else 1)]
    torch.testing.assert_close(torch.jit.script(mixer)(*inputs), mixer(*inputs))
    kwargs = {"kernel_size": 7} if isinstance(mixer, DLKPPM) else {}
    args = (4, 4, 4) if isinstance(mixer, DLKPPM) else (4, 7) if isinstance(mixer, LSKA | SDLSKA) else (4,)
    exact = type(mixer)(*args, dtype=torch.double, device="cpu", **kwargs).eval()
    exact.load_state_dict(mixer.state_dict())
    want = exact(*(x.double() for x in inputs))
    torch.testing.assert_close(mixer(*inputs).double(), want, rtol=1e-4, atol=1e-5)
