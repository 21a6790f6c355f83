"""Counts the parameters and multiply-adds of a model and of its parts, custom operators included."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula


@dataclass(frozen=True)
class Summary:
    """Counts of a model. `rows` are (part, class, parameters, multiply-adds), the latter for one picture."""

    rows: tuple[tuple[str, str, int, int], ...]
    parameters: int
    trainable: int
    macs: int
    size: tuple[int, ...]

    def __str__(self) -> str:
        width = max(len(name) for name, *_ in self.rows) + 2
        kind_width = max(len(kind) for _, kind, *_ in self.rows) + 2
        lines = [f"{'part':{width}}{'class':{kind_width}}{'parameters':>14}{'MMACs':>12}"]
        for name, kind, parameters, macs in self.rows:
            lines.append(f"{name:{width}}{kind:{kind_width}}{parameters:>14,}{macs / 1e6:>12,.2f}")
        shape = " x ".join(str(length) for length in self.size)
        lines.append(f"{'total':{width}}{'':{kind_width}}{self.parameters:>14,}{self.macs / 1e6:>12,.2f}")
        return "\n".join(
            [*lines, "", f"{self.trainable:,} trainable parameters; multiply-adds for a picture of {shape}"]
        )


@torch.no_grad()
def summarize(model: nn.Module, size: tuple[int, int, int]) -> Summary:
    """Count for an input [channels, height, width]. As usual, elementwise operations are not counted."""
    register_formulas()
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(1, *size))
    model.train(was_training)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(model).__name__
    rows = tuple(
        (name, type(part).__name__, count_parameters(part), by_module.get(f"{root}.{name}", 0) // 2)
        for name, part in _parts(model)
    )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Summary(rows, count_parameters(model), trainable, counter.get_total_flops() // 2, size)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the child modules; a container of two to eight parts is replaced by its parts."""
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        inner = list(child.named_children())
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and 1 < len(inner) <= 8:
            parts += [(f"{name}.{key}", part) for key, part in inner]
        elif not isinstance(child, nn.Identity):
            parts.append((name, child))
    return parts


def register_formulas() -> None:
    """Register the formulas of our operators with torch's counter, which `import mixerzoo.vision` does not load."""
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.mixerzoo, name, None)
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator)(formula)


def _neighborhood_attention_flops(
    query: Any, key: Any, value: Any, rpb: Any, kernel_size: list[int], *_: Any, **__: Any
) -> int:
    """Each query costs a multiply-add per channel for every key and for every value of its window."""
    *batch_and_map, heads, head_dim = query
    return 2 * math.prod(batch_and_map) * heads * math.prod(kernel_size) * (head_dim + value[-1])


def _depthwise_conv2d_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * math.prod(weight[2:])


def _large_kernel_attention_flops(x: Any, w5: Any, w7d3: Any, w1: Any, *_: Any, **__: Any) -> int:
    """Two depth-wise convolutions and a pointwise one are counted; the gate is elementwise."""
    return 2 * math.prod(x) * (math.prod(w5[2:]) + math.prod(w7d3[2:]) + w1[1])


def _selective_scan_flops(
    x: Any, delta: Any, projected: Any, dt_weight: Any, dt_bias: Any, A: Any, D: Any, size: Any, paths: Any, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """Each scan, step and channel costs a multiply-add per factor of delta and four per state."""
    scans, dim, state = A
    rank = 0 if dt_weight is None else dt_weight[2]
    step = paths[-1]
    steps = -(-size[0] // step) * -(-size[1] // step)
    return 2 * x[0] * scans * steps * dim * (rank + 4 * state)


def _gated_linear_attention_flops(
    query: Any, key: Any, value: Any, log_gate: Any, log_gate_backward: Any, *_: Any, **__: Any
) -> int:
    """The recurrence costs three multiply-adds per token, direction and element of the state: decay, update, readout.
    The extra work of computing in chunks is not counted."""
    directions = 1 if log_gate_backward is None else 2
    return 2 * 3 * directions * math.prod(query) * value[-1]


_FORMULAS: dict[str, Callable[..., int]] = {
    "neighborhood_attention": _neighborhood_attention_flops,
    "depthwise_conv2d": _depthwise_conv2d_flops,
    "large_kernel_attention": _large_kernel_attention_flops,
    "selective_scan": _selective_scan_flops,
    "gated_linear_attention": _gated_linear_attention_flops,
}
