"""Several processes: how they are started, watched and ended, and that they compute what one would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.vision.data.loading import EpochBatches, Request, ResumableLoader
from mixerzoo.vision.training import distributed
from mixerzoo.vision.training import launch as launching
from mixerzoo.vision.training.config import TrainConfig
from mixerzoo.vision.training.launch import Forwarding, check_processes, launch, rank, started_by
from mixerzoo.vision.training.settings import ConfigError


def _launch(program: str, count: int = 2) -> tuple[int, list[str], float]:
    """Runs Python statements, which see their RANK as `rank`; the exit code, what was said, and the seconds it took."""
    said: list[str] = []
    begin = "import os, signal, sys, time; rank = int(os.environ['RANK']); "
    started = time.monotonic()
    code = launch([sys.executable, "-S", "-c", begin + program], count, said.append)
    return code, said, time.monotonic() - started


def test_every_process_knows_its_place_and_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", launching.PARENT_VARIABLE)
    code, said, _ = _launch(f"open(str(rank), 'w').write(' '.join(os.environ[name] for name in {names}))", 3)
    assert (code, said) == (0, [])
    places = [(tmp_path / str(number)).read_text().split() for number in range(3)]
    assert [place[:4] for place in places] == [[str(number), str(number), "3", "0"] for number in range(3)]
    assert all(place[4:] == ["127.0.0.1", places[0][5], str(os.getpid())] for place in places)


def test_a_process_that_dies_ends_the_others_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for it in a collective, for as long as that takes."""
    monkeypatch.setattr(launching, "_GRACE", 0.3)
    code, said, seconds = _launch("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert code == 1 and seconds < 10
    assert said == ["error: process 1 of 2 was ended by SIGKILL (too little memory?); the others were stopped"]


def test_the_last_words_of_a_process_that_fails_alone_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_GRACE", 0.3)
    code, said, _ = _launch("print('much'), sys.exit('why') if rank == 1 else time.sleep(60)")
    assert code == 1
    assert said == [
        "  process 1: much",
        "  process 1: why",
        "error: process 1 of 2 ended with code 1; the others were stopped",
    ]


@pytest.mark.parametrize("code", [2, 130, 143])
def test_what_all_processes_say_is_said_once(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    got, said, _ = _launch(f"time.sleep(0.1 * rank), sys.stderr.write('words'), sys.exit({code})")
    assert (got, said, capfd.readouterr().err) == (code, [], "words")


def test_the_first_process_may_take_its_time_after_the_others() -> None:
    code, said, seconds = _launch("time.sleep(1.0 * (rank == 0))")
    assert (code, said) == (0, []) and seconds >= 1


def _note_a_signal(number: int) -> str:
    """A program that writes an x into the file RANK-NUMBER for each signal, and readyRANK once it can."""
    return (
        "note = lambda number, _: open(f'{rank}-{number}', 'a').write('x'); "
        f"signal.signal({number}, note); open(f'ready{{rank}}', 'w'); "
        f"[time.sleep(0.01) for _ in range(3000) if not os.path.exists(f'{{rank}}-{number}')]; "
        f"time.sleep(0.3); sys.exit(128 + {number})"
    )


@pytest.mark.parametrize("moment", ["before the first", "after the first", "after the second"])
def test_signals_reach_processes_that_are_being_started(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = subprocess.Popen

    def interrupt(now: str) -> None:
        if now == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupt_in_between(*arguments: Any, **options: Any) -> subprocess.Popen[Any]:
        interrupt("before the first" if options["env"]["RANK"] == "0" else "after the first")
        process = start(*arguments, **options)
        while not (tmp_path / f"ready{options['env']['RANK']}").exists() and process.poll() is None:
            time.sleep(0.01)
        if options["env"]["RANK"] == "1":
            interrupt("after the second")
        return process

    monkeypatch.setattr(launching.subprocess, "Popen", interrupt_in_between)
    code, said, _ = _launch(_note_a_signal(signal.SIGTERM))
    assert (code, said) == (143, [])
    assert [(tmp_path / f"{rank}-15").read_text() for rank in range(2)] == ["x", "x"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_process_once(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupt() -> None:
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    code, said, _ = _launch(_note_a_signal(number))
    assert (code, said) == (128 + number, [])
    assert [(tmp_path / f"{rank}-{number}").read_text() for rank in range(2)] == ["x", "x"]
    assert signal.getsignal(number) is before


def test_nothing_is_left_when_the_parent_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(processes: object) -> None:
        while not all((tmp_path / str(rank)).exists() for rank in range(2)):
            time.sleep(0.01)
        raise OSError("no more")

    monkeypatch.setattr(launching, "_wait", fail)
    with pytest.raises(OSError, match="no more"):
        _launch("open(str(rank), 'w').write(str(os.getpid())), os.replace(str(rank), str(rank)), time.sleep(60)")
    for number in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(number)).read_text()), 0)


def test_signals_outside_the_main_thread_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def enter() -> None:
        with Forwarding():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}
BATCH = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*TORCHRUN, *SRUN, *BATCH, launching.PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "starter", "number"),
    [({}, None, 0), (TORCHRUN, "torchrun", 3), (SRUN, "slurm", 2), (BATCH, None, 0)],
)
def test_who_started_a_process_is_known(
    environment: dict[str, str], starter: str | None, number: int, alone: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        alone.setenv(name, value)
    assert (started_by(), rank()) == (starter, number)


@pytest.mark.parametrize(
    ("environment", "train", "out", "message"),
    [
        ({}, TrainConfig(nodes=2), "x", "train.nodes=2: one command cannot start processes on other machines"),
        ({}, TrainConfig(strategy="ddp"), "x", "train.strategy=ddp is for several processes; give train.devices=2"),
        ({}, TrainConfig(accelerator="gpu", devices=99), "x", "but this machine has"),
        (TORCHRUN, TrainConfig(devices=2), "x", "torchrun started 4 processes, but train.devices=2 on train.nodes=1"),
        (SRUN, TrainConfig(), "x", "slurm started 4 processes, but train.devices=1"),
        (SRUN, TrainConfig(devices=2, nodes=2), None, "a run needs a folder that all processes know: give out="),
    ],
)
def test_settings_that_do_not_fit_the_processes_are_refused(
    environment: dict[str, str], train: TrainConfig, out: str | None, message: str, alone: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        alone.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_processes(train, out)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_evaluation_is_shared_out_without_repeats_and_in_as_many_batches(processes: int, batch_size: int) -> None:
    for length in (1, 2, 3, 4, 10, 15, 29):
        shares = [
            list(EpochBatches(length, batch_size, seed=0, training=False, rank=number, world_size=processes))
            for number in range(processes)
        ]
        assert len({len(share) for share in shares}) == 1
        pictures = [index for share in shares for request in share for index in request.indices]
        assert sorted(pictures) == list(range(length))


def test_another_number_of_processes_goes_on_after_an_epoch_and_is_refused_within() -> None:
    def loader(processes: int) -> ResumableLoader:
        return ResumableLoader(Numbers(), EpochBatches(64, 8, seed=0, training=True, world_size=processes))

    two, one = loader(2), loader(1)
    epoch = iter(two)
    next(epoch)
    with pytest.raises(ValueError, match="inside an epoch of 4 batches a process, which are 8 now"):
        one.load_state_dict(two.state_dict())
    assert len(list(epoch)) == 3
    one.load_state_dict(two.state_dict())
    assert (one.batches.epoch, one.batches.start) == (1, 0)


class Numbers:
    """Each picture is its number."""

    def __len__(self) -> int:
        return 64

    def __getitems__(self, request: Request, /) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.tensor(request.indices, dtype=torch.long)
        return numbers.float().view(-1, 1, 1, 1), numbers


def test_a_process_without_pictures_has_an_empty_batch_of_their_shape() -> None:
    class One(Numbers):
        def __len__(self) -> int:
            return 1

    shares = [
        list(ResumableLoader(One(), EpochBatches(1, 8, seed=0, training=False, rank=rank, world_size=2)))
        for rank in range(2)
    ]
    assert [[tuple(images.shape) for images, _ in share] for share in shares] == [[(1, 1, 1, 1)], [(0, 1, 1, 1)]]


def test_what_every_process_has_of_a_mean_is_given_back_or_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for own in range(2):
        monkeypatch.setattr(distributed, "_group", lambda own=own: (2, own))
        assert torch.equal(distributed.of_this_process(values), values[own])
        monkeypatch.setattr(distributed, "_group", lambda own=own: (3, own))
        assert torch.equal(distributed.of_this_process(values), torch.tensor([[4.0, 6.0], [0.0, 0.0]][own]))
    monkeypatch.undo()
    assert torch.equal(distributed.of_all_processes(values[0]), values[:1])
