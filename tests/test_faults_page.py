"""docs/faults.md: every row names tests that exist, and every file of tests/faults is named."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/faults.md").read_text()
LINKS = re.findall(r"\[([^\]]+)\]\(\.\./tests/faults/(\w+\.py)\)", PAGE)
SUPPORT = {"test_warm.py"}
"""Tests of what the tests of faults stand on."""


def test_every_row_has_tests_and_they_exist() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| fault ")]
    assert len(rows) > 30
    for row in rows:
        assert "../tests/faults/" in row, row
    for words, file in LINKS:
        test = f"test_{words.replace(' ', '_')}"
        assert f"def {test}(" in (ROOT / "tests/faults" / file).read_text(), f"{file} has no {test}"


def test_every_file_of_tests_stands_in_a_row() -> None:
    files = {path.name for path in (ROOT / "tests/faults").glob("test_*.py")}
    assert {file for _, file in LINKS} == files - SUPPORT
