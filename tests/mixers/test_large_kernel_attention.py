"""Large kernel attention against the authors' records, and where its square leaves half precision."""

import copy

import pytest
import torch
from mixerzoo.mixers import LargeKernelAttention

CASES = ["lka_64_56x56", "lka_32_17x23", "lka_160_14x14", "lka_64_7x7", "lka_8_5x6", "lka_512_7x9"]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_official_outputs_and_gradients(operator_case, name: str, layout: str) -> None:
    case = operator_case("lka_ops", name)
    shape = case.record["x_shape"]
    mixer = LargeKernelAttention(shape[1])
    mixer.load_state_dict(case.state())
    x = case.draw("x", shape).to(memory_format=FORMATS[layout]).requires_grad_()
    y = mixer(x)
    assert y.is_contiguous(memory_format=FORMATS[layout])
    (y * case.draw("g", y.shape)).sum().backward()
    assert case.error(case.record["y"], y) < 5e-6
    assert case.error(case.record["grad_x"], x.grad) < 5e-6
    for parameter, tensor in mixer.named_parameters():
        assert case.error(case.record["param_grads"][parameter], tensor.grad) < 2e-5, parameter


def test_it_sees_23_by_23_positions() -> None:
    mixer = LargeKernelAttention(4).double()
    x = torch.randn(1, 4, 31, 31, dtype=torch.double, requires_grad=True)
    mixer(x)[0, :, 15, 15].sum().backward()
    seen = x.grad[0].abs().sum(0).nonzero()
    assert seen.amin(0).tolist() == [4, 4] and seen.amax(0).tolist() == [26, 26]


@torch.no_grad()
def test_it_is_quadratic_and_float16_ends_where_documented(operator_case) -> None:
    case = operator_case("lka_ops", "lka_64_56x56")
    mixer = LargeKernelAttention(64)
    mixer.load_state_dict({name: t * ("bias" not in name) for name, t in case.state().items()})
    x = case.draw("x", case.record["x_shape"])
    y = mixer(x)
    assert torch.allclose(mixer(8 * x), 64 * y, rtol=1e-4, atol=1e-4)

    mixer.load_state_dict(case.state())
    limit = (torch.finfo(torch.float16).max / mixer(x).abs().max()).sqrt()
    assert 70 < limit < 75, "the docstring says 72"
    half, bfloat = copy.deepcopy(mixer).half(), copy.deepcopy(mixer).bfloat16()
    want = mixer(0.9 * limit * x)
    got = half((0.9 * limit * x).half()).float()
    assert (got - want).abs().max() < 4e-3 * want.abs().max()
    assert not half((1.1 * limit * x).half()).isfinite().all()
    assert bfloat((1.1 * limit * x).bfloat16()).isfinite().all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="dim must be at least 1; got 0"):
        LargeKernelAttention(0)
    with pytest.raises(ValueError, match=r"needed \[B, 8, H, W\]; got shape \[1, 4, 5, 5\]"):
        LargeKernelAttention(8)(torch.randn(1, 4, 5, 5))


def test_scripted(operator_case) -> None:
    mixer = LargeKernelAttention(8)
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x))
