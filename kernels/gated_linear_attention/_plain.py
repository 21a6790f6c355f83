"""Compute gated linear attention and its backward pass by PyTorch operators, chunk by chunk.

A state [head_dim, value_dim] is carried between chunks of `CHUNK` tokens; within a chunk, queries meet keys in matrix
products. The contribution of token s to token t decays by the product of the gates between them. A matrix product needs
that decay as a factor of t times a factor of s, and the usual factorisation, exp(sum up to t) * exp(-sum up to s),
overflows for strong gates. Here the two factors meet at a token between s and t, so that neither ever exceeds 1:

    In a pair of neighbouring blocks, each query decays from the border to its token ("near"), each key from its token
    to the border ("far"), and one product handles both blocks. Blocks of 1, 2, 4, ... tokens pair up until the chunk
    is one block, whose near and far connect it with the states.

No logarithm of a product and no difference of sums is ever taken, so gates of 0 (-inf as logarithm) lose no accuracy.

The two directions differ in which half of a pair holds the queries: the later one (`LATER`) if states come from the
first token, the earlier one (`EARLIER`) if they come from the last. Their scores fill the two triangles of one matrix.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 32

EARLIER, LATER = 0, 1
_SIZES = (1, 2, 4, 8, 16)

Gates = Sequence[tuple[Tensor, int]]
"""For each direction, its log gates [batch, tokens, heads, head_dim] and the half of a pair that holds the queries."""


def _to_chunks(x: Tensor) -> Tensor:
    """Reshape [batch, tokens, heads, dim] to [batch, heads, chunks, CHUNK, dim], zero-padding the last chunk."""
    x = F.pad(x, [0, 0, 0, 0, 0, -x.shape[1] % CHUNK])
    return x.unflatten(1, [-1, CHUNK]).permute(0, 3, 1, 2, 4)


def _from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """Invert `_to_chunks`, with the token count, heads and dtype of `like`."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : like.shape[1]].to(like.dtype)


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split [..., CHUNK, dim] into the earlier and the later block of every pair, [..., pairs, size, dim]."""
    left, right = x.unflatten(-2, [-1, 2, size]).unbind(-3)
    return left, right


class _Reach:
    """Hold the decay factors of keys within blocks of `size` tokens, all [..., CHUNK, head_dim].

    `near` is the decay from the block's border to each token, including that token's gate. `far` is the decay from
    each token to the border, excluding its own gate. `asks` is the half of a pair that holds the queries.
    """

    def __init__(self, log_gate: Tensor, asks: int) -> None:
        self.asks, self.size = asks, 1
        self.near = log_gate.exp().contiguous()
        self.far = torch.ones_like(self.near)

    def of_pairs(self) -> tuple[Tensor, Tensor]:
        """Return the `near` of the blocks that hold the queries and the `far` of those that hold the keys."""
        return _halves(self.near, self.size)[self.asks], _halves(self.far, self.size)[1 - self.asks]

    def through(self, blocks: Tensor) -> Tensor:
        """Return the decay across each whole block of near factors `blocks`, [..., 1, head_dim]."""
        return blocks[..., -1:, :] if self.asks == LATER else blocks[..., :1, :]

    def widen(self) -> None:
        """Double the block size."""
        near, far = _halves(self.near, self.size), _halves(self.far, self.size)
        far[1 - self.asks].mul_(self.through(near[self.asks]))
        near[self.asks].mul_(self.through(near[1 - self.asks]))
        self.size *= 2


def _corner(scores: Tensor, size: int, asks: int) -> Tensor:
    """Return a view of [..., CHUNK, CHUNK]: for each pair, its query half against its key half."""
    pairs = scores.unflatten(-1, [-1, 2, size]).unflatten(-4, [-1, 2, size])
    between = pairs.select(-5, asks).select(-2, 1 - asks)
    return between.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _between(x: Tensor, y: Tensor) -> Tensor:
    """Return x y^T for each pair of blocks. Blocks of one token are faster as element-wise sums."""
    return (x * y).sum(-1, keepdim=True) if x.shape[-2] == 1 else x @ y.mT


def _scores(query: Tensor, key: Tensor, reaches: list[_Reach]) -> Tensor:
    """Return the summed scores [..., CHUNK, CHUNK] of all directions, and widen `reaches` to whole chunks.

    Each direction counts a token's own key.
    """
    scores = ((query * key).sum(-1) * len(reaches)).diag_embed()
    for size in _SIZES:
        queries, keys = _halves(query, size), _halves(key, size)
        for reach in reaches:
            near, far = reach.of_pairs()
            _corner(scores, size, reach.asks).copy_(_between(queries[reach.asks] * near, keys[1 - reach.asks] * far))
            reach.widen()
    return scores


def _carry(log_gate: Tensor, added: Tensor, *, from_last: bool) -> Tensor:
    """Return the states [batch, heads, chunks, head_dim, value_dim] before each chunk in scan order.

    Each chunk decays its incoming state by all its gates and adds its own contribution `added`.
    """
    decay = _to_chunks(log_gate.to(added.dtype)).sum(-2).exp().unsqueeze(-1)
    states, order = torch.empty_like(added), range(added.shape[2])[:: -1 if from_last else 1]
    states[:, :, order[0]] = 0
    for before, chunk in pairwise(order):
        torch.addcmul(added[:, :, before], decay[:, :, before], states[:, :, before], out=states[:, :, chunk])
    return states


def _float_chunks(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return [_to_chunks(tensor.to(wide)).contiguous() for tensor in tensors]


def _reaches(gates: Gates, dtype: torch.dtype) -> list[_Reach]:
    return [_Reach(_to_chunks(log_gate.to(dtype)), asks) for log_gate, asks in gates]


def forward(query: Tensor, key: Tensor, value: Tensor, gates: Gates, scale: float) -> Tensor:
    """Return the sum over the directions; query, key, value are [batch, tokens, heads, dim]."""
    q, k, v = _float_chunks(query.dtype, query, key, value)
    reaches = _reaches(gates, q.dtype)
    out = _scores(q, k, reaches) @ v
    for (log_gate, asks), reach in zip(gates, reaches, strict=True):
        states = _carry(log_gate, (k * reach.far).mT @ v, from_last=asks == EARLIER)
        out = out + (q * reach.near) @ states
    return _from_chunks(out * scale, value)


def _grad_of_log_gate(query_side: Tensor, key_side: Tensor, carried: Tensor, asks: int) -> Tensor:
    """Return the gradient of the log gates of one direction.

    A gate scales every contribution that passes it, from earlier keys to later queries. Its gradient is therefore the
    sum of q dq - k dk over the tokens from it onwards in scan order; `carried` is the part of the tokens after the
    chunk.
    """
    passed = query_side - key_side
    if asks == LATER:
        return passed.flip(-2).cumsum(-2).flip(-2) + carried
    return passed.cumsum(-2) + carried


def _backward_within(
    grad_scores: Tensor, query: Tensor, key: Tensor, reaches: list[_Reach]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Recompute `_scores`, and return its gradients of query and key per direction, without a token's own key."""
    scores = ((query * key).sum(-1) * len(reaches)).diag_embed()
    grads = [(torch.zeros_like(query), torch.zeros_like(key)) for _ in reaches]
    for size in _SIZES:
        queries, keys = _halves(query, size), _halves(key, size)
        for reach, (grad_query, grad_key) in zip(reaches, grads, strict=True):
            asks, asked = reach.asks, 1 - reach.asks
            near, far = reach.of_pairs()
            weak_query, weak_key = queries[asks] * near, keys[asked] * far
            _corner(scores, size, asks).copy_(_between(weak_query, weak_key))
            corner = _corner(grad_scores, size, asks)
            _halves(grad_query, size)[asks].addcmul_(corner @ weak_key, near)
            _halves(grad_key, size)[asked].addcmul_(corner.mT @ weak_query, far)
            reach.widen()
    return scores, [grad_query for grad_query, _ in grads], [grad_key for _, grad_key in grads]


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gates: Gates, scale: float
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the gradients of query, key, value and the log gates, from the inputs of `forward` alone."""
    q, k, v, d = _float_chunks(query.dtype, query, key, value, grad)
    d = d * scale
    reaches = _reaches(gates, q.dtype)
    grad_scores = d @ v.mT
    scores, grads_q, grads_k = _backward_within(grad_scores, q, k, reaches)
    grad_v = scores.mT @ d
    grad_gates = []
    for (log_gate, asks), reach, grad_q, grad_k in zip(gates, reaches, grads_q, grads_k, strict=True):
        weak_k = k * reach.far
        added = weak_k.mT @ v
        states = _carry(log_gate, added, from_last=asks == EARLIER)
        grad_states = _carry(log_gate, (q * reach.near).mT @ d, from_last=asks == LATER)
        grad_q.addcmul_(d @ states.mT, reach.near)
        grad_k.addcmul_(v @ grad_states.mT, reach.far)
        grad_v += weak_k @ grad_states
        after = torch.addcmul(added, states, reach.through(reach.near).mT)
        carried = (after * grad_states).sum(-1).unsqueeze(-2)
        grad_gate = _grad_of_log_gate(q * grad_q, k * grad_k, carried, asks)
        grad_gates.append(_from_chunks(grad_gate, log_gate))
    grad_diagonal = grad_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * len(gates)
    grad_q, grad_k = sum(grads_q, grad_diagonal * k), sum(grads_k, grad_diagonal * q)
    return _from_chunks(grad_q, query), _from_chunks(grad_k, key), _from_chunks(grad_v, value), grad_gates
