"""DynamicViT's predictor, decisions, counts and masked attention against the authors' records and by definition."""

import importlib.util
import zlib

import numpy as np
import pytest
import torch
from mixerzoo.mixers.token_predictor import PredictorLG, attention_under_policy, draw_decision, kept_count
from mixerzoo.mixers.token_reduction import _fraction, share_of
from mixerzoo.vision._openvino import run_openvino, write_openvino
from torch import Tensor, nn


def normal(name: str, *shape: int) -> Tensor:
    stream = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    return torch.from_numpy(stream.standard_normal(shape)).float()


def fill(golden, module: nn.Module, prefix: str) -> None:
    """The recorded weights, which their official names seed."""
    gold = golden("token_ops")
    gold.record = {"state": {prefix + key: [*w.shape] for key, w in module.state_dict().items()}}
    module.load_state_dict({key.removeprefix(prefix): w for key, w in gold.checkpoint().items()})


@pytest.fixture
def official(golden):
    gold = golden("token_ops")
    gold.record = gold.record["dynamicvit"]
    return gold


def check(golden, section: dict, **got: Tensor) -> None:
    gold = golden("token_ops")
    gold.record = {"outputs": section}
    assert all(gold.error(name, tensor) < 5e-6 for name, tensor in got.items())


@torch.no_grad()
def test_official_scores_and_choices(golden, official) -> None:
    predictor = PredictorLG(64).eval()
    fill(golden, predictor, "dyvit_predictor.")
    x = normal("dyvit.x", 2, 196, 64)
    policy = (normal("dyvit.policy", 2, 196, 1) > -0.3).float().squeeze(2)
    plain = predictor(x)
    section = official.record["predictor"]
    check(golden, section, logp_all_ones=plain, logp_masked=predictor(x, policy))
    assert torch.equal(predictor(x, torch.ones(2, 196)).argsort(1), plain.argsort(1))
    order = plain[:, :, 0].argsort(dim=1, descending=True, stable=True)
    for ratio, choice in official.record["keep"].items():
        count = kept_count(196, float(ratio))
        assert count == choice["num_keep"] and order[:, :count].tolist() == choice["keep_idx"]


def test_official_masked_attention(golden, official) -> None:
    section = official.record["masked_attention"]
    layers = nn.ModuleDict({"qkv": nn.Linear(64, 192), "proj": nn.Linear(64, 64)})
    fill(golden, layers, "dyvit_attn.")
    x = normal("dyvit.attn.x", 2, 40, 64)
    policy = torch.cat([torch.ones(2, 1), (normal("dyvit.attn.policy", 2, 39, 1) > 0).float().squeeze(2)], 1)
    query, key, value = layers["qkv"](x).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    out = layers["proj"](attention_under_policy(query, key, value, policy).transpose(1, 2).flatten(2))
    check(golden, section, out=out)
    # With the identity for values the output is the attention matrix: the record's logits as they are.
    logits = normal("dyvit.attn.logits", 2, 4, 40, 40) * 40**0.5
    identity = torch.eye(40).expand(2, 4, 40, 40)
    check(golden, section, softmax_with_policy=attention_under_policy(logits, identity, identity, policy))


def test_what_a_policy_of_ones_and_of_zeros_does() -> None:
    query, key, value = torch.randn(3, 2, 2, 9, 8).unbind(0)
    full = nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(attention_under_policy(query, key, value, torch.ones(2, 9)), full, atol=1e-5)
    alone = attention_under_policy(query, key, value, torch.zeros(2, 9), eps=0.0)
    assert torch.allclose(alone, value, atol=1e-6)  # each token sees itself and no other
    predictor, x = PredictorLG(8), torch.randn(2, 9, 8)
    assert predictor(x, torch.zeros(2, 9)).isfinite().all()


def test_the_mean_counts_kept_tokens_only() -> None:
    predictor, x = PredictorLG(16), torch.randn(2, 12, 16)
    policy = torch.zeros(2, 12)
    policy[:, :5] = 1
    kept = predictor(x[:, :5])
    assert torch.allclose(predictor(x, policy)[:, :5], kept, atol=1e-6)
    other = x.clone()
    other[:, 5:] = 7.0
    assert torch.allclose(predictor(other, policy)[:, :5], kept, atol=1e-6)


def test_decisions() -> None:
    scores = torch.randn(4, 500, 2, requires_grad=True)
    log_probabilities = scores.log_softmax(-1)
    decision = draw_decision(log_probabilities)
    assert set(decision.unique().tolist()) == {0.0, 1.0}
    (decision * torch.randn(4, 500)).sum().backward()
    assert scores.grad is not None and scores.grad.ne(0).any(dim=-1).float().mean() > 0.9
    drawn = torch.stack([draw_decision(log_probabilities.detach()) for _ in range(200)]).mean(0)
    expected = log_probabilities[:, :, 0].detach().exp()
    assert (drawn - expected).abs().mean() < 0.04  # drawn by their probability
    previous = (torch.rand(4, 500) > 0.5).float()
    assert not (draw_decision(log_probabilities, previous) * (1 - previous)).any()


def test_counts() -> None:
    assert kept_count(196, 0.7 - 0.2) == 97 and kept_count(196, 0.7**2) == 96 and kept_count(10, 0.7) == 7
    assert kept_count(1, 0.3) == kept_count(0, 0.3) + 0 == 1
    for ratio in (0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.7 - 0.2, 0.7 - 0.4, 0.9 - 0.2, 0.7**2, 0.7**3, 0.5**3, 1.0):
        assert kept_count(196, ratio) == max(int(196 * ratio), 1), "as published"


RATES = [0.07, 0.28, 0.55, 0.7, 0.81, 0.7 - 0.2, 0.7**2, 1 / 3, 1e-6, 1.0]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("up", [False, True])
def test_fractions_of_exported_programs_are_exact_in_32_bits(rate: float, up: bool) -> None:
    numerator, denominator = _fraction(rate, up)
    most, offset = 2**15 - 1, denominator - 1 if up else 0
    assert most * numerator + offset < 2**31
    tokens = range(1, most + 1)
    assert [(n * numerator + offset) // denominator for n in tokens] == [share_of(n, rate, up) for n in tokens]


@pytest.mark.parametrize("rate", RATES)
def test_shares_are_what_they_are_called(rate: float) -> None:
    """Also where the product in floating point lies on the other side of a whole number: 0.55 * 20, 0.7 * 90."""
    for tokens in range(1, 1000):
        down, up = share_of(tokens, rate), share_of(tokens, rate, up=True)
        assert down / tokens <= rate < (down + 1) / tokens
        assert (up - 1) / tokens < rate <= up / tokens
    assert [share_of(20, 0.55, up=True), share_of(90, 0.7), share_of(100, 0.07, up=True)] == [11, 63, 7]


class Keep(nn.Module):
    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : kept_count(x.shape[1], self.ratio)], x[:, : share_of(x.shape[1], self.ratio, up=True)]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.7, 0.55, 0.7 - 0.2])
def test_exported_counts_are_the_same(ratio: float, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Keep(ratio), (torch.zeros(2, 30),), dynamic_shapes=(dynamic,))
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    assert onnx_program is not None
    onnx_program.save(tmp_path / "keep.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "keep.onnx", providers=["CPUExecutionProvider"])
    write_openvino(tmp_path / "keep.onnx", tmp_path / "keep.xml", {})  # it computes integers in 32 bits
    scripted = torch.jit.script(Keep(ratio))
    lengths = (10, 20, 49, 90, 100, 196, 200, 300, 360, 576, 1024, 4096, 32767)
    of_openvino = run_openvino(tmp_path / "keep.xml", [torch.zeros(1, tokens) for tokens in lengths])
    for tokens, by_openvino in zip(lengths, of_openvino, strict=True):
        x = torch.zeros(1, tokens)
        counts = [kept_count(tokens, ratio), share_of(tokens, ratio, up=True)]
        of_session = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for got in (program.module()(x), scripted(x), of_session, by_openvino):
            assert [part.shape[1] for part in got] == counts


def test_half_precision_decides_in_float32() -> None:
    predictor, x = PredictorLG(32).eval(), torch.randn(2, 50, 32)
    want = predictor(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predictor(x), want)
    assert predictor.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_arguments() -> None:
    with pytest.raises(ValueError, match="multiple of 4; got 30"):
        PredictorLG(30)
