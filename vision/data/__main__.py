"""Checks a data set before training: every picture and every mask is read once, and problems are listed.

    python -m mixerzoo.vision.data check path/to/pictures
    python -m mixerzoo.vision.data check data=ade20k data.root=path/to/ADEChallengeData2016

A path is what `data=` of train.py takes: a folder of pictures by class, one of pictures and masks, a .tar, or timm's
name of a data set. Anything else is settings of train.py. The exit code is 0 without problems, 1 with some, 2 where
there is nothing to check. See check.py for the problems that are found.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..training.config import Config, DataConfig
from ..training.settings import load
from .check import check, parts_of
from .sources import recognize


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixerzoo.vision.data", description="Read every picture and mask of a data set, list problems."
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument("what", nargs="+", help="a folder or .tar, or settings of train.py: data=… data.root=… …")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that read (all processors)")
    parser.add_argument("--configs", type=Path, help="the folder of recipes and data sets (./configs)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        config = settings_of(arguments.what, arguments.configs)
        parts = parts_of(config.data, config.augment)
    except ValueError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    problems = 0
    for problem in check(parts, workers=max(arguments.workers, 1), progress=True):
        print(problem)
        problems += 1
    counted = ", ".join(f"{part.count:,} {part.split}" for part in parts)
    print(f"check: {counted}; {problems or 'no'} problem{'s' * (problems != 1)}", file=sys.stderr)
    return 1 if problems else 0


def settings_of(words: Sequence[str], configs: Path | None) -> Config:
    """Return the settings that the command's arguments mean: those of a path alone, or as train.py would take them."""
    if len(words) == 1 and "=" not in words[0]:
        recognized = recognize(words[0])
        if recognized is None:
            kind = "neither a folder nor a .tar" if Path(words[0]).exists() else "there is no such folder or file"
            raise ValueError(f"{words[0]}: {kind}; settings are written key=value")
        source, location = recognized
        data = DataConfig(source=source, root=location.get("root"), dataset=location.get("dataset"))
        return Config(data=data)
    folders = [configs] if configs else [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]
    folder = next((folder for folder in folders if (folder / "data").is_dir()), None)
    if folder is None:
        raise ValueError(f"{folders[0]}: there are no data sets; name the folder by --configs")
    return load(words, folder)


if __name__ == "__main__":
    sys.exit(main())
