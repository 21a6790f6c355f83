"""Batches are a function of (seed, epoch, rank, number): order, shards, place after a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mixerzoo.vision.data.classification import load_digits
from mixerzoo.vision.data.items import SeededItems
from mixerzoo.vision.data.loading import EpochBatches, Request, ResumableLoader, mix_seed
from mixerzoo.vision.data.module import ZooData
from mixerzoo.vision.training.settings import load


class Numbers:
    """Answers a request with the indices themselves and noise drawn from the request's seed."""

    def __len__(self) -> int:
        return 40

    def __getitems__(self, request: Request, /) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(len(request.indices), generator=torch.Generator().manual_seed(request.seed))
        return torch.tensor(request.indices), noise


def _batches(**changes: int | bool) -> EpochBatches:
    return EpochBatches(40, 8, **{"seed": 3, "training": True, **changes})  # type: ignore[arg-type]


def test_epochs_are_different_permutations_and_repeat_exactly() -> None:
    batches = _batches()
    first = list(batches)
    assert first == list(batches)
    batches.set_epoch(1)
    second = list(batches)
    for epoch in (first, second):
        assert sorted(index for request in epoch for index in request.indices) == list(range(40))
    assert [r.indices for r in first] != [r.indices for r in second]
    assert not {r.seed for r in first} & {r.seed for r in second}


def test_training_shards_are_disjoint_and_equally_long() -> None:
    shards = [list(EpochBatches(43, 5, seed=0, training=True, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(request.indices) for shard in shards for request in shard] == [5] * 8
    seen = [index for shard in shards for request in shard for index in request.indices]
    assert len(set(seen)) == 40


@pytest.mark.parametrize("length", [1, 7, 16, 17, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_sees_each_picture_once_in_as_many_batches_on_each_rank(
    length: int, world_size: int, size: int
) -> None:
    shards = [
        EpochBatches(length, size, seed=0, training=False, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = [index for shard in shards for request in shard for index in request.indices]
    assert sorted(seen) == list(range(length))
    assert {len(list(shard)) for shard in shards} == {len(shards[0])}
    assert all(len(request.indices) <= size for shard in shards for request in shard)


def test_too_few_pictures_for_a_batch_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"7 training pictures .* train\.batch_size=3 or less"):
        EpochBatches(7, 4, seed=0, training=True, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 3, 5])
def test_a_loader_goes_on_where_another_stopped(seen: int, workers: int) -> None:
    whole = ResumableLoader(Numbers(), _batches())
    whole.batches.set_epoch(2)
    expected = list(whole)
    stopped = ResumableLoader(Numbers(), _batches())
    stopped.batches.set_epoch(2)
    iterator = iter(stopped)
    for _ in range(seen):
        next(iterator)

    resumed = ResumableLoader(Numbers(), _batches(), workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    if seen == 5:  # a finished epoch: the next one follows
        assert resumed.batches.epoch == 3
        whole.batches.set_epoch(3)
        expected, seen = list(whole), 0
    rest = list(resumed)
    assert len(rest) == 5 - seen
    for (indices, noise), (expected_indices, expected_noise) in zip(rest, expected[seen:], strict=True):
        assert torch.equal(indices, expected_indices) and torch.equal(noise, expected_noise)


def test_items_of_ordinary_data_sets_get_the_same_augmentation_in_any_batch() -> None:
    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.rand(2) + torch.tensor(np.random.rand(2)), index

    items = SeededItems(Noisy(), [3, 1, 2])
    images, labels = items.__getitems__(Request([0, 1, 2], 9))
    assert labels.tolist() == [3, 1, 2]
    assert torch.equal(items.__getitems__(Request([2], 9))[0][0], images[2])
    assert not torch.equal(items.__getitems__(Request([2], 10))[0][0], images[2])


def test_mixed_seeds_differ_where_sums_would_not() -> None:
    assert len({mix_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125
    assert all(0 <= mix_seed(a) < 2**63 for a in range(50))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_repeats_of_a_picture_land_on_different_ranks_and_the_epoch_stays_as_long(world_size: int) -> None:
    shards = [
        list(EpochBatches(60, 5, seed=1, training=True, rank=rank, world_size=world_size, repeats=3))
        for rank in range(world_size)
    ]
    assert [len(shard) for shard in shards] == [60 // (5 * world_size)] * world_size
    seen = [[index for request in shard for index in request.indices] for shard in shards]
    counts = np.bincount(np.concatenate(seen), minlength=60)
    assert sorted(np.unique(counts)) == [0, 3] and (counts == 3).sum() == 20
    together = [index for step in zip(*seen, strict=True) for index in step]
    assert together == np.repeat(together[::3], 3).tolist()  # neighbours in the order of all ranks: one on each


def test_repeats_go_on_exactly_where_they_stopped() -> None:
    whole = list(_batches(repeats=3))
    resumed = _batches(repeats=3)
    resumed.start = 2
    assert list(resumed) == whole[2:]


def test_evaluation_knows_neither_repeats_nor_sizes() -> None:
    plain = list(_batches(training=False))
    assert list(EpochBatches(40, 8, seed=3, training=False, repeats=3, sizes={0: 16})) == plain


def test_sizes_count_from_their_epoch_on() -> None:
    batches = EpochBatches(40, 8, seed=3, training=True, sizes={2: 96, 5: 128})
    sizes = []
    for epoch in range(7):
        batches.set_epoch(epoch)
        sizes.append({request.size for request in batches})
    assert sizes == [{None}, {None}, {96}, {96}, {96}, {128}, {128}]


@pytest.mark.parametrize("processors", [1, 3])
def test_no_more_workers_than_processors_start(
    processors: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """PyTorch warns of more. The batches do not depend on it."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)), raising=False)
    settings = load(["data=digits", "data.limit=8"], Path(__file__).parents[2] / "configs")
    splits = load_digits(settings.data, settings.augment, 0)
    for workers in (0, 1, 64):
        data = ZooData(splits, batch_size=4, workers=workers)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert loader.num_workers == min(workers, processors)
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]
