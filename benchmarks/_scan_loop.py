"""The selective scan by its authors' reference for machines without CUDA, the baseline of two benchmarks: a loop over
the steps of materialised sequences, with the state of every step in memory.

The algorithm is that of `selective_scan_ref` (github.com/state-spaces/mamba) and, for maps, of VMamba's forward pass
around it (github.com/MzeroMiko/VMamba). Steps are split by `unbind`; the original indexes them one by one, and its
backward pass allocates a full tensor of zeros for each, which takes minutes for the longest sequence here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mixerzoo.kernels.cross_scan import CROSS, ScanPath, cross_merge, cross_scan
from torch import Tensor
from torch.nn import functional as F


class Sequences(NamedTuple):
    """The arguments of Mamba's function, with groups of channels that share B and C."""

    u: Tensor
    """[batch, dim, length]"""
    delta: Tensor
    """[batch, dim, length], before softplus"""
    A: Tensor
    """[dim, state]"""
    B: Tensor
    """[batch, groups, state, length]"""
    C: Tensor
    """[batch, groups, state, length]"""
    D: Tensor
    """[dim]"""
    delta_bias: Tensor
    """[dim]"""

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return decay and input of every step [batch, dim, length, state], and C [batch, dim, state, length]."""
        precise = torch.promote_types(self.u.dtype, torch.float32)
        u, delta, A, B, C, _, delta_bias = (tensor.to(precise) for tensor in self)
        B, C = (tensor.repeat_interleave(u.shape[1] // B.shape[1], 1) for tensor in (B, C))
        delta = F.softplus(delta + delta_bias.unsqueeze(1))
        decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
        return decay, torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u), C


def scan_loop(sequences: Sequences) -> Tensor:
    """Compute the scan step by step; returns [batch, dim, length]."""
    decay, value, C = sequences.coefficients()
    state = value.new_zeros(value.shape[0], value.shape[1], value.shape[3])
    outputs = []
    for decay_t, value_t, C_t in zip(decay.unbind(2), value.unbind(2), C.unbind(3), strict=True):
        state = decay_t * state + value_t
        outputs.append(torch.einsum("bdn,bdn->bd", state, C_t))
    y = torch.stack(outputs, dim=2) + sequences.u * sequences.D.unsqueeze(1)
    return y.to(sequences.u.dtype)


def lay_out(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    paths: Sequence[ScanPath] = CROSS,
) -> Sequences:
    """Materialise the sequences of `selective_scan_2d`: channels, steps and coefficients of every scan."""
    scans, rank, state = len(paths), dt_weight.shape[2], A.shape[2]

    def along(tensor: Tensor, slots: int) -> Tensor:
        """Scan [batch, height, width, (slots,) channels] into [batch, scans, channels, length]."""
        if slots == 1:
            return cross_scan(tensor, paths).transpose(2, 3)
        each = [cross_scan(tensor[:, :, :, i], paths[i : i + 1]) for i in range(slots)]
        return torch.cat(each, 1).transpose(2, 3)

    u = along(x, scans if x.ndim == 5 else 1)
    low_rank, B, C = along(projected, scans if projected.ndim == 5 else 1).split([rank, state, state], 2)
    delta = torch.einsum("bkrl,kdr->bkdl", low_rank, dt_weight)
    u, delta = (tensor.flatten(1, 2).contiguous() for tensor in (u, delta))
    return Sequences(u, delta, A.flatten(0, 1), B.contiguous(), C.contiguous(), D.flatten(), dt_bias.flatten())


def put_back(y: Tensor, size: tuple[int, int], paths: Sequence[ScanPath] = CROSS) -> Tensor:
    """Merge [batch, scans * dim, length] into [batch, height, width, dim] by adding the scans."""
    return cross_merge(y.unflatten(1, (len(paths), -1)).transpose(2, 3), size, paths)


def scan_loop_2d(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    paths: Sequence[ScanPath] = CROSS,
) -> Tensor:
    """Compute `selective_scan_2d` by the loop."""
    y = scan_loop(lay_out(x, projected, dt_weight, dt_bias, A, D, paths))
    return put_back(y, (x.shape[1], x.shape[2]), paths)
