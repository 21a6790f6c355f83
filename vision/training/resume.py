"""Which checkpoint an interrupted run resumes from, and which settings must not have changed since.

A run folder keeps two checkpoints: last.ckpt and previous.ckpt, the one before it. If last.ckpt is damaged, the steps
between the two are computed again. The result stays the same, because every step depends only on the state before it.
This module does not import torch, because settings are read before it is loaded.
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
"""Settings that may differ in a resumed run: how long and on what hardware it runs, not what a step computes."""

BOUND = frozenset(
    {
        *("optim.name", "optim.no_decay", "optim.layer_decay", "optim.layer_blocks", "optim.lr_scale"),
        *("optim.freeze", "optim.freeze_epochs"),
    }
)
"""Settings that may not differ even if forced: they determine the parameter groups of the saved optimizer state."""


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run folder holds a checkpoint to resume from, even a damaged one."""
    return bool(_resumable(folder))


def saved_at(folder: Path) -> float:
    """Return the modification time of the newest checkpoint to resume from; the folder must have one."""
    return max(path.stat().st_mtime for path in _resumable(folder))


def _resumable(folder: Path) -> list[Path]:
    return [path for name in (LAST, PREVIOUS) if (path := folder / "checkpoints" / name).exists()]


def first_whole(path: Path) -> Path:
    """Return the first undamaged checkpoint: `path`, or, with a warning, the one before it. Raise if there is none."""
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
    """Describe the settings that differ from the saved run's and are not in `FREE`, one string each."""
    return [
        f"{name} was {saved.get(name)} and is now {value}"
        for name, value in now.items()
        if name not in FREE and value != saved.get(name)
    ]
