"""Token reduction under compilers, exporters and TorchScript, and its messages about bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mixerzoo.kernels.token_reduction import (
    attention_with_class_row,
    attention_with_column_sums,
    bipartite_match,
    keep_tokens,
    merge_tokens,
    merged_length,
    scatter_tokens,
    unmerge_tokens,
)
from torch import Tensor


class Reducing(torch.nn.Module):
    """Everything once, as models use it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = x.unflatten(-1, [2, 4]).transpose(1, 2)
        size = torch.ones(x.shape[0], x.shape[1], device=x.device)
        out, _ = attention_with_column_sums(q, q, q, size.log())
        tokens = x + out.transpose(1, 2).flatten(2)
        slot = bipartite_match(q, 4, 1)
        merged, size = merge_tokens(tokens, slot, merged_length(x.shape[1], 4, 1), size)
        q = merged.unflatten(-1, [2, 4]).transpose(1, 2)
        _, row = attention_with_class_row(q, q, q, size.log())
        kept, kept_slot = keep_tokens(merged, row.mean(1)[:, 1:], merged.shape[1] // 2, 1, True)
        refreshed = scatter_tokens(kept, kept_slot, merged)
        return kept, refreshed, unmerge_tokens(merged, slot)


def test_torchscript() -> None:
    x = torch.randn(2, 21, 8)
    for a, b in zip(torch.jit.script(Reducing())(x), Reducing()(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@torch.no_grad()
def test_exported_graphs_hold_standard_operators_alone_and_take_any_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Reducing(), (torch.randn(2, 21, 8),), dynamic_shapes=(sizes,))
    assert not [node for node in program.graph.nodes if "mixerzoo" in str(node.target)]
    torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, tokens in ((1, 7), (3, 50), (2, 21)):
        x = torch.randn(batch, tokens, 8)
        expected = Reducing()(x)
        from_onnx = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for right, a, b in zip(expected, program.module()(x), from_onnx, strict=True):
            torch.testing.assert_close(a, right, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.as_tensor(b), right, atol=1e-5, rtol=1e-5)


def test_compilers_see_the_native_operators_on_the_cpu() -> None:
    """Matching and merging, which Inductor makes 10 % of a model slower; it fuses the rest with what is around."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(2, 21, 8)
    compiled = torch.compile(Reducing(), backend=backend, fullgraph=True)(x)
    assert {name for name in seen if "mixerzoo" in name} == {"mixerzoo.match_tokens", "mixerzoo.merge_tokens"}
    for a, b in zip(compiled, Reducing()(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compilers_see_the_operators_where_triton_runs(triton_interpreter: None) -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        seen.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch.compile(Reducing(), backend=backend, fullgraph=True)(torch.randn(1, 11, 8))
    for name in ("match_tokens", "merge_tokens", "keep_tokens", "attention_with_evidence"):
        assert f"mixerzoo.{name}" in seen[0]


# Bad input

X, SLOT, Q = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 3, 5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bipartite_match(X[0], 1), r"metric must be \[batch, tokens, dim\] or .*got shape \[5, 4\]"),
        (lambda: bipartite_match(SLOT[..., None], 1), "floating-point; got .*int64"),
        (lambda: bipartite_match(X, -1), "r, the number of tokens to merge, must be at least 0; got -1"),
        (lambda: merged_length(5, -2), "must be at least 0; got -2"),
        (lambda: bipartite_match(X, 1, 6), "num_prefix must be from 0 to the 5 tokens; got 6"),
        (lambda: merge_tokens(X, SLOT[:, :4], 3), r"slot must be int64 \[2, 5\].*got shape \[2, 4\]"),
        (lambda: merge_tokens(X, SLOT.int(), 3), "slot must be int64.*got shape.*int32"),
        (lambda: merge_tokens(X, SLOT, 0), "length, .*, must be at least 1; got 0"),
        (lambda: merge_tokens(X, SLOT, 3, SLOT), "size must be one number per token, floating-point.*int64"),
        (lambda: unmerge_tokens(X, SLOT[:1]), r"slot must be int64 \[2, tokens\].*got shape \[1, 5\]"),
        (lambda: unmerge_tokens(X[:, :2], SLOT + 2), "below length=2, or -1 for dropped tokens; got slots up to 2"),
        (lambda: scatter_tokens(X[:, :2], SLOT + 3, X), "below length=2, .*; got slots up to 3"),
        (lambda: attention_with_class_row(X, X, X), r"must be \[batch, heads, tokens, head_dim\].*got \[2, 5, 4\]"),
        (lambda: keep_tokens(X, X[..., 0], 2), r"score must be floating-point \[2, 4\], one number"),
        (lambda: keep_tokens(X, X[:, 1:, 0], 5), "keep must be from 0 to the 4 candidates; got 5"),
        (lambda: scatter_tokens(X[..., :3], SLOT, X), "x and canvas must share batch, dim and data type"),
        (lambda: scatter_tokens(X, SLOT, X.double()), "share batch, dim and data type.*float64"),
        (lambda: attention_with_class_row(Q, Q[:, :1], Q), "q, k and v must be .*, alike"),
        (lambda: attention_with_column_sums(Q, Q, Q, X), r"log_size must be \[2, 5\].*got \[2, 5, 4\]"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
