"""A resumed run uses its own best checkpoint, wherever its folder lies, and the settings that it is resumed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.run import run
from mixerzoo.vision.training.settings import ConfigError, load, to_yaml
from mixerzoo.vision.training.tasks import Task

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]

DIGITS = ("data=digits", "model=test_convnext", "data.limit=64", "train.batch_size=16", "train.progress=false")
"""A run with four steps per epoch."""

Groups = list[list[tuple[float, float]]]


@pytest.fixture
def train(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Groups]:
    """Return a function that trains: learning rate and weight decay of each parameter group, step by step."""
    seen: Groups = []

    class Record(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    original = Task.configure_callbacks
    monkeypatch.setattr(Task, "configure_callbacks", lambda task: [*original(task), Record()])

    def call(*arguments: str) -> Groups:
        seen.clear()
        new = not any(argument.startswith("resume=") for argument in arguments)
        run(load([*(DIGITS if new else ()), *arguments], repository / "configs"))
        return list(seen)

    return call


def _last(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("how", ["renamed", "copied"])
def test_a_moved_run_keeps_its_best_checkpoint(how: str, train: Callable[..., Groups], tmp_path: Path) -> None:
    """With a learning rate of 0 no epoch is better than the first."""
    still = ("optim.lr=0", "schedule.min_lr=0", "schedule.warmup_epochs=0", "train.epochs=1")
    train(*still, f"out={tmp_path / 'old'}")
    best = (tmp_path / "old" / "checkpoints" / "best.ckpt").read_bytes()
    if how == "renamed":
        (tmp_path / "old").rename(tmp_path / "new")
    else:
        shutil.copytree(tmp_path / "old", tmp_path / "new")
    train(f"resume={tmp_path / 'new'}", "train.epochs=3")
    assert (tmp_path / "new" / "checkpoints" / "best.ckpt").read_bytes() == best
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert (results["best_epoch"], results["epochs"], results["folder"]) == (1, 3, str(tmp_path / "new"))
    for state in _last(tmp_path / "new")["callbacks"].values():
        assert str(tmp_path / "old") not in str(state)
    assert (tmp_path / "old").exists() == (how == "copied")


@pytest.mark.parametrize("length", ["train.epochs=3", "train.steps=12"])
def test_an_extended_run_learns_on_the_longer_schedule(
    length: str, train: Callable[..., Groups], tmp_path: Path
) -> None:
    begin = ("schedule.warmup_epochs=0", 'optim.lr_scale={"*.bias": 0.5}', 'optim.freeze_epochs={"stem*": 2}')
    short = ("train.epochs=1",) if "epochs" in length else ("train.epochs=null", "train.steps=4")
    train(*begin, *short, f"out={tmp_path / 'run'}")
    before = _last(tmp_path / "run")["state_dict"]
    extended = train(f"resume={tmp_path / 'run'}", length)
    after = _last(tmp_path / "run")
    assert after["global_step"] == 12
    moved = [not torch.equal(value, after["state_dict"][name]) for name, value in before.items() if "model." in name]
    assert sum(moved) > 0.9 * len(moved)
    whole = train(*begin, "train.epochs=3", f"out={tmp_path / 'whole'}")
    assert extended == whole[4:] and len(extended) == 8


def test_a_forced_setting_takes_effect(train: Callable[..., Groups], repository: Path, tmp_path: Path) -> None:
    begin = ("schedule.warmup_epochs=0", "train.epochs=2", "optim.layer_decay=0.9")
    train(*begin, f"out={tmp_path / 'run'}", "train.epochs=1")
    other = ("optim.lr=0.1", "optim.weight_decay=0.3", "schedule.name=poly", "schedule.power=0.9")
    forced = train(f"resume={tmp_path / 'run'}", "resume_force=true", "train.epochs=2", *other)
    assert forced == train(*begin, *other, f"out={tmp_path / 'whole'}")[4:]
    assert any(decay == 0.3 for _, decay in forced[0]) and max(rate for rate, _ in forced[0]) > 0.04
    saved = load([f"resume={tmp_path / 'run'}"], repository / "configs").optim
    assert (saved.lr, saved.weight_decay) == (0.1, 0.3)


@pytest.mark.parametrize(
    "argument",
    [
        *("optim.name=sgd", "optim.layer_decay=0.5", "optim.no_decay=['*.weight']", "optim.freeze=[head.*]"),
        *('optim.lr_scale={"*.bias": 0.5}', 'optim.freeze_epochs={"*": 1}', "optim.layer_blocks=2"),
    ],
)
def test_parameter_groups_cannot_be_changed_by_force(argument: str, repository: Path, tmp_path: Path) -> None:
    """The saved state of the optimizer would be given to other parameters, or to another optimizer."""
    configs = repository / "configs"
    resume = _pretend_run(tmp_path, load([*DIGITS], configs))
    with pytest.raises(
        ConfigError, match=rf"{argument.split('=')[0]} was .*, even with resume_force=true.*start_from="
    ):
        load([resume, "resume_force=true", argument], configs)
    assert load([resume, "resume_force=true", "optim.lr=0.5"], configs).optim.lr == 0.5


def _pretend_run(folder: Path, config: Config) -> str:
    """Write what `load` reads of a run folder and return the argument that resumes it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "config.yaml").write_text(to_yaml(config))
    return f"resume={folder}"


def test_a_run_is_resumed_in_its_own_folder_only(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = repository / "configs"
    monkeypatch.chdir(tmp_path)
    resume = _pretend_run(Path("r1"), load([*DIGITS], configs))
    for own in ("out=r1", "out=r1/", f"out={tmp_path / 'r1'}"):
        assert load([resume, own], configs).out == "r1"
    for checkpoint in ("", "/checkpoints/last.ckpt"):
        with pytest.raises(
            ConfigError, match=r"out=r5: .*resume=r1.* goes on in r1; .* cp -r r1 r5, and give resume=r5"
        ):
            load([f"{resume}{checkpoint}", "out=r5"], configs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.yaml is not whole: it lacks recipe, .* and \d+ more"),
        ("recipe: classification\nmodel:\n  name: test_convnext\n", r"config\.yaml is not whole: it lacks "),
        ("- 1\n", r"config\.yaml must hold `key: value` lines"),
        ("recipe: [", r"config\.yaml cannot be read"),
        ("data: digits\nmodel: nat_mini\nrecipe: classification\n", r"config\.yaml is not whole"),
    ],
)
def test_a_damaged_config_is_named(text: str, message: str, repository: Path, tmp_path: Path) -> None:
    configs = repository / "configs"
    resume = _pretend_run(tmp_path, load([*DIGITS], configs))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load([resume], configs)


def test_a_config_without_one_key_is_named(repository: Path, tmp_path: Path) -> None:
    configs = repository / "configs"
    resume = _pretend_run(tmp_path, load([*DIGITS], configs))
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(
        "".join(line for line in text.splitlines(True) if "weight_decay:" not in line)
    )
    with pytest.raises(ConfigError, match=r"it lacks optim\.weight_decay; "):
        load([resume], configs)
