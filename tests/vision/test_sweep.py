"""Sweeps: how arguments are split into runs, that all are checked first, and how a sweep is resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import fork_processes
from mixerzoo.vision.training import sweep
from mixerzoo.vision.training.cli import main
from mixerzoo.vision.training.settings import ConfigError, load
from mixerzoo.vision.training.tasks import Task
from omegaconf import OmegaConf
from warm import WarmServer


@pytest.fixture
def configs(repository: Path) -> Path:
    return repository / "configs"


@pytest.fixture
def scontrol(scontrol: Path) -> Path:
    """Begin with an empty file of calls, so that it can be read where there was none."""
    scontrol.touch()
    return scontrol


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["optim.lr=1e-3,2e-3"], ["lr=1e-3", "lr=2e-3"]),
        (
            ["optim.lr=1,2", "model=nat_mini,van_b0", "seed=3"],
            ["lr=1_model=nat_mini", "lr=1_model=van_b0", "lr=2_model=nat_mini", "lr=2_model=van_b0"],
        ),
        (
            ["optim.name=sgd,lamb", "model.name=a,b"],
            [f"optim.name={o}_model.name={m}" for o in ("sgd", "lamb") for m in "ab"],
        ),
        (["augment.scale=[0.5,1],[0.1,1]"], ["scale=0.5-1", "scale=0.1-1"]),
        (['optim.lr_scale={"a,b": 1},{}'], ["lr_scale=a-b-1", "lr_scale=empty"]),
        (["data=some/place,digits"], ["data=some-place", "data=digits"]),
        (["data.root='a,b',c"], ["root=a-b", "root=c"]),
        (["model.kwargs.act=relu,gelu"], ["act=relu", "act=gelu"]),
    ],
)
def test_commas_outside_of_brackets_and_quotes_are_runs(arguments: list[str], names: list[str]) -> None:
    plan = sweep.plan([*arguments, "out=runs/x"])
    assert plan is not None and plan.folder == Path("runs/x")
    assert [run.name for run in plan.runs] == names
    assert len({run.arguments for run in plan.runs}) == len(names)


@pytest.mark.parametrize(
    "argument",
    ["augment.scale=[0.5,1]", "optim.lr_scale={a: 1, b: 2}", "data.root='a,b'", 'data.root="a,b"', "out=a,b", "seed=1"],
)
def test_other_commas_are_one_run(argument: str) -> None:
    assert sweep.plan([argument]) is None


@pytest.mark.parametrize("key", ["data", "data.root", "model.start_from"])
def test_a_path_that_exists_is_one_value(
    key: str, tmp_path: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text is two runs as long as there is no such file or folder."""
    monkeypatch.chdir(tmp_path)
    place = "D/é ü,x" if key != "model.start_from" else "D/best,1.ckpt"
    plan = sweep.plan([f"{key}={place}"])
    assert plan is not None and len(plan.runs) == 2
    (tmp_path / place).mkdir(parents=True)
    assert sweep.plan([f"{key}={place}"]) is None
    plan = sweep.plan([f"{key}={place}", "seed=1,2", "out=x"])
    assert plan is not None and [run.arguments[0] for run in plan.runs] == [f"{key}={place}"] * 2
    assert all(sweep.plan(run.arguments) is None for run in plan.runs)  # each run asks again
    if key == "data":
        assert load(plan.runs[0].arguments, configs).data.root == place


def test_quotes_are_no_part_of_a_name(configs: Path) -> None:
    assert load(["data.root='a,b'"], configs).data.root == "a,b"
    assert load(['model.name="1e5"'], configs).model.name == "1e5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr=1,"], "optim.lr=1,: 1 of the values between the commas are empty"),
        (["optim.lr=1,1"], "a value stands there twice"),
        (["optim.lr=1,2", "resume=last"], "resume=last is one run"),
        (["optim.lr=1,fast"], "optim.lr=fast: optim.lr needs a value of type float"),
        (["model=nat_mini,nat_minni"], "did you mean nat_mini"),
        (["optim.lrr=1,2"], "did you mean optim.lr?"),
    ],
)
def test_all_runs_are_checked_before_the_first(
    arguments: list[str],
    message: str,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments, configs=configs) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_settings_of_every_run_are_printed(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "optim.lr=0.5,0.25", "data=digits"], configs=configs) == 0
    parts = capsys.readouterr().out.split("--- # ")[1:]
    assert [part.partition("\n")[0] for part in parts] == ["lr=0.5", "lr=0.25"]
    assert [OmegaConf.create(part.partition("\n")[2]).optim.lr for part in parts] == [0.5, 0.25]


class Trainer:
    """A replacement for the processes of a sweep: returns exit codes and writes the files of a run.

    `answer` gives the exit code of a run, or the signal that stopped it, or both.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        answer: Callable[[dict[str, str]], int | signal.Signals | tuple[int, signal.Signals]],
    ) -> None:
        self.answer, self.seen = answer, []
        monkeypatch.setattr(sweep, "_train", self)

    def __call__(self, command: Sequence[str]) -> tuple[int, int | None]:
        given = dict(word.split("=", 1) for word in command if "=" in word)
        self.seen.append(given)
        folder = Path(given.get("out") or given["resume"])
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").touch()
        code, stopped = self.answer(given), None
        if isinstance(code, tuple):
            code, stopped = code
        elif isinstance(code, signal.Signals):
            code, stopped = 128 + code, code
        if code == 0 and not (stopped and given["optim.lr"] == "0.2"):
            value = float(given["optim.lr"])
            test = {"accuracy": value / 2, "loss": 1.0}
            results = {"metric": "accuracy", "validation": value, "test": test, "best_epoch": 2, "seconds": 1.5}
            (folder / "results.json").write_text(json.dumps(results))  # and no metrics.csv, as on a full disk
        return code, stopped


def _run(arguments: Sequence[str]) -> tuple[int, str, str]:
    said: list[str] = []
    complained: list[str] = []
    plan = sweep.plan(arguments)
    assert plan is not None
    code = sweep.run(plan, ["train"], said.append, complained.append)
    return code, "\n".join(said), "\n".join(complained)


def test_a_table_ends_a_sweep_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, lambda given: 1 if given["optim.lr"] == "0.3" else 0)
    code, said, _ = _run(["optim.lr=0.1,0.3,0.2", f"out={tmp_path / 'x'}"])
    assert code == 1 and len(trainer.seen) == 3
    assert said.splitlines()[4:8] == [
        "optim.lr  validation  test    metric    epoch  seconds  state     ",
        "0.2       0.2000      0.1000  accuracy  2      2        done      ",
        "0.1       0.1000      0.0500  accuracy  2      2        done      ",
        "0.3                                                     failed (1)",
    ]
    table = (tmp_path / "x" / "sweep.csv").read_text().splitlines()
    assert table[1] == "lr=0.2,0.2,0.2,0.1,accuracy,2,2,done" and table[3] == "lr=0.3,0.3,,,,,,failed (1)"
    assert (tmp_path / "x" / "sweep.md").read_text().splitlines()[2].startswith("| 0.2 | 0.2000 | 0.1000 |")


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are skipped, the interrupted one is resumed, and the failed one is started again."""
    arguments = ["optim.lr=0.1,0.2,0.3,0.4", f"out={tmp_path / 'x'}"]
    Trainer(monkeypatch, lambda given: {"0.2": 1, "0.3": signal.SIGINT}.get(given["optim.lr"], 0))
    code, _, complained = _run(arguments)
    assert code == 130 and complained == f"stopped by SIGINT; go on with resume={tmp_path / 'x'}"
    for again in (arguments, [f"resume={tmp_path / 'x'}"]):
        trainer = Trainer(monkeypatch, lambda given: signal.SIGTERM if given["optim.lr"] == "0.4" else 0)
        assert _run(again)[0] == 143
        places = [given.get("resume", given.get("out")) for given in trainer.seen]
        left = ["lr=0.2", "lr=0.3", "lr=0.4"] if again is arguments else ["lr=0.4"]
        assert [Path(place or "").name for place in places] == left
    assert "resume" in trainer.seen[0]
    Trainer(monkeypatch, lambda given: 0)
    assert _run(arguments)[0] == 0
    assert _run(arguments)[0] == 0 and len(trainer.seen) == 1


USR1 = signal.SIGUSR1


@pytest.mark.parametrize(
    ("rate", "answer", "asked", "code"),
    [
        ("0.2", (138, USR1), "", 138),
        ("0.2", (0, USR1), "", 0),
        ("0.1", (0, USR1), "requeue 12\n", 0),
        ("0.2", (-USR1, USR1), "requeue 12\n", 0),
        ("0.3", (0, USR1), "", 0),
    ],
    ids=["not queued", "queued by the run", "finished meanwhile", "killed before it listened", "last one finished"],
)
def test_sigusr1_ends_with_0_only_if_the_job_is_queued_again(
    rate: str,
    answer: tuple[int, signal.Signals],
    asked: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scontrol: Path,
) -> None:
    """`asked`: what the sweep asks of Slurm itself, where the run did not. Without Slurm that is 138 as well."""
    Trainer(monkeypatch, lambda given: answer if given["optim.lr"] == rate else 0)
    for job, expected in ((None, 138 if asked else code), ("12", code)):
        if job is not None:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        got, said, complained = _run(["optim.lr=0.1,0.2,0.3", f"out={tmp_path / str(job)}"])
        assert got == expected and "failed" not in said
        assert ("stopped by SIGUSR1" in complained) == (rate != "0.3")
    assert scontrol.read_text() == asked


def usr1_to_the_sweep() -> None:
    """In the process of the sweep: its runs are forked, and the first step of a run signals the sweep."""
    fork_processes()
    step = Task.training_step
    done = False

    def signalled(*arguments: Any, **more: Any) -> Any:
        nonlocal done
        if not done:
            os.kill(os.getppid(), signal.SIGUSR1)
        done = True
        return step(*arguments, **more)

    Task.training_step = signalled


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmServer]:
    server = WarmServer()
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize(("job", "code"), [(None, 138), ("12", 0), ("13", 138)], ids=["none", "queued", "refused"])
def test_sigusr1_to_a_sweep_ends_with_the_code_of_its_run(
    job: str | None, code: int, warm: WarmServer, scontrol: Path, tmp_path: Path
) -> None:
    """The sweep is a process, and Slurm refuses to queue job 13 again."""
    tiny = ("data=digits", "data.limit=64", "train.batch_size=16", "train.epochs=50", "train.progress=false")
    small = ("model=nat_mini", "model.kwargs.stem_stride=2", "model.kwargs.embed_dim=8", "model.kwargs.kernel_size=3")
    arguments = (*tiny, *small, "model.kwargs.depths=[1,1,1,1]", "model.kwargs.num_heads=[1,1,1,1]", "seed=1,2")
    env = {"SLURM_JOB_ID": job, "PATH": os.environ["PATH"]}
    done = warm.train(*arguments, "out=sweep", cwd=tmp_path, env=env, prepare=usr1_to_the_sweep).wait()
    assert done.code == code and "stopped by SIGUSR1; go on with resume=sweep" in done.err, done.err
    assert (tmp_path / "sweep" / "seed=1" / "checkpoints" / "last.ckpt").is_file() and done.orphans == 0
    assert "failed" not in done.out and not (tmp_path / "sweep" / "seed=2").exists()
    assert scontrol.read_text() == ("" if job is None else f"requeue {job}\n")


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, lambda given: 0)
    out = f"out={tmp_path / 'x'}"
    assert _run(["optim.lr=0.1,0.2", out])[0] == 0
    with pytest.raises(ConfigError, match="holds another sweep"):
        _run(["optim.lr=0.1,0.3", out])
    with pytest.raises(ConfigError, match="would change it"):
        sweep.plan([f"resume={tmp_path / 'x'}", "seed=1"])
    assert _run(["optim.lr=0.1,0.3", out, "overwrite=true"])[0] == 0
    assert [given.get("overwrite") for given in trainer.seen] == [None, None, "true", None]
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "notes").touch()
    with pytest.raises(ConfigError, match="exists already and holds no sweep"):
        _run(["optim.lr=0.1,0.3", f"out={tmp_path / 'y'}"])
