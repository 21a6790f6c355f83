"""Depth-wise convolution and the LKA chain against PyTorch's convolution in float64, by every implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from mixerzoo.kernels import _runtime
from mixerzoo.kernels.depthwise_conv import _choice, _native, _plain, depthwise_conv2d, large_kernel_attention
from torch import Tensor
from torch.nn import functional as F


class Case(NamedTuple):
    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)


# None that the public function hands to PyTorch's convolution at once: `test_small_kernels` has those.
CASES = {
    "one position": Case(1, 1, (1, 1), (5, 5)),
    "stage of van": Case(1, 40, (14, 14), (7, 7), (3, 3)),
    "map smaller than the kernel": Case(2, 8, (5, 6), (7, 7), (3, 3)),
    "primes": Case(2, 13, (11, 17), (5, 5), (2, 2)),
    "strips": Case(1, 9, (16, 13), (1, 11), (1, 3)),
    "columns": Case(2, 16, (23, 8), (11, 1)),
    "large kernel": Case(1, 16, (7, 29), (13, 13)),
    "larger than the map": Case(1, 8, (3, 14), (31, 31)),
    "one tap": Case(2, 8, (4, 4), (1, 1), (2, 2)),
    "many images": Case(17, 3, (4, 5), (3, 3), (1, 2)),  # one more than the native weight gradient has partial sums
}

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


IMPLEMENTATIONS = ["AVX2", "DEFAULT", "plain", "triton"]

_COMPILED = [(name, layout) for name in IMPLEMENTATIONS[:3] for layout in FORMATS]
in_each_format = pytest.mark.parametrize(
    ("implementation", "memory_format"), [*_COMPILED, ("triton", "channels_last")], indirect=["implementation"]
)
"""Triton's copies the map first if it must, which `test_any_strides` sees; interpreted it is slow."""

LONG = {"large kernel", "stage of van", "columns"}
"""Cases that take the interpreter more than six seconds."""


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation that a CPU tensor can meet; the first two are the native library's builds."""
    if request.param == "triton":
        request.getfixturevalue("triton_interpreter")
    elif request.param == "plain":
        monkeypatch.setattr(_native, "is_available", lambda: False)
    else:
        request.getfixturevalue("native_library")(request.param)
    return request.param


def make_inputs(case: Case, memory_format: torch.memory_format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the result, in float64."""
    shape = (case.batch, case.channels, *case.size)
    x, grad = (torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format) for _ in range(2))
    taps = case.kernel[0] * case.kernel[1]
    weight = torch.randn(case.channels, 1, *case.kernel, dtype=torch.float64) / taps**0.5
    return x, weight, torch.randn(case.channels, dtype=torch.float64), grad


def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """The result and the gradients of all inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (result, right) in enumerate(zip(results, expected, strict=True)):
        error = (result.double() - right).abs().max()
        assert error <= tolerance * right.abs().max(), f"result {i} is off by {error:.1e} of {right.abs().max():.1e}"


def definition(case: Case) -> Callable[..., Tensor]:
    padding = [k // 2 * d for k, d in zip(case.kernel, case.dilation, strict=True)]
    return lambda x, w, b: F.conv2d(x, w, b, padding=padding, dilation=case.dilation, groups=case.channels)


@pytest.mark.parametrize(
    ("name", "implementation", "memory_format"),
    [(name, *how) for name in CASES for how in _COMPILED]
    + [pytest.param(name, "triton", "channels_last", marks=pytest.mark.slow if name in LONG else ()) for name in CASES],
    indirect=["implementation"],
)
def test_equals_the_definition(name: str, memory_format: str, implementation: str, poisoned_memory: None) -> None:
    case = CASES[name]
    *inputs, grad = make_inputs(case, FORMATS[memory_format])
    expected = run(definition(case), inputs, grad)
    single = [tensor.float() for tensor in inputs]
    results = run(lambda x, w, b: depthwise_conv2d(x, w, b, dilation=case.dilation), single, grad)
    assert_close(results, expected, 3e-6)
    assert results[0].is_contiguous(memory_format=FORMATS[memory_format])


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)], ids=str)
def test_small_kernels(kernel: tuple[int, int], implementation: str, poisoned_memory: None) -> None:
    """The public function leaves them to PyTorch; scripted modules call the operator itself."""
    case = Case(2, 10, (5, 6), kernel)
    *inputs, grad = make_inputs(case, torch.channels_last)
    expected = run(definition(case), inputs, grad)
    single = tuple(tensor.float() for tensor in inputs)
    for function in (depthwise_conv2d, lambda *t: torch.ops.mixerzoo.depthwise_conv2d(*t, [1, 1])):
        results = run(function, single, grad)
        assert_close(results, expected, 3e-6)
        assert results[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype, implementation: str) -> None:
    case = Case(1, 12, (8, 11), (5, 5))
    *inputs, grad = make_inputs(case, torch.channels_last)
    rounded = [tensor.to(dtype) for tensor in (*inputs, grad)]
    exact = run(definition(case), [tensor.double() for tensor in rounded[:3]], rounded[3].double())
    results = run(depthwise_conv2d, rounded[:3], rounded[3])
    assert {tensor.dtype for tensor in results} == {dtype}
    assert_close(results, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", ["direct", "channels_last", "lattice"])
@pytest.mark.parametrize("name", CASES)
def test_every_plain_method_is_exact(name: str, method: _plain.Method) -> None:
    case = CASES[name]
    x, weight, bias, grad = make_inputs(case, torch.contiguous_format)
    expected = run(definition(case), (x, weight, bias), grad)
    out = _plain.forward(x, weight, bias, case.dilation, method)
    assert_close([out, _plain.weight_grad(grad, x, weight, case.dilation, method)], [expected[0], expected[2]], 1e-13)
    cropped = _plain.crop(weight, case.size, case.dilation)
    assert_close([_plain.forward(x, cropped, bias, case.dilation, method)], expected[:1], 1e-13)


def test_float64_and_second_derivatives_through_plain_operators() -> None:
    case = CASES["primes"]
    x, weight, bias, grad = make_inputs(case, torch.contiguous_format)
    assert_close(
        run(lambda x, w, b: depthwise_conv2d(x, w, b, dilation=2), (x, weight, bias), grad),
        run(definition(case), (x, weight, bias), grad),
        1e-12,
    )
    tangent = torch.randn_like(x)
    _, result = torch.func.jvp(lambda x: depthwise_conv2d(x, weight, bias, dilation=2), (x,), (tangent,))
    torch.testing.assert_close(result, definition(case)(tangent, weight, None))


def test_nan_reaches_exactly_the_positions_that_see_it(implementation: str) -> None:
    case = CASES["stage of van"]
    x, weight, bias, _ = (tensor.float() for tensor in make_inputs(case, torch.channels_last))
    x[0, 3, 5, 6] = float("nan")
    out = depthwise_conv2d(x, weight, bias, dilation=3)
    reach = [[c for c in range(14) if (c - at) % 3 == 0 and abs(c - at) <= 9] for at in (5, 6)]
    seen = torch.zeros_like(out, dtype=torch.bool)
    seen[0, 3, torch.tensor(reach[0])[:, None], torch.tensor(reach[1])] = True
    assert torch.equal(out.isnan(), seen)


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    case = Case(5, 24, (40, 30), (7, 7), (3, 3))
    exact = make_inputs(case, torch.channels_last)
    *inputs, grad = (tensor.float() for tensor in exact)
    alone = run(lambda *t: depthwise_conv2d(*t, dilation=3), tuple(inputs), grad)
    try:
        torch.set_num_threads(threads)
        together = run(lambda *t: depthwise_conv2d(*t, dilation=3), tuple(inputs), grad)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone[:3], together[:3], strict=True):
        assert torch.equal(a, b)
    assert_close(together, run(definition(case), exact[:3], exact[3]), 3e-6)


def test_any_strides(implementation: str) -> None:
    case = CASES["primes"]
    x, weight, bias, _ = (tensor.float() for tensor in make_inputs(case, torch.contiguous_format))
    right = definition(case)(x, weight, bias)
    wide = F.pad(x, (1, 1, 2, 2))
    strange = {
        "a part of a map": wide[:, :, 2:-2, 1:-1],
        "a part of a channels_last map": wide.contiguous(memory_format=torch.channels_last)[:, :, 2:-2, 1:-1],
        "rows last": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second channel": x.repeat_interleave(2, 1)[:, ::2],
    }
    for name, view in strange.items():
        result = depthwise_conv2d(view, weight.transpose(2, 3).contiguous().transpose(2, 3), bias, dilation=2)
        assert torch.allclose(result, right, atol=1e-5), name
    single = x[:1, :, :, :1]
    spread = single.expand(3, case.channels, case.size[0], 4)
    torch.testing.assert_close(
        depthwise_conv2d(spread, weight, bias, dilation=2), definition(case)(spread, weight, bias), atol=1e-5, rtol=1e-5
    )


def test_empty_batch(implementation: str) -> None:
    x, *weights = (tensor.float().requires_grad_() for tensor in make_attention(0, 4, (5, 6)))
    for function, filters in ((depthwise_conv2d, weights[:1]), (large_kernel_attention, weights)):
        out = function(x, *filters)
        grads = torch.autograd.grad(out.sum(), [x, *filters])
        assert out.shape == grads[0].shape == x.shape
        assert not any(grad.any() for grad in grads[1:])


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        ((4, 5, 6), (4, 1, 3, 3), {}, r"\[batch, channels, height, width\].*; got shape \(4, 5, 6\)"),
        ((1, 4, 5, 6), (4, 1, 4, 3), {}, r"\[4, 1, rows, columns\] with odd sides.*got \(4, 1, 4, 3\)"),
        ((1, 4, 5, 6), (4, 4, 3, 3), {}, "one filter for each channel"),
        ((1, 4, 5, 6), (4, 1, 3, 3), {"bias": torch.zeros(3)}, r"bias must be \[4\]"),
        ((1, 4, 5, 6), (4, 1, 3, 3), {"dilation": 0}, "dilation must be at least 1; got"),
        ((1, 4, 5, 6), (4, 1, 3, 3), {"dilation": (1, 1, 1)}, "needed an integer or"),
        ((1, 4, 5, 6), (4, 1, 3, 3), {"bias": torch.zeros(4).double()}, "bias is torch.float64 and x torch.float32"),
        ((1, 4, 5, 6), (4, 1, 3, 3), {"bias": torch.zeros(4, device="meta")}, "bias is on meta and x on cpu"),
    ],
)
def test_bad_input(x: tuple[int, ...], weight: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(torch.zeros(x), torch.zeros(weight), **options)


def test_refuses_integers() -> None:
    x, weight = torch.zeros(1, 4, 5, 6, dtype=torch.int64), torch.zeros(4, 1, 3, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"floating-point; got .* torch\.int64"):
        depthwise_conv2d(x, weight)


def chain(
    x: Tensor, w5: Tensor, w7d3: Tensor, w1: Tensor, b5: Tensor | None, b7d3: Tensor | None, b1: Tensor | None
) -> Tensor:
    """The definition by PyTorch's convolution."""
    channels = x.shape[1]
    middle = F.conv2d(x, w5, b5, padding=2, groups=channels)
    return x * F.conv2d(F.conv2d(middle, w7d3, b7d3, padding=9, dilation=3, groups=channels), w1, b1)


def make_attention(batch: int, channels: int, size: tuple[int, int]) -> list[Tensor]:
    shapes = [(channels, 1, 5, 5), (channels, 1, 7, 7), (channels, channels, 1, 1), *[(channels,)] * 3]
    scales = [0.2, 0.15, channels**-0.5, 1.0, 1.0, 1.0]
    weights = [scale * torch.randn(shape, dtype=torch.float64) for shape, scale in zip(shapes, scales, strict=True)]
    return [torch.randn(batch, channels, *size, dtype=torch.float64), *weights]


@pytest.mark.parametrize(
    "shape", [pytest.param((2, 32, (9, 10)), marks=pytest.mark.slow), (1, 5, (7, 11)), (1, 1, (1, 1))], ids=str
)
@in_each_format
def test_attention_equals_the_chain(
    shape: tuple[int, int, tuple[int, int]], memory_format: str, implementation: str, poisoned_memory: None
) -> None:
    inputs = make_attention(*shape)
    grad = torch.randn_like(inputs[0])
    single = [tensor.float() for tensor in inputs]
    single[0] = single[0].contiguous(memory_format=FORMATS[memory_format])
    results = run(large_kernel_attention, tuple(single), grad)
    assert_close(results, run(chain, tuple(inputs), grad), 5e-6)
    assert results[0].is_contiguous(memory_format=FORMATS[memory_format])


def test_attention_without_biases_and_with_frozen_weights(implementation: str) -> None:
    inputs = [tensor.float() for tensor in make_attention(1, 8, (9, 10))[:4]]
    x = inputs[0].requires_grad_()
    out = large_kernel_attention(*inputs)
    torch.testing.assert_close(out, chain(*inputs, None, None, None), atol=1e-5, rtol=1e-4)
    (grad,) = torch.autograd.grad(out.sum(), x)
    (right,) = torch.autograd.grad(chain(*inputs, None, None, None).sum(), x)
    torch.testing.assert_close(grad, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_no_worse_than_the_chain(dtype: torch.dtype, implementation: str) -> None:
    rounded = [tensor.to(dtype) for tensor in make_attention(1, 24, (10, 12))]
    exact = chain(*(tensor.double() for tensor in rounded))
    error = (large_kernel_attention(*rounded).double() - exact).norm()
    assert error <= 1.1 * (chain(*rounded).double() - exact).norm()


def test_attention_keeps_two_maps_for_its_backward() -> None:
    x, *weights = (tensor.float().requires_grad_() for tensor in make_attention(2, 16, (12, 12)))

    def saved_maps(function: Callable[..., Tensor]) -> int:
        maps = set()

        def note(tensor: Tensor) -> Tensor:
            if tensor.shape == x.shape:
                maps.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = function(x, *weights)
            assert out.requires_grad
            return len(maps)

    assert saved_maps(large_kernel_attention) == 2
    assert saved_maps(chain) == 4  # x, both convolutions', the gate; VAN's own code clones x, which makes five


@pytest.mark.parametrize("position", range(1, 4))
def test_attention_refuses_other_filters(position: int) -> None:
    inputs = [tensor.float() for tensor in make_attention(1, 4, (6, 6))]
    inputs[position] = torch.zeros(4, 1, 3, 3)
    with pytest.raises(ValueError, match="got"):
        large_kernel_attention(*inputs)


class Convolution(torch.nn.Module):
    """Both operators in a module that every kind of capture sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(tensor.float() for tensor in make_attention(1, 6, (1, 1))[1:])

    def forward(self, x: Tensor) -> Tensor:
        w5, w7d3, w1, b5, b7d3, b1 = self.weights
        return large_kernel_attention(x, w5, w7d3, w1, b5, b7d3, b1) + depthwise_conv2d(x, w7d3, b5, dilation=(1, 2))


def graph_targets(graph: torch.fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes)


def test_compiled_graphs_hold_the_operators_and_give_equal_gradients() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.append(graph_targets(graph.graph))
        return graph.forward

    module, x = Convolution(), torch.randn(2, 6, 9, 12)
    torch.compile(module, backend=backend, fullgraph=True)(x)
    assert "mixerzoo.large_kernel_attention" in seen[0] and "mixerzoo.depthwise_conv2d" in seen[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((9, 12), (10, 7)):
        x = torch.randn(2, 6, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
        grads = [torch.autograd.grad(run(x).square().sum(), [x, *module.parameters()]) for run in (module, compiled)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_exported_graphs_hold_standard_operators_alone() -> None:
    module, x = Convolution().eval(), torch.randn(1, 6, 9, 12)
    sizes = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    program = torch.export.export(module, (x,), dynamic_shapes=({0: None, 1: None, **sizes},))
    assert "mixerzoo" not in graph_targets(program.graph)
    other = torch.randn(1, 6, 15, 8)
    torch.testing.assert_close(program.module()(other), module(other), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@in_each_format
def test_backward_operators_pass_opcheck(memory_format: str, implementation: str) -> None:
    x, w5, w7d3, w1, b5, _, b1 = (tensor.float() for tensor in make_attention(2, 3, (3, 4)))
    other = next(layout for name, layout in FORMATS.items() if name != memory_format)
    x = x.contiguous(memory_format=FORMATS[memory_format])
    for grad in (torch.randn_like(x), torch.randn_like(x).contiguous(memory_format=other)):
        for needs in ((True, True), (True, False), (False, True)):
            arguments = (grad, x, w7d3, [3, 1], *needs)
            torch.library.opcheck(torch.ops.mixerzoo.depthwise_conv2d_backward.default, arguments)
        for grad_spatial, needs_weights in ((None, True), (torch.randn_like(x), True), (None, False)):
            arguments = (grad, grad_spatial, torch.randn_like(x), x, w5, w7d3, w1, b5, b1, needs_weights)
            torch.library.opcheck(torch.ops.mixerzoo.large_kernel_attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("implementation", "memory_format"),
    [*_COMPILED, pytest.param("triton", "channels_last", marks=pytest.mark.slow)],
    indirect=["implementation"],
)
def test_operators_pass_opcheck(memory_format: str, implementation: str) -> None:
    inputs = [tensor.float() for tensor in make_attention(2, 3, (3, 4))]
    inputs[0] = inputs[0].contiguous(memory_format=FORMATS[memory_format])
    for tensor in inputs:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.mixerzoo.large_kernel_attention.default, tuple(inputs))
    arguments = (inputs[0], inputs[2], inputs[4], [3, 1])
    torch.library.opcheck(torch.ops.mixerzoo.depthwise_conv2d.default, arguments)


def test_autocast_as_for_convolutions() -> None:
    inputs = [tensor.float() for tensor in make_attention(1, 6, (8, 8))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = large_kernel_attention(*inputs)
        assert half.dtype == depthwise_conv2d(inputs[0], inputs[1]).dtype == torch.bfloat16
        assert depthwise_conv2d(inputs[0].double(), inputs[1].double()).dtype == torch.float64
    torch.testing.assert_close(half.float(), chain(*inputs), atol=0.1, rtol=0.05)
    for tensor in inputs:
        tensor.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        large_kernel_attention(*inputs).float().sum().backward()
    assert {tensor.grad.dtype for tensor in inputs if tensor.grad is not None} == {torch.float32}


def test_measures_only_where_cudnn_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_choice, "_fastest", {})
    times = {"direct": 3.0, "lattice": 1.0, "triton": 2.0}
    ran: list[str] = []

    def run(method: str) -> Tensor:
        ran.append(method)
        return torch.zeros(())

    def seconds(call: Callable[[], Tensor]) -> float:
        call()
        return times[ran[-1]]

    monkeypatch.setattr(_choice, "seconds", seconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _choice.run_fastest("key", list(times), run)
    assert ran == ["direct"]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    _choice.run_fastest("key", list(times), run)
    assert ran[1:] == ["direct", "lattice", "triton", "lattice"]
    _choice.run_fastest("key", list(times), run)
    assert ran[5:] == ["lattice"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _choice.run_fastest("another key", list(times), run)
    assert ran[6:] == ["direct"]


def test_seconds_measures() -> None:
    assert 0 < _choice.seconds(lambda: torch.zeros(4)) < 1


def test_triton_serves_no_float64() -> None:
    assert not _runtime.runs_triton(torch.zeros(1, dtype=torch.float64))
