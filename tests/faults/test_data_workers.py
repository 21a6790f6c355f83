"""Data loading workers that die or hang cause a quick error or are restarted at the same batch, without zombies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from mixerzoo.vision.data.loading import EpochBatches, Request, ResumableLoader
from mixerzoo.vision.data.workers import WorkerError


class Fragile:
    """A data set of seeded noise. The worker that gets picture `at` kills itself once, or `times` times."""

    def __init__(self, folder: Path, *, at: int = -1, how: str = "SIGKILL", times: int = 1) -> None:
        self.folder, self.at, self.how, self.times = folder, at, how, times

    def __len__(self) -> int:
        return 48

    def __getitems__(self, request: Request, /) -> tuple[torch.Tensor, torch.Tensor]:
        if self.at in request.indices and (count := len(list(self.folder.iterdir()))) < self.times:
            (self.folder / f"{count}").touch()
            if self.how == "hang":
                time.sleep(600)
            os.kill(os.getpid(), getattr(signal, self.how))
        noise = torch.rand(len(request.indices), generator=torch.Generator().manual_seed(request.seed))
        return torch.tensor(request.indices), noise


def _loader(data: Fragile, **options: object) -> ResumableLoader:
    batches = EpochBatches(48, 6, seed=3, training=True)
    return ResumableLoader(data, batches, **{"workers": 2, **options})  # type: ignore[arg-type]


def _same(batches: list, expected: list) -> bool:
    return len(batches) == len(expected) and all(
        torch.equal(index, want_index) and torch.equal(noise, want)
        for (index, noise), (want_index, want) in zip(batches, expected, strict=True)
    )


def _children() -> set[int]:
    """Return the child processes of this one, including zombies."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended since
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            found |= {int(file.parent.name)} if parent == os.getpid() else set()
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> object:
    handler = signal.getsignal(signal.SIGCHLD)
    before = _children()  # compilers that tests before this one have started
    yield
    assert not multiprocessing.active_children()
    assert _children() <= before
    restored = signal.getsignal(signal.SIGCHLD)
    assert restored == handler or "torch" in getattr(restored, "__module__", "")


@pytest.mark.parametrize(
    ("how", "message"),
    [("SIGKILL", "ended with SIGKILL .memory ran out, most likely"), ("SIGSEGV", "ended with SIGSEGV .a library")],
)
def test_a_killed_worker_is_an_error_within_5_seconds(how: str, message: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        list(_loader(Fragile(tmp_path, at=13, how=how)))
    assert time.monotonic() - started < 5


def test_a_worker_killed_during_a_step_does_not_break_the_step(tmp_path: Path) -> None:
    batches = iter(_loader(Fragile(tmp_path)))
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    time.sleep(0.2)  # the step: PyTorch's own handler would raise here
    with pytest.raises(WorkerError, match="SIGKILL"):
        next(batches)


def test_a_hanging_worker_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"no data came for 1\.5 s \(data\.timeout\)"):
        list(_loader(Fragile(tmp_path, at=13, how="hang"), timeout=1.5))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("how", ["SIGKILL", "hang"])
def test_restarted_workers_go_on_at_the_same_batch(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(_loader(Fragile(tmp_path), workers=0))
    loader = _loader(Fragile(tmp_path, at=expected[4][0][0].item(), how=how), timeout=1.5, restarts=1)
    assert _same(list(loader), expected)
    assert "starting the workers again, at batch" in caplog.text
    assert loader.state_dict() == {"epoch": 0, "batches": 8, "of": 8} and loader.batches.start == 0
    assert _same(list(loader), expected)  # a second pass begins at the beginning


def test_restarts_are_limited_and_the_error_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"data\.worker_restarts=2 would start the workers again"):
        list(_loader(Fragile(tmp_path, at=13, times=5), restarts=1))
    assert len(list(tmp_path.iterdir())) == 2


def test_workers_outlive_signals_to_the_group(tmp_path: Path) -> None:
    """Ctrl-C and Slurm signal every process; the main process may need more data to finish its step."""
    expected = list(_loader(Fragile(tmp_path), workers=0))
    batches = iter(_loader(Fragile(tmp_path), timeout=5))
    first = [next(batches), next(batches)]  # one of each worker, so that both are past their start
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGINT)
        os.kill(child.pid or 0, signal.SIGTERM)
    assert _same([*first, *batches], expected)


def test_an_abandoned_epoch_ends_its_workers(tmp_path: Path) -> None:
    batches = iter(_loader(Fragile(tmp_path)))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_an_error_of_a_data_set_is_no_dead_worker(tmp_path: Path) -> None:
    class Wrong(Fragile):
        def __getitems__(self, request: Request, /) -> tuple[torch.Tensor, torch.Tensor]:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as caught:
        list(_loader(Wrong(tmp_path), restarts=3))
    assert not isinstance(caught.value, WorkerError)


def test_a_worker_that_leaves_quietly_is_an_error(tmp_path: Path) -> None:
    class Leaving(Fragile):
        def __getitems__(self, request: Request, /) -> tuple[torch.Tensor, torch.Tensor]:
            os._exit(0)

    with pytest.raises(WorkerError, match="exited unexpectedly"):
        list(_loader(Leaving(tmp_path), timeout=1))
