"""A run that is killed anywhere, and started again by the same command each time, ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork_processes
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from mixerzoo.vision.training import callbacks, checkpoints
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.tasks import Task
from warm import Finished

RANDOM = (
    *(
        "train.epochs=2",
        "data.limit=96",
        "train.batch_size=16",
        "train.save_every=2",
        "ema.decay=0.9",
        "ema.warmup=true",
    ),
    *("augment.mixup=0.5", "augment.erasing=0.3", "augment.shift=1", "model.kwargs.drop_path_rate=0.3"),
)
"""Six steps an epoch with everything random that there is."""


def kill(place: str, count: int, rank: int | None = None) -> None:
    """In the run's process: makes it, or the one of two with this rank, kill itself at the `count`th time that it comes
    to the place."""
    left = count
    if rank is not None:
        fork_processes()

    def strike() -> None:
        nonlocal left
        if rank is not None and int(os.environ["RANK"]) != rank:
            return
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if place == "save":  # half of the file is written
        original = checkpoints.write_sealed

        def half(file: Any, write: Callable[[Any], Any]) -> None:
            if left == 0 and rank in (0, None):
                file.write(b"PK" * 5000)
                file.flush()
            strike()
            original(file, write)

        checkpoints.write_sealed = half
    elif place == "rename":  # between the two: last.ckpt is previous.ckpt already
        replace = os.replace

        def replace_and_die(source: Any, target: Any) -> None:
            replace(source, target)
            if Path(target).name == "previous.ckpt":
                strike()

        os.replace = replace_and_die
    else:
        owner, name = {
            "step": (Task, "training_step"),
            "validation": (Task, "validation_step"),
            "test": (Task, "test_step"),
            "table": (callbacks, "write_text"),
        }[place]
        method = getattr(owner, name)

        def struck(*arguments: Any, **more: Any) -> Any:
            result = method(*arguments, **more)
            strike()
            return result

        setattr(owner, name, struck)


def two_processes() -> None:
    fork_processes()


def assert_same(one: Any, two: Any, where: str = "") -> None:
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_same(left, right, f"{where}/{index}")
    else:
        assert one == two, where


def assert_same_runs(one: Path, two: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        pair = [load_checkpoint(folder / "checkpoints" / name) for folder in (one, two)]
        for part in ("state_dict", "raw_weights", "optimizer_states", "lr_schedulers", "train_means", "global_step"):
            assert_same(pair[0][part], pair[1][part], f"{name}/{part}")
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert_same(*({name: found[name] for name in found if name not in ("seconds", "folder")} for found in results))


@pytest.fixture(scope="module")
def whole(warm: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of the uninterrupted run with these settings, made once."""
    folders: dict[tuple[str, ...], Path] = {}

    def make(*arguments: str, **how: Any) -> Path:
        if arguments not in folders:
            folders[arguments] = tmp_path_factory.mktemp("whole") / "run"
            done = warm.train(*arguments, f"out={folders[arguments]}", **how).wait()
            assert done.code == 0, done.err
        return folders[arguments]

    return make


def _check(
    kills: list[tuple[str, int]],
    arguments: tuple[str, ...],
    whole: Callable[..., Path],
    run_train: Callable[..., Finished],
    folder: Path,
) -> None:
    command = (*arguments, f"out={folder}", "resume=auto")
    for place, count in kills:
        done = run_train(*command, prepare=kill, prepare_with={"place": place, "count": count})
        assert done.code in (-signal.SIGKILL, 0), done.err  # 0: it did not come there so often
    done = run_train(*command)
    assert done.code == 0, done.err
    assert_same_runs(whole(*arguments), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [[("step", 0)], [("step", 9), ("validation", 0)], [("save", 1), ("rename", 2), ("table", 1)]],
    ids=lambda kills: "-".join(place for place, _ in kills),
)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    kills: list[tuple[str, int]],
    tiny: tuple[str, ...],
    whole: Callable[..., Path],
    run_train: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    _check(kills, (*tiny, *RANDOM), whole, run_train, tmp_path / "run")


PLACES = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 11)),
    st.tuples(st.sampled_from(["save", "rename"]), st.integers(0, 5)),
    st.tuples(st.just("validation"), st.integers(0, 30)),
    st.tuples(st.sampled_from(["test", "table"]), st.integers(0, 3)),
)


@pytest.mark.parametrize("extra", [("data.workers=2",), ("train.accumulate=2",)], ids=["workers", "accumulate"])
@pytest.mark.parametrize(
    "examples", [pytest.param(1, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.exhaustive)]
)
def test_a_run_killed_anywhere_ends_as_an_uninterrupted_one(
    extra: tuple[str, ...],
    examples: int,
    tiny: tuple[str, ...],
    whole: Callable[..., Path],
    run_train: Callable[..., Finished],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kills=st.lists(PLACES, min_size=1, max_size=2))
    @example(kills=[("save", 0), ("validation", 19)])
    def check(kills: list[tuple[str, int]]) -> None:
        _check(kills, (*tiny, *RANDOM, *extra), whole, run_train, tmp_path_factory.mktemp("killed") / "run")

    check()


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_as_uninterrupted_ones(
    tiny: tuple[str, ...], whole: Callable[..., Path], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    """In a step, in a save and in an evaluation, one after the other; with two batches to a step."""
    two = ("train.devices=2", "train.accelerator=cpu", "train.batch_size=8", "train.accumulate=2")
    arguments = (*tiny, *RANDOM, *two)
    command = (*arguments, f"out={tmp_path / 'run'}", "resume=auto")
    for rank, place, count in ((1, "step", 5), (0, "save", 1), (1, "validation", 2)):
        fault = {"rank": rank, "place": place, "count": count}
        done = run_train(*command, prepare=kill, prepare_with=fault)
        assert done.code == 1 and f"process {rank} of 2 was ended by SIGKILL" in done.err, done.err
    done = run_train(*command, prepare=two_processes)
    assert done.code == 0, done.err
    assert_same_runs(whole(*arguments, prepare=two_processes), tmp_path / "run")
