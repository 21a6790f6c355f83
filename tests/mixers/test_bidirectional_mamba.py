"""BidirectionalMamba: official convolution, its definition step by step, symmetry, initial values, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixerzoo.mixers import BidirectionalMamba
from torch import Tensor, nn
from torch.nn import functional as F


def one_direction(x: Tensor, mixer: BidirectionalMamba, direction: int) -> Tensor:
    """[B, N, inner] after the convolution, SiLU and scan of Mamba along the steps as they come, written as a loop."""
    scan, length = mixer.scan, x.shape[1]
    rank, state = scan.dt_rank, scan.state_dim
    weight, bias = mixer.conv_weight[direction], mixer.conv_bias[direction]
    past = F.pad(x, [0, 0, mixer.conv_size - 1, 0])
    x = F.silu(bias + sum(past[:, k : k + length] * weight[:, k] for k in range(mixer.conv_size)))
    low_rank, b, c = (x @ scan.x_proj_weight[direction].T).split([rank, state, state], dim=-1)
    delta = F.softplus(low_rank @ scan.dt_weight[direction].T + scan.dt_bias[direction])
    decay = -scan.A_log[direction].exp()
    h, outputs = x.new_zeros(x.shape[0], x.shape[2], state), []
    for t in range(length):
        h = (delta[:, t, :, None] * decay).exp() * h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        outputs.append((h * c[:, t, None, :]).sum(-1) + scan.D[direction] * x[:, t])
    return torch.stack(outputs, dim=1)


def by_definition(u: Tensor, mixer: BidirectionalMamba) -> Tensor:
    x, z = mixer.in_proj(u).chunk(2, dim=-1)
    y = one_direction(x, mixer, 0) + one_direction(x.flip(1), mixer, 1).flip(1)
    return mixer.out_proj(y / 2 * F.silu(z))


def lively(*args: Any, **kwargs: Any) -> BidirectionalMamba:
    """With steps large enough for states to decay within a few of them."""
    mixer = BidirectionalMamba(*args, **kwargs)
    with torch.no_grad():
        mixer.scan.dt_bias.normal_()
        mixer.scan.D.normal_()
    return mixer


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("direction", [0, 1])
def test_official_convolution(scan_case: Callable, direction: int) -> None:
    case = scan_case("causal_conv1d_silu")
    inputs = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    mixer = BidirectionalMamba(5, expand=1).double()
    for name in ("weight", "bias"):
        parameter = getattr(mixer, f"conv_{name}")
        both = torch.stack([inputs[name]] * 2)
        delattr(mixer, f"conv_{name}")
        setattr(mixer, f"conv_{name}", both)
        assert parameter.shape == both.shape
    x = inputs["x"].transpose(1, 2)
    y = mixer._convolve(x.flip(1) if direction else x)[:, :, direction]
    y = (y.flip(1) if direction else y).transpose(1, 2)
    y.backward(case.grad())
    assert case.output_error("out", y) < 1e-12
    for name, tensor in inputs.items():
        assert case.grad_error(name, tensor.grad) < 1e-12, name


@pytest.mark.parametrize(("length", "state", "conv_size"), [(1, 16, 4), (2, 1, 4), (37, 16, 4), (70, 3, 2), (9, 5, 1)])
def test_definition(length: int, state: int, conv_size: int) -> None:
    mixer = lively(24, state_dim=state, conv_size=conv_size)
    x = torch.randn(2, length, 24, requires_grad=True)
    grad = torch.randn(2, length, 24)
    mixer(x).backward(grad)
    got = {"output": mixer(x), "input": x.grad} | {name: p.grad for name, p in mixer.named_parameters()}

    wide = lively(24, state_dim=state, conv_size=conv_size).double()
    wide.load_state_dict(mixer.state_dict())
    u = x.detach().double().requires_grad_()
    y = by_definition(u, wide)
    y.backward(grad.double())
    want = {"output": y, "input": u.grad} | {name: p.grad for name, p in wide.named_parameters()}
    for name, tensor in want.items():
        if length == 1 and name == "scan.A_log":
            assert not tensor.any() and not got[name].any()  # a first state has nothing to forget
        else:
            assert_near(got[name], tensor.float(), 2e-5)
    assert_near(wide(u), y, 1e-12)


@torch.no_grad()
def test_a_reversed_sequence_with_exchanged_directions_is_the_reversed_output() -> None:
    mixer, other = lively(16), lively(16)
    exchanged = ("conv_weight", "conv_bias", "scan.")
    state = mixer.state_dict()
    other.load_state_dict({name: t.flip(0) if name.startswith(exchanged) else t for name, t in state.items()})
    x = torch.randn(3, 21, 16)
    assert_near(other(x.flip(1)).flip(1), mixer(x), 1e-5)


@torch.no_grad()
def test_every_token_sees_every_other() -> None:
    mixer = lively(8, state_dim=4)
    x = torch.randn(1, 12, 8)
    for changed in (0, 5, 11):
        y = x.clone()
        y[:, changed] += 1
        assert ((mixer(y) - mixer(x)).abs().amax((0, 2)) > 0).all()


def test_initial_parameters() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(48)
    assert mixer.inner_dim == 96 and mixer.scan.dt_rank == 3 and mixer.scan.state_dim == 16
    steps = F.softplus(mixer.scan.dt_bias)
    assert 1e-3 * 0.99 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101
    assert torch.allclose(mixer.scan.A_log.exp(), torch.arange(1.0, 17).expand(2, 96, 16))
    assert (mixer.scan.D == 1).all()
    assert 0.4 < mixer.conv_weight.abs().max() <= 0.5 and 0.4 < mixer.conv_bias.abs().max() <= 0.5
    assert BidirectionalMamba(40).scan.dt_rank == 3 and BidirectionalMamba(40, dt_rank=7).scan.dt_rank == 7
    assert {p.device.type for p in BidirectionalMamba(8, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype: torch.dtype) -> None:
    """By autocast and with half-precision weights, on inputs ten times as large as norms leave them."""
    mixer = lively(32)
    x = 10 * torch.randn(2, 50, 32)
    with torch.no_grad():
        want = mixer(x)
    with torch.autocast("cpu", dtype):
        y = mixer(x)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    assert_near(y.detach().float(), want, 0.05)
    with torch.no_grad():
        assert_near(mixer.to(dtype)(x.to(dtype)).float(), want, 0.05)


def test_torchscript_computes_gradients() -> None:
    mixer = lively(16)
    scripted = torch.jit.script(mixer)
    x = torch.randn(2, 9, 16)
    for module in (mixer, scripted):
        mixer.zero_grad()
        y = module(x)
        y.square().sum().backward()
        if module is mixer:
            want = [y.detach(), *(p.grad.clone() for p in mixer.parameters())]
    for got, expected in zip([y.detach(), *(p.grad for p in mixer.parameters())], want, strict=True):
        assert_near(got, expected, 1e-6)


def test_hooks_on_the_parts_run() -> None:
    mixer, seen = BidirectionalMamba(8), []
    for name, module in mixer.named_children():
        assert isinstance(module, nn.Module)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    mixer(torch.randn(1, 4, 8))
    assert seen == ["in_proj", "scan", "out_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "got dim 0"),
        ({"dim": 4, "expand": 0.1}, "expand 0.1"),
        ({"dim": 4, "conv_size": 0}, "conv_size 0"),
        ({"dim": 4, "state_dim": 0}, "state_dim must be at least 1; got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BidirectionalMamba(**arguments)


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 0, 8), (2, 3, 3, 8), (5, 8)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needed \[B, N, 8 channels\] with N >= 1; got shape"):
        BidirectionalMamba(8)(torch.zeros(shape))
