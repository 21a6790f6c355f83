"""Segmentation recipes: heads, losses and evaluation as published. test_recipes.py has the tests of all recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import pytest
import torch
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.segmentation.losses import OhemCrossEntropy
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.dense import make_inference, make_loss
from mixerzoo.vision.training.optimization import make_optimizer
from mixerzoo.vision.training.plan import make_plan
from mixerzoo.vision.training.settings import load

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

ADE20K = 20_210
Load = Callable[..., Config]


@pytest.fixture
def settings(repository: Path) -> Load:
    def settings(recipe: str, *arguments: str) -> Config:
        by_hand = ["model.checkpoint=weights"] if recipe.startswith("bevanet") else []
        return load([f"recipe={recipe}", "data.root=somewhere", *by_hand, *arguments], repository / "configs")

    return settings


def _network(config: Config) -> torch.nn.Module:
    with torch.device("meta"):  # only names and shapes matter
        return build_segmenter(config.model.name, 150, head=dataclasses.asdict(config.head))


@pytest.mark.parametrize(
    ("recipe", "head", "divisor", "views", "stride"),
    [
        ("litv2_segmentation", "semantic_fpn", 1, 1, None),
        ("van_segmentation", "semantic_fpn", 32, 6, None),
        ("van_upernet", "upernet", 32, 12, None),
        ("nat_segmentation", "upernet", 1, 1, None),
        ("unireplknet_segmentation", "upernet", 32, 1, None),
        ("vim_segmentation", "upernet", 1, 1, [341, 341]),
        ("vmamba_segmentation", "upernet", 1, 1, None),
    ],
)
def test_segmentation_is_trained_and_judged_as_published(
    recipe: str, head: str, divisor: int, views: int, stride: list[int] | None, settings: Load
) -> None:
    config = settings(recipe)
    model: Any = _network(config)
    splits: Any = SimpleNamespace(dense=True, size=config.data.size, classes=("a", "b"))
    validation, test = make_inference(config, splits) or ()
    assert (config.head.name, model.auxiliary_head is not None) == (head, head == "upernet")
    assert (len(validation.views), len(test.views), test.divisor, test.short_side) == (1, views, divisor, 512)
    assert (test.mode, test.stride) == (("slide", stride) if stride else ("whole", None))
    assert config.augment.resize == [0.5, 2.0] and config.augment.cat_max_ratio == 0.75 and config.augment.photometric
    loss = make_loss(model, config, splits)
    assert loss is not None and loss.auxiliary_weight == 0.4 and loss.main is loss.pixels  # not the hardest alone


CITYSCAPES_WEIGHTS = (
    *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
    *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
)
"""Weights of the 19 classes by training id, with which HRNet, PIDNet and BEVANet are trained."""

SW = (
    "model.kwargs.depths=[2,2,3,2,2] optim.lr=0.01 optim.weight_decay=1e-3 train.batch_size=10 train.total_batch=10 "
    "train.epochs=484"
)
"""The value in the recipe's comment."""


@pytest.mark.parametrize(
    ("recipe", "pictures", "batch", "at_once", "rate", "decay", "epochs"),
    [
        ("bevanet_cityscapes model=bevanet", 2975, 12, 6, 0.008, 4e-4, 500),
        ("bevanet_cityscapes model=bevanet_s", 2975, 12, 12, 0.01, 5e-4, 500),
        (f"bevanet_cityscapes {SW}", 2975, 10, 10, 0.01, 1e-3, 484),
        ("bevanet_camvid", 468, 24, 24, 0.0038, 5e-4, 100),
        ("bevanet_ade20k", ADE20K, 14, 14, 0.0015, 5e-4, 150),
    ],
)
def test_bevanet_learns_boundaries_and_hard_pixels(
    recipe: str, pictures: int, batch: int, at_once: int, rate: float, decay: float, epochs: int, settings: Load
) -> None:
    config = settings(*recipe.split())
    plan = make_plan(config, pictures)
    assert (plan.batch, plan.epochs, config.optim.weight_decay) == (batch, epochs, decay)
    assert config.train.batch_size == at_once, "batch norm and the hardest pixels are of one device's batch"
    assert config.optim.lr * plan.lr_factor == pytest.approx(rate)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config.optim, plan)
    assert optimizer.defaults["momentum"] == 0.9 and not optimizer.defaults["nesterov"]
    model: Any = _network(config)
    classes = {"cityscapes": 19, "camvid": 11}.get(recipe.split()[0].removeprefix("bevanet_"), 150)
    splits: Any = SimpleNamespace(dense=True, size=config.data.size, classes=("a",) * classes)
    loss = make_loss(model, config, splits)
    assert loss is not None and isinstance(loss.main, OhemCrossEntropy)
    assert (loss.main.threshold, loss.main.kept) == (0.9, 131_072)
    assert (loss.auxiliary_weight, loss.boundary_weight, loss.boundary_labels_weight) == (0.4, 20, 1)
    assert (tuple(config.loss.class_weights) == CITYSCAPES_WEIGHTS) == (classes == 19)
    assert not config.augment.photometric and config.augment.cat_max_ratio == 1
