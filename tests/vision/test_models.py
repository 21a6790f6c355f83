"""The table of models: which names, which numbers. README.md's copy is compared in tests/test_readme.py."""

from __future__ import annotations

import pytest
import timm
from mixerzoo.vision.models import describe, main, names, table


def test_names_are_ours_and_follow_the_pattern() -> None:
    assert "resnet18" not in names() and {"nat_mini", "dinat_mini"} <= set(names())
    assert names("nat_ti*") == ["nat_tiny"]


def test_numbers_are_those_of_the_paper() -> None:
    """The authors state 20 M parameters, 2.7 GFLOPs (multiply-adds) and 81.8 % for NAT-Mini."""
    row = describe("nat_mini")
    assert row == ("nat_mini", "in1k", "20.0", "2.7", "224", "81.8", "mit")
    counted = sum(parameter.numel() for parameter in timm.create_model("nat_mini").parameters())
    assert row.parameters == f"{counted / 1e6:.1f}"


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [describe("nat_mini"), describe("nat_isotropic_small")]
    assert len({len(line) for line in table(rows).splitlines()}) == 1
    assert main(["nat_mini"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["nat_mini", "in1k", "20.0", "2.7", "224", "81.8", "mit"]


def test_a_pattern_without_a_match_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no_such_*"]) == 2
    assert "no model of ours matches 'no_such_*'" in capsys.readouterr().err
