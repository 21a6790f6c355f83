"""The selective scan, over sequences and maps: official records, its definition, and all that calls an operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mixerzoo.kernels.cross_scan import ATROUS, BIDIRECTIONAL, CROSS, ScanPath
from mixerzoo.kernels.selective_scan import _operator, _plain, selective_scan, selective_scan_2d
from torch import Tensor

Tensors = dict[str, Tensor]

TURNED = (ScanPath(by_columns=True, flip_columns=True), ScanPath(flip_rows=True))


@pytest.fixture(params=["native", "plain", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation of the operator that a CPU tensor can meet."""
    if request.param == "triton":
        request.getfixturevalue("triton_interpreter")
    elif request.param == "plain":
        monkeypatch.setattr(_operator, "_implementation", lambda x: _plain)
    elif _operator._implementation(torch.zeros(1)) is _plain:
        pytest.skip("no compiler built the native kernel on this machine")
    return request.param


triton_takes_long = pytest.mark.parametrize(
    "implementation", ["native", "plain", pytest.param("triton", marks=pytest.mark.slow)], indirect=True
)
"""Five seconds and more in the interpreter."""


# The definition, one step after the other.


def define_sequence(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """u, delta [batch, dim, length], A [dim, state], B and C [batch, state, length]."""
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype)
    steps = []
    for t in range(u.shape[2]):
        kept, read = torch.exp(delta[:, :, t, None] * A), delta[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
        h = kept * h + read
        steps.append((h * C[:, None, :, t]).sum(2))
    return torch.stack(steps, 2)


def define_map(t: Tensors, paths: tuple[ScanPath, ...]) -> Tensor:
    """What `selective_scan_2d` promises, scan by scan from the paths' indices."""
    batch, height, width, dim = *t["x"].shape[:3], t["x"].shape[-1]
    rank, state = t["dt_weight"].shape[2], t["A"].shape[2]
    out = torch.zeros(batch, height * width + 1, dim, dtype=t["x"].dtype)  # the last is outside of the map
    for k, path in enumerate(paths):
        x = t["x"] if t["x"].ndim == 4 else t["x"][:, :, :, k]
        q = t["projected"] if t["projected"].ndim == 4 else t["projected"][:, :, :, k]
        pixels = path.indices(height, width)
        outside = (pixels < 0)[None, :, None]
        x = x.flatten(1, 2)[:, pixels].masked_fill(outside, 0)
        low, B, C = q.flatten(1, 2)[:, pixels].masked_fill(outside, 0).split([rank, state, state], 2)
        delta = torch.nn.functional.softplus(low @ t["dt_weight"][k].T + t["dt_bias"][k])
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        y = define_sequence(x.transpose(1, 2), delta.transpose(1, 2), t["A"][k], B, C).transpose(1, 2)
        if "D" in t:
            y = y + t["D"][k] * x
        out = out.index_add(1, pixels % (height * width + 1), y)
    return out[:, :-1].unflatten(1, (height, width))


def draw_map(
    paths: tuple[ScanPath, ...],
    size: tuple[int, int],
    *,
    batch: int = 2,
    dim: int = 6,
    rank: int = 2,
    state: int = 3,
    own_inputs: bool = False,
    shared_projection: bool = False,
    skip: bool = True,
) -> Tensors:
    scans = len(paths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    found = {
        "x": normal(batch, *size, *([scans] if own_inputs else []), dim),
        "projected": normal(batch, *size, *([] if shared_projection else [scans]), rank + 2 * state),
        "dt_weight": normal(scans, dim, rank) / rank**0.5,
        "dt_bias": normal(scans, dim) - 1,
        "A": -torch.exp(normal(scans, dim, state) / 2),
    }
    return found | ({"D": normal(scans, dim)} if skip else {})


def run(function: Callable[..., Tensor], inputs: Tensors, dtype: torch.dtype, **options: object) -> list[Tensor]:
    """The result and the gradients of all inputs, for a gradient drawn once for this size."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves, **options)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), materialize_grads=True)
    return [out.detach(), *grads]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (result, right) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == right.shape
        error = (result.double() - right).abs().max()
        assert error <= tolerance * right.abs().max(), f"result {i} is off by {error:.1e} of {right.abs().max():.1e}"


# Official records.

SEQUENCES = [
    f"ss_{kind}" for kind in ("full", "noz", "plain", "grouped_n1", "grouped_n16", "long", "const_bc", "extreme")
]
MAPS = {
    "ss2d_core_n1": CROSS,
    "ss2d_core_n4": CROSS,
    "es2d_core_4x6": ATROUS,
    "es2d_core_5x7": ATROUS,
    "mobilemamba_ss2d_core": BIDIRECTIONAL,
}


def official_map(inputs: Tensors, paths: tuple[ScanPath, ...]) -> Tensor:
    """The module around the operator, as the official code has it: [batch, channels, pixels]."""
    by_scan = len(paths), inputs["x"].shape[1]
    x = inputs["x"].permute(0, 2, 3, 1)
    out = selective_scan_2d(
        x,
        torch.einsum("bhwc,krc->bhwkr", x, inputs["x_proj_weight"]),
        inputs["dt_projs_weight"],
        inputs["dt_projs_bias"],
        -inputs["A_logs"].exp().unflatten(0, by_scan),
        inputs["Ds"].unflatten(0, by_scan),
        paths=paths,
    )
    return out.permute(0, 3, 1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*SEQUENCES, *MAPS])
def test_equals_the_official_records(name: str, dtype: torch.dtype, scan_case) -> None:
    case, tolerance = scan_case(name), 1e-12 if dtype == torch.float64 else 3e-6
    inputs = {key: value.to(dtype).requires_grad_() for key, value in case.inputs().items()}
    if name in MAPS:
        out = official_map(inputs, MAPS[name])
    else:
        out, last = selective_scan(**inputs, delta_softplus=name != "ss_plain", return_last_state=True)
        assert case.output_error("last_state", last) < tolerance
    out.backward(case.grad().to(dtype))
    errors = {"out": case.output_error("out", out)}
    errors |= {key: case.grad_error(key, value.grad) for key, value in inputs.items()}
    assert max(errors.values()) < tolerance, errors


# The definition.

DEFINED = {
    "one pixel": (CROSS, draw_map(CROSS, (1, 1))),
    "a row": (BIDIRECTIONAL, draw_map(BIDIRECTIONAL, (1, 37), own_inputs=True, state=16, dim=5)),
    "a column": (CROSS, draw_map(CROSS, (33, 1), state=1)),
    "chunks": (CROSS, draw_map(CROSS, (8, 12), state=1, dim=20, rank=3)),
    "full chunks": (BIDIRECTIONAL, draw_map(BIDIRECTIONAL, (8, 8), state=2, skip=False)),
    "odd sub-grids": (ATROUS, draw_map(ATROUS, (9, 7), shared_projection=True)),
    "even sub-grids": (ATROUS, draw_map(ATROUS, (4, 6))),
    "turned": (TURNED, draw_map(TURNED, (5, 7), own_inputs=True, shared_projection=True)),
    "large rank": (BIDIRECTIONAL, draw_map(BIDIRECTIONAL, (3, 5), dim=18, rank=17, batch=1)),
    "third pixels": ((ScanPath(row=2, step=3),), draw_map((ScanPath(),), (4, 8))),
}


@pytest.mark.parametrize(
    ("implementation", "name"),
    [(path, name) for path in ("native", "plain") for name in DEFINED] + [("triton", "turned")],
    indirect=["implementation"],
)
def test_maps_equal_the_definition(name: str, implementation: str, poisoned_memory: None) -> None:
    """Triton's kernels, slow to interpret, have tests of their own."""
    paths, inputs = DEFINED[name]
    expected = run(lambda **t: define_map(t, paths), inputs, torch.float64)
    assert_close(run(selective_scan_2d, inputs, torch.float32, paths=paths), expected, 5e-6)


@pytest.mark.parametrize("name", DEFINED)
def test_the_plain_form_and_its_written_out_gradients_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, inputs = DEFINED[name]
    expected = run(lambda **t: define_map(t, paths), inputs, torch.float64)
    assert_close(run(selective_scan_2d, inputs, torch.float64, paths=paths), expected, 1e-12)

    def by_operator(
        x: Tensor, projected: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor | None = None
    ):
        size = list(x.shape[1:3])
        x = x.flatten(1, 2) if x.ndim == 5 else x.flatten(1, 2).unsqueeze(2)
        projected = projected.flatten(1, 2) if projected.ndim == 5 else projected.flatten(1, 2).unsqueeze(2)
        fields = _plain.to_integers(paths)
        tensors = x, None, projected, dt_weight, dt_bias, A, D
        return torch.ops.mixerzoo.selective_scan(*tensors, size, fields, True, True, True)[0].unflatten(1, size)

    monkeypatch.setattr(_operator, "_implementation", lambda x: _plain)
    assert_close(run(by_operator, inputs, torch.float64), expected, 1e-12)


@triton_takes_long
def test_states_are_saved_before_each_chunk_and_after_the_last(implementation: str) -> None:
    for length in (31, 32, 65):
        u, delta = torch.randn(2, 5, length), torch.rand(2, 5, length)
        A, B, C = -torch.rand(5, 3), torch.randn(2, 3, length), torch.randn(2, 3, length)
        tensors = u.permute(0, 2, 1)[:, :, None], delta.permute(0, 2, 1)[:, :, None]
        projected = torch.cat([B, C], 1).permute(0, 2, 1)[:, :, None]
        arguments = (*tensors, projected, None, None, A[None], None, [1, length], [0, 0, 0, 0, 0, 1], False, False)
        _, states = torch.ops.mixerzoo.selective_scan(*arguments, True)
        assert states.shape == (2, 1, -(-length // 32) + 1, 3, 5)
        for chunk, steps in enumerate([*range(0, length, 32), length]):
            expected = torch.zeros(2, 5, 3)
            for t in range(steps):
                expected = torch.exp(delta[:, :, t, None] * A) * expected
                expected = expected + delta[:, :, t, None] * u[:, :, t, None] * B[:, None, :, t]
            torch.testing.assert_close(states[:, 0, chunk], expected.transpose(1, 2))
        assert torch.ops.mixerzoo.selective_scan(*arguments, False)[1].numel() == 0


def test_groups_share_coefficients_and_kinds_mix() -> None:
    u, delta = torch.randn(2, 8, 11), torch.rand(2, 8, 11)
    A, B, C = -torch.rand(8, 4), torch.randn(2, 2, 4, 11), torch.randn(8, 4)
    expected = define_sequence(
        u.flatten(0, 1)[:, None],
        delta.flatten(0, 1)[:, None],
        torch.zeros(16, 1, 4) + A.repeat(2, 1)[:, None],
        B.repeat_interleave(4, 1).flatten(0, 1),
        C.repeat(2, 1)[:, :, None].expand(-1, -1, 11),
    )
    torch.testing.assert_close(selective_scan(u, delta, A, B, C), expected.view(2, 8, 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype, implementation: str) -> None:
    paths, inputs = CROSS, draw_map(CROSS, (3, 4), state=2, dim=8)
    halved = {name: value.to(dtype) if name in ("x", "projected") else value for name, value in inputs.items()}
    rounded = {name: value.double() for name, value in halved.items()}
    expected = run(lambda **t: define_map(t, paths), rounded, torch.float64)
    leaves = {name: (v if v.dtype == dtype else v.float()).requires_grad_() for name, v in halved.items()}
    out = selective_scan_2d(**leaves, paths=paths)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = [out, *torch.autograd.grad(out, list(leaves.values()), grad)]
    assert [r.dtype for r in results] == [dtype, dtype, dtype, *[torch.float32] * 4]
    step = torch.finfo(dtype).eps
    assert_close(results, expected, step * 2)


@triton_takes_long
def test_strong_decay_and_long_memory_stay_finite(implementation: str) -> None:
    """What breaks scans that divide by products of decays or add up their logarithms."""
    length = 70
    for scale in (50.0, 1e-6):
        t = {
            "u": torch.randn(1, 4, length),
            "delta": scale * torch.rand(1, 4, length),
            "A": -torch.arange(1.0, 17).repeat(4, 1),
            "B": torch.randn(1, 16, length),
            "C": torch.randn(1, 16, length),
        }
        expected = run(define_sequence, t, torch.float64)
        results = run(selective_scan, t, torch.float32)
        assert all(result.isfinite().all() for result in results)
        assert_close(results[:1], expected[:1], 3e-6)


def test_nan_reaches_the_steps_after_it_and_no_other_channel(implementation: str) -> None:
    t = draw_map(BIDIRECTIONAL[:1], (4, 10), batch=1)
    t["x"][0, 2, 3, 1] = float("nan")
    single = {name: value.float() for name, value in t.items()}
    found = selective_scan_2d(**single, paths=BIDIRECTIONAL[:1]).isnan()
    expected = torch.zeros_like(found)
    expected.flatten(1, 2)[0, 23:, 1] = True
    assert torch.equal(found, expected)


@triton_takes_long
def test_any_strides(implementation: str) -> None:
    t = {name: value.float() for name, value in draw_map(CROSS, (2, 3), dim=4).items()}
    expected = run(selective_scan_2d, t, torch.float32)
    strided = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in t.items()}
    strided["x"] = torch.cat([t["x"], t["x"]], 3)[..., 4:]
    assert_close(run(selective_scan_2d, strided, torch.float32), expected, 1e-6)
    leaf = t["x"].clone().requires_grad_()
    out = selective_scan_2d(**(t | {"x": leaf}))
    out.sum().backward()  # a gradient that is one number, expanded
    (plain,) = torch.autograd.grad(selective_scan_2d(**(t | {"x": leaf})), leaf, torch.ones_like(out))
    torch.testing.assert_close(leaf.grad, plain)


def test_empty_batch(implementation: str) -> None:
    t = {name: value.float().requires_grad_() for name, value in draw_map(CROSS, (3, 4), batch=0).items()}
    out = selective_scan_2d(**t)
    out.sum().backward()
    assert out.shape == (0, 3, 4, 6) and not t["A"].grad.any()


# Bad input.

SIZES = {"u": (2, 6, 9), "delta": (2, 6, 9), "A": (6, 4), "B": (2, 4, 9), "C": (2, 4, 9)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"u": (6, 9)}, r"u must be \[batch, dim, length\]"),
        ({"u": (2, 6, 0)}, "at least one step"),
        ({"delta": (2, 6, 8)}, r"delta must be \[batch, dim, length\] = \(2, 6, 9\); got \(2, 6, 8\)"),
        ({"A": (5, 4)}, r"A must be \[dim, state\]"),
        ({"A": (6, 65)}, "1 to 64"),
        ({"B": (2, 4, 4, 9)}, "groups that divide dim"),
        ({"B": (2, 2, 4, 9), "C": (2, 3, 4, 9)}, "do not divide each other"),
        ({"C": (2, 3, 9)}, r"C must be \[batch, groups, state, length\]"),
        ({"D": (5,)}, r"D must be \[dim\]"),
        ({"z": (2, 6, 8)}, "z must be"),
        ({"delta_bias": (1,)}, "delta_bias must be"),
    ],
)
def test_bad_sequences(changed: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{name: torch.zeros(shape) for name, shape in (SIZES | changed).items()})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 4, 5, 3, 6), r"\[batch, height, width, 4, dim\] for 4 paths"),
        ("x", torch.zeros(2, 0, 5, 6), "at least one pixel"),
        ("x", torch.zeros(2, 4, 5, 6, dtype=torch.int64), "x must be floating-point; got torch.int64"),
        ("projected", torch.zeros(2, 4, 5, 4, 7), r"projected must be .* = \(2, 4, 5, 4, 8\); got \(2, 4, 5, 4, 7\)"),
        ("A", torch.zeros(24, 3), r"A must be \[4, 6, state\]"),
        ("dt_bias", torch.zeros(24), r"dt_bias must be \[scans, dim\]"),
        ("D", torch.zeros(4, 6, device="meta"), "D is on meta and x on cpu"),
        ("paths", BIDIRECTIONAL, r"A must be \[scans, dim, state\] = \(2, 6, 3\)"),
    ],
)
def test_bad_maps(name: str, value: object, message: str) -> None:
    t: dict[str, object] = {key: tensor.float() for key, tensor in draw_map(CROSS, (4, 5)).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan_2d(**(t | {name: value}))


# Compilers, exporters, transforms.


class Scan(torch.nn.Module):
    def __init__(self, paths: tuple[ScanPath, ...], state: int = 3) -> None:
        super().__init__()
        self.paths = paths
        drawn = draw_map(paths, (1, 1), state=state)
        self.weights = torch.nn.ParameterDict({k: drawn[k].float() for k in ("dt_weight", "dt_bias", "A", "D")})
        self.project = torch.nn.Linear(6, len(paths) * (2 + 2 * state))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.project(x).unflatten(3, (len(self.paths), -1))
        return selective_scan_2d(x, projected, **dict(self.weights.items()), paths=self.paths)


def graph_targets(graph: torch.fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes)


def test_compiled_graphs_hold_the_operator_and_give_equal_gradients() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.append(graph_targets(graph.graph))
        return graph.forward

    module = Scan(CROSS)
    torch.compile(module, backend=backend, fullgraph=True)(torch.randn(2, 5, 6, 6))
    assert "mixerzoo.selective_scan" in seen[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 6), (9, 4)):
        x = torch.randn(2, *size, 6, requires_grad=True)
        grads = [torch.autograd.grad(f(x).square().sum(), [x, *module.parameters()]) for f in (module, compiled)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("paths", [CROSS, pytest.param(ATROUS, marks=pytest.mark.slow)], ids=["cross", "atrous"])
def test_exported_graphs_hold_standard_operators_and_any_size(paths: tuple[ScanPath, ...]) -> None:
    module = Scan(paths).eval()
    sizes = {1: torch.export.Dim("height", min=3, max=512), 2: torch.export.Dim("width", min=3, max=512)}
    program = torch.export.export(module, (torch.randn(1, 9, 11, 6),), dynamic_shapes=(sizes,))
    assert "mixerzoo" not in graph_targets(program.graph)
    for size in ((3, 3), (8, 12), (45, 40)):  # 1800 steps: two levels of chunks
        x = torch.randn(1, *size, 6)
        torch.testing.assert_close(program.module()(x), module(x), atol=1e-4, rtol=1e-4)


def test_functional_transforms_and_forward_mode_take_plain_operators() -> None:
    t = draw_map(BIDIRECTIONAL, (3, 4))

    def function(x: Tensor) -> Tensor:
        return selective_scan_2d(**(t | {"x": x}), paths=BIDIRECTIONAL)

    x, tangent = t["x"], torch.randn_like(t["x"])
    _, by_transform = torch.func.jvp(function, (x,), (tangent,))
    difference = (function(x + 1e-6 * tangent) - function(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(by_transform, difference, atol=1e-7, rtol=1e-6)
    single = {name: value.float() for name, value in t.items()}
    grad = torch.func.grad(lambda x: selective_scan_2d(**(single | {"x": x}), paths=BIDIRECTIONAL).sum())(single["x"])
    leaf = single["x"].clone().requires_grad_()
    selective_scan_2d(**(single | {"x": leaf}), paths=BIDIRECTIONAL).sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


def test_float64_is_differentiable_twice() -> None:
    t = {name: value.requires_grad_() for name, value in draw_map(BIDIRECTIONAL, (2, 3), batch=1, dim=2).items()}

    def function(*values: Tensor) -> Tensor:
        return selective_scan_2d(**dict(zip(t, values, strict=True)), paths=BIDIRECTIONAL)

    assert torch.autograd.gradgradcheck(function, tuple(t.values()))


@triton_takes_long
def test_operators_pass_opcheck(implementation: str) -> None:
    t = {k: value.float().requires_grad_() for k, value in draw_map(BIDIRECTIONAL, (2, 2), dim=3, batch=1).items()}
    x, projected = t["x"].flatten(1, 2).unsqueeze(2), t["projected"].flatten(1, 2)
    tensors = (x, None, projected, t["dt_weight"], t["dt_bias"], t["A"], t["D"])
    options = ([2, 2], _plain.to_integers(BIDIRECTIONAL), True, True)
    arguments = tuple(None if v is None else v.detach().requires_grad_() for v in tensors)
    torch.library.opcheck(torch.ops.mixerzoo.selective_scan.default, (*arguments, *options, True))
    u = torch.randn(1, 1, 3, 5).permute(0, 3, 1, 2)
    given = (u.detach().requires_grad_(), torch.rand(1, 5, 1, 3), torch.randn(1, 5, 1, 4))
    sequence = (*given, None, None, -torch.rand(1, 3, 2), None, [1, 5], [0, 0, 0, 0, 0, 1], False, False)
    torch.library.opcheck(torch.ops.mixerzoo.selective_scan.default, (*sequence, True))
    with torch.no_grad():
        y, states = torch.ops.mixerzoo.selective_scan(*arguments, *options, True)
        detached = tuple(None if v is None else v.detach() for v in tensors)
        backward = (torch.randn_like(y), *detached, states, *options)
        torch.library.opcheck(torch.ops.mixerzoo.selective_scan_backward.default, backward)


def test_autocast_changes_nothing_inside(implementation: str) -> None:
    t = {name: value.float() for name, value in draw_map(CROSS, (2, 2)).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = selective_scan_2d(**t)
    assert torch.equal(out, selective_scan_2d(**t)) and out.dtype == torch.float32
