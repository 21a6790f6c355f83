"""The table of data sets, and `ZooData`, the Lightning data module for any of them.

A new data set is a function that returns `Splits` and one line in `SOURCES`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl

from .classification import load_digits, load_fashion_mnist, load_image_folder
from .loading import Batches, EpochBatches, Request, ResumableLoader
from .mask_layouts import LAYOUTS, load_masks
from .readers import load_timm
from .scenes import load_fashion_scenes
from .splits import Augmentation, DataSettings, Splits
from .streams import Stream, StreamBatches
from .volumes import load_colin27, load_mni_tissue

SOURCES: dict[str, Callable[[DataSettings, Augmentation, int], Splits]] = {
    "fashion_mnist": load_fashion_mnist,
    "digits": load_digits,
    "image_folder": load_image_folder,
    "timm": load_timm,
    "fashion_scenes": load_fashion_scenes,
    **{name: partial(load_masks, layout) for name, layout in LAYOUTS.items()},
    "colin27": load_colin27,
    "mni_tissue": load_mni_tissue,
}


class ZooData(pl.LightningDataModule):
    """Provides loaders over `splits`, which shard over the trainer's processes (use_distributed_sampler=False)."""

    def __init__(
        self,
        splits: Splits,
        *,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        repeats: int = 1,
        sizes: Mapping[int, int] | None = None,
        timeout: float = 120,
        restarts: int = 0,
    ) -> None:
        """`workers` is reduced to the number of processors, except for streams, whose order depends on it.

        `repeats` and `sizes` go to the `EpochBatches` of training, `timeout` and `restarts` to `ResumableLoader`.
        """
        super().__init__()
        self.splits, self.batch_size, self.seed, self.workers = splits, batch_size, seed, workers
        self.repeats, self.sizes, self.timeout, self.restarts = repeats, sizes, timeout, restarts

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.splits.train, training=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.splits.val)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader(self.splits.test)

    def first_request(self, world_size: int = 1) -> Request:
        """What the first of `world_size` processes asks of the training set in its first step."""
        return next(iter(self._requests(self.splits.train, 0, world_size, training=True)))

    def _requests(self, dataset: Batches, rank: int, world_size: int, *, training: bool) -> EpochBatches:
        options: dict[str, Any] = {
            "seed": self.seed,
            "training": training,
            "rank": rank,
            "world_size": world_size,
            "repeats": self.repeats,
            "sizes": self.sizes,
        }
        if isinstance(dataset, Stream):
            return StreamBatches(len(dataset), self.batch_size, workers=self.workers, **options)
        batch_size = self.batch_size if training or not self.splits.whole else 1
        return EpochBatches(len(dataset), batch_size, **options)

    def _loader(self, dataset: Batches, *, training: bool = False) -> ResumableLoader:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        batches = self._requests(dataset, rank, world_size, training=training)
        on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return ResumableLoader(
            dataset,
            batches,
            workers=self.workers if isinstance(dataset, Stream) else min(self.workers, _processors()),
            pin_memory=on_gpu,
            timeout=self.timeout,
            restarts=self.restarts,
        )


def _processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
