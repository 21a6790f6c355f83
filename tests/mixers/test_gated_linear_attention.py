"""GatedLinearAttention2d against its formula, map by map; scripting, precision, arguments."""

from __future__ import annotations

import io

import pytest
import torch
from mixerzoo.mixers import GatedLinearAttention2d
from torch import Tensor, nn
from torch.nn import functional as F


def make(act_layer: type[nn.Module] = nn.SiLU) -> GatedLinearAttention2d:
    mixer = GatedLinearAttention2d(24, 3, gate_rank=5, act_layer=act_layer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (parameter.ndim == 1))
    return mixer.eval()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@torch.no_grad()
def define(mixer: GatedLinearAttention2d, x: Tensor, act_layer: type[nn.Module]) -> Tensor:
    """The formula with the matrix of all pairs of tokens written out, in float64."""
    mixer, act = mixer.double(), act_layer()
    local = act(F.conv2d(x.double().permute(0, 3, 1, 2), mixer.conv.weight, padding=1, groups=24)).flatten(2).mT
    query, key, value = (mixer.qkv.weight @ local.mT).mT.split([12, 12, 24], -1)
    down, up = mixer.decay
    log_gates = F.logsigmoid(local @ down.weight.T @ up.weight.T + up.bias) / 16
    tokens = range(local.shape[1])
    out = torch.zeros_like(value)
    for head in range(3):
        q, k, v = (
            query[..., 4 * head : 4 * head + 4],
            key[..., 4 * head : 4 * head + 4],
            value[..., 8 * head :][..., :8],
        )
        there, back = (log_gates[..., first + 4 * head :][..., :4] for first in (0, 12))
        for t in tokens:
            for s in tokens:
                forward = there[:, s + 1 : t + 1].sum(1).exp() * (s <= t)
                backward = back[:, t:s].sum(1).exp() * (s >= t)
                score = 0.5 * (q[:, t] * k[:, s] * (forward + backward) / 2).sum(-1, keepdim=True)  # 4 ** -0.5
                out[:, t, 8 * head : 8 * head + 8] += score * v[:, s]
    gate = (local @ mixer.gate.weight.T + mixer.gate.bias).sigmoid().unflatten(-1, (3, 8))
    attended, near = (
        rms(out.unflatten(-1, (3, 8)), mixer.norm.weight),
        rms(local.unflatten(-1, (3, 8)), mixer.local_norm.weight),
    )
    mixed = act((gate * attended + (1 - gate) * near).flatten(2))
    return (mixed @ mixer.proj.weight.T).view(x.shape)


@pytest.mark.parametrize("act_layer", [nn.SiLU, nn.Identity])
@torch.no_grad()
def test_equals_the_formula(act_layer: type[nn.Module]) -> None:
    mixer, x = make(act_layer), torch.randn(2, 3, 5, 24)
    got = mixer(x)
    want = define(mixer, x, act_layer)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@torch.no_grad()
def test_the_second_half_of_the_gates_is_of_the_other_direction() -> None:
    """A map of one row, where turning it around changes the roles of the directions and nothing else."""
    mixer, x = make(), torch.randn(1, 1, 9, 24)
    mixer.conv.weight.copy_(mixer.conv.weight + mixer.conv.weight.flip(3))
    turned = mixer(x.flip(2)).flip(2)
    assert not torch.allclose(turned, mixer(x), atol=1e-3)
    for tensor in (mixer.decay[1].weight, mixer.decay[1].bias):
        tensor.copy_(tensor.roll(12, 0))
    torch.testing.assert_close(mixer(x), turned)


def test_scripted_and_saved() -> None:
    mixer, file = make(), io.BytesIO()
    torch.jit.save(torch.jit.script(mixer), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in ((4, 6), (7, 3)):
        x = torch.randn(2, *size, 24, requires_grad=True)
        torch.testing.assert_close(scripted(x), mixer(x))
        grads = [torch.autograd.grad(module(x).square().sum(), x)[0] for module in (mixer, scripted)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    mixer, x = make(), torch.randn(2, 6, 7, 24)
    want = mixer(x)
    with torch.autocast("cpu", dtype=dtype):
        cast = mixer(x)
    for got in (cast, mixer.to(dtype)(x.to(dtype))):
        assert got.dtype == dtype
        assert (got.float() - want).norm() < 8 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 20, "num_heads": 4}, "multiple of 2 . num_heads; got dim 20 and num_heads 4"),
        ({"dim": 20, "num_heads": 0}, "multiple of 2 . num_heads; got dim 20 and num_heads 0"),
        ({"dim": 8, "num_heads": 2, "gate_rank": 0}, "gate_rank must be at least 1; got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedLinearAttention2d(**arguments)


@pytest.mark.parametrize("shape", [(2, 9, 24), (2, 3, 3, 12), (2, 0, 3, 24)], ids=str)
def test_bad_maps(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needed \[B, H, W, 24 channels\] with H, W >= 1; got shape"):
        make()(torch.zeros(shape))
