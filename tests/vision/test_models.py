"""The table of models: names, numbers, licences, filters. docs/models.md is compared in tests/test_readme.py."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from mixerzoo.vision import models
from mixerzoo.vision.model_counts import COUNTS
from mixerzoo.vision.models import FAMILIES, count, describe, family, main, names, table

AGAIN = "run python -m mixerzoo.vision.models --count"
SMALLEST = {family(name): name for name in sorted(names(), key=lambda name: -COUNTS.get(name, (0, 0))[1])}


def test_names_are_ours_and_follow_the_pattern() -> None:
    assert "resnet18" not in names() and {"nat_mini", "dinat_mini"} <= set(names())
    assert names("nat_ti*") == ["nat_tiny"]


def test_numbers_are_those_of_the_paper() -> None:
    """The authors state 20 M parameters, 2.7 GFLOPs (multiply-adds) and 81.8 % for NAT-Mini."""
    row = describe("nat_mini")
    assert (row.weights, row.image, row.top1, row.arxiv) == ("in1k", 224, 81.8, "2204.07143")
    assert round(row.parameters / 1e6) == 20 and round(row.macs / 1e9, 1) == 2.7
    assert row.parameters == sum(parameter.numel() for parameter in timm.create_model("nat_mini").parameters())


def test_every_model_is_counted_and_no_other() -> None:
    assert list(COUNTS) == names(), AGAIN


@pytest.mark.parametrize("name", ["nat_mini", "van_b0", "tome_deit_tiny_patch16_224"])
def test_counts_are_what_counting_gives(name: str) -> None:
    assert COUNTS[name] == count(name), AGAIN


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST.values())
def test_counts_of_a_family_are_what_counting_gives(name: str) -> None:
    assert COUNTS[name] == count(name), AGAIN


@pytest.mark.exhaustive
def test_all_counts_are_what_counting_gives(tmp_path: Path) -> None:
    models.write_counts(tmp_path / "model_counts.py")
    assert (tmp_path / "model_counts.py").read_text() == Path(models.__file__).with_name("model_counts.py").read_text()


@pytest.mark.parametrize("name", names())
def test_every_model_has_a_paper_and_licences(name: str) -> None:
    row = describe(name)
    assert len(row.paper) > 10 and re.fullmatch(r"\d{4}\.\d{5}", row.arxiv)
    assert row.mixer and row.code_licence in {"mit", "apache-2.0", "cc-by-nc-4.0", "none", ""}
    if row.pretrained == "no":
        assert row.weights == row.weights_licence == "" and row.top1 is None
    else:
        assert row.weights and row.weights_licence in {"mit", "apache-2.0", "cc-by-nc-4.0", "unclear"}
        assert row.origin.startswith("https://")


def test_families_are_the_backbone_files() -> None:
    assert {family(name) for name in names()} == set(FAMILIES)


def test_code_licences_are_those_that_the_files_state() -> None:
    """A backbone's docstring names the licence of its authors' code; the table must not say another."""
    for name, group in FAMILIES.items():
        said = (Path(models.__file__).parent / f"backbones/{name}.py").read_text().split('"""')[1]
        stated = {"mit": "MIT", "apache-2.0": r"Apache[- ]2\.0", "cc-by-nc-4.0": r"CC-BY-NC 4\.0"}.get(group.code)
        assert stated is None or re.search(stated, said), name
        assert stated is not None or not re.search(r"\bMIT\b", said), name


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def _listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [row["model"] for row in json.loads(_run([*arguments, "--format", "json"], capsys))]


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [describe("nat_mini"), describe("nat_isotropic_small")]
    assert len({len(line) for line in table(rows).splitlines()}) == 1
    words = ["nat_mini", "in1k", "yes", "20.0", "2.7", "224", "81.8", "mit", "mit", "2204.07143"]
    assert _run(["nat_mini"], capsys).splitlines()[1].split() == words
    cells = ["", "`nat_mini`", *words[1:-1], "[2204.07143](https://arxiv.org/abs/2204.07143)", ""]
    assert _run(["nat_mini", "--markdown"], capsys).splitlines()[2] == " | ".join(cells).strip()


def test_csv_and_json_hold_the_same_whole_rows(capsys: pytest.CaptureFixture[str]) -> None:
    [row] = json.loads(_run(["nat_mini", "--format", "json"], capsys))
    [text] = csv.DictReader(io.StringIO(_run(["nat_mini", "--format", "csv"], capsys)))
    assert {key: str(value) for key, value in row.items()} == text
    assert (row["parameters"], row["macs"]) == COUNTS["nat_mini"]
    assert row["origin"] == "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [
        (["--max-params", "10"], lambda row: row.parameters <= 10e6),
        (["--max-gmacs", "1"], lambda row: row.macs <= 1e9),
        (["--min-top1", "84"], lambda row: row.top1 is not None and row.top1 >= 84),
        (["--family", "vig*"], lambda row: row.family in ("vig", "vig_h")),
        (["--mixer", "Scan"], lambda row: "scan" in row.mixer),
        (["--licence", "cc-by-nc*"], lambda row: row.weights_licence == "cc-by-nc-4.0"),
        (["--pretrained"], lambda row: row.pretrained != "no"),
        (["van_*", "vim_*"], lambda row: row.family in ("van", "vim")),
    ],
)
def test_filters_keep_what_they_say_and_all_of_it(
    arguments: list[str], holds: Callable[[models.Model], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [name for name in names() if holds(describe(name))]
    assert 0 < len(wanted) < len(names())
    assert sorted(_listed(arguments, capsys)) == sorted(wanted)


def test_orders(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {key: [describe(name) for name in _listed(["--sort", key], capsys)] for key in models.ORDERS}
    assert [row.model for row in rows["name"]] == sorted(names())
    assert [row.parameters for row in rows["params"]] == sorted(row.parameters for row in rows["name"])
    assert [row.macs for row in rows["gmacs"]] == sorted(row.macs for row in rows["name"])
    stated = [row.top1 or 0.0 for row in rows["top1"]]
    assert stated == sorted(stated, reverse=True)


def test_what_matches_nothing_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no_such_*"]) == 2
    assert "no model of ours matches 'no_such_*'" in capsys.readouterr().err
    assert main(["nat_*", "--max-params", "1"]) == 2
    assert "none of 6 models is what the options ask for" in capsys.readouterr().err
