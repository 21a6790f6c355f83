"""Runs of two processes compute what one would, end together, and lose no step."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork_processes
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.training.build import build_model
from mixerzoo.vision.training.callbacks import read_table
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.run import load_data
from mixerzoo.vision.training.settings import load
from warm import Finished, WarmServer

pytestmark = pytest.mark.slow

TINY = (
    "data=digits",
    *("data.limit=64", "train.progress=false", "model=nat_mini", "model.kwargs.stem_stride=2"),
    *("model.kwargs.embed_dim=8", "model.kwargs.depths=[1,1,1,1]", "model.kwargs.num_heads=[1,1,1,1]"),
    "model.kwargs.kernel_size=3",
)
"""A run with four steps of 16 pictures per epoch."""

TWO = ("train.devices=2", "train.accelerator=cpu", "train.batch_size=8")
STILL = ("augment.shift=0", "augment.hflip=0", "train.epochs=1", "schedule.warmup_epochs=0")
"""No augmentation: its seeds depend on the rank."""


def plain(evaluated: int | None = None) -> None:
    """Fork the processes of a run, draw nothing, and evaluate only the first `evaluated` pictures."""
    from mixerzoo.vision.data import module
    from mixerzoo.vision.training import report, run
    from mixerzoo.vision.training.settings import to_yaml

    fork_processes()
    run.describe_run = lambda folder, config, *_: (folder / "config.yaml").write_text(to_yaml(config))
    run.show_results = lambda folder, *found: (folder / "results.json").write_text(json.dumps(found[2]))
    report.write_report = lambda *_: None
    if evaluated is not None:
        usual = module.SOURCES["digits"]

        def shortened(*arguments: Any) -> Any:
            splits = usual(*arguments)
            return dataclasses.replace(splits, val=First(splits.val, evaluated), test=First(splits.test, evaluated))

        module.SOURCES["digits"] = shortened


class First:
    """A data set cut to its first pictures."""

    def __init__(self, dataset: Any, length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, request: Request, /) -> Any:
        return self.dataset.__getitems__(request)


def disturb(rank: int, step: int, how: str) -> None:
    """Make the process of this rank raise, receive a signal, or wait for `go` before training step `step`."""
    from mixerzoo.vision.training.tasks import Task

    usual = Task.on_train_batch_start

    def on_train_batch_start(task: Any, batch: Any, index: int) -> None:
        usual(task, batch, index)
        if task.global_step != step or task.global_rank != rank:
            return
        if how == "raise":
            raise KeyError("unheard of")
        if how == "wait":
            Path("waiting").touch()
            while not Path("go").exists():
                time.sleep(0.01)
            return
        os.kill(os.getpid(), getattr(signal, how))

    Task.on_train_batch_start = on_train_batch_start
    plain()


def _both_end(folder: Path, seconds: float = 10) -> bool:
    """Return whether both processes whose ids are in the folder exit soon."""
    until = time.monotonic() + seconds
    pids = [int((folder / name).read_text()) for name in ("0", "1")]
    while any(map(_is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(_is_alive, pids))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _weights(folder: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    state = load_checkpoint(folder / "checkpoints" / name)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def together(warm: WarmServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed run of two processes under DDP."""
    folder = tmp_path_factory.mktemp("together")
    settings = (*TINY, *TWO, *STILL, "out=run")
    done = warm.train(*settings, cwd=folder, prepare=plain).wait()
    assert done.code == 0, done.err
    return folder / "run"


def test_two_processes_learn_what_one_learns_from_as_many_pictures_a_step(
    together: Path, run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    settings = (*TINY, *STILL, "train.batch_size=8", "train.accumulate=2", "out=run")
    assert run_train(*settings, cwd=tmp_path, prepare=plain).code == 0
    one, two = _weights(tmp_path / "run"), _weights(together)
    start = _weights_at_the_start(together)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(value, start[name], atol=1e-5) or not value.is_floating_point(), name
    losses = [read_table(folder / "metrics.csv")[0]["train/loss"] for folder in (tmp_path / "run", together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _weights_at_the_start(folder: Path) -> dict[str, torch.Tensor]:
    from mixerzoo.vision.data.loading import mix_seed, seed_everything

    config = load([f"resume={folder}"], folder)
    seed_everything(mix_seed(config.seed))
    return {f"model.{name}": value for name, value in build_model(config, load_data(config)).state_dict().items()}


def test_the_metric_of_two_processes_is_that_of_one(together: Path) -> None:
    """Of 299 pictures, one process has 150 and the other 149; none is counted twice."""
    config = load([f"resume={together}"], together)
    splits = load_data(config)
    model = build_model(config, splits).eval()
    model.load_state_dict({name[6:]: value for name, value in _weights(together, "best.ckpt").items()})
    images, labels = splits.test.__getitems__(Request(list(range(len(splits.test))), 0))
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    assert len(labels) == 299
    results = json.loads((together / "results.json").read_text())
    assert results["test"]["accuracy"] == torch.tensor(right / 299).item()


def test_a_run_leaves_the_folder_of_one_process(together: Path) -> None:
    names = {path.name for path in together.iterdir()}
    assert names == {"checkpoints", "config.yaml", "env.json", "metrics.csv", "results.json", "tensorboard"}
    checkpoints = {path.name for path in (together / "checkpoints").iterdir()}
    assert checkpoints == {"best.ckpt", "last.ckpt"}
    writers = {path.name.split(".")[-2] for path in (together / "tensorboard").glob("events.*")}
    assert len(writers) == 1, "by the process id in their names"
    assert len(json.loads((together / "env.json").read_text())["starts"]) == 1


RANDOM = (
    *("augment.mixup=0.5", "augment.shift=1", "model.kwargs.drop_path_rate=0.3", "ema.decay=0.9"),
    *("train.accumulate=2", "train.epochs=2", "schedule.warmup_epochs=0"),
)


def test_sigterm_stops_both_and_a_resumed_run_ends_as_an_uninterrupted_one(
    warm: WarmServer, run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    settings = (*TINY, *TWO, *RANDOM)
    run = warm.train(
        *settings,
        "out=parts",
        cwd=tmp_path,
        env={"FORKED_PIDS": str(tmp_path)},
        prepare=disturb,
        prepare_with={"rank": 1, "step": 1, "how": "wait"},
    )
    run.wait_for((tmp_path / "waiting").exists, timeout=60)
    run.kill(signal.SIGTERM)
    (tmp_path / "go").touch()
    done = run.wait()
    assert done.code == 143 and "stopped by SIGTERM; go on with resume=parts" in done.err, done.err
    assert done.err.count("stopped by") == 1 and _both_end(tmp_path)
    assert load_checkpoint(tmp_path / "parts" / "checkpoints" / "last.ckpt")["global_step"] == 2

    assert run_train("resume=parts", cwd=tmp_path, prepare=plain).code == 0
    assert run_train(*settings, "out=whole", cwd=tmp_path, prepare=plain).code == 0
    one, two = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    assert one["global_step"] == two["global_step"] == 4
    for part in ("state_dict", "raw_weights"):
        assert one[part].keys() == two[part].keys() and one[part]
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    assert (tmp_path / "parts" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_a_process_that_is_killed_takes_the_run_down(run_train: Callable[..., Finished], tmp_path: Path) -> None:
    how = {"prepare": disturb, "prepare_with": {"rank": 1, "step": 1, "how": "SIGKILL"}}
    started = time.monotonic()
    done = run_train(*TINY, *TWO, "out=run", cwd=tmp_path, env={"FORKED_PIDS": str(tmp_path)}, **how)
    assert done.code == 1 and time.monotonic() - started < 60
    assert "error: process 1 of 2 was ended by SIGKILL (too little memory?); the others were stopped" in done.err
    assert _both_end(tmp_path)


def test_an_error_of_one_process_ends_the_other_and_is_told(run_train: Callable[..., Finished], tmp_path: Path) -> None:
    how = {"prepare": disturb, "prepare_with": {"rank": 1, "step": 1, "how": "raise"}}
    done = run_train(*TINY, *TWO, "out=run", cwd=tmp_path, env={"FORKED_PIDS": str(tmp_path)}, **how)
    assert done.code == 1 and "Traceback" not in done.err
    assert "process 1: error: KeyError: 'unheard of' (traceback in run/error-1.txt)" in done.err
    assert "on_train_batch_start" in (tmp_path / "run" / "error-1.txt").read_text()
    assert _both_end(tmp_path)


def test_nothing_is_left_when_the_parent_is_killed(warm: WarmServer, tmp_path: Path) -> None:
    run = warm.train(
        *(*TINY, *TWO, "out=run"),
        cwd=tmp_path,
        env={"FORKED_PIDS": str(tmp_path)},
        prepare=disturb,
        prepare_with={"rank": 0, "step": 1, "how": "wait"},
    )
    run.wait_for((tmp_path / "waiting").exists, timeout=60)
    run.kill()
    assert run.wait().code == -signal.SIGKILL
    assert _both_end(tmp_path)


def test_a_mistake_that_all_processes_find_is_told_once(run_train: Callable[..., Finished], tmp_path: Path) -> None:
    done = run_train(*TINY, *TWO, "model.kwargs.colour=3", cwd=tmp_path, prepare=plain)
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.count("error:") == 1 and "model.name=nat_mini cannot be made with" in done.err


@pytest.fixture
def torchrun(warm: WarmServer, tmp_path: Path) -> Callable[..., list[Finished]]:
    """Start two processes with the environment variables of torchrun."""

    def start(*arguments: str, **how: Any) -> list[Finished]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [{**shared, "RANK": number, "LOCAL_RANK": number, "GROUP_RANK": "0"} for number in ("0", "1")]
        runs = [warm.train(*arguments, cwd=tmp_path, env=place, **how) for place in places]
        return [run.wait() for run in runs]

    return start


def test_fsdp_learns_what_ddp_learns_and_its_checkpoint_is_one_of_whole_weights(
    together: Path, torchrun: Callable[..., list[Finished]], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    """With a single picture to evaluate, one process has none but still takes part in gathering weights."""
    settings = (*TINY, *TWO, *STILL, "train.strategy=fsdp", "out=run")
    for done in torchrun(*settings, prepare=plain, prepare_with={"evaluated": 1}):
        assert done.code == 0, done.err
    one, two = _weights(together), _weights(tmp_path / "run")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test"]["accuracy"] in (0.0, 1.0)

    for done in torchrun("resume=run", "out=run", "train.epochs=2", prepare=plain):
        assert done.code == 0, done.err
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 8
    longer = _weights(tmp_path / "run")
    assert not any(torch.equal(value, longer[name]) for name, value in two.items())

    alone = ("train.devices=1", "train.strategy=auto", "train.accumulate=2", "resume_force=true", "train.epochs=3")
    done = run_train("resume=run", *alone, cwd=tmp_path, prepare=plain)
    assert done.code == 0, done.err
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 12
    assert not any(torch.equal(value, longer[name]) for name, value in _weights(tmp_path / "run").items())


def test_a_sweep_trains_all_goes_on_after_ctrl_c_and_passes_over_a_failure(
    warm: WarmServer, run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    settings = (*TINY, "train.batch_size=16", *STILL, "optim.lr=1e-3,2e-3", "data.limit=32,64", "out=sweep")
    how = {"prepare": disturb, "prepare_with": {"rank": 0, "step": 2, "how": "wait"}}
    run = warm.train(*settings, cwd=tmp_path, **how)
    run.wait_for((tmp_path / "waiting").exists, timeout=60)  # the first two have only two steps
    run.kill(signal.SIGINT)
    (tmp_path / "go").touch()
    done = run.wait()
    assert done.code == 130 and "stopped by SIGINT; go on with resume=sweep" in done.err, done.err
    finished = {path.parent.name for path in tmp_path.glob("sweep/*/results.json")}
    assert finished == {"limit=32_lr=1e-3", "limit=32_lr=2e-3"}

    failing = {"prepare": disturb, "prepare_with": {"rank": 0, "step": 0, "how": "raise"}}
    done = run_train("resume=sweep", cwd=tmp_path, **failing)  # the third goes on at its step 3, the fourth begins
    assert done.code == 1 and done.err.count("error: KeyError") == 1
    assert "[2/4]" not in done.out and "[3/4] limit=64_lr=1e-3" in done.out
    table = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert [row.rsplit(",", 1)[1] for row in table] == ["state", "done", "done", "done", "failed (1)"]
