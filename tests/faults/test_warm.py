"""The warm server: the processes that it starts behave like normal ones."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import pytest
from warm import Finished, WarmServer


def say(text: str) -> None:
    sys.stderr.write(f"{text} {os.environ.get('WARM_TEST')}\n")


def hang() -> None:
    time.sleep(60)


def test_output_exit_code_and_preparation_are_those_of_the_child(run_train: Callable[..., Finished]) -> None:
    done = run_train("--cfg", "optim.lr=0.25", prepare=say, prepare_with={"text": "hello"}, env={"WARM_TEST": "x"})
    assert done.code == 0 and "lr: 0.25" in done.out and done.err == "hello x\n" and done.orphans == 0
    assert run_train("optm.lr=1").code == 2 and "WARM_TEST" not in os.environ


def test_a_child_can_be_killed_and_a_hanging_one_is(warm: WarmServer) -> None:
    run = warm.train("--cfg", prepare=hang)
    run.kill()
    assert run.wait().code == -signal.SIGKILL
    with pytest.raises(TimeoutError, match="not done after"):
        warm.train("--cfg", prepare=hang).wait(0.1)
