"""Finds what would stop a training run later: reads every picture and every mask of a data set once.

Problems are unreadable pictures, empty class folders, classes that training does not know, masks that are missing,
coloured, of another size or with unknown labels, and the same file in two splits.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .pictures import DataError, UnreadableError, read_picture
from .splits import Augmentation, DataSettings


class Problem(NamedTuple):
    """A problem with one file of a data set; `what` continues the sentence that the file's name begins."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass
class Part:
    """A split of a data set. `examine(index)` reads one of its `count` pictures; `found` holds problems known without
    that."""

    split: str
    count: int
    examine: Callable[[int], list[Problem]]
    files: Sequence[Path] = ()
    found: list[Problem] = field(default_factory=list)


def check(parts: Sequence[Part], *, workers: int = 1, progress: bool = False) -> Iterator[Problem]:
    """Yield the problems of all parts; those of pictures come in the order of the files."""
    from tqdm import tqdm

    for part in parts:
        yield from part.found
        with ThreadPoolExecutor(workers) as pool:
            # Without a terminal tqdm is silent by itself (disable=None).
            shown = tqdm(total=part.count, desc=part.split, unit="", leave=False, disable=None if progress else True)
            for problems in pool.map(part.examine, range(part.count)):
                shown.update()
                yield from problems
            shown.close()
    yield from _in_two_splits(parts)


def _in_two_splits(parts: Sequence[Part]) -> Iterator[Problem]:
    """Yield files with the same content in two splits. Only files of equal length are read."""
    by_length: defaultdict[int, list[tuple[str, Path]]] = defaultdict(list)
    for part in parts:
        for file in part.files:
            if file.is_file() and (length := file.stat().st_size):
                by_length[length].append((part.split, file))
    for alike in by_length.values():
        if len({split for split, _ in alike}) == 1:
            continue
        seen: dict[str, tuple[str, Path]] = {}
        for split, file in alike:
            first_split, first = seen.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), (split, file))
            if first_split != split:
                yield Problem(str(file), f"the same as {first}: {split} and {first_split} must not share pictures")


def parts_of(config: DataSettings, augmentation: Augmentation) -> list[Part]:
    """Return the splits of the data set that `config` describes. `augmentation` is needed to build it and not used."""
    from .mask_layouts import LAYOUTS
    from .module import SOURCES

    root = Path(config.root or "")
    if config.source in LAYOUTS:
        return _masks(config)
    if config.source == "image_folder":
        if config.root is None or not root.is_dir():
            raise ValueError(f"data.root={config.root}: there is no such folder")
        return _folders(root)
    if config.source not in SOURCES:
        raise ValueError(f"data.source={config.source}: choose one of {', '.join(SOURCES)}")
    return _read_by_timm(config, augmentation)


def _folders(root: Path) -> list[Part]:
    from torchvision.datasets import ImageFolder

    from .classification import split_folders

    parts, known = [], None
    for split, folder in split_folders(root).items():
        try:
            dataset = ImageFolder(str(folder), allow_empty=True)
        except FileNotFoundError as error:
            raise ValueError(f"{folder} needs a sub-folder with pictures for each class: {error}") from None
        found = []
        if known is None:  # training comes first
            known = dataset.classes
            if len(known) < 2:
                found = [Problem(str(folder), f"there is one class only ({known[0]}); at least 2 are needed")]
        filled = {label for _, label in dataset.samples}
        found += [
            Problem(str(folder / name), "there is no picture of this class")
            for name, label in dataset.class_to_idx.items()
            if label not in filled
        ]
        found += [
            Problem(str(folder / name), "training has no such class") for name in dataset.classes if name not in known
        ]
        found += [Problem(str(folder / name), "this class is missing") for name in known if name not in dataset.classes]
        files = [Path(file) for file, _ in dataset.samples]
        parts.append(Part(split, len(files), lambda index, files=files: _unreadable(files[index]), files, found))
    return parts


def _unreadable(file: Path) -> list[Problem]:
    try:
        read_picture(file)
    except UnreadableError as error:
        return [Problem(error.file, f"cannot be read: {error.reason}")]
    return []


def _masks(config: DataSettings) -> list[Part]:
    from .mask_files import Pair, problem_of
    from .mask_layouts import LAYOUTS

    files = LAYOUTS[config.source](config)

    def examine(pair: Pair) -> list[Problem]:
        picture, mask = pair
        problems = _unreadable(picture)
        if not mask.is_file():
            return [*problems, Problem(str(picture), f"has no mask; it was expected at {mask}")]
        wrong = problem_of(pair, files.labels)
        if wrong is None or (isinstance(wrong, UnreadableError) and wrong.file == str(picture)):
            return problems
        what = f"cannot be read: {wrong.reason}" if isinstance(wrong, UnreadableError) else str(wrong)
        return [*problems, Problem(str(mask), what.removeprefix(f"{mask} "))]

    parts = []
    for split, pairs in files.splits.items():
        part = Part(split, len(pairs), lambda index, pairs=pairs: examine(pairs[index]))
        part.files = [picture for picture, _ in pairs]
        if split in files.mask_folders:
            lonely = set(files.mask_folders[split].rglob("*.png")) - {mask for _, mask in pairs}
            part.found = [Problem(str(mask), "this mask has no picture") for mask in sorted(lonely)]
        parts.append(part)
    return parts


def _read_by_timm(config: DataSettings, augmentation: Augmentation) -> list[Part]:
    from .items import SeededItems
    from .module import SOURCES

    splits = SOURCES[config.source](config, augmentation, 0)
    parts = []
    for split, batches in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if split == "test" and batches is splits.val:
            continue
        if not isinstance(batches, SeededItems):
            raise ValueError(f"{splits.origin} is not made of files that could be checked one by one")

        def examine(index: int, batches: SeededItems = batches) -> list[Problem]:
            try:
                batches.dataset[batches.indices[index]]
            except UnreadableError as error:
                return [Problem(error.file, f"cannot be read: {error.reason}")]
            except DataError as error:  # an unknown label
                file, _, what = str(error).partition(" ")
                return [Problem(file, what)]
            return []

        parts.append(Part(split, len(batches), examine))
    return parts
