"""Fixtures of the fault tests: `run_train` runs train.py in a separate process that a test can kill or disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from warm import Finished, WarmServer

TINY = (
    *("data=digits", "data.limit=64", "train.batch_size=16", "train.progress=false", "model=nat_mini"),
    *("model.kwargs.stem_stride=2", "model.kwargs.embed_dim=8", "model.kwargs.depths=[1,1,1,1]"),
    *("model.kwargs.num_heads=[1,1,1,1]", "model.kwargs.kernel_size=3"),
)
"""A run with four steps per epoch of a model that trains in a second."""


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmServer]:
    """Starts commands in children of a warm process: `warm.train(*settings)`, `warm.start(module, *arguments)`."""
    server = WarmServer()
    yield server
    server.close()


@pytest.fixture
def tiny() -> tuple[str, ...]:
    return TINY


@pytest.fixture
def run_train(warm: WarmServer) -> Callable[..., Finished]:
    """`run_train(*TINY, "out=…", prepare=function, prepare_with={…}, env={…})`: runs train.py to its end."""

    def run(*arguments: str, timeout: float = 120, **how: Any) -> Finished:
        return warm.train(*arguments, **how).wait(timeout)

    return run
