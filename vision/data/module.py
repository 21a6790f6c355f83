"""`ZooData`: any data set of this library as a Lightning data module, and the table of readers.

A new data set is a function that returns `Splits` and one line in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl

from .classification import load_digits, load_fashion_mnist, load_image_folder
from .loading import Batches, EpochBatches, ResumableLoader
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
    """Loaders over `splits`, sharded over the trainer's processes by themselves (use_distributed_sampler=False)."""

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
        """`repeats` and `sizes` are of training, as `EpochBatches` has them, the last two `ResumableLoader`'s."""
        super().__init__()
        self.splits, self.batch_size, self.seed, self.workers = splits, batch_size, seed, workers
        self.repeats, self.sizes, self.timeout, self.restarts = repeats, sizes, timeout, restarts

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.splits.train, training=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.splits.val)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader(self.splits.test)

    def _loader(self, dataset: Batches, *, training: bool = False) -> ResumableLoader:
        trainer = self.trainer
        options: dict[str, Any] = {
            "seed": self.seed,
            "training": training,
            "rank": trainer.global_rank if trainer else 0,
            "world_size": trainer.world_size if trainer else 1,
            "repeats": self.repeats,
            "sizes": self.sizes,
        }
        if isinstance(dataset, Stream):
            batches = StreamBatches(len(dataset), self.batch_size, workers=self.workers, **options)
        else:
            batches = EpochBatches(len(dataset), self.batch_size if training or not self.splits.whole else 1, **options)
        on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return ResumableLoader(
            dataset,
            batches,
            workers=self.workers,
            pin_memory=on_gpu,
            timeout=self.timeout,
            restarts=self.restarts,
        )
