"""Without a network: nothing is asked for unasked, and what is missing is named in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from mixerzoo.vision._loading import load_model
from mixerzoo.vision.training.cli import main

_IMPORT_ALL = """
import socket, sys

def refuse(*arguments, **more):
    raise SystemExit(f"something connected to {arguments[1:]}")

socket.socket.connect = socket.getaddrinfo = refuse
import importlib, pkgutil, mixerzoo, mixerzoo.vision
for module in pkgutil.walk_packages(mixerzoo.__path__, "mixerzoo."):
    if "_triton" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("mixerzoo.")]))
"""


@pytest.mark.slow
def test_importing_asks_nobody(repository: Path) -> None:
    """Every module of the library, in a process that cannot open a connection."""
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 80


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a cache nor, for what is no part of Hugging Face (HF_HUB_OFFLINE, conftest.py), a network."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("setting", "model"),
    [
        (("model=resnet18", "model.pretrained=true"), "resnet18"),
        (("model=nat_mini", "model.pretrained=true"), "nat_mini"),
        (("model=test_convnext", "model.start_from=resnet18"), "resnet18"),
        (("model=test_convnext", "distill.teacher=resnet18"), "resnet18"),
    ],
)
def test_missing_weights_are_named_in_one_line(
    setting: tuple[str, ...],
    model: str,
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["data=digits", *setting, f"out={tmp_path / 'run'}"]
    assert main(arguments, configs=repository / "configs") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and f"the published weights of {model} are not on this machine" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_tools_name_missing_weights() -> None:
    with pytest.raises(ValueError, match="the published weights of nat_mini are not on this machine"):
        load_model("nat_mini", pretrained=True)
