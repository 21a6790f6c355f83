"""Training of segmenters: losses of several heads, evaluation of whole pictures, and contradictory settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mixerzoo.vision._loading import load_run
from mixerzoo.vision.data.loading import EpochBatches, Request
from mixerzoo.vision.data.pictures import DataError
from mixerzoo.vision.data.splits import IGNORE_INDEX, Splits
from mixerzoo.vision.segmentation import Segmenter, SegmenterOutput, scores
from mixerzoo.vision.segmentation.inference import infer
from mixerzoo.vision.training.callbacks import read_table
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.config import Config, TrainConfig
from mixerzoo.vision.training.dense import check_one_picture, loss_parts, make_inference, make_loss
from mixerzoo.vision.training.distributed import on_gpu
from mixerzoo.vision.training.plan import Plan
from mixerzoo.vision.training.run import load_data, run
from mixerzoo.vision.training.settings import ConfigError, load
from mixerzoo.vision.training.tasks import Task
from PIL import Image
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

TINY = ("model=test_convnext", "head.channels=8", "train.batch_size=2", "train.progress=false", "data.workers=0")
Settings = Callable[..., Config]
SIZES = ((40, 56), (56, 40), (30, 90), (48, 48), (64, 33))


@pytest.fixture(scope="module")
def settings(repository: Path) -> Settings:
    """Return the settings of the recipe for a tiny model, with changes `section.key=value`; they are loaded once."""
    usual = load(["recipe=segmentation", "loss.class_weights=[]", *TINY], repository / "configs")

    def change(*arguments: str) -> Config:
        config = copy.deepcopy(usual)
        for argument in arguments:
            name, _, value = argument.partition("=")
            section, _, key = name.partition(".")
            assert hasattr(getattr(config, section), key)
            setattr(getattr(config, section), key, yaml.safe_load(value))
        return config

    return change


class Few:
    """A data set of random pictures with masks, each of its own size."""

    def __init__(self, sizes: Sequence[tuple[int, int]], *, classes: int = 3) -> None:
        stream = torch.Generator().manual_seed(len(sizes))
        self.images = [torch.randn(3, *size, generator=stream) for size in sizes]
        self.masks = [torch.randint(0, classes, size, generator=stream) for size in sizes]
        for mask in self.masks:
            mask[:5] = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, request: Request, /) -> tuple[Tensor, Tensor]:
        images, masks = ([parts[index] for index in request.indices or [0]] for parts in (self.images, self.masks))
        count = len(request.indices)
        return torch.stack(images)[:count], torch.stack(masks)[:count]


def _splits(sizes: Sequence[tuple[int, int]] = SIZES, **changes: Any) -> Splits:
    train, judged = Few([(32, 32)] * 4), Few(sizes)
    facts = {"dense": True, "whole": True, "size": 32, "origin": "nowhere", **changes}
    return Splits(train, judged, judged, ("a", "b", "c", "d"), (0.5,) * 3, (0.5,) * 3, **facts)


class Pixels(nn.Module):
    """A segmenter that sees single pixels, with optional further heads."""

    def __init__(self, *, auxiliary: bool = False, boundary: bool = False) -> None:
        super().__init__()
        self.backbone, self.decode_head = nn.Identity(), nn.Conv2d(3, 4, 1)
        self.auxiliary_head = nn.Conv2d(3, 4, 1) if auxiliary else None
        self.boundary_head = nn.Conv2d(3, 1, 1) if boundary else None

    def forward(self, images: Tensor) -> Tensor | SegmenterOutput:
        logits = self.decode_head(images)
        if not self.training or (self.auxiliary_head is None and self.boundary_head is None):
            return logits
        others = () if self.auxiliary_head is None else (self.auxiliary_head(images),)
        return SegmenterOutput(logits, others, None if self.boundary_head is None else self.boundary_head(images))


def _task(config: Config, model: nn.Module | None = None, splits: Splits | None = None) -> Task:
    plan = Plan(epochs=1, steps_per_epoch=2, accumulate=1, batch=2, lr_factor=1.0)
    task = Task(model or Pixels(), config, splits or _splits(), plan=plan)
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize(
    ("heads", "parts"),
    [
        ({}, ()),
        ({"auxiliary": True}, ("auxiliary",)),
        ({"auxiliary": True, "boundary": True}, ("auxiliary", "boundary", "boundary_labels")),
    ],
)
def test_every_head_has_its_part_of_the_loss(
    heads: dict[str, bool], parts: tuple[str, ...], settings: Settings
) -> None:
    model = Pixels(**heads)
    assert loss_parts(model) == parts
    task = _task(settings(), model)
    batch = task.splits.train.__getitems__(Request([0, 1], 0))
    loss = task.training_step(batch, 0)
    assert list(task.train_parts) == (["labels", *parts] if parts else [])
    seen: dict[str, float] = {name: metric.compute().item() for name, metric in task.train_parts.items()}  # type: ignore
    weights = {"labels": 1, "auxiliary": 0.4, "boundary": 20, "boundary_labels": 1}
    if parts:
        assert loss.item() == pytest.approx(sum(weights[name] * value for name, value in seen.items()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["ce", "ohem"])
def test_a_batch_without_a_labelled_pixel_teaches_nothing(name: str, settings: Settings) -> None:
    model = Pixels(auxiliary=True, boundary=True)
    task = _task(settings(f"loss.name={name}"), model)
    images, masks = task.splits.train.__getitems__(Request([0, 1], 0))
    loss = task.training_step((images, torch.full_like(masks, IGNORE_INDEX)), 0)
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_processes_count_every_pixel_of_whole_pictures_once(settings: Settings) -> None:
    """Shards may have different lengths or be empty; a class that never occurs is left out of the mean."""
    splits = _splits()
    task = _task(settings("data.short_side=20"), splits=splits)
    task.eval()
    results, losses = [], []
    for processes in (1, 2, 7):
        total, loss, weight = torch.zeros(4, 4, dtype=torch.int64), 0.0, 0.0
        for rank in range(processes):
            task._reset_evaluation()
            batches = EpochBatches(len(splits.val), 1, seed=0, training=False, rank=rank, world_size=processes)
            for request in batches:
                answer = task.test_step(splits.val.__getitems__(request), 0)
                assert answer.shape[0] == len(request.indices)
            total += task.confusion.compute()
            loss += float(task.val_loss.mean_value)  # of a process: the sum
            weight += float(task.val_loss.weight)
        results.append(total)
        losses.append(loss / weight)
    labelled = sum(int((mask != IGNORE_INDEX).sum()) for mask in Few(SIZES).masks)
    assert int(results[0].sum()) == labelled
    assert all(torch.equal(result, results[0]) for result in results)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert scores(results[0])["recall"].isnan().tolist() == [False, False, False, True]


def test_validation_loss_is_of_pixels_at_the_size_of_the_picture(settings: Settings) -> None:
    """The expected loss is computed from the decode head alone, as the model sees single pixels."""
    splits = _splits(((32, 40), (50, 37)))
    task = _task(settings("data.short_side=0", "loss.name=ohem"), splits=splits).eval()
    network: Any = task.model
    losses = []
    for index in range(2):
        images, masks = splits.val.__getitems__(Request([index], 0))
        task.validation_step((images, masks), index)
        each = nn.functional.cross_entropy(network.decode_head(images), masks, reduction="none", ignore_index=255)
        losses.append(each[masks != IGNORE_INDEX])
    assert task.val_loss.compute().item() == pytest.approx(torch.cat(losses).mean().item())


def test_scales_and_mirror_images_are_of_the_test_alone(settings: Settings) -> None:
    config = settings("evaluate.scales=[0.5,1]", "evaluate.flip=true")
    task = _task(config).eval()
    images, masks = task.splits.val.__getitems__(Request([2], 0))
    once, often = task.judge(images, final=False).logits, task.judge(images, final=True).logits
    assert once.shape == often.shape == (1, 4, 30, 90)
    assert not torch.allclose(once.softmax(1), often.softmax(1), atol=1e-3)
    assert task.inferences is not None
    averaged = infer(task.model, images, task.inferences[True])  # probabilities
    torch.testing.assert_close(often.softmax(1), averaged)
    torch.testing.assert_close(task.test_step((images, masks), 0), often)
    each = nn.functional.nll_loss(averaged.log(), masks, ignore_index=IGNORE_INDEX)
    assert task.val_loss.compute().item() == pytest.approx(each.item())


def test_the_likeliest_class_is_that_of_the_averaged_probabilities(settings: Settings) -> None:
    """For nearly uniform predictions, many logarithms are equal although the probabilities are not."""
    model = Pixels()
    for parameter in model.parameters():
        parameter.data.mul_(1e-7)
    task = _task(settings("evaluate.flip=true"), model).eval()
    images, masks = task.splits.val.__getitems__(Request([0], 0))
    answer = task.judge(images, final=True)
    assert (answer.labels != answer.logits.argmax(1)).any()
    assert task.inferences is not None
    assert torch.equal(answer.labels, infer(task.model, images, task.inferences[True]).argmax(1))
    task.test_step((images, masks), 0)
    known = masks != IGNORE_INDEX
    pairs = 4 * masks[known] + answer.labels[known]
    assert torch.equal(task.confusion.compute(), pairs.bincount(minlength=16).reshape(4, 4))


def test_masks_that_are_all_ignored_say_so(settings: Settings) -> None:
    task = _task(settings()).eval()
    images, masks = task.splits.val.__getitems__(Request([0], 0))
    task.validation_step((images, torch.full_like(masks, IGNORE_INDEX)), 0)
    with pytest.raises(DataError, match="nowhere: no pixel of the masks of `val` has a class"):
        task.on_validation_epoch_end()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss.boundary_weight=20"], "loss.boundary_weight=20, but no head of this model draws boundaries"),
        (["loss.boundary_labels_weight=1"], "loss.boundary_labels_weight=1, but no head"),
        (["loss.auxiliary_weight=1"], "loss.auxiliary_weight=1, but there is no auxiliary head; give head.auxiliary"),
        (["loss.class_weights=[1,2]"], "loss.class_weights has 2 numbers, but there are 4 classes"),
        (["loss.class_weights=[0,0,0,0]"], "are all 0: there is nothing to learn"),
        (["evaluate.window=[8,8]"], "evaluate.window=[8, 8] is of windows that slide; give evaluate.mode=slide"),
        (["evaluate.stride=[8,8]"], "evaluate.stride=[8, 8] is of windows that slide"),
        (["evaluate.mode=slide", "evaluate.window=[8]"], "needs a window of two positive sides"),
        (["evaluate.mode=slide", "evaluate.stride=[40,40]"], "pixels between windows would stay unseen"),
        (["evaluate.mode=slide", "train.strategy=fsdp", "train.devices=2"], "take ddp, or evaluate.mode=whole"),
        (["evaluate.scales=[]"], "scales must be positive numbers, at least one"),
    ],
)
def test_settings_of_segmentation_that_contradict_are_refused(
    arguments: list[str], message: str, settings: Settings
) -> None:
    with pytest.raises(ConfigError) as caught:
        _task(settings(*arguments))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.short_side=64"], "data.short_side=64: swin_tiny_patch4_window7_224 takes pictures of 32 x 32 alone"),
        (["evaluate.scales=[0.5,1]"], "set evaluate.mode=slide, or evaluate.scales=[1.0]"),
        (["evaluate.divisor=20"], "evaluate.divisor=20: swin_tiny_patch4_window7_224 takes"),
        (
            ["evaluate.mode=slide", "evaluate.window=[64,64]"],
            "evaluate.window=[64, 64]: swin_tiny_patch4_window7_224 takes",
        ),
    ],
)
def test_a_model_of_one_size_is_not_shown_others(arguments: list[str], message: str, settings: Settings) -> None:
    with pytest.raises(ConfigError) as caught:
        make_inference(settings("model.name=swin_tiny_patch4_window7_224", *arguments), _splits())
    assert message in str(caught.value)
    slide = settings("model.name=swin_tiny_patch4_window7_224", "evaluate.mode=slide", "evaluate.scales=[0.5,2]")
    found = make_inference(slide, _splits())
    assert found is not None and found[1].size(20, 70, 0.5) == (32, 56) and found[0].scales == (1.0,)


@pytest.mark.parametrize("argument", ["loss.name=ohem", "loss.class_weights=[1,2,3,4]", "evaluate.mode=slide"])
def test_classifiers_have_no_settings_of_pixels(argument: str, settings: Settings) -> None:
    config, splits = settings(argument), _splits(dense=False, whole=False)
    with pytest.raises(ConfigError, match="is of segmentation"):
        make_loss(Pixels(), config, splits)
        make_inference(config, splits)


def test_one_picture_at_a_time_is_refused_where_it_is_pooled_to_one_pixel(settings: Settings) -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    config = settings("train.batch_size=1", "train.accumulate=4")
    with pytest.raises(ConfigError, match=r"train\.batch_size=1: .* take at least 2 pictures"):
        check_one_picture(pooled, config, _splits())
    buffers = dict(pooled.named_buffers())
    assert pooled.training and not buffers["1.running_mean"].any() and buffers["1.num_batches_tracked"] == 0
    check_one_picture(Pixels(), config, _splits())


def _folder(root: Path) -> Path:
    """Write pictures of several sizes with masks of 0 (no class), 1 and 2; class 3 never occurs."""
    stream = np.random.default_rng(0)
    for index, (height, width) in enumerate(SIZES * 2):
        split = "training" if index < len(SIZES) else "validation"
        mask = stream.integers(0, 3, (height // 5 + 1, width // 5 + 1), dtype=np.uint8)
        mask = mask.repeat(5, 0).repeat(5, 1)[:height, :width]
        picture = stream.integers(0, 60, (height, width, 3)) + 90 * mask[..., None]
        for folder, name, pixels in (("images", "jpg", picture), ("annotations", "png", mask)):
            path = root / folder / split / f"{index}.{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    root = tmp_path_factory.mktemp("dense")
    arguments = [
        *("recipe=segmentation", "data=ade20k", f"data.root={_folder(root / 'data')}", "data.classes=3", *TINY),
        *("data.size=32", "data.short_side=40", "train.epochs=1", "head.name=upernet", f"out={root / 'run'}"),
        *("evaluate.mode=slide", "evaluate.scales=[1,1.5]", "evaluate.flip=true", "ema.decay=0.5"),
    ]
    run(load(arguments, repository / "configs"))
    return root / "run"


@pytest.mark.slow
def test_a_run_on_whole_pictures_says_all_of_them(trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    names = {"loss", "mean_iou", "mean_accuracy", "accuracy", "frequency_weighted_iou"}
    assert results["test"].keys() == names and all(value >= 0 for value in results["test"].values())
    classes = results["test_by_class"]
    present = [row["iou"] for row in classes if row["iou"] is not None]
    assert classes[2]["count"] == 0 and classes[2]["recall"] is None  # never the truth
    assert results["test"]["mean_iou"] == pytest.approx(sum(present) / len(present), abs=1e-5)
    rows = read_table(trained / "metrics.csv")
    names = {"train/loss_labels", "train/loss_auxiliary", "val/mean_iou", "val/accuracy"}
    assert all(names <= set(row) for row in rows)
    whole = rows[0]["train/loss_labels"] + 0.4 * rows[0]["train/loss_auxiliary"]
    assert rows[0]["train/loss"] == pytest.approx(whole, rel=1e-4)
    for name in ("batch", "predictions", "mistakes", "confusion", "curves"):
        assert (trained / f"{name}.png").stat().st_size > 5_000
    report = (trained / "report.html").read_text()
    assert "frequency weighted IoU" in report and "<th scope='col'>IoU</th>" in report


@pytest.mark.slow
def test_the_checkpoint_judges_as_the_run_did(trained: Path, repository: Path) -> None:
    """The checkpoint alone gives the numbers of results.json, with the averaged weights that were validated."""
    facts = load_checkpoint(trained / "checkpoints" / "best.ckpt")["mixerzoo"]
    assert facts["head"]["name"] == "upernet" and facts["short_side"] == 40
    assert facts["evaluate"]["mode"] == "slide" and facts["evaluate"]["scales"] == [1.0, 1.5]
    found = load_run(trained)
    assert isinstance(found.model, Segmenter)
    config = load([f"resume={trained}"], repository / "configs")
    splits = load_data(config)
    task = _task(config, found.model, splits).eval()
    for index in range(len(splits.test)):
        task.test_step(splits.test.__getitems__(Request([index], 0)), index)
    results = json.loads((trained / "results.json").read_text())
    for name, value in scores(task.confusion.compute()).items():
        if name in results["test"]:
            assert results["test"][name] == pytest.approx(float(value), abs=1e-6)


@pytest.mark.slow
def test_a_resumed_run_may_be_tested_otherwise_but_not_judged(trained: Path, repository: Path) -> None:
    changed = [f"resume={trained}", "evaluate.scales=[1]", "evaluate.flip=false"]
    assert load(changed, repository / "configs").evaluate.flip is False
    with pytest.raises(
        ConfigError, match=r"loss\.name was ce and is now ohem, evaluate\.mode was slide and is now whole"
    ):
        load([f"resume={trained}", "evaluate.mode=whole", "loss.name=ohem"], repository / "configs")


def test_checkpoints_from_before_have_no_facts_of_evaluation(settings: Settings) -> None:
    task = _task(settings())
    facts = {name: value for name, value in task._facts().items() if name not in ("evaluate", "short_side")}
    task.on_load_checkpoint({"state_dict": task.state_dict(), "mixerzoo": facts, "train_means": torch.zeros(1, 1, 2)})
    with pytest.raises(ConfigError, match="short_side was 7 and is now 32"):
        task.on_load_checkpoint({"state_dict": task.state_dict(), "mixerzoo": {**facts, "short_side": 7}})


def test_batch_norm_is_shared_by_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert [on_gpu(TrainConfig(accelerator=name)) for name in ("auto", "gpu", "cpu")] == [there, there, False]
