"""Finding pictures by binary codes: how far codes are apart, how good a ranking is, and what codes are learned from.

    codes = model.hash_codes(pictures)  # of an EET model with bits
    mean_average_precision(codes[:100], labels[:100], codes[100:], labels[100:])

The objective is of Jiang, Tang, Pan, Li, "Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval"
(EET, arXiv 2504.16691). A step of training, where `teacher` has all tokens (`copy.deepcopy(restore_tokens(model))`),
and learns along by the same loss without a teacher of its own:

    hidden = hide_attended(teacher, pictures)
    scores, scores_hidden = model(pictures), model(hidden)
    code, teacher_code = model.head_hash(scores), teacher.forward_hash(pictures)
    loss = hash_loss(scores, code, labels, targets, scores_hidden=scores_hidden, teacher_code=teacher_code.detach())

What is unusual:
* `targets` are codes of +1 and -1 that the authors find for each picture beforehand, by proxies of the classes. How is
  not part of this; a random code for each class is the simplest choice.
* Codes of few bits are often equally far. Then pictures rank in the order of the database, so that a score is one
  number and not a matter of the sort; `torchmetrics.retrieval` leaves that open.
* A picture is hidden from the student where the teacher looks, to make it look elsewhere too.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F


def hamming_distances(queries: Tensor, database: Tensor) -> Tensor:
    """In how many bits codes [Q, bits] and [D, bits] of booleans differ: int64 [Q, D]."""
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
    """How well the nearest codes are of the query's class: the mean over queries of the average precision.

    Args:
        queries, database: codes [Q, bits] and [D, bits] of booleans.
        query_labels, database_labels: classes, [Q] and [D].
        top: count only so many of the nearest. A query that finds none of its class counts as 0.
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
    for some, labels in zip(queries.split(256), query_labels.split(256), strict=True):  # memory for so many rankings
        order = hamming_distances(some, database).argsort(dim=1, stable=True)[:, :top]
        hit = database_labels[order] == labels[:, None]
        at_hits = torch.where(hit, hit.cumsum(1) / rank, 0.0).sum(1)
        precisions.append(at_hits / hit.sum(1).clamp(min=1))
    return torch.cat(precisions).mean().item()


@torch.no_grad()
def class_attention(model: VisionTransformer, x: Tensor) -> Tensor:
    """How much of the last block's attention the class token pays to each patch, [B, N], the mean over the heads."""
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
    """Pictures [B, 3, H, W] with zeros on the patches that the teacher's class token attends to most.

    Height and width must be whole patches of the teacher, whose tokens must all be there.
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
    """EET's objective: labels_weight * cross entropies + squared error of the code + teacher_weight * (1 - cosine).

    Args:
        scores: of the classes, [B, classes]; `scores_hidden` those of `hide_attended`'s pictures, if they count.
        code: what `forward_hash` gives, [B, bits]; `teacher_code` the teacher's, if there is one.
        labels: [B].
        targets: the codes to reach, [B, bits], of +1 and -1.
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
