"""SelectiveScan2d, SS2D and AtrousSS2D: official cores with gradients, definition, initial values, half precision."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixerzoo.kernels.cross_scan import ATROUS, BIDIRECTIONAL, CROSS, ScanPath
from mixerzoo.mixers import SS2D, AtrousSS2D, SelectiveScan2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

# Ours to the official names.
NAMES = {
    "x_proj_weight": "x_proj_weight",
    "dt_weight": "dt_projs_weight",
    "dt_bias": "dt_projs_bias",
    "A_log": "A_logs",
    "D": "Ds",
}
PATHS = {"cross": CROSS, "bidirectional": BIDIRECTIONAL, "atrous": ATROUS}


def lively(module: nn.Module) -> nn.Module:
    """With steps large enough for states to decay within a few of them, and orders that differ in all weights."""
    with torch.no_grad():
        for scan in module.modules():
            if isinstance(scan, SelectiveScan2d):
                scan.dt_bias.normal_()
                scan.A_log.normal_(std=0.5)
                scan.D.normal_()
    return module


def by_definition(x: Tensor, scan: SelectiveScan2d) -> Tensor:
    """The recurrence pixel by pixel along each path. A step outside of the map reads zeros, and its state decays."""
    total = torch.zeros_like(x)
    for i, path in enumerate(scan.paths):
        h = x.new_zeros(x.shape[0], scan.dim, scan.state_dim)
        for pixel in path.indices(x.shape[1], x.shape[2]).tolist():
            row, column = divmod(pixel, x.shape[2])
            u = x[:, row, column] if pixel >= 0 else torch.zeros_like(x[:, 0, 0])
            low_rank, b, c = (u @ scan.x_proj_weight[i].T).split([scan.dt_rank, scan.state_dim, scan.state_dim], -1)
            delta = F.softplus(low_rank @ scan.dt_weight[i].T + scan.dt_bias[i])
            h = (delta[..., None] * -scan.A_log[i].exp()).exp() * h + (delta * u)[..., None] * b[:, None]
            if pixel >= 0:
                total[:, row, column] += (h * c[:, None]).sum(-1) + scan.D[i] * u
    return total


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "paths"),
    [("ss2d_core_n1", CROSS), ("ss2d_core_n4", CROSS), ("es2d_core_4x6", ATROUS), ("es2d_core_5x7", ATROUS)],
)
def test_official_core(scan_case: Callable, name: str, paths: tuple[ScanPath, ...], dtype: torch.dtype) -> None:
    case = scan_case(name)
    inputs = {key: tensor.to(dtype) for key, tensor in case.inputs().items()}
    _, features, dim = inputs["x_proj_weight"].shape
    rank = inputs["dt_projs_weight"].shape[2]
    scan = SelectiveScan2d(dim, state_dim=(features - rank) // 2, dt_rank=rank, paths=paths, dtype=dtype)
    scan.load_state_dict(
        {ours: inputs[theirs].reshape(scan.get_parameter(ours).shape) for ours, theirs in NAMES.items()}
    )
    x = inputs["x"].permute(0, 2, 3, 1).requires_grad_()
    y = scan(x)
    y.backward(case.grad().to(dtype).transpose(1, 2).reshape(y.shape))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert case.output_error("out", y.flatten(1, 2).transpose(1, 2)) < tolerance
    assert case.grad_error("x", x.grad.permute(0, 3, 1, 2)) < tolerance
    for ours, theirs in NAMES.items():
        grad = scan.get_parameter(ours).grad
        assert case.grad_error(theirs, grad.reshape(inputs[theirs].shape)) < tolerance, ours


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (8, 9)])
def test_definition(paths: str, size: tuple[int, int]) -> None:
    scan = lively(SelectiveScan2d(6, state_dim=3, dt_rank=2, paths=PATHS[paths]))
    wide = SelectiveScan2d(6, state_dim=3, dt_rank=2, paths=PATHS[paths]).double()
    wide.load_state_dict(scan.state_dict())
    x = torch.randn(2, *size, 6)
    assert_near(scan(x).double(), by_definition(x.double(), wide), 1e-5)


def test_sub_grids_may_stand_in_any_order() -> None:
    """The weights of a scan belong to its path, wherever that stands."""
    x = torch.randn(1, 5, 6, 4)
    scan = lively(SelectiveScan2d(4, state_dim=2, dt_rank=1, paths=ATROUS))
    turned = SelectiveScan2d(4, state_dim=2, dt_rank=1, paths=ATROUS[::-1])
    turned.load_state_dict({name: weight.flip(0) for name, weight in scan.state_dict().items()})
    assert_near(turned(x), scan(x), 1e-6)


def test_each_pixel_of_a_sub_grid_is_projected_once() -> None:
    x = torch.randn(2, 6, 8, 16)
    counts = []
    for paths in (CROSS, ATROUS):
        scan = SelectiveScan2d(16, state_dim=4, dt_rank=2, paths=paths)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            scan._project(x) if paths is CROSS else scan._project_sub_grids(x)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 48 * 16 * 40, 2 * 2 * 48 * 16 * 10]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("paths", ["cross", "atrous"])
def test_ss2d_definition(gate: bool, paths: str) -> None:
    mixer = lively(SS2D(8, expand=1.5, state_dim=2, paths=PATHS[paths], gate=gate, conv_bias=gate)).double()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    u, z = F.linear(x, mixer.in_proj.weight[:12]), F.linear(x, mixer.in_proj.weight[12:])
    assert mixer.scan.dt_rank == 1 and (z.shape[-1] > 0) == gate == (mixer.conv2d.bias is not None)
    u = F.conv2d(u.permute(0, 3, 1, 2), mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=12)
    y = mixer.out_norm(by_definition(F.silu(u).permute(0, 2, 3, 1), mixer.scan))
    assert_near(mixer(x), (y * F.silu(z) if gate else y) @ mixer.out_proj.weight.T, 1e-12)


def test_atrous_is_ss2d_on_sub_grids() -> None:
    atrous, same = AtrousSS2D(8), SS2D(8, paths=ATROUS)
    same.load_state_dict(atrous.state_dict())
    x = torch.randn(1, 5, 4, 8)
    assert torch.equal(atrous(x), same(x))
    one_pixel = x.clone()
    one_pixel[:, 4, 3] += 1  # the last pixel of the grid of even rows and odd columns
    changed = (atrous.scan(F.pad(one_pixel, [0, 8])) - atrous.scan(F.pad(x, [0, 8]))).abs().sum(-1) > 0
    assert changed.sum() == 1 and changed[0, 4, 3]


def test_initial_values() -> None:
    scan = SelectiveScan2d(512, state_dim=16, dt_rank=32)
    assert torch.equal(scan.A_log, torch.arange(1, 17).log().expand(4, 512, 16))
    assert (scan.D == 1).all()
    step = F.softplus(scan.dt_bias)
    assert step.min() > 0.99e-3 and step.max() < 0.101
    assert step.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.1)  # evenly in the logarithm
    for weight, bound in ((scan.dt_weight, 32**-0.5), (scan.x_proj_weight, 512**-0.5)):
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("paths", ["cross", "atrous"])
def test_half_precision(dtype: torch.dtype, paths: str) -> None:
    """Autocast keeps A_log, D and dt_bias as they are; a module in half precision computes from what it holds."""
    mixer = lively(SS2D(16, state_dim=4, paths=PATHS[paths]))
    x = 3 * torch.randn(2, 12, 14, 16)
    want = mixer(x)
    with torch.autocast("cpu", dtype):
        got = mixer(x)
        got.float().square().mean().backward()
    tolerance = 2e-2 if dtype == torch.float16 else 0.1
    assert got.dtype == dtype and (got.float() - want).norm() < tolerance * want.norm()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    with torch.no_grad():
        half = mixer.to(dtype)(x.to(dtype))
    assert half.dtype == dtype and (half.float() - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_steps_stay_finite(dtype: torch.dtype) -> None:
    """Steps from nearly nothing to thousands: what forgets at once, and what never does."""
    scan = lively(SelectiveScan2d(8, state_dim=4, dt_rank=2))
    with torch.no_grad():
        scan.dt_bias.copy_(torch.linspace(-30, 30, 32).view(4, 8))
        scan.A_log.copy_(torch.linspace(-8, 8, 128).view(4, 8, 4))
    x = torch.randn(1, 9, 11, 8, requires_grad=True)
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        scan(x).float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scan.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be at least 1; got 0"),
        ({"state_dim": 0}, "state_dim must be at least 1; got 0"),
        ({"dt_rank": 0}, "dt_rank must be at least 1; got 0"),
        ({"paths": ()}, "paths must be at least 1; got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveScan2d(**{"dim": 4, "state_dim": 2, "dt_rank": 1, **arguments})


def test_bad_inputs() -> None:
    for module in (SelectiveScan2d(8, state_dim=2, dt_rank=1), SS2D(8)):
        for shape in ((2, 3, 8), (2, 3, 4, 7)):
            with pytest.raises(ValueError, match=r"needed \[B, H, W, 8 channels\]"):
                module(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"H, W >= 1; got shape \[2, 0, 4, 8\]"):
        SelectiveScan2d(8, state_dim=2, dt_rank=1)(torch.zeros(2, 0, 4, 8))
    with pytest.raises(ValueError, match=r"got dim 4 and expand 0\.1"):
        SS2D(4, expand=0.1)
