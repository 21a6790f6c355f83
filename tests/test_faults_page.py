"""docs/faults.md: every fault that must be handled has its rows, every row names tests that exist, and every file of
tests/faults is named.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    line
    for line in (ROOT / "docs/faults.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| fault ")
]
LINK = re.compile(r"\[([^\]]+)\]\(\.\./(tests/(?:faults|vision)/\w+\.py)\)")
SUPPORT = {"test_warm.py"}
"""Tests of what the tests of faults stand on."""

REQUIRED = {
    "kill at any step, in a save, in validation": ("SIGKILL at any moment",),
    "kill of one of two processes, with accumulation": ("SIGKILL of one of two processes",),
    "signals": ("SIGINT, SIGTERM", "A second Ctrl-C", "SIGUSR1 from Slurm", "A signal to several processes"),
    "exception in validation with averaged weights": ("An exception in validation while weights are averaged",),
    "damaged or missing checkpoint": (
        "A checkpoint is truncated, empty, flipped in one bit, or gone",
        "No undamaged checkpoint is left",
    ),
    "disk full": ("The disk is full |", "The disk is full at the start"),
    "checkpoint of another model, other settings": ("A checkpoint of another model", "Other data or settings"),
    "malicious pickle": ("A file with a pickle that would run code",),
    "loss not finite": ("The loss or a gradient is NaN or infinite", "The same with `train.skip_nonfinite=N`"),
    "damaged pictures": (
        "A picture is truncated, empty, of size zero, a decompression bomb, or text",
        "The same in evaluation",
        "A picture is CMYK, 16-bit, a palette, or turned by its EXIF",
        "Any of these before training",
    ),
    "wrong masks": ("A mask has an unknown label, another size, or colours",),
    "loading process killed or hanging": (
        "A loading process is killed",
        "A loading process hangs",
        "Either, with `data.worker_restarts=N`",
    ),
    "out of memory": ("Out of memory (GPU or CPU)", "Out of memory in `… benchmark`"),
    "empty class, one picture, batch larger than the set, odd batch with mixup, one class": ("An empty class,",),
    "folder that cannot be written, or holds a run": ("The run folder cannot be written", "The run folder holds a run"),
    "wrong settings": ("An unknown key, a wrong type, a value out of range",),
    "metric of several processes": ("Several processes evaluate",),
    "wrong export": ("An exported file differs from its model",),
    "no network": ("No network",),
}
"""The faults that this project has to handle, and how the rows about each of them begin."""


@pytest.mark.parametrize("fault", REQUIRED)
def test_every_required_fault_has_its_rows(fault: str) -> None:
    for words in REQUIRED[fault]:
        assert len([row for row in ROWS if row.startswith(f"| {words}")]) == 1, words


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_every_row_has_tests_and_they_exist(row: str) -> None:
    cell = row.split("|")[-2].strip()
    links = LINK.findall(cell)
    assert links and cell == ", ".join(f"[{words}](../{file})" for words, file in links)
    for words, file in links:
        test = f"test_{words.replace(' ', '_')}"
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"


def test_every_file_of_tests_stands_in_a_row() -> None:
    files = {path.name for path in (ROOT / "tests/faults").glob("test_*.py")}
    linked = {Path(file).name for row in ROWS for _, file in LINK.findall(row) if "/faults/" in file}
    assert linked == files - SUPPORT
