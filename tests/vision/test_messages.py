"""Shared parts of error messages: the closest known name, lists of names in files, and the processor's name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
from mixerzoo.vision import _machine
from mixerzoo.vision._loading import class_names, load_under_head
from mixerzoo.vision._messages import closest, did_you_mean, one_line
from mixerzoo.vision.data.pictures import DataError


def test_the_closest_names_end_the_message() -> None:
    known = ["nat_mini", "nat_tiny", "Unet"]
    assert did_you_mean("nat_minni", known) == "; did you mean nat_mini?"
    assert did_you_mean("nat_minni", known, most=2) == "; did you mean nat_mini, nat_tiny?"
    assert did_you_mean("unett", known) == "; did you mean Unet?"  # as the name is written, whatever the case asked for
    assert did_you_mean("qqq", known) == "" and closest("qqq", known) == []


def test_messages_become_one_short_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 500))) == 401


def test_lists_of_classes_are_read_like_all_lists(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffsky \n\n  tree\n".encode())
    assert class_names(str(file)) == ["sky", "tree"]
    file.write_bytes("ciel étoilé\n".encode("latin-1"))
    arguments = argparse.Namespace(model="test_convnext", pretrained=False, classes=str(file))
    with pytest.raises(DataError, match=r"classes\.txt is not in UTF-8 .* at byte 5\); save it in UTF-8"):
        load_under_head(arguments, None)
    assert class_names("3") == ["0", "1", "2"] and class_names("voc")[1] == "aeroplane"


def test_the_processor_has_a_name_with_and_without_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nmodel name\t: another\n")
    monkeypatch.setattr(_machine, "Path", lambda _: file)
    assert _machine.cpu_name() == "Some CPU: 3 GHz"
    file.write_text("processor\t: 0\n")  # as on ARM
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert _machine.cpu_name() == "arm"
    os.remove(file)
    assert _machine.cpu_name() == "arm"
