"""Where an interrupted run goes on from, and what must not have changed since. Needs no torch: settings are read early.

A run folder keeps two checkpoints, last.ckpt and previous.ckpt, the one before it. A damaged last.ckpt costs the steps
between the two; what a run computes stays the same, because every step depends on the state before it alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from .._checksum import find_damage

_log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"

FREE = frozenset(
    {
        *("out", "overwrite", "resume", "resume_force", "data.root", "data.download", "data.workers", "data.max_bad"),
        *("data.timeout", "data.worker_restarts", "train.epochs", "train.steps", "train.threads", "train.progress"),
        *("train.save_every", "train.save_errors", "train.skip_nonfinite", "train.accelerator", "train.compile"),
        *("evaluate.scales", "evaluate.flip"),
    }
)
"""Settings that a resumed run may change: they choose how long and on what it runs, not what a step computes."""


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder holds something to go on from, whole or not."""
    return any((folder / "checkpoints" / name).exists() for name in (LAST, PREVIOUS))


def first_whole(path: Path) -> Path:
    """`path`, or where it is damaged, with a warning, the checkpoint before it; a `ValueError` if none is whole."""
    wrong = []
    for candidate in (path, path.with_name(PREVIOUS)) if path.name == LAST else (path,):
        damage = find_damage(candidate)
        if damage is None:
            if wrong:
                _log.warning("warning: %s; going on from %s", "; ".join(wrong), candidate)
            return candidate
        wrong.append(f"{candidate} {damage}")
    raise ValueError(f"{'; '.join(wrong)}; no checkpoint is left to go on from: start anew, in another out=")


def changes(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """In words, the settings that differ from those of the saved run although they must not."""
    return [
        f"{name} was {saved.get(name)} and is now {value}"
        for name, value in now.items()
        if name not in FREE and value != saved.get(name)
    ]
