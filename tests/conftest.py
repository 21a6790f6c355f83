"""What every test stands on: one thread, a fixed seed, no window system, no network; and the official records."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import random
import re
import socket
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch, matplotlib and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PIP_NO_INDEX"] = "1"  # data that wheels carry is not fetched: pip is a process of its own

import numpy as np
import pytest
import torch
from mixerzoo.kernels import _runtime
from torch import Tensor

torch.set_num_threads(1)


def _load_triton_interpreted() -> None:
    """Import Triton and our Triton modules so that tests can run them on the CPU.

    Whether a Triton function is compiled or interpreted is settled when the module that defines it is imported,
    Triton's own library included. The variable is taken away again: CPU tensors keep their own path (`_runtime` is
    loaded already), and the processes that tests start must not see it.
    """
    if not _runtime.HAS_TRITON:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton.language")
        for path in sorted((Path(__file__).parent.parent / "kernels").rglob("_triton*.py")):
            importlib.import_module(f"mixerzoo.kernels.{path.parent.name}.{path.stem}")
    finally:
        del os.environ["TRITON_INTERPRET"]


_load_triton_interpreted()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout: tests read its files and run its commands from there."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of train.py in this process draw nothing and write no report: for tests of their numbers."""
    results = importlib.import_module("mixerzoo.vision.training.results")
    report = importlib.import_module("mixerzoo.vision.training.report")
    for module, name in ((results, "_draw_batch"), (results, "_draw_results"), (report, "write_report")):
        monkeypatch.setattr(module, name, lambda *_: None)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program of this name on the PATH that writes its arguments to a file, and fails for job 13."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n[ "$2" != 13 ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that needs the network fails on the spot, naming the host. Sockets of this machine (DDP, workers) work."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise RuntimeError(f"tests must not use the network, but something connected to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


# Records of the official implementations' outputs (tests/goldens), and the weights and pictures that they belong to.
#
# A record holds the names and shapes of an official state dict, and of some outputs the shape, mean, standard
# deviation, largest magnitude and a few values. No weights travel: every tensor is drawn from a random stream that its
# own name seeds, so whoever knows the names has the very checkpoint.

RECORDS = Path(__file__).parent / "goldens"


def draw_tensor(name: str, shape: list[int], factor: float = 1.0) -> Tensor:
    """The weight called `name`: scaled so that signals keep their size and a wrong position term shows."""
    stream = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    leaf = name.split(".")[-1]
    values = stream.standard_normal(shape or (1,))
    if leaf == "running_var":
        values = 0.75 + 0.5 * stream.random(shape)
    elif "pos_embed" in name or any(part in leaf for part in ("token", "rpb", "bias_table")):
        values = values * 0.5
    elif "bias" in leaf or leaf in ("beta", "running_mean"):
        values = values * 0.05
    elif max(shape, default=1) == math.prod(shape):  # a vector: norm weights and the like
        values = 1 + 0.05 * values
    else:
        values = values / math.sqrt(max(math.prod(shape[1:]), 1))
    return torch.from_numpy(np.ascontiguousarray(values * factor)).reshape(shape).float()


def draw_picture(height: int, width: int) -> Tensor:
    """[1, 3, height, width]: three waves and noise in every channel, about zero mean and unit variance."""
    stream = np.random.Generator(np.random.Philox(1000))
    row, column = np.mgrid[:height, :width].astype(np.float64)
    channels = []
    for _ in range(3):
        frequency, phase = 0.02 + 0.06 * stream.random(4), 6.283 * stream.random(4)
        waves = [
            np.sin(frequency[0] * column + phase[0]),
            np.cos(frequency[1] * row + phase[1]),
            np.sin(frequency[2] * (column + row) + phase[2]),
        ]
        channels.append(sum(waves) + 0.5 * stream.standard_normal((height, width)))
    return torch.from_numpy(np.stack(channels)[None] / 1.3).float()


def draw_state(record: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict that a record describes; index buffers, which loading must not depend on, as zeros."""
    integers = set(record.get("integer_buffers", ()))
    state = {}
    for name, shape in record["state"].items():
        factor = math.prod(f for pattern, f in record.get("weight_rules") or () if re.search(pattern, name))
        if name in integers or name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.long)
        else:
            state[name] = draw_tensor(name, shape, factor)
    return state


def deviation(got: Tensor, want: dict[str, Any]) -> float:
    """The largest deviation from what was recorded of a tensor, as a part of its largest magnitude."""
    assert list(got.shape) == want["shape"]
    values = got.detach().double().flatten()
    samples = torch.tensor(want["samples"], dtype=torch.float64)
    places = torch.linspace(0, values.numel() - 1, len(samples)).long()
    deviations = [
        (values[places] - samples).abs().max(),
        (values.mean() - want["mean"]).abs(),
        (values.std(unbiased=False) - want["std"]).abs(),
    ]
    worst = max(float(deviation) for deviation in deviations) / max(want["absmax"], 1e-12)
    return worst if math.isfinite(worst) else math.inf


class Golden:
    """The record of a model."""

    def __init__(self, name: str) -> None:
        self.record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())

    def checkpoint(self) -> dict[str, Tensor]:
        return draw_state(self.record)

    def picture(self, size: Sequence[int] | None = None) -> Tensor:
        """Of the recorded size, or of one that some of the outputs are of."""
        return draw_picture(*(size or self.record["input_size"][1:]))

    def error(self, output: str, got: Tensor) -> float:
        return deviation(got, self.record["outputs"][output])


class OperatorCase:
    """The record of a module: `record["y"]`, `record["grad_x"]`, `record["param_grads"]` and others are for `error`."""

    def __init__(self, file: str, name: str) -> None:
        self.name = name
        self.record: dict[str, Any] = _operator_records(file)[name]

    def state(self) -> dict[str, Tensor]:
        return draw_state(self.record)

    def draw(self, what: str, shape: Sequence[int]) -> Tensor:
        """ "x" the input, "g" the gradient that is fed to the output."""
        stream = np.random.Generator(np.random.Philox(zlib.crc32(f"{what}:{self.name}".encode())))
        return torch.from_numpy(stream.standard_normal(tuple(shape)).astype(np.float32))

    @staticmethod
    def error(want: dict[str, Any], got: Tensor) -> float:
        return deviation(got, want)


_SCAN_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda x: x,
    "half": lambda x: 0.5 * x,
    "posdelta": lambda x: 0.1 + 0.4 * abs(x),
    "negexp": lambda x: -np.exp(0.5 * x),
    "around1": lambda x: 1 + 0.1 * x,
    "dtbias": lambda x: 0.5 * x - 0.5,
    "big": lambda x: 8 * x + 4,
    "alog": lambda x: 0.3 * x,
    "fan": lambda x: x / math.sqrt(x.shape[-1]),
    "loggate": lambda x: -np.logaddexp(0, -x) / 16,
    "loggate_strong": lambda x: -np.logaddexp(0, 1 - 2 * x),
}


class ScanCase(OperatorCase):
    """A record of scan_ops.json: float64 results of the official scans, gated attentions and wavelets."""

    def __init__(self, name: str) -> None:
        super().__init__("scan_ops", name)

    def inputs(self) -> dict[str, Tensor]:
        """By name, float64 (of values that float32 holds)."""
        return {name: self._draw(name, **how) for name, how in self.record["inputs"].items()}

    def grad(self) -> Tensor:
        """The gradient that is fed to "out"."""
        return self._draw("dout", **self.record["dout"])

    def _draw(self, name: str, shape: list[int], rule: str) -> Tensor:
        stream = np.random.Generator(np.random.Philox(zlib.crc32(f"scan_ops/{self.name}/{name}".encode())))
        return torch.from_numpy(_SCAN_RULES[rule](stream.standard_normal(shape)).astype(np.float32)).double()

    def output_error(self, output: str, got: Tensor) -> float:
        return deviation(got, self.record["outputs"][output])

    def grad_error(self, name: str, got: Tensor) -> float:
        return deviation(got, self.record["grads"][name])


@functools.cache
def _operator_records(file: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{file}.json").read_text())["cases"]


@pytest.fixture(scope="session")
def scan_case() -> Callable[[str], ScanCase]:
    return ScanCase


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    return Golden


@pytest.fixture(scope="session")
def operator_case() -> Callable[[str, str], OperatorCase]:
    """Of the file `tests/goldens/<file>.json`, the case of that name."""
    return OperatorCase


@pytest.fixture(scope="session")
def load_drawn() -> Callable[[torch.nn.Module, str], None]:
    """Gives a module the weights that records call by that prefix and its own names."""

    def load(module: torch.nn.Module, prefix: str) -> None:
        shapes = {prefix + name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        drawn = draw_state({"state": shapes})
        module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in drawn.items()})

    return load
