"""Recognises data sets by a path or timm's name, for `data=…` of train.py and for `… vision.data check …`."""

from __future__ import annotations

from pathlib import Path

STREAMS = ("hfids", "wds", "tfds")
PREFIXES = ("hfds", "torch", *STREAMS)
"""Prefixes of timm's names of data sets, each of which chooses a reader."""

MASK_FOLDERS = ("annotations", "masks")
"""Names of the folder beside `images` that holds the masks."""


def recognize(place: str) -> tuple[str, dict[str, str]] | None:
    """Return the source of a data set (a key of `SOURCES`) and the settings below `data.` that locate it.

    A folder holds masks if `images` and one of `MASK_FOLDERS` lie in it, and else one sub-folder per class; a `.tar`
    and a name such as `hfds/NAME` are read through timm. None: `place` is none of these.
    """
    folder = Path(place)
    if folder.is_dir():
        has_masks = (folder / "images").is_dir() and any((folder / name).is_dir() for name in MASK_FOLDERS)
        return "mask_folder" if has_masks else "image_folder", {"root": place}
    if place.endswith(".tar"):
        return "timm", {"root": place}
    prefix, slash, _ = place.partition("/")
    if slash and prefix.lower() in PREFIXES:
        return "timm", {"dataset": place}
    return None
