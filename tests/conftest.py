"""What every test stands on: one thread, a fixed seed, no window system, no network."""

from __future__ import annotations

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

torch.set_num_threads(1)


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
