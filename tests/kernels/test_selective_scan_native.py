"""The compiled CPU kernel of the selective scan against the recurrence in float64, one step after the other."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from mixerzoo.kernels.cross_scan import ATROUS, BIDIRECTIONAL, CROSS, ScanPath
from mixerzoo.kernels.selective_scan import _native, selective_scan
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(
    not _native.is_available(), reason="no compiled kernel: installed without a C++ compiler"
)

SEQUENCE = (ScanPath(),)
TURNED = (
    ScanPath(flip_rows=True),
    ScanPath(flip_columns=True),
    ScanPath(by_columns=True, flip_rows=True),
    ScanPath(by_columns=True, flip_columns=True),
)
LATTICE = (
    ScanPath(row=2, column=1, step=3, flip_rows=True),
    ScanPath(by_columns=True, column=2, step=3, flip_rows=True, flip_columns=True),
)


class Case(NamedTuple):
    """`rank` 0: delta is given in full."""

    batch: int
    size: tuple[int, int]
    dim: int
    state: int
    rank: int
    paths: tuple[ScanPath, ...] = SEQUENCE
    merge: bool = True
    shares_x: bool = True
    shares_projected: bool = False
    has_bias: bool = True
    has_skip: bool = True
    softplus: bool = True
    time_last: bool = False


CASES = {
    "one step of one channel": Case(1, (1, 1), 1, 1, 1),
    "less than a chunk": Case(2, (1, 31), 5, 1, 0, merge=False, time_last=True),
    "one chunk": Case(2, (1, 32), 16, 3, 0, merge=False, time_last=True),
    "a chunk and a step": Case(2, (1, 33), 24, 16, 0, merge=False, time_last=True),
    "two chunks and a step": Case(1, (1, 65), 40, 8, 0, merge=False, time_last=True),
    "groups": Case(2, (1, 70), 17, 4, 0, SEQUENCE * 3, merge=False, shares_x=False, time_last=True),
    "neither bias nor skip nor softplus": Case(
        2, (1, 40), 8, 2, 0, merge=False, has_bias=False, has_skip=False, softplus=False, time_last=True
    ),
    "stage of vmamba": Case(2, (7, 14), 40, 1, 6, CROSS),
    "narrow map": Case(1, (13, 3), 24, 1, 2, CROSS),
    "every flip": Case(2, (5, 11), 16, 3, 5, TURNED, shares_x=False),
    "time-last maps": Case(2, (4, 17), 24, 2, 3, CROSS + TURNED, merge=False, time_last=True),
    "both ways": Case(1, (1, 50), 20, 16, 4, BIDIRECTIONAL, shares_x=False),
    "large state": Case(1, (6, 7), 5, 64, 9, BIDIRECTIONAL, shares_projected=True),
    "sub-grids": Case(2, (6, 8), 16, 16, 4, ATROUS, shares_projected=True),
    "sub-grids of an odd map": Case(2, (7, 13), 24, 16, 4, ATROUS, shares_projected=True),
    "sub-grids that leave pixels out": Case(2, (7, 8), 16, 8, 2, LATTICE, shares_projected=True),
    "unmerged sub-grids": Case(1, (7, 8), 16, 8, 0, LATTICE, merge=False, time_last=True),
    "partial sums over a batch": Case(67, (2, 3), 8, 1, 2, CROSS),
    "channels in parts": Case(1, (5, 9), 200, 3, 13, CROSS, shares_projected=True),
    "channels of sub-grids in parts": Case(1, (5, 7), 140, 2, 3, ATROUS, shares_projected=True),
}


class Inputs(NamedTuple):
    x: Tensor
    delta: Tensor | None
    projected: Tensor
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor | None


def draw(*shape: int, time_last: bool = False) -> Tensor:
    """Normal numbers in a shape of [batch, pixels, scans, channels]."""
    if not time_last:
        return torch.randn(shape)
    return torch.randn([shape[i] for i in (0, 2, 3, 1)]).permute(0, 3, 1, 2)


def make_inputs(case: Case) -> Inputs:
    pixels, scans = case.size[0] * case.size[1], len(case.paths)
    inputs, slots = 1 if case.shares_x else scans, 1 if case.shares_projected else scans
    delta = draw(case.batch, pixels, scans, case.dim, time_last=case.time_last)
    return Inputs(
        x=draw(case.batch, pixels, inputs, case.dim, time_last=case.time_last),
        delta=None if case.rank else (delta if case.softplus else delta.abs()),
        projected=draw(case.batch, pixels, slots, case.rank + 2 * case.state, time_last=case.time_last),
        dt_weight=torch.randn(scans, case.dim, case.rank) if case.rank else None,
        dt_bias=torch.randn(scans, case.dim) if case.has_bias else None,
        A=-torch.randn(scans, case.dim, case.state).exp(),
        D=torch.randn(scans, case.dim) if case.has_skip else None,
    )


def steps_of(path: ScanPath, height: int, width: int) -> Iterator[int | None]:
    """The pixel of each step, None outside of the map, from the words of ScanPath."""
    rows = range(path.row, path.row + path.step * -(-height // path.step), path.step)
    columns = range(path.column, path.column + path.step * -(-width // path.step), path.step)
    rows, columns = (rows[::-1] if path.flip_rows else rows), (columns[::-1] if path.flip_columns else columns)
    if path.by_columns:
        pairs = ((row, column) for column in columns for row in rows)
    else:
        pairs = ((row, column) for row in rows for column in columns)
    for row, column in pairs:
        yield row * width + column if row < height and column < width else None


def walk(case: Case, inputs: Inputs) -> tuple[Tensor, list[list[Tensor]]]:
    """y [batch, pixels, scans, dim], not added up, and the states after each step of each scan."""
    batch, pixels, _, dim = inputs.x.shape
    parts, states = [], []
    for k, path in enumerate(case.paths):
        x = inputs.x[:, :, 0 if case.shares_x else k]
        low_rank, B, C = inputs.projected[:, :, 0 if case.shares_projected else k].split(
            [case.rank, case.state, case.state], 2
        )
        outputs = {}
        every = [x.new_zeros(batch, dim, case.state)]
        for pixel in steps_of(path, *case.size):
            raw = x.new_zeros(batch, dim)
            if pixel is not None:
                raw = low_rank[:, pixel] @ inputs.dt_weight[k].T if case.rank else inputs.delta[:, pixel, k]
            raw = raw if inputs.dt_bias is None else raw + inputs.dt_bias[k]
            delta = F.softplus(raw) if case.softplus else raw
            h = torch.exp(delta.unsqueeze(2) * inputs.A[k]) * every[-1]
            if pixel is not None:
                h = h + (delta * x[:, pixel]).unsqueeze(2) * B[:, pixel].unsqueeze(1)
                y = (h * C[:, pixel].unsqueeze(1)).sum(2)
                outputs[pixel] = y if inputs.D is None else y + inputs.D[k] * x[:, pixel]
            every.append(h)
        nothing = x.new_zeros(batch, dim)
        parts.append(torch.stack([outputs.get(pixel, nothing) for pixel in range(pixels)], 1))
        states.append(every)
    return torch.stack(parts, 2), states


def run_native(case: Case, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    fields = [int(field) for path in case.paths for field in path]
    y, states = _native.forward(*inputs, case.size, fields, case.softplus, case.merge, True)
    grads = _native.backward(grad, *inputs, states, case.size, fields, case.softplus, case.merge)
    found = {f"grad of {name}": g for name, g in zip(Inputs._fields, grads, strict=True) if g is not None}
    return {"y": y, "states": states, **found}


def expected(case: Case, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    given = {name: tensor.double().requires_grad_() for name, tensor in inputs._asdict().items() if tensor is not None}
    y, states = walk(case, Inputs(**{name: given.get(name) for name in Inputs._fields}))
    y = y.sum(2) if case.merge else y.permute(0, 2, 3, 1)
    y.backward(grad.double())
    kept = torch.stack([torch.stack([*every[:-1:32], every[-1]], 1) for every in states], 1).transpose(3, 4)
    return {"y": y, "states": kept, **{f"grad of {name}": tensor.grad for name, tensor in given.items()}}


def draw_grad(case: Case) -> Tensor:
    """An upstream gradient whose memory is not laid out as y's."""
    pixels = case.size[0] * case.size[1]
    if case.merge:
        return torch.randn(case.batch, case.dim, pixels).transpose(1, 2)
    return torch.randn(case.batch, pixels, len(case.paths), case.dim).permute(0, 2, 3, 1)


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        torch.testing.assert_close(
            found[name].double(),
            tensor.detach(),
            rtol=1e-5,
            atol=3e-6 * max(tensor.abs().max().item(), 1e-3),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_recurrence(case: Case, instructions: str, poisoned_memory: None) -> None:
    torch.manual_seed(0)
    inputs, grad = make_inputs(case), draw_grad(case)
    assert_near(run_native(case, inputs, grad), expected(case, inputs, grad))


@pytest.mark.parametrize("name", ["stage of vmamba", "groups", "channels in parts", "sub-grids of an odd map"])
def test_results_do_not_depend_on_threads(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, grad = make_inputs(case), draw_grad(case)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(run_native(case, inputs, grad))
        finally:
            torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[key], tensor) for key, tensor in results[0].items())


@pytest.mark.parametrize("name", ["stage of vmamba", "a chunk and a step", "sub-grids of an odd map"])
def test_an_image_does_not_see_its_neighbours_in_the_batch(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, grad = make_inputs(case), draw_grad(case)
    alone = Inputs(*(t[1:2] if t is not None and i < 3 else t for i, t in enumerate(inputs)))
    together = run_native(case, inputs, grad)
    single = run_native(case._replace(batch=1), alone, grad[1:2])
    for key in ("y", "states", "grad of x"):
        torch.testing.assert_close(together[key][1:2], single[key], rtol=0, atol=0)


def test_takes_any_strides(instructions: str) -> None:
    """Expanded, sliced and spread over more than 2^31 elements, of which few are ever touched."""
    torch.manual_seed(0)
    case = Case(2, (3, 5), 24, 2, 0, CROSS[:2])
    inputs, grad = make_inputs(case), draw_grad(case)
    wanted = run_native(case, inputs, grad)
    spread = torch.empty(2**31 + 2**20, dtype=torch.float32).as_strided((2, 15, 1, 24), (2**31, 100, 1, 1))
    spread.copy_(inputs.x)
    strided = inputs._replace(
        x=spread,
        delta=torch.zeros(2, 15, 2, 48)[..., ::2].copy_(inputs.delta),
        projected=torch.zeros(2, 30, 2, 4)[:, ::2].copy_(inputs.projected),
        A=inputs.A.transpose(1, 2).contiguous().transpose(1, 2),
    )
    found = run_native(case, strided, grad)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())

    expanded = inputs._replace(
        projected=inputs.projected[:, :1].expand_as(inputs.projected), x=inputs.x[:1].expand_as(inputs.x)
    )
    wanted = run_native(case, Inputs(*(None if t is None else t.contiguous() for t in expanded)), grad)
    found = run_native(case, expanded, grad)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_batch_of_none() -> None:
    case = Case(0, (3, 4), 5, 2, 3, CROSS)
    found = run_native(case, make_inputs(case), draw_grad(case))
    assert found["y"].shape == (0, 12, 5) and found["grad of x"].shape == (0, 12, 1, 5)
    assert not found["grad of A"].any() and found["grad of dt_weight"].shape == (4, 5, 3)


def test_softplus_at_its_ends(instructions: str) -> None:
    """With x = B = C = 1 and no decay, y after one step is delta itself."""
    raw = torch.cat([torch.linspace(-87, 30, 4001), torch.tensor([20.0, 1e4, 3e38])])
    ones = torch.ones(1, 1, 1, len(raw))
    y, _ = _native.forward(
        ones, raw.view(1, 1, 1, -1), torch.ones(1, 1, 1, 2), None, None, -ones[0, 0, :, :, None], None, (1, 1),
        [0, 0, 0, 0, 0, 1], True, True, False,
    )  # fmt: skip
    torch.testing.assert_close(y[0, 0].double(), F.softplus(raw.double(), threshold=40), rtol=5e-7, atol=0)


def test_decay_of_any_size(instructions: str) -> None:
    """From a state of 1, h after a step of delta = 1 without input is exp(A): whatever is passed, infinite or not."""
    inf, nan = float("inf"), float("nan")
    A = torch.cat([torch.linspace(-87, 88, 4001), torch.tensor([-inf, -1e30, -200.0, 0.0, 200.0, 1e30, inf, nan])])
    dim = len(A)
    first = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    _, states = _native.forward(
        first.expand(1, 2, 1, dim), torch.ones(1, 2, 1, dim), torch.ones(1, 2, 1, 2), None, None, A.view(1, dim, 1),
        None, (1, 2), [0, 0, 0, 0, 0, 1], False, True, True,
    )  # fmt: skip
    found, decay = states[0, 0, 1, 0], A.double().exp().float()
    wanted = decay * (decay * 0 + 1)  # the first step decays a state of 0: none if the decay is infinite
    limit = A.abs().clamp(1, 100).nan_to_num() * 2e-7  # of the product delta A log2 e, whose size is |A|
    close = (found - wanted).abs() <= limit * wanted
    assert (close | (found == wanted) | (found.isnan() & wanted.isnan())).all()


def test_steps_from_almost_nothing_to_very_large() -> None:
    """The published function on steps that leave nothing of the state, and on steps that are lost in it."""
    golden = json.loads((Path(__file__).parents[1] / "goldens" / "scan_ops.json").read_text())["cases"]["ss_extreme"]
    rules = {
        "normal": lambda x: x,
        "big": lambda x: 8 * x + 4,
        "negexp": lambda x: -np.exp(0.5 * x),
        "around1": lambda x: 1 + 0.1 * x,
        "dtbias": lambda x: 0.5 * x - 0.5,
    }

    def make(name: str, spec: dict) -> Tensor:
        generator = np.random.Generator(np.random.Philox(zlib.crc32(f"scan_ops/ss_extreme/{name}".encode())))
        return torch.from_numpy(rules[spec["rule"]](generator.standard_normal(spec["shape"])).astype(np.float32))

    given = {name: make(name, spec).requires_grad_() for name, spec in golden["inputs"].items()}
    out, last = selective_scan(**given, delta_softplus=True, return_last_state=True)
    out.backward(make("dout", golden["dout"]))
    found = {"out": out, "last_state": last}
    records = {**golden["outputs"], **{f"grad of {name}": record for name, record in golden["grads"].items()}}
    found |= {f"grad of {name}": tensor.grad for name, tensor in given.items()}
    for name, record in records.items():
        flat = found[name].detach().flatten()
        samples = flat[torch.linspace(0, flat.numel() - 1, len(record["samples"])).long()].double()
        tolerance = 1e-5 * record["absmax"]
        torch.testing.assert_close(samples, torch.tensor(record["samples"]).double(), rtol=0, atol=tolerance, msg=name)
