"""Invalid settings and unexpected errors: one line on the terminal and a reliable exit code."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mixerzoo.vision.segmentation import inference
from mixerzoo.vision.training import cli, run, settings, sweep
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.failures import TrainingError
from mixerzoo.vision.training.optimization import check_names
from mixerzoo.vision.training.signals import Interrupted


@pytest.fixture
def train(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments, configs=repository / "configs")
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.lrr=1", "optim.lrr=1: there is no key optim.lrr; did you mean optim.lr?"),
        ("optim.lr=fast", "optim.lr=fast: optim.lr needs a value of type float"),
        ("train.epochs=1.5", "train.epochs=1.5: train.epochs needs a value of type int"),
        ("augment.hflip=2", "augment.hflip=2.0: needs a finite number, 0 to 1"),
        ("train.strategy=dpp", "train.strategy needs a value of type auto | ddp | fsdp"),
        ("train.nodes=2", "train.nodes=2: one command cannot start processes on other machines"),
        ("train.strategy=ddp", "train.strategy=ddp is for several processes; give train.devices=2 or more"),
        ("data=/nope/path", "data=/nope/path: there is no such folder; give one that exists, or one of ade20k, "),
        ("data=sub/dir", "data=sub/dir: there is no such folder"),
        (f"data={__file__}", "test_settings.py is a file; give a folder, a .tar or one of ade20k, "),
        ("data=digitz", "data=digitz: choose one of "),
        ("--fast", "there is no option --fast"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line_and_code_2(
    argument: str, message: str, train: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = train("data=digits", argument)
    assert code == 2 and out == ""
    assert [line for line in err.splitlines() if line.startswith("error: ")] == err.splitlines()[-1:]
    assert message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model=nat_minni", "timm and mixerzoo have no such model; did you mean nat_mini"),
        (
            "distill.teacher=vit_tinny_patch16_224",
            "timm and mixerzoo have no such model; did you mean vit_tiny_patch16",
        ),
        ("model.checkpoint=nowhere.pth", "there is no such file"),
        ("optim.name=adamww", "timm has no such optimizer; did you mean adamw?"),
        ("optim.name=lookahead_sdg", "timm has no such optimizer; did you mean lookahead_sgd?"),
        ("schedule.name=cosin", "choose one of constant, cosine, poly, step, tanh, wsd; did you mean cosine?"),
        ("schedule.name=plateau", "choose one of constant"),  # timm's steps once an epoch only
        ("schedule.name=multistep", "choose one of constant"),  # timm's has milestones, for which there is no setting
        ("schedule.name=none", "choose one of constant"),
    ],
)
@pytest.mark.parametrize("swept", [False, True], ids=["run", "sweep"])
def test_names_are_checked_before_data_is_read(
    argument: str,
    message: str,
    swept: bool,
    train: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def read(_: Config) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(run, "load_data", read)
    code, _, err = train("data=digits", argument, *(["seed=1,2"] if swept else []))
    key = argument.replace("model=", "model.name=")
    assert code == 2 and err.startswith(f"error: {key}: {message}"), err
    assert not list(tmp_path.iterdir())


def test_names_of_optimizers_are_read_as_timm_reads_them(repository: Path) -> None:
    for name in ("adamw", "AdamW", "lookahead_sgd", "muon"):
        check_names(settings.load([f"optim.name={name}"], repository / "configs"))


def _replace_run(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    def fake(config: Config) -> dict[str, object]:
        Path(config.out or "").mkdir(parents=True)
        if error is not None:
            raise error
        return {"test": {"accuracy": 0.5}, "best_epoch": 1, "epochs": 1, "seconds": 1.0, "folder": config.out}

    monkeypatch.setattr(run, "run", fake)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 0, ""),
        (TrainingError("the loss is nan"), 1, "error: the loss is nan\n"),
        (Interrupted(signal.SIGINT, Path("x/checkpoints/last.ckpt")), 130, "stopped by SIGINT; go on with resume=x\n"),
        (
            Interrupted(signal.SIGTERM, Path("x/checkpoints/last.ckpt")),
            143,
            "stopped by SIGTERM; go on with resume=x\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(1), 130, ""),
    ],
)
def test_every_end_has_its_code(
    error: BaseException | None,
    code: int,
    words: str,
    train: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _replace_run(monkeypatch, error)
    got, out, err = train("data=digits", "out=x")
    assert (got, err) == (code, words)
    assert ("everything is in x" in out) == (code == 0)


@pytest.mark.parametrize("error", [KeyError("unheard of"), RuntimeError("first\nsecond"), ValueError("of a library")])
def test_what_nobody_expected_is_a_line_and_a_file(
    error: Exception, train: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A `ValueError` of another library is not reported as an invalid setting."""

    def fail(config: Config) -> None:
        Path(config.out or "").mkdir(parents=True, exist_ok=True)
        exec(compile("def other(error): raise error", "library.py", "exec"), namespace := {"__name__": "library"})
        namespace["other"](error)

    monkeypatch.setattr(run, "run", fail)
    code, out, err = train("data=digits", "out=x")
    first = str(error).splitlines()[0]
    assert (code, out) == (1, "")
    assert err == f"error: {type(error).__name__}: {first} (traceback in x/error.txt)\n"
    assert "library.py" in (tmp_path / "x" / "error.txt").read_text()
    code, _, err = train("--debug", "data=digits", "out=x")
    assert code == 1 and err.startswith("Traceback") and "library.py" in err


def test_a_bug_of_ours_is_no_mistake_in_the_settings(
    train: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A `ValueError` that the interpreter raises in our code, here by unpacking, is an unexpected error."""
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(run, "run", lambda _: list(sweep._markdown([])))
    code, _, err = train("data=digits", "out=x")
    assert code == 1 and err.endswith("(traceback in x/error.txt)\n")
    assert "_markdown" in (tmp_path / "x" / "error.txt").read_text()


def test_what_our_code_refuses_is_a_mistake_in_the_settings(
    train: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(run, "run", lambda _: inference.of_settings({"mode": "slide", "stride": [1]}, size=8))
    code, _, err = train("data=digits", "out=x")
    assert code == 2 and err.startswith("error: strides are two numbers from 1 to the window's sides [8, 8]")
    assert not (tmp_path / "x" / "error.txt").exists()


def test_without_a_folder_the_traceback_is_on_the_terminal(
    train: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Config) -> None:
        raise OSError("no room")

    monkeypatch.setattr(run, "run", fail)
    code, _, err = train("data=digits", "out=x")
    assert code == 1 and err.startswith("Traceback") and err.endswith("error: OSError: no room\n")


def test_help_for_a_part_of_the_settings(train: Callable[..., tuple[int, str, str]]) -> None:
    code, section, _ = train("--help", "schedule")
    assert code == 0 and section.startswith("schedule.name  ") and "optim.lr " not in section
    assert train("--help", "optim.lr")[1] == train("--help", "lr")[1] != section
    code, _, err = train("--help", "optin")
    assert code == 2 and "there is no such section or key; did you mean optim?" in err


def test_a_resumed_run_names_what_is_missing(train: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = train("resume=nowhere")
    assert code == 2 and err == f"error: {_missing()}\n"


def _missing() -> str:
    with pytest.raises(settings.ConfigError) as caught:
        settings.find_checkpoint("nowhere")
    return str(caught.value)
