"""Image retrieval by binary codes: Hamming distances, mean average precision, and the training objective of EET.

    codes = model.hash_codes(pictures)  # of an EET model with bits
    mean_average_precision(codes[:100], labels[:100], codes[100:], labels[100:])

The objective is that of Jiang, Tang, Pan, Li, "Rethinking Vision Transformer for Large-Scale Fine-Grained Image
Retrieval" (EET, arXiv 2504.16691). A training step, where `teacher` keeps all tokens
(`copy.deepcopy(restore_tokens(model))`) and is trained by the same loss without a teacher of its own:

    hidden = hide_attended(teacher, pictures)
    scores, scores_hidden = model(pictures), model(hidden)
    code, teacher_code = model.head_hash(scores), teacher.forward_hash(pictures)
    loss = hash_loss(scores, code, labels, targets, scores_hidden=scores_hidden, teacher_code=teacher_code.detach())

What is unusual:
* `targets` are codes of +1 and -1 that the authors compute for each picture beforehand, from proxies of the classes.
  That step is not implemented here; a random code per class is the simplest choice.
* Short codes often have equal distances. Ties are broken by the order of the database, so that a score does not depend
  on the sorting algorithm; `torchmetrics.retrieval` leaves that open.
* Regions that the teacher attends to are hidden from the student, which must then use others.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F


def hamming_distances(queries: Tensor, database: Tensor) -> Tensor:
    """Count the differing bits of boolean codes [Q, bits] and [D, bits]; returns int64 [Q, D]."""
    for name, codes in (("queries", queries), ("database", database)):
        if codes.dim() != 2 or codes.dtype != torch.bool or codes.shape[1] != queries.shape[1]:
            raise ValueError(
                f"{name} must be codes of booleans [pictures, {queries.shape[-1]}], as hash_codes gives them; "
                f"got {list(codes.shape)}, {codes.dtype}"
            )
    signs, others = (codes.float() * 2 - 1 for codes in (queries, database))
    return ((queries.shape[1] - signs @ others.T) / 2).round().long()


def mean_average_precision(
    queries: Tensor, query_labels: Tensor, database: Tensor, database_labels: Tensor, *, top: int | None = None
) -> float:
    """Compute the mean average precision of rankings by Hamming distance; a hit has the class of the query.

    Args:
        queries, database: boolean codes [Q, bits] and [D, bits].
        query_labels, database_labels: classes, [Q] and [D].
        top: length of the rankings; all of the database by default. A query without a hit counts as 0.
    """
    if query_labels.shape != queries.shape[:1] or database_labels.shape != database.shape[:1]:
        raise ValueError(
            f"labels must be one a code, [{len(queries)}] and [{len(database)}]; got {list(query_labels.shape)} and "
            f"{list(database_labels.shape)}"
        )
    if len(queries) == 0 or len(database) == 0 or (top is not None and top < 1):
        raise ValueError(f"there must be something to rank; got {len(queries)} queries, {len(database)} codes, {top=}")
    rank = torch.arange(1, len(database) + 1, device=database.device)[:top]
    precisions = []
    for some, labels in zip(queries.split(256), query_labels.split(256), strict=True):  # bounds the memory for rankings
        order = hamming_distances(some, database).argsort(dim=1, stable=True)[:, :top]
        hit = database_labels[order] == labels[:, None]
        at_hits = torch.where(hit, hit.cumsum(1) / rank, 0.0).sum(1)
        precisions.append(at_hits / hit.sum(1).clamp(min=1))
    return torch.cat(precisions).mean().item()


@torch.no_grad()
def class_attention(model: VisionTransformer, x: Tensor) -> Tensor:
    """Return the attention of the last block's class token to each patch, [B, N], averaged over the heads."""
    network: Any = model
    if getattr(network, "cls_token", None) is None:
        raise ValueError("class_attention needs a model with a class token")
    x = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
    for block in network.blocks[:-1]:
        x = block(x)
    last = network.blocks[-1]
    qkv = last.attn.qkv(last.norm1(x)).unflatten(2, (3, last.attn.num_heads, last.attn.head_dim))
    query, key = last.attn.q_norm(qkv[:, :1, 0].transpose(1, 2)), last.attn.k_norm(qkv[:, :, 1].transpose(1, 2))
    attention = (query * last.attn.scale @ key.transpose(2, 3)).softmax(3)
    return attention.mean(1)[:, 0, network.num_prefix_tokens :]


@torch.no_grad()
def hide_attended(teacher: VisionTransformer, x: Tensor, *, patches: int = 4) -> Tensor:
    """Zero the patches of pictures [B, 3, H, W] to which the teacher's class token attends most.

    Height and width must be multiples of the patch size, and the teacher must keep all tokens.
    """
    high, wide = teacher.patch_embed.patch_size
    rows, columns = x.shape[2] // high, x.shape[3] // wide
    attention = class_attention(teacher, x)
    if attention.shape[1] != rows * columns or x.shape[2] % high or x.shape[3] % wide:
        raise ValueError(
            f"the teacher must have a token for each patch of {high} x {wide}; for pictures of {x.shape[2]} x "
            f"{x.shape[3]} it has {attention.shape[1]}. Use restore_tokens, and whole patches"
        )
    shown = torch.ones_like(attention).scatter(1, attention.topk(patches, dim=1).indices, 0.0)
    shown = shown.unflatten(1, (1, rows, columns)).repeat_interleave(high, 2).repeat_interleave(wide, 3)
    return x * shown.to(x.dtype)


def hash_loss(
    scores: Tensor,
    code: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    scores_hidden: Tensor | None = None,
    teacher_code: Tensor | None = None,
    labels_weight: float = 0.1,
    teacher_weight: float = 1.0,
) -> Tensor:
    """Compute EET's objective: labels_weight * cross entropies + code MSE + teacher_weight * (1 - cosine similarity).

    Args:
        scores: class scores [B, classes]; `scores_hidden` are those of the pictures of `hide_attended`.
        code: the output of `forward_hash`, [B, bits]; `teacher_code` is the teacher's.
        labels: classes [B].
        targets: target codes [B, bits] of +1 and -1.
    """
    for name, other in (("targets", targets), ("teacher_code", teacher_code)):
        if other is not None and other.shape != code.shape:
            raise ValueError(f"{name} must be as code, {list(code.shape)}; got {list(other.shape)}")
    of_labels = F.cross_entropy(scores, labels)
    if scores_hidden is not None:
        of_labels = of_labels + F.cross_entropy(scores_hidden, labels)
    loss = labels_weight * of_labels + F.mse_loss(code, targets.to(code.dtype))
    if teacher_code is not None:
        loss = loss + teacher_weight * (1 - F.cosine_similarity(code, teacher_code)).mean()
    return loss
