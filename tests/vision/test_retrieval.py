"""Binary codes: distances and rankings against loops, hidden patches, and the loss that they are learned by."""

import copy

import mixerzoo.vision  # noqa: F401  registers the models
import pytest
import timm
import torch
from mixerzoo.vision.backbones import restore_tokens
from mixerzoo.vision.retrieval import (
    class_attention,
    hamming_distances,
    hash_loss,
    hide_attended,
    mean_average_precision,
)
from torch import nn
from torchmetrics.retrieval import RetrievalMAP

SETTINGS = {"depth": 3, "embed_dim": 32, "num_heads": 4, "num_classes": 4, "img_size": 64, "bits": 8}


def test_distances() -> None:
    a, b = torch.rand(5, 19) > 0.5, torch.rand(7, 19) > 0.5
    want = [[sum(bool(p != q) for p, q in zip(row, other, strict=True)) for other in b] for row in a]
    assert hamming_distances(a, b).tolist() == want
    with pytest.raises(ValueError, match="database"):
        hamming_distances(a, b.float())
    with pytest.raises(ValueError, match="database"):
        hamming_distances(a, b[:, :18])


@pytest.mark.parametrize("top", [None, 5])
def test_ranking_is_torchmetrics_with_ties_in_order(top: int | None) -> None:
    queries, database = torch.rand(300, 6) > 0.5, torch.rand(40, 6) > 0.5
    wanted, labels = torch.randint(0, 4, (300,)), torch.randint(0, 3, (40,))
    ranked = hamming_distances(queries, database).double() + torch.arange(40) / 1000
    metric = RetrievalMAP(top_k=top)
    want = metric(
        1 - ranked.flatten() / 10, (labels == wanted[:, None]).flatten(), torch.arange(300).repeat_interleave(40)
    )
    assert mean_average_precision(queries, wanted, database, labels, top=top) == pytest.approx(want.item(), abs=1e-6)


def test_perfect_and_hopeless_rankings() -> None:
    codes = torch.eye(4) > 0
    assert mean_average_precision(codes, torch.arange(4), codes, torch.arange(4)) == 1
    assert mean_average_precision(codes, torch.arange(4), codes, torch.arange(4) + 4) == 0
    with pytest.raises(ValueError, match="one a code"):
        mean_average_precision(codes, torch.arange(3), codes, torch.arange(4))
    with pytest.raises(ValueError, match="something to rank"):
        mean_average_precision(codes, torch.arange(4), codes[:0], torch.arange(0))


def test_hidden_is_what_the_class_token_attends_to() -> None:
    torch.manual_seed(3)
    teacher = restore_tokens(timm.create_model("eet_vit_small", **SETTINGS)).eval()
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    seen = {}
    last = teacher.blocks[-1].attn
    last.fused_attn = False  # then its matrix goes through the dropout
    last.attn_drop.register_forward_hook(lambda module, args, out: seen.update(matrix=out))
    x = torch.randn(2, 3, 48, 64)
    teacher(x)
    torch.testing.assert_close(class_attention(teacher, x), seen["matrix"].mean(1)[:, 0, 1:])
    hidden = hide_attended(teacher, x, patches=3)
    for i, row in enumerate(class_attention(teacher, x)):
        best = {divmod(n, 4) for n in row.topk(3).indices.tolist()}
        for r in range(3):
            for c in range(4):
                patch = (i, slice(None), slice(16 * r, 16 * r + 16), slice(16 * c, 16 * c + 16))
                assert torch.equal(hidden[patch], x[patch] * ((r, c) not in best))
    with pytest.raises(ValueError, match="whole patches"):
        hide_attended(teacher, torch.randn(1, 3, 40, 64))


def test_loss_is_the_sum_of_its_parts() -> None:
    scores, labels = torch.randn(5, 4), torch.randint(0, 4, (5,))
    code, teacher = torch.randn(5, 8), torch.randn(5, 8)
    targets = torch.randn(5, 8).sign()
    entropy = -scores.log_softmax(1)[torch.arange(5), labels].mean()
    distance = ((code - targets) ** 2).mean()
    cosine = ((code * teacher).sum(1) / code.norm(dim=1) / teacher.norm(dim=1)).mean()
    torch.testing.assert_close(hash_loss(scores, code, labels, targets), 0.1 * entropy + distance)
    whole = hash_loss(scores, code, labels, targets, scores_hidden=scores, teacher_code=teacher)
    torch.testing.assert_close(whole, 0.2 * entropy + distance + 1 - cosine)
    with pytest.raises(ValueError, match="targets"):
        hash_loss(scores, code, labels, targets[:, :7])


def test_codes_can_be_learned() -> None:
    """Four classes of coloured noise, by the whole objective: codes must find their class."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    labels = torch.arange(32) % 4
    pictures = colours[labels][:, :, None, None] + 0.3 * torch.randn(32, 3, 64, 64)
    target = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).repeat(1, 2)
    model = timm.create_model("eet_vit_small", **SETTINGS)
    teacher = copy.deepcopy(restore_tokens(model))
    before = mean_average_precision(model.hash_codes(pictures), labels, model.hash_codes(pictures), labels)
    optimizer = torch.optim.AdamW([*model.parameters(), *teacher.parameters()], lr=0.01)
    for _ in range(20):
        hidden = hide_attended(teacher, pictures)
        scores, dense = model(pictures), teacher(pictures)
        code, teacher_code = model.head_hash(scores), teacher.head_hash(dense)
        loss = hash_loss(dense, teacher_code, labels, target[labels]) + hash_loss(
            scores,
            code,
            labels,
            target[labels],
            scores_hidden=model(hidden),
            teacher_code=teacher_code.detach(),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = model.eval().hash_codes(pictures)
    after = mean_average_precision(codes, labels, codes, labels)
    assert after > 0.75 > before, (before, after)
