"""The visual Mambas and ViG train in half precision, at the learning rate that their authors publish for float32.

Their official code does not: scans gave NaN under autocast (Vim trains in float32 for that, hustvl/Vim#30). Here 200
steps on pictures of four classes are taken from the same weights with the same batches in float32 and under bfloat16
autocast. Both must learn, and agree: the smoothed losses may at no step differ by more than a share of the way that
float32's has come down. A run that does not learn, or learns something else because a sum or a state lost its digits,
leaves that band; so does one with a single NaN.
"""

from __future__ import annotations

from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, BATCH, SIDE, CLASSES = 200, 8, 32, 4
WINDOW = 20  # steps that are averaged
BAND = 0.15  # of the way from the first loss to zero
MODELS: dict[str, tuple[float, dict[str, Any]]] = {
    "vim_tiny": (1e-3, {"embed_dim": 48, "depth": 2, "patch_size": 8, "img_size": SIDE}),
    "vmamba_tiny_s1l8": (1e-3, {"dims": (16, 32), "depths": (1, 1)}),
    "efficientvmamba_tiny": (1e-3, {"embed_dim": 16, "depths": (1, 1)}),
    "mobilemamba_t2": (1.5e-3, {"dims": (48, 64, 80), "depths": (1, 1, 1)}),
    "vig_tiny": (1e-3, {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": SIDE}),
}
"""Effective rates of configs/recipes, and arguments that make the model tiny."""


def make_batch(stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stripes in four directions at random phases, in noise."""
    labels = torch.randint(CLASSES, (BATCH,), generator=stream)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angle = (labels * torch.pi / CLASSES)[:, None, None]
    phase = 6.28 * torch.rand(BATCH, 1, 1, generator=stream)
    waves = torch.sin(0.8 * (row * angle.sin() + column * angle.cos()) + phase)
    return waves.unsqueeze(1) + 0.3 * torch.randn(BATCH, 3, SIDE, SIDE, generator=stream), labels


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0, **MODELS[name][1]).train()


def train(name: str, dtype: torch.dtype) -> Tensor:
    """The loss of each step, five of them warm-up."""
    model, rate, stream = make_model(name), MODELS[name][0], torch.Generator().manual_seed(1)
    optimizer = create_optimizer_v2(model, "adamw", lr=rate, weight_decay=0.05, fused=True)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5)
        images, labels = make_batch(stream)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim_tiny", "vmamba_tiny_s1l8"])
def test_bfloat16_learns_what_float32_learns(name: str) -> None:
    single, half = train(name, torch.float32), train(name, torch.bfloat16)
    assert single.isfinite().all() and half.isfinite().all()
    smooth, near = (losses.unfold(0, WINDOW, 1).mean(1) for losses in (single, half))
    assert smooth[-1] < 0.5 * smooth[0] and near[-1] < 0.5 * near[0], "both learn"
    assert (smooth - near).abs().max() < BAND * smooth[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vim_tiny", "vmamba_tiny_s1l8")])
def test_the_others_do_too(name: str) -> None:
    test_bfloat16_learns_what_float32_learns(name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_under_autocast_are_those_of_float32(name: str, dtype: torch.dtype) -> None:
    """To two steps of the data type. Batch norms stand still: over eight values they magnify every rounding."""
    model, (images, labels) = make_model(name).eval(), make_batch(torch.Generator().manual_seed(1))
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = F.cross_entropy(model(images).float(), labels)
        scale = 1024.0 if enabled and dtype == torch.float16 else 1.0  # as a gradient scaler does
        (scale * loss).backward()
        gradients.append(torch.cat([p.grad.flatten() / scale for p in model.parameters() if p.grad is not None]))
    exact, got = gradients
    assert (got - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()
