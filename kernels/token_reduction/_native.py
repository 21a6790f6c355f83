"""Match and merge tokens with the compiled kernels of kernels/cpu/token_reduction.cpp."""

import torch
from torch import Tensor

from .._native import NO_MEMORY, as_words, is_available, library

__all__ = ["is_available", "match", "merge"]


def _call(name: str, x: Tensor, words: list[int], *results: Tensor) -> bool:
    """Run a kernel; return whether it took its arguments."""
    status = getattr(library(), name)(as_words([torch.get_num_threads(), *words]), *(r.data_ptr() for r in results))
    if status == NO_MEMORY:
        raise MemoryError(f"the native token kernels found no memory for {tuple(x.shape)}")
    return status == 0


def match(metric: Tensor, r: int, num_prefix: int) -> Tensor:
    """Compute `_plain.match` for a float32 CPU metric; r must be in range."""
    if metric.stride(-1) != 1:
        metric = metric.contiguous()
    heads = metric if metric.dim() == 4 else metric.unsqueeze(1)
    batch, count, tokens, dim = heads.shape
    slot = torch.empty(batch, tokens, dtype=torch.int64)
    words = [batch, count, tokens, dim, num_prefix, r, heads.data_ptr(), *heads.stride()[:3]]
    if not _call("mixerzoo_token_match", metric, words, slot):
        raise ValueError(f"{tokens} tokens, {num_prefix} of them a prefix, cannot lose r={r} by merging")
    return slot


def merge(x: Tensor, slot: Tensor, length: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `_plain.merge` for a float32 CPU tensor."""
    if x.stride(2) != 1:
        x = x.contiguous()
    slot, size = slot.contiguous(), None if size is None else size.contiguous()
    batch, tokens, dim = x.shape
    merged, total = torch.empty(batch, length, dim), torch.empty(batch, length)
    words = [batch, tokens, dim, length, x.data_ptr(), *x.stride()[:2], slot.data_ptr()]
    if not _call("mixerzoo_token_merge", x, [*words, 0 if size is None else size.data_ptr()], merged, total):
        raise ValueError(f"slots are below length={length}, or -1 for dropped tokens; got slots up to {slot.max()}")
    return merged, total
