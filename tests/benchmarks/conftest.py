"""What the tests of benchmarks share: the modules themselves, and a clock that shows what a test wants."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def load_benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of `benchmarks/` by its name."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`set_clock(module, seconds)`: each call of `time_calls` there runs once and took `seconds(its name)`."""

    def set_clock(module: Any, seconds: Callable[[str], float]) -> None:
        def time_calls(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, float]:
            for call in calls.values():
                call()
            return {name: seconds(name) for name in calls}

        monkeypatch.setattr(module, "time_calls", time_calls)

    return set_clock
