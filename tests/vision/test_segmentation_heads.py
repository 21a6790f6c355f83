"""Each head against its definition, written out once more on the names and shapes of published checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from mixerzoo.vision.segmentation._head import DecodeHead
from mixerzoo.vision.segmentation.fcn_head import FCNHead
from mixerzoo.vision.segmentation.segformer import SegFormerHead
from mixerzoo.vision.segmentation.semantic_fpn import FPN, SemanticFPN
from mixerzoo.vision.segmentation.upernet import AdaptivePool, UPerNet, averaging_matrix
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (32, 64, 160, 256)
"""Of VAN-B0, whose published models have both UPerNet and Semantic FPN."""


def _conv_norm(name: str, out: int, into: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.conv.weight", (out, into, size, size)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.bn.{leaf}", (out,)
    yield f"{name}.bn.num_batches_tracked", ()


def _classifier(width: int) -> dict[str, tuple[int, ...]]:
    return {"conv_seg.weight": (150, width, 1, 1), "conv_seg.bias": (150,)}


def upernet_names() -> dict[str, tuple[int, ...]]:
    names = _classifier(512)
    for i in range(4):
        names |= _conv_norm(f"psp_modules.{i}.1", 512, 256, 1)
    for i, width in enumerate(WIDTHS[:3]):
        names |= dict(_conv_norm(f"lateral_convs.{i}", 512, width, 1)) | dict(_conv_norm(f"fpn_convs.{i}", 512, 512, 3))
    return names | dict(_conv_norm("bottleneck", 512, 2304, 3)) | dict(_conv_norm("fpn_bottleneck", 512, 2048, 3))


def semantic_fpn_names() -> dict[str, tuple[int, ...]]:
    names = _classifier(128)
    for i, places in enumerate([(0,), (0,), (0, 2), (0, 2, 4)]):  # the places between them double the map
        for place in places:
            names |= _conv_norm(f"scale_heads.{i}.{place}", 128, 256 if place == 0 else 128, 3)
    return names


def segformer_names() -> dict[str, tuple[int, ...]]:
    names = _classifier(256) | dict(_conv_norm("fusion_conv", 256, 1024, 1))
    for i, width in enumerate(WIDTHS):
        names |= _conv_norm(f"convs.{i}", 256, width, 1)
    return names


def fpn_names() -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(WIDTHS):
        names |= {f"lateral_convs.{i}.conv.weight": (256, width, 1, 1), f"lateral_convs.{i}.conv.bias": (256,)}
        names |= {f"fpn_convs.{i}.conv.weight": (256, 256, 3, 3), f"fpn_convs.{i}.conv.bias": (256,)}
    return names


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: UPerNet(WIDTHS, 150), upernet_names()),
        (lambda: SemanticFPN([256] * 4, 150), semantic_fpn_names()),
        (lambda: SegFormerHead(WIDTHS, 150), segformer_names()),
        (lambda: FPN(WIDTHS), fpn_names()),
        (lambda: FCNHead(160, 150), _classifier(256) | dict(_conv_norm("convs.0", 256, 160, 3))),
    ],
    ids=["upernet", "semantic_fpn", "segformer", "fpn", "fcn"],
)
def test_names_and_shapes_are_those_of_published_checkpoints(
    make: Callable[[], nn.Module], names: Mapping[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        state = make().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == names


# The definitions, on the names alone


def _conv(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Convolution, batch norm by its running values, ReLU."""
    weight = state[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean, var, scale, shift = (
        state[f"{name}.bn.{leaf}"].view(-1, 1, 1) for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)


def _plain(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def _linear(length: int, size: int) -> Tensor:
    """[size, length]: interpolation between the centres of pixels, the outer ones repeated."""
    place = ((torch.arange(size) + 0.5) * length / size - 0.5).clamp(0, length - 1)
    before = place.floor().long().clamp(max=max(length - 2, 0))
    matrix = torch.zeros(size, length)
    rows = torch.arange(size)
    matrix[rows, before] = 1 - (place - before)
    if length > 1:
        matrix[rows, before + 1] = place - before
    return matrix


def _to(x: Tensor, like: Tensor) -> Tensor:
    rows, columns = (_linear(a, b) for a, b in zip(x.shape[-2:], like.shape[-2:], strict=True))
    return rows @ x @ columns.T


def _repeated(x: Tensor, like: Tensor) -> Tensor:
    rows, columns = (torch.arange(b) * a // b for a, b in zip(x.shape[-2:], like.shape[-2:], strict=True))
    return x[..., rows[:, None], columns]


def _parts(x: Tensor, count: int) -> Tensor:
    """Means over parts of the map, from the floor of a part's beginning to the ceiling of its end."""
    height, width = x.shape[-2:]
    means = [
        x[..., i * height // count : -(-(i + 1) * height // count), j * width // count : -(-(j + 1) * width // count)]
        for i in range(count)
        for j in range(count)
    ]
    return torch.stack([part.mean((-2, -1)) for part in means], -1).unflatten(-1, (count, count))


def _upernet(state: Mapping[str, Tensor], maps: list[Tensor]) -> Tensor:
    top = maps[-1]
    pooled = [_to(_conv(state, f"psp_modules.{i}.1", _parts(top, n)), top) for i, n in enumerate((1, 2, 3, 6))]
    levels = [_conv(state, f"lateral_convs.{i}", x) for i, x in enumerate(maps[:3])]
    levels.append(_conv(state, "bottleneck", torch.cat([top, *pooled], 1)))
    for i in (2, 1, 0):
        levels[i] = levels[i] + _to(levels[i + 1], levels[i])
    smooth = [_conv(state, f"fpn_convs.{i}", x) for i, x in enumerate(levels[:3])] + levels[3:]
    joined = torch.cat([_to(x, smooth[0]) for x in smooth], 1)
    return _plain(state, "conv_seg", _conv(state, "fpn_bottleneck", joined))


def _fpn(state: Mapping[str, Tensor], maps: list[Tensor]) -> list[Tensor]:
    levels = [_plain(state, f"lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in (2, 1, 0):
        levels[i] = levels[i] + _repeated(levels[i + 1], levels[i])
    return [_plain(state, f"fpn_convs.{i}.conv", x) for i, x in enumerate(levels)]


def _semantic_fpn(state: Mapping[str, Tensor], maps: list[Tensor]) -> Tensor:
    total = _conv(state, "scale_heads.0.0", maps[0])
    for i, count in ((1, 1), (2, 2), (3, 3)):
        x = maps[i]
        for step in range(count):
            x = _conv(state, f"scale_heads.{i}.{2 * step}", x)
            x = _to(x, x.new_empty(2 * x.shape[2], 2 * x.shape[3]))
        total = total + _to(x, total)
    return _plain(state, "conv_seg", total)


def _segformer(state: Mapping[str, Tensor], maps: list[Tensor]) -> Tensor:
    levels = [_to(_conv(state, f"convs.{i}", x), maps[0]) for i, x in enumerate(maps)]
    return _plain(state, "conv_seg", _conv(state, "fusion_conv", torch.cat(levels, 1)))


def _fcn(state: Mapping[str, Tensor], maps: list[Tensor]) -> Tensor:
    return _plain(state, "conv_seg", _conv(state, "convs.0", maps[2]))


def _random(module: nn.Module) -> nn.Module:
    """In evaluation, with weights in which a wrong norm or a wrong order shows."""
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 1.5)
        elif not name.endswith("num_batches_tracked"):
            tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim == 4 else 0.5)
    return module.eval()


def _maps(height: int, width: int) -> list[Tensor]:
    """Of a picture so large, each side rounded up."""
    return [
        torch.randn(2, c, -(-height // r), -(-width // r)) for c, r in zip((4, 6, 8, 10), (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("size", [(64, 64), (37, 61), (96, 40), (230, 300)])
@pytest.mark.parametrize(
    ("make", "definition"),
    [
        (lambda: UPerNet((4, 6, 8, 10), 3, channels=5), _upernet),
        (lambda: SegFormerHead((4, 6, 8, 10), 3, channels=5), _segformer),
        (lambda: SemanticFPN((4, 6, 8, 10), 3, channels=5), _semantic_fpn),
    ],
    ids=["upernet", "segformer", "semantic_fpn"],
)
@torch.no_grad()
def test_a_head_is_its_definition(
    make: Callable[[], DecodeHead], definition: Callable[..., Tensor], size: tuple[int, int]
) -> None:
    head, maps = _random(make()), _maps(*size)
    expected = definition(head.state_dict(), maps)
    assert expected.shape == (2, 3, *maps[0].shape[-2:])
    torch.testing.assert_close(head(maps), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_neck_and_the_auxiliary_head_are_their_definitions() -> None:
    maps = _maps(37, 61)
    neck, head = _random(FPN((4, 6, 8, 10), channels=5)), _random(FCNHead(8, 3, channels=5))
    torch.testing.assert_close(neck(maps), _fpn(neck.state_dict(), maps), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(maps[2]), _fcn(head.state_dict(), maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_pooling_by_matrices_is_adaptive_pooling(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, maps = AdaptivePool(parts), [torch.randn(2, 3, h, w) for h, w in ((1, 1), (2, 5), (6, 7), (13, 16), (3, 64))]
    usual = [pool(x) for x in maps]
    monkeypatch.setattr("mixerzoo.vision.segmentation.upernet.is_exporting", lambda: True)
    torch.testing.assert_close([pool(x) for x in maps], usual)
    assert averaging_matrix(parts, 11, torch.ones(1)).sum(1) == pytest.approx([1.0] * parts)


def test_a_new_head_begins_close_to_zero() -> None:
    head = UPerNet((4, 6, 8, 10), 150, channels=128)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05) and not head.conv_seg.bias.any()
    conv = head.fpn_convs[0].conv.weight
    assert conv.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("make", [UPerNet, SegFormerHead, SemanticFPN])
def test_maps_of_another_backbone_are_refused(make: Callable[..., DecodeHead]) -> None:
    head = make((4, 6, 8, 10), 3, channels=5)
    maps = _maps(64, 64)
    with pytest.raises(ValueError, match=r"built for 4 feature maps of \(4, 6, 8, 10\) channels; got 3 of \(4, 6, 8\)"):
        head(maps[:3])
    with pytest.raises(ValueError, match=r"got 4 of \(10, 8, 6, 4\)"):
        head(maps[::-1])


def test_a_neck_and_octaves_fit_the_maps() -> None:
    with pytest.raises(ValueError, match="the pyramid was built for 4 feature maps; got 3"):
        FPN((4, 6, 8, 10), channels=5)(_maps(64, 64)[:3])
    with pytest.raises(ValueError, match="octaves needs one entry a map, 4"):
        SemanticFPN((4, 6, 8, 10), 3, octaves=(0, 1))
