"""A run that is killed anywhere and started again gives the same results as an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from forked import fork_processes
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
"""Settings with six steps per epoch and every kind of randomness."""


def kill(place: str, count: int, rank: int | None = None) -> None:
    """In the process of the run: make it, or only this rank, kill itself when it reaches the place for the `count`th
    time."""
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
    """Return a function that gives the folder of the uninterrupted run with these settings, cached."""
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
    resume: Literal["auto", "last"] = "auto",
) -> None:
    """Kill a run at each of the places, start it again every time, and compare it with an uninterrupted one.

    Every kill must happen: a place that the run does not reach fails the test.
    `resume`: "auto" is one command for every start; "last" is added to it from the second start on.
    """
    first = (*arguments, f"out={folder}", *(["resume=auto"] if resume == "auto" else []))
    again = first if resume == "auto" else (*first, "resume=last")
    command = first
    for place, count in kills:
        done = run_train(*command, prepare=kill, prepare_with={"place": place, "count": count})
        assert done.code == -signal.SIGKILL, f"not killed at {place} {count}: code {done.code}\n{done.err}"
        command = again
    done = run_train(*again)
    assert done.code == 0, done.err
    assert_same_runs(whole(*arguments), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "resume"),
    [
        ([("step", 0)], "auto"),
        ([("step", 9), ("validation", 0)], "auto"),
        ([("save", 1), ("rename", 2), ("table", 1)], "auto"),
        ([("rename", 1), ("step", 2)], "last"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(place for place, _ in value),
)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    kills: list[tuple[str, int]],
    resume: Literal["auto", "last"],
    tiny: tuple[str, ...],
    whole: Callable[..., Path],
    run_train: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    _check(kills, (*tiny, *RANDOM), whole, run_train, tmp_path / "run", resume)


IN_FIRST_EPOCH = {"step": 6, "save": 3, "rename": 1, "validation": 19, "table": 2}
"""How often a run comes to each place in its first epoch at least, with and without accumulation."""
AFTER_IT = {"step": 6, "save": 3, "rename": 2, "validation": 19, "table": 2}
"""The same for what is left of a run that was killed in its first epoch."""
AT_THE_END = {"validation": 19, "test": 19}
"""The same for a run that was killed once more."""
SAMPLE, ALL = 2, 12
"""How many drawn lists of three kills `make test` and `make test-exhaustive` take for each of the two settings."""


def draw(name: str) -> list[tuple[str, int]]:
    """Draw three kills that all happen, from a random stream seeded by the name."""
    stream = random.Random(name)
    kills = []
    for counts in (IN_FIRST_EPOCH, AFTER_IT, AT_THE_END):
        place = stream.choice(sorted(counts))
        kills.append((place, stream.randrange(counts[place])))
    return kills


def cases() -> Iterator[Any]:
    """Yield settings and kills: a chosen list and the drawn ones."""
    for setting in ("data.workers=2", "train.accumulate=2"):
        drawn = [draw(f"{setting} {number}") for number in range(ALL)]
        for number, kills in enumerate([[("save", 0), ("validation", 19)], *drawn]):
            mark = pytest.mark.slow if number <= SAMPLE else pytest.mark.exhaustive
            name = "-".join(f"{place}{count}" for place, count in kills)
            yield pytest.param(setting, kills, marks=mark, id=f"{setting.split('=')[0].split('.')[1]}-{name}")


@pytest.mark.parametrize(("setting", "kills"), list(cases()))
def test_a_run_killed_anywhere_ends_as_an_uninterrupted_one(
    setting: str,
    kills: list[tuple[str, int]],
    tiny: tuple[str, ...],
    whole: Callable[..., Path],
    run_train: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    _check(kills, (*tiny, *RANDOM, setting), whole, run_train, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_as_uninterrupted_ones(
    tiny: tuple[str, ...], whole: Callable[..., Path], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    """A process is killed in a step, in a save and in an evaluation in turn, with two batches per step."""
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
