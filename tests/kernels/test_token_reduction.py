"""Token reduction against its definitions, token by token in float64, and the official results, by every
implementation."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixerzoo.kernels.token_reduction import (
    _native,
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
from torch.nn import functional as F

RECORDS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "goldens" / "token_ops.json").read_text())
TOME, EVIT = RECORDS["tome"]["bipartite_soft_matching"], RECORDS["evit"]["block"]
ATTENTIONS = {"row": attention_with_class_row, "sums": attention_with_column_sums}


def take_triton_if_asked(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        request.getfixturevalue("triton_interpreter")
    return request.param


@pytest.fixture(params=["plain", pytest.param("triton", marks=pytest.mark.slow)])
def attention_implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation of attention that a CPU tensor can meet."""
    return take_triton_if_asked(request)


@pytest.fixture(params=["plain", "native", pytest.param("triton", marks=pytest.mark.slow)])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation that a CPU tensor can meet."""
    if request.param == "plain":
        monkeypatch.setattr(_native, "is_available", lambda: False)
    elif request.param == "native" and not _native.is_available():
        pytest.skip("no compiled kernels: installed without a C++ compiler")
    return take_triton_if_asked(request)


# Definitions, each step a loop


def match_by_loops(metric: Tensor, r: int, num_prefix: int) -> Tensor:
    tokens = metric.shape[1]
    even = [n for n in range(num_prefix, tokens) if n % 2 == 0]
    odd = [n for n in range(num_prefix, tokens) if n % 2 == 1]
    slots = []
    for image in F.normalize(metric, dim=-1):
        partner = {n: max(odd, key=lambda m: (float(image[n] @ image[m]), -m)) for n in even} if odd else {}
        ranked = sorted(partner, key=lambda n: (-float(image[n] @ image[partner[n]]), n))
        merging = set(ranked[: min(r, (tokens - num_prefix) // 2)])
        stay = [*range(num_prefix), *(n for n in even if n not in merging), *odd]
        slots.append([stay.index(partner[n] if n in merging else n) for n in range(tokens)])
    return torch.tensor(slots)


def merge_by_loops(x: Tensor, slot: Tensor, length: int, size: Tensor) -> tuple[Tensor, Tensor]:
    rows, totals = [], []
    for b in range(x.shape[0]):
        for s in range(length):
            members = [n for n in range(x.shape[1]) if slot[b, n] == s]
            total = torch.stack([size[b, n] for n in members]).sum()
            rows.append(torch.stack([x[b, n] * size[b, n] for n in members]).sum(0) / total)
            totals.append(total)
    return torch.stack(rows).view(-1, length, x.shape[2]), torch.stack(totals).view(-1, length)


def keep_by_loops(x: Tensor, score: Tensor, keep: int, num_prefix: int, fuse: bool) -> tuple[Tensor, Tensor]:
    kept, slot = [], torch.full(x.shape[:2], -1)
    for b in range(x.shape[0]):
        values = score[b].tolist()
        ranked = sorted(range(score.shape[1]), key=lambda n: (-values[n], n))
        chosen = [*range(num_prefix), *(num_prefix + n for n in ranked[:keep])]
        slot[b, chosen] = torch.arange(len(chosen))
        rows = [x[b, n] for n in chosen]
        if fuse:
            rows.append(sum((score[b, n] * x[b, num_prefix + n] for n in ranked[keep:]), torch.zeros_like(x[b, 0])))
        kept.append(torch.stack(rows) if rows else x[b, :0])
    return torch.stack(kept), slot


def attend_by_matrix(
    kind: str, q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    matrix = (logits if log_size is None else logits + log_size[:, None, None]).softmax(-1)
    return matrix @ v, matrix[:, :, 0] if kind == "row" else matrix.sum(2)


def drawn(name: str, *shape: int) -> Tensor:
    stream = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    return torch.from_numpy(stream.standard_normal(shape)).float()


def error(got: Tensor, want: dict[str, Any]) -> float:
    """The largest deviation from what was recorded, as a part of its largest magnitude."""
    assert list(got.shape) == want["shape"]
    values = got.detach().double().flatten()
    samples = torch.tensor(want["samples"], dtype=torch.float64)
    places = torch.linspace(0, values.numel() - 1, len(samples)).long()
    off = (values[places] - samples).abs().max(), (values.mean() - want["mean"]).abs()
    return max(map(float, (*off, (values.std(unbiased=False) - want["std"]).abs()))) / want["absmax"]


# Official results


@pytest.mark.parametrize("name", TOME)
def test_official_merging(name: str, implementation: str, poisoned_memory: None) -> None:
    record = TOME[name]
    if implementation == "triton" and name not in ("cls_r13", "dist_max", "plain_odd_r20"):
        pytest.skip("minutes in the interpreter")
    batch, tokens, dim, r = (record[key] for key in ("B", "T", "C", "r"))
    prefix = record["class_token"] + record["distill_token"]
    metric = drawn(f"tome.{name}.metric", batch, tokens, dim) + 0.7 * drawn(f"tome.{name}.shared", batch, 1, dim)
    x = drawn(f"tome.{name}.x", batch, tokens, 48)
    slot, length = bipartite_match(metric, r, prefix), merged_length(tokens, r, prefix)
    assert tokens - length == record["r_effective"]
    merged, size = merge_tokens(x, slot, length)
    group = torch.tensor(record["group_of_input_token"])
    if prefix == 0:  # upstream leaves the tokens that stay unsorted then; here they are ascending
        assert torch.equal(slot[:, :, None] == slot[:, None], group[:, :, None] == group[:, None])
        return
    assert torch.equal(slot, group)
    assert size.tolist() == record["size"]
    assert error(merged, record["merge_wavg"]) < 1e-6
    if prefix == 1:  # upstream's way back is wrong with a distillation token
        assert error(unmerge_tokens(merged, slot), record["unmerge_of_merge_wavg"]) < 1e-6
    second = record["second"]
    again = bipartite_match(drawn(f"tome.{name}.metric2", batch, length, dim), second["r"], prefix)
    merged, size = merge_tokens(merged, again, merged_length(length, second["r"], prefix), size)
    assert error(merged, second["merge_wavg"]) < 1e-6
    assert size.tolist() == second["size"]
    assert again.gather(1, slot).tolist() == second["group_of_input_token"]


class Projections(torch.nn.Module):
    """Those around an attention of four heads, for tokens of 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, [3, 4, 16]).permute(2, 0, 3, 1, 4)

    def join(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_official_proportional_attention(load_drawn: Callable[..., None], attention_implementation: str) -> None:
    record = RECORDS["tome"]["proportional_attention"]
    attention = Projections()
    load_drawn(attention, "tome_attn.")
    q, k, v = attention.heads(drawn("tome.attn.x", 2, 40, 64))
    log_size = torch.tensor(record["size_values"]).float().log()
    assert error(attention.join(attention_with_class_row(q, k, v, log_size)[0]), record["out"]) < 1e-6
    assert error(attention.join(attention_with_column_sums(q, k, v)[0]), record["out_no_size"]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", EVIT)
def test_official_pruning(name: str, load_drawn: Callable[..., None], implementation: str) -> None:
    """EViT's attention, choice and fused token."""
    record = EVIT[name]
    if implementation == "triton" and record["N"] > 50:
        pytest.skip("minutes in the interpreter")
    attention, norm = Projections(), torch.nn.LayerNorm(64, eps=1e-6)
    load_drawn(attention, "evit_block.attn.")
    load_drawn(norm, "evit_block.norm1.")
    x = drawn(f"evit.{name}.x", record["B"], record["N"], 64)
    out, row = attention_with_class_row(*attention.heads(norm(x)))
    score = row[:, :, 1:].mean(1)
    assert error(score, record["cls_attn_mean_over_heads"]) < 1e-5
    kept, slot = keep_tokens(x + attention.join(out), score, record["left_tokens"], fuse=record["fuse"])
    assert error(kept, record["after_attention_and_fusion_before_mlp"]) < 1e-5
    order = torch.tensor(record["idx"])
    assert torch.equal(slot[:, 1:].gather(1, order), torch.arange(1, order.shape[1] + 1).expand(order.shape))
    assert ((slot >= 0).sum(1) == 1 + order.shape[1]).all()
    if record["fuse"]:
        assert error(kept[:, -1], record["fused_token"]) < 1e-5


# Every implementation against the definitions

SHAPES = {  # batch, heads, tokens, prefix, r, channels of the metric, of the tokens
    "one pair": (1, 1, 3, 1, 1, 1, 1),
    "primes": (2, 3, 17, 1, 5, 7, 13),
    "as many as can be, no prefix": (1, 1, 16, 0, 99, 16, 16),
    "odd, no prefix": (2, 1, 19, 0, 4, 3, 5),
    "registers": (1, 2, 37, 5, 9, 8, 130),
    "distillation": (2, 1, 34, 2, 33, 4, 8),
    "several tiles": (1, 1, 131, 1, 20, 16, 24),
}


@pytest.mark.parametrize("name", SHAPES)
def test_merging(name: str, implementation: str, poisoned_memory: None) -> None:
    batch, heads, tokens, prefix, r, dim, channels = SHAPES[name]
    keys = torch.randn(batch, tokens, heads, dim, dtype=torch.float64).transpose(1, 2) + 0.3
    expected = match_by_loops(keys.mean(1), r, prefix)
    slot = bipartite_match(keys.float(), r, prefix)
    length = merged_length(tokens, r, prefix)
    assert torch.equal(slot, expected)
    assert torch.equal(bipartite_match(keys.mean(1).float(), r, num_prefix=prefix), expected)
    assert slot.max() == length - 1

    x = torch.randn(batch, channels, tokens, dtype=torch.float64).mT.requires_grad_()
    size = torch.randint(1, 5, (batch, tokens)).double().requires_grad_()
    grad = torch.randn(batch, length, channels).double()
    for sized in (True, False):
        leaf, leaf_size = (t.detach().float().requires_grad_() for t in (x, size))
        right = merge_by_loops(x, slot, length, size if sized else torch.ones_like(size))
        got = merge_tokens(leaf, slot, length, leaf_size if sized else None)
        assert got[0].is_contiguous() and got[1].is_contiguous()
        wanted = torch.autograd.grad((right[0] * grad).sum() + right[1].square().sum(), [x, size][: 1 + sized])
        loss = (got[0] * grad.float()).sum() + got[1].square().sum()
        received = torch.autograd.grad(loss, [leaf, leaf_size][: 1 + sized])
        for a, b in zip((*got, *received), (*right, *wanted), strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-6)
        alone = slot[:, :prefix, None].expand(-1, -1, channels)
        assert torch.equal(got[0].gather(1, alone), leaf[:, :prefix]), "bit by bit"


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_keeping(name: str, fuse: bool, implementation: str, poisoned_memory: None) -> None:
    batch, _, tokens, prefix, _, _, channels = SHAPES[name]
    candidates = tokens - prefix
    x = torch.randn(batch, channels, tokens, dtype=torch.float64).mT.requires_grad_()
    score = torch.rand(batch, candidates, dtype=torch.float64).mul(8).round().div(8).requires_grad_()  # many ties
    for keep in (0, 1, candidates // 2, candidates):
        right = keep_by_loops(x, score, keep, prefix, fuse)
        leaf, leaf_score = (t.detach().float().requires_grad_() for t in (x, score))
        got = keep_tokens(leaf, leaf_score, keep, prefix, fuse)
        assert torch.equal(got[1], right[1])
        torch.testing.assert_close(got[0].double(), right[0], atol=1e-5, rtol=1e-5)
        if got[0].numel() == 0:
            continue
        grad = torch.randn_like(got[0])
        leaves = ((leaf, x), (leaf_score, score)) if fuse else ((leaf, x),)
        given = torch.autograd.grad(got[0], [a for a, _ in leaves], grad, allow_unused=True)
        wanted = torch.autograd.grad(right[0], [b for _, b in leaves], grad.double(), allow_unused=True)
        for a, b in zip(given, wanted, strict=True):
            if a is not None and b is not None:
                torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
            else:
                assert all(t is None or not t.any() for t in (a, b))


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 37, 7), (1, 1, 64, 16), (1, 2, 131, 20)], ids=str)
def test_attention(
    kind: str, shape: tuple[int, ...], sized: bool, attention_implementation: str, poisoned_memory: None
) -> None:
    batch, heads, tokens, dim = shape
    q, k, v = torch.randn(3, batch, tokens, heads, dim, dtype=torch.float64).transpose(2, 3)
    leaves = [q, k, v, torch.randint(1, 6, (batch, tokens)).double().log()][: 4 if sized else 3]
    exact = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    given = [leaf.detach().float().requires_grad_() for leaf in leaves]
    right = attend_by_matrix(kind, *exact[:3], exact[3] if sized else None, 0.4)
    got = ATTENTIONS[kind](*given[:3], given[3] if sized else None, 0.4)
    grads = torch.randn(shape).double(), torch.randn(shape[:3]).double()
    wanted = torch.autograd.grad(right, exact, grads)
    received = torch.autograd.grad(got, given, [g.float() for g in grads])
    for a, b in zip((*got, *received), (*right, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)


def test_going_back(implementation: str) -> None:
    x, canvas = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 6, 3, requires_grad=True)
    slot = torch.tensor([[0, 3, 1, -1, 3, 2], [-1, -1, 0, 0, 0, 1]])
    spread = unmerge_tokens(x, slot)
    refreshed = scatter_tokens(x, slot, canvas)
    for b in range(2):
        for n in range(6):
            s = int(slot[b, n])
            assert torch.equal(spread[b, n], x[b, s] if s >= 0 else torch.zeros(3))
            assert torch.equal(refreshed[b, n], x[b, s] if s >= 0 else canvas[b, n])
    grad = torch.randn_like(refreshed)
    grad_x, grad_canvas = torch.autograd.grad(refreshed, (x, canvas), grad)
    assert torch.equal(grad_canvas, torch.where(slot[..., None] < 0, grad, 0.0))
    expected = torch.stack([torch.stack([grad[b][slot[b] == s].sum(0) for s in range(4)]) for b in range(2)])
    torch.testing.assert_close(grad_x, expected)
    torch.testing.assert_close(torch.autograd.grad(spread, x, grad)[0], expected)


# Corners


def test_equal_values_go_to_the_lowest_index(implementation: str) -> None:
    slot = bipartite_match(torch.ones(1, 12, 4), 2)
    assert slot.tolist() == [[0, 4, 4, 5, 4, 6, 1, 7, 2, 8, 3, 9]]
    _, slot = keep_tokens(torch.randn(1, 6, 2), torch.tensor([[0.5, 1.0, 0.5, 1.0, 0.5]]), 3)
    assert slot.tolist() == [[0, 3, 1, -1, 2, -1]]


@pytest.mark.parametrize(("tokens", "prefix", "r"), [(7, 1, 0), (2, 1, 5), (1, 1, 3), (1, 0, 2), (4, 4, 1)])
def test_nothing_to_merge_moves_nothing(tokens: int, prefix: int, r: int, implementation: str) -> None:
    slot = bipartite_match(torch.randn(2, tokens, 3), r, prefix)
    assert slot.tolist() == [list(range(tokens))] * 2
    x = torch.randn(2, tokens, 5)
    merged, size = merge_tokens(x, slot, merged_length(tokens, r, prefix))
    assert torch.equal(merged, x) and torch.equal(size, torch.ones(2, tokens))


def test_an_empty_batch(implementation: str) -> None:
    x = torch.empty(0, 9, 4)
    slot = bipartite_match(x, 2)
    assert slot.shape == (0, 9)
    assert merge_tokens(x, slot, 7)[0].shape == (0, 7, 4)
    assert keep_tokens(x, x[:, 1:, 0], 3, fuse=True)[0].shape == (0, 5, 4)
    assert unmerge_tokens(x[:, :7], slot).shape == (0, 9, 4)
    q = torch.empty(0, 2, 9, 4)
    assert attention_with_class_row(q, q, q)[1].shape == (0, 2, 9)
    assert attention_with_column_sums(q, q, q)[1].shape == (0, 2, 9)


def test_dropped_tokens_are_not_merged(implementation: str) -> None:
    x = torch.tensor([[[1.0], [2.0], [4.0], [torch.nan]], [[torch.inf], [1.0], [3.0], [5.0]]])
    slot = torch.tensor([[0, 1, 0, -1], [-1, 1, 0, 0]])
    merged, size = merge_tokens(x, slot, 2, torch.tensor([[3.0, 1.0, 1.0, 9.0], [9.0, 2.0, 1.0, 3.0]]))
    torch.testing.assert_close(merged, torch.tensor([[[1.75], [2.0]], [[4.5], [1.0]]]))
    assert size.tolist() == [[4, 1], [4, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_slot_behind_the_end_is_an_error(dtype: torch.dtype) -> None:
    x, slot = torch.randn(2, 2, 4, dtype=dtype), torch.tensor([[0, 2], [0, 1]])
    with pytest.raises(ValueError, match="below length=2, or -1 for dropped tokens; got slots up to 2"):
        merge_tokens(x, slot, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype, implementation: str) -> None:
    x = torch.randn(2, 21, 8).to(dtype)
    slot = bipartite_match(x, 9)
    assert torch.equal(slot, bipartite_match(x.float(), 9))
    size = torch.randint(1, 400, (2, 21)).float()
    for got, right in zip(merge_tokens(x, slot, 12, size), merge_tokens(x.double(), slot, 12, size), strict=True):
        torch.testing.assert_close(got, right.to(got.dtype))
    score = torch.rand(2, 20)
    kept, slot = keep_tokens(x, score, 5, fuse=True)
    right, right_slot = keep_tokens(x.double(), score.double(), 5, fuse=True)
    assert torch.equal(slot, right_slot)
    torch.testing.assert_close(kept, right.to(dtype))
    q, k, v = torch.randn(3, 1, 2, 21, 8).to(dtype)
    for kind, attend in ATTENTIONS.items():
        out, evidence = attend(q, k, v)
        right, right_evidence = attend_by_matrix(kind, q.double(), k.double(), v.double(), None)
        assert out.dtype == dtype and evidence.dtype == torch.float32
        torch.testing.assert_close(evidence.double(), right_evidence, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.double(), right, atol=2e-2, rtol=2e-2)


def test_autocast_leaves_decisions_in_float32(implementation: str) -> None:
    q, k, v = torch.randn(3, 2, 2, 21, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for attend in ATTENTIONS.values():
            out, evidence = attend(q, k, v, torch.rand(2, 21))
            assert out.dtype == torch.bfloat16 and evidence.dtype == torch.float32
        rounded = [x.bfloat16().double() for x in (q, k, v)]
        exact = attend_by_matrix("row", *rounded, None)[1]
        torch.testing.assert_close(attention_with_class_row(q, k, v)[1].double(), exact, atol=1e-6, rtol=1e-5)
        assert torch.equal(bipartite_match(k, 5), match_by_loops(k.mean(1).double(), 5, 1))
        score = torch.rand(2, 20)
        fused = keep_tokens(out[:, 0].float(), score, 4, fuse=True)[0]
    torch.testing.assert_close(fused, keep_tokens(out[:, 0].float(), score, 4, fuse=True)[0])


def test_gradients_by_differences() -> None:
    x, canvas = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 9, 3).double()
    size = 1 + torch.rand(2, 9, dtype=torch.float64).requires_grad_()
    slot = bipartite_match(x, 3)
    score = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, size: merge_tokens(x, slot, 6, size), (x, size))
    assert torch.autograd.gradcheck(lambda x: unmerge_tokens(x[:, :6], slot), (x,))
    assert torch.autograd.gradcheck(lambda x, score: keep_tokens(x, score, 3, fuse=True)[0], (x, score))
    dropped = keep_tokens(x, score, 3)[1]
    leaves = x, canvas.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, canvas: scatter_tokens(x[:, :4], dropped, canvas), leaves)
    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    log_size = torch.rand(1, 5, dtype=torch.float64, requires_grad=True)
    for attend in ATTENTIONS.values():
        assert torch.autograd.gradcheck(attend, (q, k, v, log_size))


def test_functional_transforms_take_plain_operators() -> None:
    x, tangent = torch.randn(2, 2, 9, 3)
    slot, score = bipartite_match(x, 3), torch.rand(2, 8)
    for function in (lambda x: merge_tokens(x, slot, 6)[0], lambda x: keep_tokens(x, score, 3, fuse=True)[0]):
        got = torch.func.jvp(function, (x,), (tangent,))
        torch.testing.assert_close(got[1], function(tangent))  # both are linear
        torch.testing.assert_close(got[0], function(x))


@pytest.mark.parametrize(("tokens", "num_prefix"), [(9, 1), (10, 0), (7, 2)])
def test_matching_under_vmap(tokens: int, num_prefix: int) -> None:
    x = torch.randn(3, tokens, 4)
    each = torch.func.vmap(lambda one: bipartite_match(one[None], 2, num_prefix)[0])(x)
    assert torch.equal(each, bipartite_match(x, 2, num_prefix))


@pytest.mark.slow
def test_operators_pass_opcheck(implementation: str) -> None:
    operators = torch.ops.mixerzoo
    x, slot = torch.randn(2, 9, 4, requires_grad=True), bipartite_match(torch.randn(2, 9, 4), 3)
    size, score = torch.rand(2, 9, requires_grad=True), torch.rand(2, 8, requires_grad=True)
    torch.library.opcheck(operators.match_tokens.default, (x.detach(), 3, 1))
    torch.library.opcheck(operators.merge_tokens.default, (x, slot, 6, size))
    torch.library.opcheck(operators.merge_tokens.default, (x, slot, 6, None))
    torch.library.opcheck(operators.unmerge_tokens.default, (x, slot))
    torch.library.opcheck(operators.keep_tokens.default, (x, score, 3, 1, True))
    if implementation != "triton":
        return
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    inputs = q, k, v, torch.rand(1, 3, requires_grad=True), 0.5, True
    torch.library.opcheck(operators.attention_with_evidence.default, inputs)
    saved = [t.detach() for t in (*inputs[:4], *operators.attention_with_evidence(*inputs))]
    arguments = (torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3), *saved, 0.5, True)
    torch.library.opcheck(operators.attention_with_evidence_backward.default, arguments)


def test_results_do_not_depend_on_the_run(implementation: str) -> None:
    x, slot = torch.randn(2, 40, 8, requires_grad=True), torch.randint(0, 3, (2, 40))
    grad = torch.randn(2, 3, 8)
    first, again = (
        (merged, *torch.autograd.grad(merged, x, grad)) for merged in (merge_tokens(x, slot, 3)[0] for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
