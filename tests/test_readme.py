"""Every code block of README.md and of docs/ runs. A block or a command that no rule here knows is an error.

Python blocks are executed one after the other; a `text` block is what the block before it prints. Shell commands are
checked in the default run (arguments parsed, targets known). The slow run executes them as one session in an empty
folder, with additions that make a training or an export small.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mixerzoo.vision import models
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")))
TINY = {"depths": "[1,1,1,1]", "embed_dim": "8", "num_heads": "[1,1,1,1]"}
TRAIN = ["train.batch_size=4", "train.limit_batches=1", "train.progress=false", "data.size=32", "data.limit=32"]
PUBLISHED = [*TRAIN, "data.workers=0", "train.epochs=1", "train.total_batch=4", "schedule.warmup_epochs=0"]
REDUCED = [*TRAIN, "train.epochs=1", "data=digits", "data.size=28"]
ELSEWHERE = re.compile(r"benchmarks/|runs/city|path/to/(ADE|city)|FILE|\.pth|model=van_")
"""In commands on what the session has not, or that take long: the default run checks them."""
TRAIN += [f"model.kwargs.{key}={value}" for key, value in TINY.items()]


def _blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def _commands(page: str) -> list[str]:
    return [line for language, content in _blocks(page) if language == "bash" for line in content.splitlines() if line]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in _commands(page)))


def test_every_block_has_a_known_language() -> None:
    found = [(page, language) for page in PAGES for language, _ in _blocks(page)]
    assert {language for _, language in found} == {"python", "text", "bash", ""}
    assert {page for page, language in found if not language} <= {"README.md", "docs/data.md"}  # trees of folders
    fences = sum((ROOT / page).read_text().count("```") for page in PAGES)
    assert fences == 2 * len(found), "a fence that the pattern of this test does not see"


def test_python_blocks_run_and_print_what_is_shown() -> None:
    namespace: dict[str, object] = {}
    printed, shown = "", 0
    for language, content in _blocks("README.md"):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(content, "README.md", "exec"), namespace)
            printed = out.getvalue()
        elif language == "text":
            shown += 1
            assert printed == content
    assert shown


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if any(block[0] == "python" for block in _blocks(page))])
def test_python_blocks_of_a_page_run(page: str) -> None:
    namespace: dict[str, object] = {}
    for language, content in _blocks(page):
        if language == "python":
            exec(compile(content, page, "exec"), namespace)


def test_first_python_block_is_short() -> None:
    (_, first), *_ = _blocks("README.md")
    assert len([line for line in first.splitlines() if line]) <= 8


def test_families_name_every_model() -> None:
    patterns = re.findall(r"`(\w+\*)`", (ROOT / "README.md").read_text())
    assert all(models.names(pattern) for pattern in patterns)
    assert {name for pattern in patterns for name in models.names(pattern)} == set(models.names())


def _table() -> list[str]:
    text = (ROOT / "docs/models.md").read_text()
    (table,) = re.findall(r"<!-- models: .*? -->\n(.*?)\n<!-- /models -->", text, flags=re.DOTALL)
    return table.splitlines()


def test_table_lists_every_model() -> None:
    _, _, *lines = _table()
    assert [line.split("`")[1] for line in lines] == models.names()
    assert set(models.STATED_TOP1) <= {f"{row[0]}.{row[1]}" for row in (re.findall(r"[\w.]+", line) for line in lines)}
    for name in ("nat_mini", "dinat_s_tiny"):
        assert models.table([models.describe(name)], markdown=True).splitlines()[-1] in lines


@pytest.mark.slow
def test_table_holds_the_present_numbers_of_a_sample() -> None:
    _, _, *lines = _table()
    for name in models.names()[::8]:
        assert models.table([models.describe(name)], markdown=True).splitlines()[-1] in lines


@pytest.mark.exhaustive
def test_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == _table()


def test_links_and_pictures_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
            if not target.startswith("https://"):
                file, _, anchor = target.partition("#")
                linked = ((ROOT / page).parent / file) if file else ROOT / page
                assert linked.exists(), f"{page}: {target}"
                assert not anchor or anchor in _anchors(linked.read_text()), f"{page}: {target}"


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    match shlex.split(command):
        case ["make", target]:
            subprocess.run(["make", "-n", "-C", ROOT, target], check=True, capture_output=True)
        case ["pip", "install", "-e", requirement]:
            extras = set(re.findall(r"\w+", requirement))
            assert extras <= set(importlib.metadata.metadata("mixerzoo").get_all("Provides-Extra") or [])
        case ["python", "train.py", *arguments] | ["srun", "python", "train.py", *arguments]:
            _check_training(arguments)
        case ["torchrun", *options]:
            run = importlib.import_module("torch.distributed.run").get_args_parser().parse_args(options)
            assert run.training_script == "train.py"
            _check_training(run.training_script_args)
        case ["python", "-m", "pytest", *paths]:
            assert paths and all((ROOT / path).exists() for path in paths)
        case ["python", script, *arguments] if script.startswith("benchmarks/"):
            known = (ROOT / script).read_text()
            assert all(f'"{word}"' in known for word in arguments if word.startswith("--"))
        case ["python", "-m", module, *arguments]:
            _command(module).parser().parse_args(arguments)
        case _:
            pytest.fail(f"no rule checks the command {command!r}")


def _check_training(arguments: list[str]) -> None:
    settings = importlib.import_module("mixerzoo.vision.training.settings")
    if arguments == ["--help"]:
        return  # the slow session runs it
    Path("path/to/pictures").mkdir(parents=True)
    if "resume=last" in arguments:
        with pytest.raises(settings.ConfigError, match=r"no last\.ckpt"):
            settings.load(arguments, ROOT / "configs")
        return
    sweep = importlib.import_module("mixerzoo.vision.training.sweep").plan(arguments)
    for one in [run.arguments for run in sweep.runs] if sweep else [arguments]:
        settings.load(one, ROOT / "configs")


@pytest.mark.slow
def test_commands_run_as_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pages, so that what one command writes is there for the next."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "configs", "benchmarks", "tests", "Makefile", "pyproject.toml", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    for split, label in [(split, label) for split in ("train", "val") for label in ("cat", "dog")]:
        folder = tmp_path / "path/to/pictures" / split / label
        folder.mkdir(parents=True)
        for index in range(8):
            pixels = np.random.randint(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / "best.ckpt").symlink_to("runs/first/checkpoints/best.ckpt")
    for command in COMMANDS:
        made_small = _small(shlex.split(command), tmp_path)
        if made_small:
            _run(made_small)
    assert (tmp_path / "runs/first/results.json").exists()
    assert all((tmp_path / f"nat_mini.{ending}").exists() for ending in ("onnx", "xml", "bin"))
    assert (tmp_path / "nat_mini_folder/model.safetensors").exists()


def _small(words: list[str], folder: Path) -> list[str]:
    """The command with the additions that make it short; an empty list for what the default run has checked whole."""
    if ELSEWHERE.search(" ".join(words)):
        return []
    match words:
        case ["make", "train"]:
            stamp = folder / ".installed"
            stamp.touch()
            arguments = " ".join(["data=digits", "train.epochs=1", *TRAIN])
            return ["make", "train", f"STAMP={stamp}", f"BIN={Path(sys.executable).parent}", f"ARGS={arguments}"]
        case ["make", _] | ["pip", *_] | ["torchrun", *_] | ["srun", *_]:
            return []
        case ["python", "train.py", "--help"]:
            return [sys.executable, *words[1:]]
        case ["python", "train.py", *arguments]:
            names = {argument.split("=")[0] for argument in arguments}
            if "train.devices" in names or importlib.import_module("mixerzoo.vision.training.sweep").plan(arguments):
                return []  # tests of their own start several processes: test_distributed.py, test_sweep.py
            if any(argument.startswith("recipe=") and argument.endswith("_imagenet") for argument in arguments):
                return [sys.executable, *words[1:], *PUBLISHED]
            if "recipe=token_reduction" in arguments:
                return [sys.executable, *words[1:], *REDUCED]
            data = [] if names & {"data", "resume"} else ["data=digits"]
            if "recipe" in names:
                data = ["data.scenes=8", "data.download=false"]
            resumed = ["train.epochs=4"] if "resume" in names else ["train.epochs=1", *data, *TRAIN]
            return [sys.executable, *words[1:], *resumed]
        case ["python", "-m", "pytest", *_] | [
            "python",
            "-m",
            "mixerzoo.vision.visualize",
            "--output",
            "docs/pictures",
        ]:
            return []  # this very suite; tests/vision/test_visualize.py draws them all
        case ["python", "-m", "mixerzoo.vision.export", *arguments]:
            trained = "--checkpoint" in arguments or arguments[0].startswith("runs/")
            tiny = [] if trained else [f"{key}={value}" for key, value in TINY.items()]
            # Free sizes take a minute each; tests/vision/test_export.py has them.
            fixed = [] if "safetensors" in arguments else ["--static"]
            return [
                sys.executable,
                *words[1:],
                *fixed,
                *(["--input-size", "64", "--model-kwargs", *tiny] if tiny else []),
            ]
        case ["python", "-m", "mixerzoo.vision.visualize", *_]:
            offline = [word for word in words[1:] if word != "--pretrained"]
            return [sys.executable, *offline, "--images", "1", "--input-size", "64"]
        case ["python", "-m", "mixerzoo.vision.benchmark", *_]:
            return [sys.executable, *words[1:], "--input-size", "64", "--rounds", "1", "--seconds", "0.1"]
        case ["python", "-m", *_]:
            return [sys.executable, *words[1:]]
    raise AssertionError(f"no rule runs the command {words}")


def _command(name: str) -> ModuleType:
    """The module that `python -m` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def _run(command: list[str]) -> None:
    """In this process where that can be: a new one takes longer to import torch than most commands take to run."""
    match command[1:]:
        case ["train.py", *arguments]:
            code = importlib.import_module("mixerzoo.vision.training.cli").main(arguments, configs=ROOT / "configs")
            assert code == 0, shlex.join(command)
        case ["-m", module, *arguments] if module.startswith("mixerzoo."):
            assert _command(module).main(arguments) == 0, shlex.join(command)
        case _:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
