"""Scan orders against the official ones, and maps to sequences and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mixerzoo.kernels.cross_scan import ATROUS, BIDIRECTIONAL, CROSS, ScanPath, cross_merge, cross_scan

FORWARD, BACKWARD = BIDIRECTIONAL
TURNED = (
    FORWARD,
    ScanPath(by_columns=True, flip_columns=True),
    BACKWARD,
    ScanPath(by_columns=True, flip_rows=True),
)

ORDERS = {
    "vmamba_scans0": CROSS,
    "vmamba_scans1": (FORWARD,) * 4,
    "vmamba_scans2": (FORWARD, FORWARD, BACKWARD, BACKWARD),
    "vmamba_scans3": TURNED,
    "mobilemamba_k2": BIDIRECTIONAL,
    "efficientvmamba_step2_4x6": ATROUS,
    "efficientvmamba_step2_5x7": ATROUS,
}

ALL = {"cross": CROSS, "bidirectional": BIDIRECTIONAL, "atrous": ATROUS, "turned": TURNED, "one": (ScanPath(step=3),)}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_are_the_official_ones(name: str, repository: Path) -> None:
    record = json.loads((repository / "tests/goldens/scan_ops.json").read_text())["orders"][name]
    found = [path.indices(record["H"], record["W"]).tolist() for path in ORDERS[name]]
    assert found == record["index"]


@pytest.mark.parametrize("name", [f"cross_{kind}_{i}" for kind in ("scan", "merge") for i in range(4)])
def test_equals_the_official_scan_and_merge(name: str, scan_case) -> None:
    case = scan_case(name)
    ((key, value),) = case.inputs().items()
    value.requires_grad_()
    paths = ORDERS[f"vmamba_scans{name[-1]}"]
    if key == "x":
        out = cross_scan(value.permute(0, 2, 3, 1), paths).transpose(2, 3)
    else:
        out = cross_merge(value.flatten(3).transpose(2, 3), (5, 7), paths).permute(0, 3, 1, 2).flatten(2)
    out.backward(case.grad().view_as(out))
    assert case.output_error("out", out) < 1e-12 and case.grad_error(key, value.grad) < 1e-12


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=str)
def test_equals_the_official_atrous_scan_and_merge(size: tuple[int, int], scan_case) -> None:
    scan, merge = (scan_case(f"atrous_{kind}_{size[0]}x{size[1]}") for kind in ("scan", "merge"))
    x, y = scan.inputs()["x"], merge.inputs()["y"]
    assert scan.output_error("out", cross_scan(x.permute(0, 2, 3, 1), ATROUS).transpose(2, 3)) < 1e-12
    merged = cross_merge(y.transpose(2, 3), size, ATROUS).permute(0, 3, 1, 2).flatten(2)
    assert merge.output_error("out", merged) < 1e-12


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_scan_reads_the_indices_and_merge_is_its_adjoint(name: str, size: tuple[int, int]) -> None:
    paths, (height, width) = ALL[name], size
    x = torch.randn(2, height, width, 3, dtype=torch.float64)
    padded = torch.cat([x.flatten(1, 2), torch.zeros(2, 1, 3, dtype=torch.float64)], 1)  # index -1: outside
    scanned = cross_scan(x, paths)
    assert torch.equal(scanned, torch.stack([padded[:, path.indices(height, width)] for path in paths], 1))
    y = torch.randn_like(scanned)
    torch.testing.assert_close((scanned * y).sum(), (x * cross_merge(y, size, paths)).sum())


def test_any_trailing_axes() -> None:
    x = torch.randn(2, 5, 7, 3, 4)
    assert torch.equal(cross_scan(x, ATROUS)[..., 2, :], cross_scan(x[..., 2, :], ATROUS))
    assert cross_scan(x[..., 0, 0]).shape == (2, 4, 35)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), "same step"),
        ((ScanPath(), ScanPath(step=2)), "same step"),
        ((ScanPath(step=0),), "at least 1"),
        ((ScanPath(row=2, step=2),), "below step"),
    ],
)
def test_bad_paths(paths: tuple[ScanPath, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_scan(torch.zeros(1, 4, 4), paths)


def test_bad_maps_and_sequences() -> None:
    with pytest.raises(ValueError, match=r"x must be \[batch, height, width"):
        cross_scan(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"y must be \[batch, 4, 35"):
        cross_merge(torch.zeros(1, 4, 34, 3), (5, 7))
