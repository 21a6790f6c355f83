"""Benchmarks HiLo on the CPU against the attention of its paper, and LITv2's deformable merging against torchvision's.

    python benchmarks/bench_hilo.py --threads 2 --markdown table.md

One layer on a 14 x 14 map, forward under `no_grad`, at C = 768 (the paper's, 12 heads) and C = 384 (LITv2-S): HiLo with
windows of 2 and alpha 0.9; spatial reduction by 2 (timm's PVTv2 attention); attention in 7 x 7 windows (Swin's, without
its bias); attention over the whole map (timm's). All use PyTorch's fused attention where they attend.

Before anything is timed, HiLo is compared with a plain transcription of its definition and the merging with
torchvision's operator; one that differs ends the run. A run ends with status 1 if HiLo is not as many times as fast as
the attention of the paper's comparison as the project promises (`REQUIRED`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _harness import describe_machine, digits, markdown_table, time_calls
from mixerzoo.mixers import HiLo
from mixerzoo.vision.backbones.litv2 import sample_taps
from timm.layers import Attention
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

SIDE, HEADS, ALPHA, WINDOW = 14, 12, 0.9, 2
WIDTHS = (768, 384)
MERGINGS = ((56, 96), (28, 192), (14, 384))  # side of the map and channels, as in LITv2-S at 224 pixels
TOLERANCE = 1e-5  # of the norm
PUBLISHED = {"spatial reduction": 1.45, "7 x 7 windows": 1.63}  # at C = 768, by the authors' vit-attention-benchmark
REQUIRED = {"spatial reduction": 1.4, "7 x 7 windows": 1.6}
REQUIRED_WIDTH, REQUIRED_BATCH = 768, 64  # as published


class WindowAttention(nn.Module):
    """Multi-head attention within 7 x 7 windows of [B, H, W, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        shape, rows = x.shape, x.shape[1] // 7
        windows = x.view(-1, rows, 7, rows, 7, shape[-1]).transpose(2, 3).reshape(-1, 49, shape[-1])
        query, key, value = self.qkv(windows).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj(out).view(-1, rows, rows, 7, 7, shape[-1]).transpose(2, 3).reshape(shape)


def make_mixers(dim: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Make the mixers, each of which maps [B, 14, 14, dim] to the same shape."""
    hilo = HiLo(dim, HEADS, window_size=WINDOW, alpha=ALPHA)
    reduced = SpatialReductionAttention(dim, HEADS, sr_ratio=WINDOW, linear_attn=False)
    windows, whole = WindowAttention(dim), Attention(dim, HEADS, qkv_bias=True)
    for module in (hilo, reduced, windows, whole):
        module.eval()
    return {
        "HiLo": hilo,
        "spatial reduction": lambda x: reduced(x.flatten(1, 2), [SIDE, SIDE]).view(x.shape),
        "7 x 7 windows": windows,
        "whole map": lambda x: whole(x.flatten(1, 2)).view(x.shape),
    }


def definition(hilo: HiLo, x: Tensor) -> Tensor:
    """Compute HiLo by matrix products and softmax, window by window."""
    scale, dim = hilo.head_dim**-0.5, hilo.head_dim
    high = torch.empty(*x.shape[:3], hilo.h_heads * dim)
    for i in range(0, SIDE, WINDOW):
        for j in range(0, SIDE, WINDOW):
            window = x[:, i : i + WINDOW, j : j + WINDOW].flatten(1, 2)
            query, key, value = hilo.h_qkv(window).unflatten(-1, (3, hilo.h_heads, dim)).permute(2, 0, 3, 1, 4)
            out = (query @ key.transpose(-2, -1) * scale).softmax(-1) @ value
            high[:, i : i + WINDOW, j : j + WINDOW] = out.transpose(1, 2).reshape(len(x), WINDOW, WINDOW, -1)
    pooled = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).mean((2, 4)).flatten(1, 2)
    query = hilo.l_q(x.flatten(1, 2)).unflatten(-1, (hilo.l_heads, dim)).transpose(1, 2)
    key, value = hilo.l_kv(pooled).unflatten(-1, (2, hilo.l_heads, dim)).permute(2, 0, 3, 1, 4)
    low = ((query @ key.transpose(-2, -1) * scale).softmax(-1) @ value).transpose(1, 2).reshape(*x.shape[:3], -1)
    return torch.cat([hilo.h_proj(high), hilo.l_proj(low)], -1)


def require_equal(what: str, got: Tensor, want: Tensor) -> None:
    error = ((got - want).norm() / want.norm()).item()
    if not error <= TOLERANCE:
        raise SystemExit(f"{what} is off by {error:.1e} of the norm, more than {TOLERANCE:.0e}; nothing is reported")


@torch.no_grad()
def attention_rows(batches: list[int], rounds: int, missed: list[str]) -> Iterator[list[str]]:
    """Yield images per second of each mixer and HiLo's speedup; add insufficient ones to `missed`."""
    for dim in WIDTHS:
        mixers = make_mixers(dim)
        hilo = mixers["HiLo"]
        assert isinstance(hilo, HiLo)
        sample = torch.randn(2, SIDE, SIDE, dim)
        require_equal(f"HiLo at C = {dim}", hilo(sample), definition(hilo, sample))
        for batch in batches:
            x = torch.randn(batch, SIDE, SIDE, dim)
            calls = {name: lambda mixer=mixer, x=x: mixer(x) for name, mixer in mixers.items()}
            seconds = time_calls(calls, rounds=rounds)
            if (dim, batch) == (REQUIRED_WIDTH, REQUIRED_BATCH):
                speedups = {name: seconds[name] / seconds["HiLo"] for name in REQUIRED}
                missed += [
                    f"HiLo at C = {dim}, batch {batch} is {speedup:.2f} times as fast as {name}, not {REQUIRED[name]}"
                    for name, speedup in speedups.items()
                    if speedup < REQUIRED[name]
                ]
            cells = [f"{batch / s:.0f} ({s / seconds['HiLo']:.2f}x)" for name, s in seconds.items() if name != "HiLo"]
            yield [str(dim), str(batch), f"**{batch / seconds['HiLo']:.0f}**", *cells]


def merging_rows(batches: list[int], rounds: int) -> Iterator[list[str]]:
    """Yield milliseconds of both implementations of the deformable 2 x 2 convolution, without and with backward."""
    for side, dim in MERGINGS:
        weight, bias = torch.randn(2 * dim, dim, 2, 2) / (4 * dim) ** 0.5, torch.randn(2 * dim)

        def ours(x: Tensor, offset: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return F.linear(sample_taps(x, offset), weight.permute(0, 2, 3, 1).flatten(1), bias)

        def theirs(x: Tensor, offset: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return deform_conv2d(x.permute(0, 3, 1, 2), offset, weight, bias, stride=2).permute(0, 2, 3, 1)

        for batch in batches:
            x, offset = torch.randn(batch, side, side, dim), torch.randn(batch, 8, side // 2, side // 2)
            with torch.no_grad():
                want = theirs(x, offset)
                require_equal(f"the merging at {side} x {side}", ours(x, offset), want)
            leaves = [x.requires_grad_(), offset.requires_grad_(), weight.requires_grad_()]

            def forward(merge: Callable, x: Tensor = x, offset: Tensor = offset) -> Tensor:
                with torch.no_grad():
                    return merge(x, offset)

            def train(merge: Callable, leaves: list[Tensor] = leaves, fed: Tensor = want) -> object:
                return torch.autograd.grad(merge(leaves[0], leaves[1]), leaves, fed)

            for name, run in (("forward", forward), ("forward + backward", train)):
                calls = {"ours": lambda run=run: run(ours), "torchvision": lambda run=run: run(theirs)}
                s = time_calls(calls, rounds=rounds)
                ratio = f"{digits(s['torchvision'] * 1e3)} ({s['torchvision'] / s['ours']:.1f}x)"
                yield [f"{side}x{side}, C {dim}", str(batch), name, f"**{digits(s['ours'] * 1e3)}**", ratio]


def report(arguments: argparse.Namespace, missed: list[str]) -> Iterator[str]:
    """Yield the lines of the tables."""
    yield f"{describe_machine(arguments.threads)}. float32, median of {arguments.rounds} rounds taken in turns."
    published = ", ".join(f"{name} {ratio}x" for name, ratio in PUBLISHED.items())
    yield f"\nImages per second, and how many times as fast HiLo is (published for C 768: {published}):\n"
    header = ["C", "batch", "HiLo", "spatial reduction", "7 x 7 windows", "whole map"]
    yield from markdown_table(header, attention_rows(arguments.batch, arguments.rounds, missed))
    yield "\nDeformable merging, milliseconds:\n"
    header = ["map", "batch", "pass", "ours", "torchvision"]
    yield from markdown_table(header, merging_rows(arguments.batch[:1], arguments.rounds))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64], help="the merging is timed at the first")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    missed: list[str] = []
    text = "\n".join(report(arguments, missed)) + "\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
