"""What every test stands on: one thread, a fixed seed, no window system, no network."""

from __future__ import annotations

import importlib
import os
import random
import socket
from pathlib import Path
from typing import Any

# Before torch, matplotlib and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from mixerzoo.kernels import _runtime

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


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that needs the network fails on the spot, naming the host. Sockets of this machine (DDP, workers) work."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise RuntimeError(f"tests must not use the network, but something connected to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
