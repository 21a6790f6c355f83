"""Gated linear attention against its recurrence, token by token in float64, by every implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from mixerzoo.kernels.gated_linear_attention import (
    _plain,
    _traceable,
    bidirectional_gated_linear_attention,
    gated_linear_attention,
)
from torch import Tensor
from torch.nn import functional as F


class Case(NamedTuple):
    tokens: int
    heads: int = 1
    head_dim: int = 8
    value_dim: int = 16
    batch: int = 1
    decay: str = "usual"


CASES = {
    "one token": Case(1, heads=3, batch=2),
    "one chunk": Case(32),
    "primes": Case(37, heads=2, head_dim=5, value_dim=7, batch=2),
    "vig": Case(49, head_dim=32, value_dim=64),
    "hierarchical vig": Case(65, head_dim=16, value_dim=32),
    "strong decay": Case(40, decay="strong"),
    "decay of some channels": Case(40, decay="mixed"),
    "gates of zero": Case(40, decay="zero"),
    "no decay": Case(40, decay="none"),
    "several times a chunk": Case(130),
}

DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda x: F.logsigmoid(x) / 16,  # ViG's
    "strong": lambda x: -50 - x.abs(),
    "mixed": lambda x: torch.where(x > 0.5, -50.0, 0.02 * F.logsigmoid(x)),
    "zero": lambda x: torch.where(x > 0.5, -torch.inf, F.logsigmoid(x)),
    "none": torch.zeros_like,
}


def attend_step_by_step(
    query: Tensor, key: Tensor, value: Tensor, *log_gates: Tensor, scale: float | None = None
) -> Tensor:
    """The definition: one direction, or the mean of two."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    total = torch.zeros_like(value)
    for log_gate, order in zip(log_gates, (1, -1), strict=False):
        state = query.new_zeros(*query.shape[:1], *query.shape[2:], value.shape[-1])
        outputs = []
        for t in range(query.shape[1])[::order]:
            state = log_gate[:, t].exp().unsqueeze(-1) * state + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
            outputs.append(scale * (query[:, t].unsqueeze(-1) * state).sum(-2))
        total = total + torch.stack(outputs[::order], 1) / len(log_gates)
    return total


FUNCTIONS = {1: gated_linear_attention, 2: bidirectional_gated_linear_attention}

in_each_direction = pytest.mark.parametrize("directions", [1, 2], ids=["causal", "bidirectional"])


def make_inputs(case: Case, directions: int) -> tuple[list[Tensor], Tensor]:
    """query, key, value and the log gates in float64; the gradient of the result."""
    shape = (case.batch, case.tokens, case.heads)
    query, key, *gates = (torch.randn(*shape, case.head_dim, dtype=torch.float64) for _ in range(2 + directions))
    value, grad = (torch.randn(*shape, case.value_dim, dtype=torch.float64) for _ in range(2))
    return [query, key, value, *(DECAYS[case.decay](gate) for gate in gates)], grad


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The result and the gradients of all inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Gradients of gates that let nothing through are measured by those of the keys, of which they are differences."""
    for i, (result, right) in enumerate(zip(results, expected, strict=True)):
        size = max(right.abs().max(), expected[2].abs().max() if i > 3 else right.new_zeros(()))
        error = (result.double() - right).abs().max()
        assert error <= tolerance * size, f"result {i} is off by {error:.1e} of {size:.1e}"


@pytest.fixture(params=["plain", pytest.param("triton", marks=pytest.mark.slow)])
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation that a CPU tensor can meet."""
    if request.param == "triton":
        request.getfixturevalue("triton_interpreter")
    return request.param


@in_each_direction
@pytest.mark.parametrize("name", CASES)
def test_equals_the_recurrence(name: str, directions: int, implementation: str, poisoned_memory: None) -> None:
    inputs, grad = make_inputs(CASES[name], directions)
    expected = run(attend_step_by_step, inputs, grad)
    results = run(FUNCTIONS[directions], [tensor.float() for tensor in inputs], grad)
    assert_close(results, expected, 3e-6)
    assert all(result.is_contiguous() for result in results)


@in_each_direction
@pytest.mark.parametrize("name", CASES)
def test_float64_is_exact(name: str, directions: int) -> None:
    inputs, grad = make_inputs(CASES[name], directions)
    expected = run(attend_step_by_step, inputs, grad)
    assert_close(run(FUNCTIONS[directions], inputs, grad), expected, 1e-13)
    sides = (_plain.LATER, _plain.EARLIER)[:directions]
    scale = inputs[0].shape[-1] ** -0.5 / directions

    def traced(query: Tensor, key: Tensor, value: Tensor, *gates: Tensor) -> Tensor:
        return _traceable.forward(query, key, value, list(zip(gates, sides, strict=True)), scale)

    assert_close(run(traced, inputs, grad), expected, 1e-13)


@pytest.mark.parametrize("enough", [pytest.param(0, id="walk"), pytest.param(1000, id="by chunk")])
def test_states_by_a_walk_or_by_chunks(enough: int, triton_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixerzoo.kernels.gated_linear_attention import _triton

    monkeypatch.setattr(_triton, "ENOUGH_PROGRAMS", enough)
    inputs, grad = make_inputs(Case(70, head_dim=5, value_dim=19), 2)
    results = run(bidirectional_gated_linear_attention, [tensor.float() for tensor in inputs], grad)
    assert_close(results, run(attend_step_by_step, inputs, grad), 3e-6)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim", "fits"),
    [
        (torch.float16, 64, 128, True),
        (torch.float16, 65, 128, False),
        (torch.float16, 64, 129, False),
        (torch.float32, 32, 64, True),
        (torch.float32, 33, 64, False),
    ],
)
def test_heads_too_wide_for_registers_take_plain_operators(
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    fits: bool,
    triton_interpreter: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mixerzoo.kernels.gated_linear_attention import _triton

    calls: list[str] = []

    def forward(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        calls.append("forward")
        return torch.zeros_like(value)

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, ...], scale: float
    ) -> list[Tensor]:
        calls.append("backward")
        return [torch.zeros_like(x) for x in (query, key, value, *gates)]

    monkeypatch.setattr(_triton, "forward", forward)
    monkeypatch.setattr(_triton, "backward", backward)
    query = torch.randn(1, 2, 1, head_dim, dtype=dtype)
    value = torch.randn(1, 2, 1, value_dim, dtype=dtype, requires_grad=True)
    gated_linear_attention(query, query, value, -query.abs()).sum().backward()
    assert calls == (["forward", "backward"] if fits else [])
    assert value.grad is not None and value.grad.any() != fits


OFFICIAL = ["gla_small", "gla_vig_t", "gla_strong_gate", "bigla_small", "bigla_vig_t", "bigla_strong_gate"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_results(scan_case, name: str) -> None:
    case = scan_case(name)
    inputs = case.inputs()
    assert len(case.record["grads"]) == len(inputs)
    leaves = [tensor.transpose(1, 2).float() for tensor in inputs.values()]
    out, *grads = run(FUNCTIONS[len(leaves) - 3], leaves, case.grad().transpose(1, 2))
    assert case.output_error("out", out.transpose(1, 2)) < 3e-6
    for key, grad in zip(inputs, grads, strict=True):
        assert case.grad_error(key, grad.transpose(1, 2)) < 1e-5, key


@in_each_direction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype, directions: int, implementation: str) -> None:
    inputs, grad = make_inputs(Case(34, head_dim=16, value_dim=16), directions)
    rounded = [tensor.to(dtype) for tensor in (*inputs, grad)]
    exact = run(attend_step_by_step, [tensor.double() for tensor in rounded[:-1]], rounded[-1].double())
    for gate_dtype in (dtype, torch.float32):
        mixed = [*rounded[:3], *(gate.to(gate_dtype) for gate in rounded[3:-1])]
        results = run(FUNCTIONS[directions], mixed, rounded[-1])
        assert [tensor.dtype for tensor in results] == [dtype, *(tensor.dtype for tensor in mixed)]
        for result, right in zip(results, exact, strict=True):
            assert (result.double() - right).norm() <= 2 * torch.finfo(dtype).eps * right.norm()


@in_each_direction
def test_scale_and_any_strides(directions: int, implementation: str) -> None:
    inputs, grad = make_inputs(CASES["primes"], directions)
    expected = run(lambda *t: attend_step_by_step(*t, scale=0.3), inputs, grad)
    strange = [tensor.float().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in strange]
    out = FUNCTIONS[directions](*leaves, scale=0.3)
    given = grad.float().transpose(1, 3).contiguous().transpose(1, 3)
    assert_close([out, *torch.autograd.grad(out, leaves, given)], expected, 3e-6)
    one = leaves[0][:, :1].expand_as(leaves[0]).detach()
    spread = FUNCTIONS[directions](one, *leaves[1:])
    assert torch.equal(spread, FUNCTIONS[directions](one.contiguous(), *leaves[1:]))


def test_a_token_reaches_those_after_it_or_all(implementation: str) -> None:
    inputs, _ = make_inputs(CASES["several times a chunk"], 2)
    inputs = [tensor.float() for tensor in inputs]
    outs = [gated_linear_attention(*inputs[:4]), bidirectional_gated_linear_attention(*inputs)]
    inputs[2][0, 70] += 1
    causal = gated_linear_attention(*inputs[:4]) != outs[0]
    both = bidirectional_gated_linear_attention(*inputs) != outs[1]
    assert causal[:, 70:].any(-1).all() and not causal[:, :70].any()
    assert both.any(-1).all()


def test_both_directions_are_two_walks(implementation: str) -> None:
    inputs, _ = make_inputs(CASES["vig"], 2)
    query, key, value, forward, backward = (tensor.float() for tensor in inputs)
    there = gated_linear_attention(query, key, value, forward)
    back = gated_linear_attention(*(tensor.flip(1) for tensor in (query, key, value, backward))).flip(1)
    both = bidirectional_gated_linear_attention(query, key, value, forward, backward)
    torch.testing.assert_close(both, (there + back) / 2, atol=1e-5, rtol=1e-5)


@in_each_direction
@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4)], ids=str)
def test_nothing_to_attend_to(shape: tuple[int, ...], directions: int, implementation: str) -> None:
    leaves = [torch.zeros(shape, requires_grad=True) for _ in range(3 + directions)]
    out = FUNCTIONS[directions](*leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == shape and all(grad.shape == shape for grad in grads)


Q = torch.zeros(2, 5, 3, 4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((Q[0], Q, Q, Q), r"\[batch, tokens, heads, head_dim\], floating-point; got shape \(5, 3, 4\)"),
        ((Q.long(), Q, Q, Q), r"floating-point; got .* torch\.int64"),
        ((Q, Q, Q[:, :4], Q), r"value must be .* first three of query \(2, 5, 3, 4\); got \(2, 4, 3, 4\)"),
        ((Q, Q[..., :2], Q, Q), r"key must have query's shape \(2, 5, 3, 4\); got \(2, 5, 3, 2\)"),
        ((Q, Q, Q, Q[:1]), r"log_gate must have query's shape \(2, 5, 3, 4\); got \(1, 5, 3, 4\)"),
        ((Q, Q, Q.to("meta"), Q), "value is on meta and query on cpu; move"),
        ((Q, Q.double(), Q, Q), "key is torch.float64 and query torch.float32; convert"),
        ((Q, Q, Q, Q.bool()), "log_gate must be floating-point, of any precision; got torch.bool"),
    ],
)
def test_bad_input(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(*inputs)


def test_bad_input_of_the_other_direction() -> None:
    with pytest.raises(ValueError, match="log_gate_backward must have query's shape"):
        bidirectional_gated_linear_attention(Q, Q, Q, Q, Q[:, 1:])


@in_each_direction
def test_gradients_by_differences(directions: int) -> None:
    inputs, _ = make_inputs(Case(5, heads=1, head_dim=2, value_dim=3, batch=1), directions)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(FUNCTIONS[directions], leaves)


@in_each_direction
def test_functional_transforms_take_plain_operators(directions: int) -> None:
    inputs, _ = make_inputs(CASES["primes"], directions)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    expected = torch.func.jvp(attend_step_by_step, tuple(inputs), tangents)
    results = torch.func.jvp(FUNCTIONS[directions], tuple(inputs), tangents)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(
        torch.func.grad(lambda q: FUNCTIONS[directions](q, *inputs[1:]).square().sum())(inputs[0]),
        torch.func.grad(lambda q: attend_step_by_step(q, *inputs[1:]).square().sum())(inputs[0]),
    )


@in_each_direction
def test_operators_pass_opcheck(directions: int, implementation: str) -> None:
    inputs, grad = make_inputs(Case(7, head_dim=4, value_dim=4), directions)
    tensors = [tensor.float().requires_grad_() for tensor in inputs] + [None] * (2 - directions)
    torch.library.opcheck(torch.ops.mixerzoo.gated_linear_attention.default, (*tensors, 0.5))
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    arguments = (grad.float(), *detached, 0.5)
    torch.library.opcheck(torch.ops.mixerzoo.gated_linear_attention_backward.default, arguments)


class Attention(torch.nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return FUNCTIONS[len(inputs) - 3](*inputs, scale=0.5)


def test_compiled_graphs_hold_the_operator_and_give_equal_gradients() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    inputs, grad = make_inputs(CASES["primes"], 2)
    inputs, grad = [tensor.float() for tensor in inputs], grad.float()
    torch.compile(Attention(), backend=backend, fullgraph=True)(*inputs)
    assert seen[0].count("mixerzoo.gated_linear_attention") == 1
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (37, 21):
        part = [tensor[:, :tokens] for tensor in inputs]
        results = run(compiled, part, grad[:, :tokens])
        for a, b in zip(results, run(Attention(), part, grad[:, :tokens]), strict=True):
            torch.testing.assert_close(a, b)


@torch.no_grad()
def test_exported_graphs_hold_standard_operators_alone_and_take_any_number_of_tokens() -> None:
    inputs, _ = make_inputs(CASES["several times a chunk"], 2)
    inputs = [tensor.float() for tensor in inputs]
    size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = tuple(torch.cat([tensor, tensor]) for tensor in inputs)
    program = torch.export.export(Attention(), example, dynamic_shapes=((size,) * 5,))
    assert not [node for node in program.graph.nodes if "mixerzoo" in str(node.target)]
    for tokens in (2, 31, 64, 130):
        part = [tensor[:, :tokens] for tensor in inputs]
        torch.testing.assert_close(program.module()(*part), Attention()(*part), atol=1e-5, rtol=1e-4)


def test_autocast_keeps_the_gates() -> None:
    inputs, _ = make_inputs(CASES["vig"], 2)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bidirectional_gated_linear_attention(*leaves)
        assert out.dtype == torch.bfloat16
        halves = [tensor.bfloat16() for tensor in leaves[:3]]
        assert torch.equal(bidirectional_gated_linear_attention(*halves, *leaves[3:]), out)
        assert bidirectional_gated_linear_attention(*inputs).dtype == torch.float64
    out.float().sum().backward()
    assert {leaf.grad.dtype for leaf in leaves if leaf.grad is not None} == {torch.float32}


def test_memory_and_time_are_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the elements of all that the operators allocate, forward and backward."""

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                self.elements += tensor.numel() if isinstance(tensor, Tensor) else 0
            return out

    counts = []
    for tokens in (256, 1024):
        inputs, grad = make_inputs(Case(tokens, heads=1, batch=1), 2)
        with Counting() as counting, torch.no_grad():
            gates = [(inputs[3], _plain.LATER), (inputs[4], _plain.EARLIER)]
            _plain.forward(*inputs[:3], gates, 1.0)
            _plain.backward(grad, *inputs[:3], gates, 1.0)
        counts.append(counting.elements)
    assert counts[1] < 4.2 * counts[0]
