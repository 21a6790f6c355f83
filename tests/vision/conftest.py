"""Records of the official implementations' outputs (tests/goldens), and the weights and pictures that they belong to.

A record holds the names and shapes of an official state dict, and of some outputs the shape, mean, standard
deviation, largest magnitude and a few values. No weights travel: every tensor is drawn from a random stream that its
own name seeds, so whoever knows the names has the very checkpoint.
"""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

RECORDS = Path(__file__).parent.parent / "goldens"


def draw_tensor(name: str, shape: list[int]) -> Tensor:
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
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(shape).float()


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


class Golden:
    """One record."""

    def __init__(self, name: str) -> None:
        self.record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())

    def checkpoint(self) -> dict[str, Tensor]:
        """The official state dict; index buffers, which loading must not depend on, as zeros."""
        integers = set(self.record["integer_buffers"])
        integers |= {name for name in self.record["state"] if name.endswith("num_batches_tracked")}
        return {
            name: torch.zeros(shape, dtype=torch.long) if name in integers else draw_tensor(name, shape)
            for name, shape in self.record["state"].items()
        }

    def picture(self) -> Tensor:
        return draw_picture(*self.record["input_size"][1:])

    def error(self, output: str, got: Tensor) -> float:
        """The largest deviation from the record, as a part of the output's largest magnitude."""
        want = self.record["outputs"][output]
        assert list(got.shape) == want["shape"]
        values = got.detach().double().flatten()
        samples = torch.tensor(want["samples"], dtype=torch.float64)
        places = torch.linspace(0, values.numel() - 1, len(samples)).long()
        deviations = [
            (values[places] - samples).abs().max(),
            (values.mean() - want["mean"]).abs(),
            (values.std(unbiased=False) - want["std"]).abs(),
        ]
        worst = max(float(deviation) for deviation in deviations) / want["absmax"]
        return worst if math.isfinite(worst) else math.inf


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    return Golden
