"""Trains a backbone: `python train.py [recipe=…] [model=nat_mini] [data=…] [optim.lr=1e-3] …`, see `--help`."""

from __future__ import annotations

import sys
from pathlib import Path

from mixerzoo.vision.training.cli import main  # pyright: ignore[reportMissingImports]  # mapped in pyproject.toml

if __name__ == "__main__":  # several processes: Lightning starts this file once for each
    sys.exit(main(sys.argv[1:], configs=Path(__file__).parent / "configs"))
