"""Streamed data sets: WebDataset shards, and the streams of Hugging Face and TensorFlow.

timm's readers distribute shards over all loading processes and shuffle samples through a buffer. A stream cannot start
in the middle or return a picture by its index. Each loading process therefore counts its batches, so that training can
be resumed exactly, with these limits:

* A run resumed within an epoch reads the stream of that epoch again up to its position, decoding pictures without
  augmenting them. It needs the same number of workers and processes as before.
* No pictures can be held out of a stream: validation needs a split of its own.
* In training the stream starts over until the epoch is full, so some pictures appear twice and some later, depending on
  how even the shards are. An evaluation sees each picture once; every process reads the whole stream and keeps its
  share.
* timm's reader of shards skips samples that it cannot decode, with a line in the log. They are not counted, but an
  evaluation of fewer pictures than the split states is an error.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.dataset_factory import create_dataset
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from .classification import PictureTransforms
from .loading import EpochBatches, Request, mix_seed, seed_everything
from .pictures import DataError, to_rgb
from .splits import Augmentation, DataSettings, Splits

_log = logging.getLogger(__name__)

_HINT = "(a split may state its length, as in train|50000 or, with shards, train-{0000..0009}.tar|50000)"


class Turn(NamedTuple):
    """A request for the next pictures of a rank from a stream. Only the length of `indices` matters; `number` counts
    requests from the beginning of the epoch."""

    indices: Sequence[int]
    seed: int
    size: int | None = None
    number: int = 0
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    skip: bool = False


class Stream:
    """Batches of an iterable timm data set. Each worker answers its own turns, in order."""

    def __init__(
        self, dataset: Any, length: int, transforms: PictureTransforms, *, classes: int, training: bool
    ) -> None:
        self.dataset, self.length, self.transforms = dataset, length, transforms
        self.classes, self.training = classes, training
        self._items: Iterator[tuple[Any, Any]] = iter(())

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]:
        """Return as many pictures as `request` has indices, from the beginning: a stream has no random access."""
        batch = self.answer(Turn(*request))[0]
        self._items = iter(())
        if batch is None:
            raise DataError("the stream is empty")
        return batch

    def answer(self, turn: Turn) -> tuple[tuple[Tensor, Tensor] | None, dict[str, str]]:
        """Return a batch, or None for one that is skipped or past the end."""
        worker = get_worker_info()
        if turn.number == (worker.id if worker else 0):
            self._items = self._begin(turn)
        items = list(itertools.islice(self._items, len(turn.indices)))
        if turn.skip or not items:
            return None, {}
        transform, images = self.transforms(turn.size), []
        for place, (picture, target) in enumerate(items):
            seed_everything(mix_seed(turn.seed, place))
            if not 0 <= int(target) < self.classes:
                raise DataError(f"the stream holds label {target}, but there are {self.classes} classes (data.classes)")
            images.append(transform(to_rgb(picture), int(target)))
        pictures, targets = default_collate(images)
        return (pictures, targets), {}

    def _begin(self, turn: Turn) -> Iterator[tuple[Any, Any]]:
        """Open the stream of this process for an epoch, with the reader's state reset."""
        reader, worker = self.dataset.reader, get_worker_info()
        # timm asks torch.distributed, which is not started when the data set is made.
        reader.dist_rank, reader.dist_num_replicas = (turn.rank, turn.world_size) if self.training else (0, 1)
        reader.worker_info, reader.worker_id, reader.num_workers, reader.ds = None, 0, 1, None
        reader.batch_size = len(turn.indices)
        reader.worker_seed = mix_seed(reader.common_seed, turn.epoch)  # of the main process; workers have their own
        loading = reader.dist_num_replicas * (worker.num_workers if worker else 1)
        shards = getattr(getattr(reader, "split_info", None), "filenames", None)
        if self.training and shards is not None and len(shards) < loading:
            raise DataError(
                f"{len(shards)} shards cannot be shared among {loading} loading processes (data.workers, on each "
                f"device); use fewer, at most {max(len(shards) // reader.dist_num_replicas, 1)} data.workers"
            )
        seed_everything(mix_seed(turn.epoch, loading))
        self.dataset.set_epoch(turn.epoch)
        share = iter(reader)
        return share if self.training else itertools.islice(share, turn.rank, None, turn.world_size)


class StreamBatches(EpochBatches):
    """A batch sampler that yields the turns of one rank for one epoch, including those before `start`, to be skipped.

    The `workers` loading processes alternate. The number of pictures of each is unknown, so an evaluation requests
    enough turns for the case that one of them has all pictures.
    """

    def __init__(self, length: int, batch_size: int, *, workers: int, **options: Any) -> None:
        super().__init__(length, batch_size, **options)
        self.workers = workers
        if self.training and self.repeats != 1:
            raise ValueError(f"augment.repeats={self.repeats}: a picture of a stream comes when it comes; set it to 1")

    @property
    def first(self) -> int:
        return 0

    def __len__(self) -> int:
        share = math.ceil(self.length / self.world_size)
        return super().__len__() if self.training else max(self.workers or 0, 1) * math.ceil(share / self.batch_size)

    def _requests(self, epoch: int, start: int) -> Iterator[Any]:
        size = self.size_at(epoch) if self.training else None
        for number in range(len(self)):
            seed = mix_seed(self.seed, epoch, self.rank, number)
            place = (number, epoch, self.rank, self.world_size)
            yield Turn(range(self.batch_size), seed, size, *place, skip=number < start)


def load_stream(config: DataSettings, augmentation: Augmentation, seed: int) -> Splits:
    """Load the stream that `data.dataset` names."""
    val_name = config.val_split or "validation"
    train, val = _open(config, config.train_split, seed, training=True), _open(config, val_name, seed, training=False)
    classes = _classes(config, train)
    length = min(_length(train, config.train_split), config.limit or 2**62)

    def judged(dataset: Any, split: str) -> Stream:
        transforms = PictureTransforms(config, None)
        return Stream(dataset, _length(dataset, split), transforms, classes=len(classes), training=False)

    test = validation = judged(val, val_name)
    if config.test_split is not None:
        test = judged(_open(config, config.test_split, seed, training=False), config.test_split)
    else:
        _log.warning("%s: no data.test_split, so the final numbers are of the validation pictures", config.dataset)
    _log.warning("%s is a stream: a run resumed inside an epoch reads up to its place again", config.dataset)
    return Splits(
        train=Stream(train, length, PictureTransforms(config, augmentation), classes=len(classes), training=True),
        val=validation,
        test=test,
        classes=classes,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=config.size,
        origin=f"{config.dataset} in {config.root}" if config.root else str(config.dataset),
    )


def _open(config: DataSettings, split: str, seed: int, *, training: bool) -> Any:
    prefix, _, name = str(config.dataset).partition("/")
    prefix, options, classes = prefix.lower(), {}, None
    if prefix == "wds" and (config.root is None or ("://" not in config.root and not Path(config.root).is_dir())):
        raise ValueError(f"data.root={config.root}: there is no such folder of shards")
    asked, _, count = split.partition("|") if prefix != "wds" else (split, "", "")  # its reader knows the sign
    try:
        if prefix == "hfids":
            features = _features(name, asked, config.root)
            options = columns(features, name)
            classes = getattr(features[options["target_key"]], "names", None)
        dataset: Any = create_dataset(
            str(config.dataset),
            root=config.root,
            split=asked,
            is_training=training,
            seed=seed,
            num_samples=int(count) if count else None,
            input_img_mode="",
            **options,  # pyright: ignore[reportArgumentType]
        )
        if classes:
            dataset.reader.class_to_idx = {name: index for index, name in enumerate(classes)}
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data.dataset={config.dataset}, split {split}: {reason} {_HINT}") from error
    return dataset


def _features(name: str, split: str, cache: str | None) -> Any:
    """Return the column types. timm asks the builder, which does not know those of local files before reading them."""
    import datasets

    return datasets.load_dataset(name, split=split, streaming=True, cache_dir=cache).features  # pyright: ignore


def columns(features: Any, origin: str) -> dict[str, str]:
    """Return timm's arguments for the columns of pictures and classes, which data sets name differently."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if not pictures or not (labels or "label" in kinds):
        raise ValueError(f"{origin} has the columns {', '.join(kinds)}; one of pictures and one of classes are needed")
    return {
        "input_key": "image" if "image" in pictures else pictures[0],
        "target_key": "label" if "label" in kinds else labels[0],
    }


def _length(dataset: Any, split: str) -> int:
    if not dataset.reader.num_samples:
        raise ValueError(f"{split}: how many pictures these are is not known {_HINT}")
    return int(dataset.reader.num_samples)


def _classes(config: DataSettings, dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset.reader, "class_to_idx", None) or {}
    if names:
        return tuple(sorted(names, key=names.__getitem__))
    if config.classes is None:
        raise ValueError(f"{config.dataset} does not say how many classes it has; give data.classes")
    return tuple(str(index) for index in range(config.classes))
