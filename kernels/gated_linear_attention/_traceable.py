"""Compute gated linear attention with few standard operators: for exporters, functional transforms and autograd.

The decays between all pairs of tokens of a chunk, and between all pairs of chunks, are materialised: exp of a sum of
exactly the gates in between, so that no gate is too strong, -inf included. This takes more memory than `_plain` and
grows, slowly, with the square of the number of tokens. In return, the program contains no loop and no fixed number of
chunks, so it is valid for any number of tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._plain import CHUNK, EARLIER, Gates


def _survival(log_gates: Tensor) -> Tensor:
    """Return [..., to, from, dim]: the product of gates [..., steps, dim] after `from` up to `to`, 0 if to < from."""
    step = torch.arange(log_gates.shape[-2], device=log_gates.device)
    after = (step[:, None] > step)[..., None]
    sums = torch.where(after, log_gates.unsqueeze(-2), 0.0).cumsum(-3)
    return torch.where((step[:, None] >= step)[..., None], sums.exp(), 0.0)


def _walk(query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor) -> Tensor:
    """Scan one direction, from the first token; inputs are [batch, heads, chunks, CHUNK, dim]."""
    q, k, v, g = query, key, value, log_gate
    survival = _survival(g)  # [batch, heads, chunks, to, from, head_dim]
    scores = (survival * q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
    added = (k * survival[..., -1, :, :]).mT @ v
    between = _survival(g.sum(-2)).permute(0, 1, 4, 2, 3)  # [batch, heads, head_dim, chunk, chunk]
    after = (between @ added.transpose(2, 3)).transpose(2, 3)
    before = F.pad(after, [0, 0, 0, 0, 1, -1])
    return scores @ v + (q * g.cumsum(-2).exp()) @ before


def forward(query: Tensor, key: Tensor, value: Tensor, gates: Gates, scale: float) -> Tensor:
    """Return the sum over the directions; query, key, value are [batch, tokens, heads, dim]."""
    wide, tokens = torch.promote_types(query.dtype, torch.float32), query.shape[1]

    def stack(of_direction: Sequence[Tensor]) -> Tensor:
        """Concatenate all directions into one batch of scans from the first token."""
        walks = [x.flip(1) if asks == EARLIER else x for x, (_, asks) in zip(of_direction, gates, strict=True)]
        # Pad by one extra chunk, because exporters specialise a size that may be 1. Avoid a remainder of the number of
        # tokens, because they would have to prove divisibility.
        padded = F.pad(torch.cat(walks).to(wide), [0, 0, 0, 0, 0, 2 * CHUNK - 1])
        return padded.unfold(1, CHUNK, CHUNK).permute(0, 2, 1, 4, 3)

    inputs = [[x] * len(gates) for x in (query, key, value)]
    walked = _walk(*(stack(x) for x in (*inputs, [log_gate for log_gate, _ in gates]))) * scale
    walked = walked.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
    walked = walked.unflatten(0, [len(gates), query.shape[0]])  # not `chunk`: ONNX's optimiser fails on it
    outs = [walked[i].flip(1) if asks == EARLIER else walked[i] for i, (_, asks) in enumerate(gates)]
    return sum(outs[1:], outs[0]).to(value.dtype)
