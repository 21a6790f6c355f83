"""Published segmenters by name are judged as the recipes say: the same table twice, held together here."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import pytest
import timm
import torch
from mixerzoo.vision._loading import load_segmenter
from mixerzoo.vision.label_sets import LABEL_SETS
from mixerzoo.vision.predictors import of_run
from mixerzoo.vision.segmentation import evaluation
from mixerzoo.vision.segmentation.evaluation import DATA, MODELS, published_evaluation
from mixerzoo.vision.segmentation.inference import Inference, of_settings
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.dense import make_inference
from mixerzoo.vision.training.settings import load
from omegaconf import OmegaConf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

NAMES = {name: known.names for name, known in LABEL_SETS.items()}


def _recipes(repository: Path) -> dict[str, list[str]]:
    """Recipes of known data sets, with their model and one of each rule that changes how pictures are seen."""
    found: dict[str, list[str]] = {}
    for file in sorted((repository / "configs" / "recipes").glob("*.yaml")):
        recipe: Any = OmegaConf.to_container(OmegaConf.load(file))
        data = recipe.get("data")
        if "head" in recipe and (data if isinstance(data, str) else data["name"]) in DATA:
            rules = [rule for rule, more in recipe.get("variants", {}).items() if {"data", "evaluate"} & more.keys()]
            own = recipe["model"] if isinstance(recipe["model"], str) else recipe["model"]["name"]
            found[file.stem] = [own, *(fnmatch.filter(timm.list_models(), rule)[0] for rule in rules)]
    return found


def _judged(config: Config) -> Inference:
    splits: Any = SimpleNamespace(dense=True, size=config.data.size)
    _, test = make_inference(config, splits) or (None, None)
    assert test is not None
    return test


def _by_name(model: str, head: str, data: str) -> Inference:
    settings = published_evaluation(model, head, NAMES[data])
    return of_settings(settings.pop("evaluate"), **settings)


def test_a_name_is_judged_as_its_recipe_and_every_rule_is_of_one(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = _recipes(repository)
    assert len(recipes) >= 10
    needed = set()
    for recipe, models in recipes.items():
        for model in models:
            given = [f"recipe={recipe}", f"model={model}", "data.root=somewhere", "model.checkpoint=null"]
            config = load(given, repository / "configs")
            parts = model, config.head.name, config.data.name
            assert _by_name(*parts) == _judged(config), (recipe, model)
            for rule in MODELS:  # without it, is the recipe's model judged otherwise?
                monkeypatch.setattr(evaluation, "MODELS", {k: v for k, v in MODELS.items() if k != rule})
                if _by_name(*parts) != _judged(config):
                    needed.add(rule)
            monkeypatch.setattr(evaluation, "MODELS", MODELS)
    assert needed == set(MODELS)


@pytest.mark.parametrize("data", DATA)
def test_other_models_are_judged_as_their_data_set_is(data: str, repository: Path) -> None:
    config = load([f"data={data}", "data.root=somewhere"], repository / "configs")
    assert _by_name("resnet50", "segformer", data) == _judged(config)


@pytest.mark.parametrize(
    ("name", "head", "classes", "want"),
    [
        (
            "van_b0",
            "upernet",
            NAMES["ade20k"],
            Inference(short_side=512, divisor=32, scales=evaluation._SCALES, flip=True),
        ),
        ("test_convnext", "segformer", NAMES["camvid"], Inference(short_side=0)),
        ("test_convnext", "segformer", ["cat", "dog"], Inference(short_side=512)),
    ],
)
def test_a_segmenter_by_name_sees_pictures_so(name: str, head: str, classes: list[str], want: Inference) -> None:
    shape = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)} if name == "van_b0" else {}
    trained = load_segmenter(name, classes, head={"name": head, "channels": 8}, **shape)
    own = of_run(trained).inference
    assert own is not None and own == Inference(**{**vars(want), "least": 32})
    assert own.views == want.views
    told = of_run(trained, 64).inference
    assert told is not None and (told.short_side, told.divisor) == (64, want.divisor)


def test_a_model_of_one_size_is_built_for_that_of_its_data_set_or_as_told() -> None:
    kwargs: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    head = {"name": "segformer", "channels": 8}
    for size, want in ((None, 512), (64, 64)):
        trained = load_segmenter("swin_tiny_patch4_window7_224", NAMES["voc"], head=head, size=size, **kwargs)
        assert of_run(trained, size).inference == Inference(short_side=want, least=32, fixed=True)
        if size is not None:
            assert trained.model(torch.zeros(1, 3, size, size)).shape == (1, 21, size, size)
