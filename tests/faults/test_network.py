"""Without a network, imports open no connection and missing files are named in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import huggingface_hub
import numpy as np
import pytest
import timm
from mixerzoo.vision import predict
from mixerzoo.vision._loading import load_model
from mixerzoo.vision._published import require_published
from mixerzoo.vision.training.cli import main
from PIL import Image

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
    """Import every module of the library in a process that cannot open a connection."""
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 80


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the weights that were downloaded earlier."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def no_weights(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the cache, and the network also for hosts that HF_HUB_OFFLINE (conftest.py) does not cover."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    monkeypatch.setattr("mixerzoo.vision._published.urlopen", unreachable)


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


class DeadEnd:
    """A proxy that closes every connection, and counts them: one or two for a request, as the client may try again."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def dead_end(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadEnd]:
    """Hide the cache, allow the network, and let every way into it end at this proxy."""
    proxy = DeadEnd()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        for spelling in (name, name.lower()):
            monkeypatch.setenv(spelling, "" if name == "NO_PROXY" else proxy.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()  # it has read the variables
    yield proxy
    huggingface_hub.close_session()
    proxy.close()


def _picture(folder: Path) -> str:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "x.png")
    return str(folder / "x.png")


@pytest.mark.parametrize("model", ["resnet18.a1_in1k", "efficientvmamba_tiny", "nat_mini"])
def test_without_an_answer_weights_are_asked_for_once(
    model: str, dead_end: DeadEnd, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The names stand for the hub, the hub with a file name, and another host."""
    assert predict.main([model, "--pretrained", _picture(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"the published weights of {model} are not on this machine" in err, err
    assert 1 <= dead_end.connections <= 2 and not caplog.records


@pytest.mark.parametrize(
    "setting",
    [
        ("model=resnet18", "model.pretrained=true"),
        ("model=test_convnext", "model.start_from=resnet18"),
        ("model=test_convnext", "distill.teacher=resnet18"),
    ],
    ids=["pretrained", "start_from", "teacher"],
)
def test_training_asks_once_as_well(
    setting: tuple[str, ...],
    dead_end: DeadEnd,
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(["data=digits", *setting, f"out={tmp_path / 'run'}"], configs=repository / "configs") == 2
    assert "the published weights of resnet18 are not on this machine" in capsys.readouterr().err
    assert 1 <= dead_end.connections <= 2 and not any("Retry" in record.message for record in caplog.records)


@pytest.mark.slow
def test_a_command_without_a_network_ends_in_seconds(dead_end: DeadEnd, repository: Path, tmp_path: Path) -> None:
    """A process of its own, as a user starts it."""
    command = [sys.executable, "-m", "mixerzoo.vision.predict", "resnet18", "--pretrained", _picture(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["HF_HOME"] = str(tmp_path / "home")
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment, timeout=55)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert 1 <= dead_end.connections <= 2
    assert time.monotonic() - began < 50  # 61 s with the retries of the hub, and most of this is Python's start


@pytest.mark.usefixtures("dead_end")
def test_cached_weights_are_asked_for_by_nobody(tmp_path: Path) -> None:
    """A request would fail, as it does before the files are there."""
    cfg = timm.get_pretrained_cfg("nat_mini")
    assert cfg is not None
    file = tmp_path / "torch" / "hub" / "checkpoints" / str(cfg.url).rpartition("/")[2]
    snapshot = tmp_path / "hub" / "models--timm--resnet18.a1_in1k" / "snapshots" / ("0" * 40)
    for folder in (file.parent, snapshot, snapshot.parents[1] / "refs"):
        folder.mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").touch()
    for name in ("nat_mini", "resnet18"):
        with pytest.raises(ConnectionError):
            require_published(name)
    file.touch()
    (snapshot / "model.safetensors").touch()
    require_published("nat_mini")
    require_published("resnet18")


def test_a_host_that_refuses_has_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it refuses is told by the error of the download."""

    def refuse(*_: Any, **__: Any) -> None:
        raise HTTPError("https://shi-labs.com", 405, "Method Not Allowed", {}, None)  # pyright: ignore

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("mixerzoo.vision._published.urlopen", refuse)
    require_published("nat_mini")
