"""Recipes with published settings: they match the published ones, and each trains on a small scale from files."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mixerzoo.vision  # noqa: F401  # registers the models
import numpy as np
import pytest
import timm
import torch
from mixerzoo.vision.segmentation import build_segmenter
from mixerzoo.vision.segmentation.published import backbone_kwargs
from mixerzoo.vision.training import settings as settings_module
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.distillation import Objective, make_teacher
from mixerzoo.vision.training.optimization import make_optimizer, make_scheduler, parameter_groups
from mixerzoo.vision.training.plan import make_plan
from mixerzoo.vision.training.run import run
from mixerzoo.vision.training.settings import ConfigError, load
from omegaconf import OmegaConf
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

IMAGENET, ADE20K = 1_281_167, 20_210
"""Number of training pictures."""

BY_HAND = ("mobilemamba_finetune", "bevanet_cityscapes", "bevanet_camvid", "bevanet_ade20k")
ASKED = dict.fromkeys(BY_HAND, "model.checkpoint=weights")
"""Settings that a recipe leaves open: a file that has to be downloaded by hand."""

SMALL = {"nat_finetune": "dinat_s_tiny", "van_finetune": "van_b0", "van_22k": "van_b0", "van_upernet": "van_b0"}
SMALL |= {"litv2_finetune": "litv2_s", "unireplknet_22k": "unireplknet_a", "unireplknet_finetune": "unireplknet_a"}
"""The smallest model that a recipe's settings fit, if it is not the model of the recipe."""

FILES = {file.stem: file for file in sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))}
RECIPES = list(FILES)
TRAINED_ON_MASKS = [name for name, file in FILES.items() if "\nhead:" in file.read_text()]

Load = Callable[..., Config]
_read_once = functools.cache(settings_module._read)


@pytest.fixture
def settings(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setattr(settings_module, "_read", lambda path: copy.deepcopy(_read_once(path)))
    return lambda recipe, *arguments: load(
        [f"recipe={recipe}", "data.root=somewhere", *([ASKED[recipe]] if recipe in ASKED else []), *arguments],
        repository / "configs",
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gives_a_plan_and_rates_for_every_parameter(recipe: str, settings: Load) -> None:
    model = [f"model={SMALL[recipe]}"] if recipe in SMALL else []
    config = settings(recipe, *model)
    assert config.recipe == recipe
    dense = recipe in TRAINED_ON_MASKS
    plan = make_plan(config, ADE20K if dense else IMAGENET)
    network = _network(config, dense)
    optimizer = make_optimizer(network, config.optim, plan)
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(network.parameters()))
    scheduler = make_scheduler(optimizer, config.schedule, plan)
    steps = plan.epochs * plan.steps_per_epoch
    rates = []
    for step in (int(config.schedule.warmup_epochs * plan.steps_per_epoch) + 1, steps):
        scheduler.step_update(step)
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    highest, lowest = (rate * plan.lr_factor for rate in (config.optim.lr, config.schedule.min_lr))
    assert 0.9 * highest < rates[0] <= highest  # a schedule that runs under its warm-up has begun to fall
    if config.schedule.name == "constant":
        lowest = highest
    elif config.schedule.decay_epochs is not None:
        lowest = highest * 0.1 ** (plan.epochs // config.schedule.decay_epochs)
    assert rates[1] == pytest.approx(lowest, abs=1e-12)


_networks: dict[tuple[str, str | None], torch.nn.Module] = {}


def _network(config: Config, dense: bool) -> torch.nn.Module:
    """Build a model on the meta device, cached for all recipes: only names and shapes matter."""
    name, head = config.model.name, dataclasses.asdict(config.head) if dense else None
    key = (name, head and head["name"])
    if key not in _networks:
        with torch.device("meta"):
            _networks[key] = timm.create_model(name) if head is None else build_segmenter(name, 150, head=head)
    return _networks[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "model", "drop_path", "mixup", "cutmix"),
    [
        ("nat_imagenet", "dinat_tiny", 0.2, 0.8, 1.0),
        ("nat_imagenet", "dinat_s_base", 0.5, 0.8, 1.0),
        ("nat_imagenet", "nat_isotropic_small", 0.1, 0.8, 1.0),
        ("nat_imagenet", "vitrpb_base", 0.4, 0.8, 1.0),
        ("nat_finetune", "dinat_large_384", 0.35, 0, 0),
        ("nat_segmentation", "nat_small", 0.5, 0, 0),
        ("nat_segmentation", "dinat_s_small", 0.3, 0, 0),
        ("stvitr_imagenet", "stvitr_swin_base", 0.4, 0.8, 1.0),
        ("unireplknet_22k", "unireplknet_xl", 0.2, 0.8, 1.0),
        ("van_upernet", "van_b6.in22k", 0.5, 0, 0),
        ("mobilemamba_distill", "mobilemamba_b2", 0.03, 0.8, 1.0),
        ("tome_mae_finetune", "tome_mae_vit_large_patch16_224", 0.2, 0.8, 1.0),
        ("van_imagenet", "van_b0", 0.1, 0.8, 1.0),
        ("van_imagenet", "van_b3", 0.2, 0.8, 1.0),
        ("van_finetune", "van_b5.in22k", 0.2, 0, 0),
        ("van_finetune", "van_b6.in22k", 0.3, 0, 0),
        ("unireplknet_imagenet", "unireplknet_f", 0.0, 0.3, 0.3),
        ("unireplknet_imagenet", "unireplknet_p", 0.1, 0.3, 0.3),
        ("unireplknet_imagenet", "unireplknet_n", 0.1, 0.5, 0.5),
        ("unireplknet_imagenet", "unireplknet_t", 0.2, 0.8, 1.0),
        ("unireplknet_imagenet", "unireplknet_s", 0.4, 0.8, 1.0),
        ("unireplknet_finetune", "unireplknet_b.in22k", 0.2, 0, 0),
        ("unireplknet_finetune", "unireplknet_xl.in22k", 0.3, 0, 0),
        ("litv2_imagenet", "litv2_s", 0.2, 0.8, 1.0),
        ("litv2_imagenet", "litv2_m", 0.3, 0.8, 1.0),
        ("litv2_finetune", "litv2_b", 0.5, 0.8, 1.0),
        ("van_segmentation", "van_b2", 0.2, 0, 0),
        ("van_segmentation", "van_b3", 0.3, 0, 0),
        ("unireplknet_segmentation", "unireplknet_t", 0.2, 0, 0),
        ("unireplknet_segmentation", "unireplknet_s", 0.3, 0, 0),
        ("unireplknet_segmentation", "unireplknet_b", 0.3, 0, 0),
        ("unireplknet_segmentation", "unireplknet_l", 0.4, 0, 0),
        ("litv2_segmentation", "litv2_m", 0.2, 0, 0),
        ("litv2_segmentation", "litv2_b", 0.3, 0, 0),
        ("vim_imagenet", "vim_tiny", 0.0, 0.8, 1.0),
        ("vim_imagenet", "vim_base", 0.05, 0.8, 1.0),
        ("vim_finetune", "vim_small", 0.0, 0.8, 1.0),
        ("vim_segmentation", "vim_small", 0.1, 0, 0),
        ("vmamba_imagenet", "vmamba_base_s2l15", 0.6, 0.8, 1.0),
        ("vmamba_imagenet", "vmamba_base_s1l20", 0.5, 0.8, 1.0),
        ("vmamba_imagenet", "vmambav0_tiny", 0.1, 0.8, 1.0),
        ("vmamba_segmentation", "vmamba_tiny_s2l5", 0.2, 0, 0),
        ("efficientvmamba_imagenet", "efficientvmamba_base", 0.2, 0.8, 1.0),
        ("mobilemamba_imagenet", "mobilemamba_t4", 0.0, 0.8, 1.0),
        ("mobilemamba_imagenet", "mobilemamba_b2", 0.03, 0.8, 1.0),
        ("vig_imagenet", "vig_base", 0.5, 0.8, 1.0),
        ("vig_imagenet", "vig_h_base", 0.6, 0.8, 1.0),
        ("tome_imagenet", "tome_deit_tiny_patch16_224", 0.1, 0.8, 1.0),
        ("evit_imagenet", "evit_deit_base_patch16_224", 0.1, 0.8, 1.0),
        ("evit_finetune", "evit_deit_small_patch16_224", 0.0, 0.8, 1.0),
        ("dynamicvit_finetune", "dynamicvit_deit_small_patch16_224", 0.0, 0.8, 1.0),
        ("dynamicvit_finetune", "dynamicvit_deit_base_patch16_224", 0.2, 0.8, 1.0),
        ("dynamicvit_hierarchical_finetune", "dynamicvit_convnext_small", 0.2, 0.8, 1.0),
        ("dynamicvit_hierarchical_finetune", "dynamicvit_swin_base", 0.5, 0.8, 1.0),
    ],
)
def test_each_size_has_its_own_settings(
    recipe: str, model: str, drop_path: float, mixup: float, cutmix: float, settings: Load
) -> None:
    config = settings(recipe, f"model={model}")
    assert config.model.kwargs["drop_path_rate"] == drop_path
    assert (config.augment.mixup, config.augment.cutmix) == (mixup, cutmix)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "pictures", "batch", "rate", "epochs"),
    [
        ("nat_imagenet", IMAGENET, 1024, 1e-3, 310),
        ("nat_finetune", IMAGENET, 512, 5e-5, 30),
        ("bevanet_imagenet", IMAGENET, 256, 0.1, 135),
        ("nat_segmentation", ADE20K, 16, 6e-5, 127),
        ("stvitr_imagenet", IMAGENET, 1024, 1e-3, 300),
        ("unireplknet_22k", IMAGENET, 4096, 4e-3, 90),
        ("van_22k", IMAGENET, 8192, 4e-3, 90),
        ("mobilemamba_distill", IMAGENET, 1024, 3e-3, 1000),
        ("mobilemamba_finetune", IMAGENET, 1024, 5e-4, 30),
        ("tome_mae_finetune", IMAGENET, 1024, 2e-3, 100),
        ("van_imagenet", IMAGENET, 1024, 1e-3, 310),
        ("van_finetune", IMAGENET, 512, 5e-5, 30),
        ("unireplknet_imagenet", IMAGENET, 4096, 4e-3, 300),
        ("unireplknet_finetune", IMAGENET, 512, 5e-5, 30),
        ("litv2_imagenet", IMAGENET, 1024, 1e-3, 300),
        ("litv2_finetune", IMAGENET, 1024, 4e-5, 30),
        ("van_segmentation", ADE20K, 32, 2e-4, 64),
        ("unireplknet_segmentation", ADE20K, 16, 1e-4, 127),
        ("litv2_segmentation", ADE20K, 16, 1e-4, 64),
        ("vim_imagenet", IMAGENET, 1024, 1e-3, 300),
        ("vim_finetune", IMAGENET, 1024, 1e-5, 30),
        ("vim_segmentation", ADE20K, 32, 2e-4, 95),
        ("vmamba_imagenet", IMAGENET, 1024, 1e-3, 300),
        ("vmamba_segmentation", ADE20K, 16, 6e-5, 127),
        ("efficientvmamba_imagenet", IMAGENET, 1024, 1e-3, 300),
        ("mobilemamba_imagenet", IMAGENET, 1024, 3e-3, 300),
        ("vig_imagenet", IMAGENET, 1024, 1e-3, 300),
        ("tome_imagenet", IMAGENET, 1024, 1e-3, 300),
        ("evit_imagenet", IMAGENET, 2048, 2e-3, 300),
        ("evit_finetune", IMAGENET, 2048, 8e-5, 30),
        ("dynamicvit_finetune", IMAGENET, 1024, 1e-3, 30),
        ("dynamicvit_hierarchical_finetune", IMAGENET, 4096, 4e-3, 120),
    ],
)
def test_one_device_or_eight_take_the_same_steps(
    recipe: str, pictures: int, batch: int, rate: float, epochs: int, settings: Load
) -> None:
    config = settings(recipe, "train.batch_size=2")
    for config.train.devices in (8, 1):
        plan = make_plan(config, pictures)
        assert (plan.batch, plan.epochs) == (batch, epochs)
        assert config.optim.lr * plan.lr_factor == pytest.approx(rate)
    if config.optim.lr_for_batch is not None:
        config.train.total_batch = batch // 2
        assert make_plan(config, pictures).lr_factor == plan.lr_factor / 2


def test_segmentation_with_unireplknet_as_published(settings: Load) -> None:
    config = settings("unireplknet_segmentation")
    plan = make_plan(config, ADE20K)
    assert config.schedule.warmup_epochs * (ADE20K // plan.batch) == pytest.approx(1500, rel=0.01)
    for name, size in [("unireplknet_s", 512), ("unireplknet_b", 640), ("unireplknet_l", 640)]:
        assert settings("unireplknet_segmentation", f"model={name}").data.size == size


def test_the_table_of_recipes_is_whole_and_says_what_the_files_say(repository: Path, settings: Load) -> None:
    """Each published recipe has a row with its length and with numbers from its first lines."""
    text = (repository / "docs" / "training.md").read_text()
    rows = re.findall(r"^\|.*?\|(.*)\|(.*)\| \[(\w+)\]\(\.\./configs/recipes/(\w+)\.yaml\) \|$", text, re.MULTILINE)
    own = {"classification", "segmentation", "token_reduction"}
    assert sorted(name for *_, name in rows) == sorted(set(RECIPES) - own)
    for what, published, title, name in rows:
        train = settings(name).train
        assert title == name
        assert f"{train.steps:,} steps" in what if train.steps else f"{train.epochs} epochs" in what, name
        comment = (repository / "configs" / "recipes" / f"{name}.yaml").read_text().split("\nmodel:")[0]
        numbers = re.findall(r"\d+\.\d+", published)
        assert all(number in comment for number in numbers), name


def test_what_authors_do_besides_is_in_their_recipes(settings: Load) -> None:
    """EMA, repeated augmentation, layer decay and the scale of a new head are as in the sources."""
    decays = {"vmamba": 0.9999, "efficientvmamba": 0.9999, "vig": 0.9999, "mobilemamba": 0.9998, "vim": 0.99996}
    decays |= {"evit": 0.99996, "tome": 0.99996, "nat": None, "van": None, "litv2": None, "stvitr": None}
    for family, decay in decays.items():
        config = settings(f"{family}_imagenet")
        assert config.ema.decay == decay, family
        assert config.augment.repeats == (3 if decay == 0.99996 else 1), family  # DeiT's scripts do both
        assert config.augment.random_interpolation == (family in ("nat", "van", "mobilemamba")), family
        assert config.schedule.warmup_prefix == (decay == 0.9999), family  # VMamba's, all three
    assert settings("nat_imagenet", "model=dinat_isotropic_base").ema.decay == 0.9998
    assert settings("nat_imagenet", "model=vitrpb_base").schedule.warmup_epochs == 50
    fine = settings("unireplknet_finetune", "model=unireplknet_l.in22k")
    assert (fine.ema.decay, fine.train.epochs, fine.augment.label_smoothing) == (0.9999, 20, 0.3)
    assert (fine.optim.layer_decay, fine.optim.layer_blocks, fine.model.head_init_scale) == (0.8, 3, 0.001)
    assert settings("van_finetune").model.head_init_scale == 0.001


def test_dinat_grows_with_its_pictures(settings: Load) -> None:
    """A window of 7 fits into the map at 1/4 of 512 pixels, or of 640 for the large models."""
    for name in ("dinat_mini", "dinat_base", "dinat_large", "dinat_s_tiny", "dinat_s_base", "dinat_s_large"):
        config = settings("nat_segmentation", f"model={name}")
        assert config.data.size == (640 if "large" in name else 512)
        dilations = backbone_kwargs(name, config.model.kwargs)["dilations"]
        for level, stage in enumerate(dilations):
            assert 7 * max(stage) <= config.data.size >> (level + 2), name
    for name, decay in (("dinat_large_384", 1e-10), ("dinat_large_11x11_384", 1e-10), ("dinat_s_large_384", 1e-5)):
        fine = settings("nat_finetune", f"model={name}")
        assert (fine.data.size, fine.data.crop, fine.optim.weight_decay) == (384, 1.0, decay)
        assert fine.model.start_from == f"{name.removesuffix('_384')}.in22k" and not fine.model.pretrained
    assert settings("nat_finetune", "model=dinat_s_large.in22k").model.pretrained


def test_vim_under_a_segmentation_head_learns_by_layers(settings: Load) -> None:
    """Embeddings, 24 blocks and the head are layers, each with 1/0.92 times the learning rate of the one before."""
    config = settings("vim_segmentation")
    optim = config.optim
    assert (optim.lr, optim.weight_decay) == (2e-4, 0.1)
    model = _network(config, True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=optim.layer_decay, lr_scale={})
    scale = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    heads = {name: value for name, value in scale.items() if not name.startswith("backbone.")}
    assert {"neck", "decode_head", "auxiliary_head"} == {name.split(".")[0] for name in heads}
    assert set(heads.values()) == {1.0}
    assert scale["backbone.model.patch_embed.proj.weight"] == pytest.approx(0.92**25)
    assert scale["backbone.model.blocks.23.mixer.in_proj.weight"] == pytest.approx(0.92)
    assert settings("vim_segmentation", "model=vim_small").optim.layer_decay == 0.95


def test_sizes_of_mamba_recipes_that_differ_in_more_than_drop_path(settings: Load) -> None:
    small = settings("vim_imagenet", "model=vim_small")
    assert (small.optim.lr, small.optim.weight_decay, small.train.total_batch) == (1e-3, 0.05, 512)
    assert make_plan(small, IMAGENET).lr_factor == 1
    fine = settings("vim_finetune", "model=vim_small")
    assert fine.model.kwargs["stride"] == 8 and fine.schedule.name == "constant"
    sizes = {"t2": 192, "s6": 224, "b1": 256, "b2": 384, "b4": 512}
    for name, size in sizes.items():
        assert settings("mobilemamba_imagenet", f"model=mobilemamba_{name}").data.size == size
    assert settings("vig_imagenet", "model=vig_h_tiny").optim.lr == 8e-4


def test_every_pattern_of_a_recipe_names_a_model(repository: Path) -> None:
    names = [*timm.list_models(), *timm.list_pretrained()]
    for file in (repository / "configs" / "recipes").glob("*.yaml"):
        tree = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(tree, dict)
        for pattern in tree.get("variants", {}):
            assert fnmatch.filter(names, str(pattern)), f"{file.name}: {pattern}"


@pytest.mark.slow
def test_a_recipe_begins_with_weights_that_are_published(settings: Load) -> None:
    for recipe in (name for name in RECIPES if "_" in name and name not in ASKED):
        model = settings(recipe).model
        begins = model.pretrained or model.start_from is not None
        cfg = timm.get_pretrained_cfg(model.start_from or model.name)
        assert begins == (recipe in TRAINED_ON_MASKS or recipe.endswith("_finetune")), recipe
        assert cfg is not None and (cfg.has_weights or not begins), recipe
    for recipe, model in (("van_finetune", "van_b6.in22k"), ("vim_segmentation", "vim_small")):
        assert settings(recipe, f"model={model}").model.pretrained  # not only the model that the file names


def test_offset_convolutions_of_litv2_learn_slowly(settings: Load) -> None:
    optim = settings("litv2_imagenet", "model=litv2_m").optim
    with torch.device("meta"):
        model = timm.create_model("litv2_m")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=None, lr_scale=optim.lr_scale)
    slow = {names[p] for group in groups if group.get("lr_scale", 1) != 1 for p in group["params"]}
    assert slow == {f"stages.{stage}.downsample.offset.weight" for stage in (1, 2, 3)}
    assert {group["lr_scale"] for group in groups if "lr_scale" in group} == {0.01, 1.0}


def test_unireplknet_is_fine_tuned_in_the_layers_of_its_authors(settings: Load) -> None:
    """The layers are ConvNeXt's: stem, stages 1 and 2, nine groups of three blocks in stage 3 of S, stage 4, and head;
    downsampling belongs to the blocks after it. The published factor is 0.8 for each of these 14."""
    optim = settings("unireplknet_finetune").optim
    with torch.device("meta"):
        model = timm.create_model("unireplknet_s")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(
        model, weight_decay=0, layer_decay=optim.layer_decay, layer_blocks=optim.layer_blocks, lr_scale={}
    )
    layer = {names[p]: round(math.log(group["lr_scale"], 0.8), 6) for group in groups for p in group["params"]}
    assert sorted(set(layer.values())) == list(range(14))
    parts = {"stem": 13, "stages.0": 12, "stages.1": 11, "stages.2.downsample": 10, "stages.3": 1, "head.fc": 0}
    parts |= {f"stages.2.blocks.{block}.": 10 - block // 3 for block in range(27)}
    for part, expected in parts.items():
        assert {value for name, value in layer.items() if name.startswith(part)} == {expected}, part


DECIDING = ("dynamicvit_finetune", "dynamicvit_hierarchical_finetune")


@pytest.mark.parametrize("recipe", DECIDING)
def test_every_size_of_dynamicvit_has_its_own_teacher(recipe: str, settings: Load) -> None:
    """The teacher is the dense model it starts from, with equal tokens; new modules have a higher learning rate."""
    families = (
        ["dynamicvit_deit_[sb]*", "dynamicvit_lvvit_*"] if recipe == "dynamicvit_finetune" else "dynamicvit_[cs]*"
    )
    for name in timm.list_models(families):
        config = settings(recipe, f"model={name}")
        assert config.distill.teacher == config.model.start_from is not None
        assert (config.distill.logits_weight, config.distill.tokens_weight) == (0.5, 0.5)
        want = 10.0 if recipe == "dynamicvit_hierarchical_finetune" else 5.0 if "base" in name else 2.0
        assert config.reduction.ratio_weight == want
    with torch.device("meta"):
        model = timm.create_model(settings(recipe).model.name)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optim = settings(recipe).optim
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=None, lr_scale=optim.lr_scale)
    scales = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    for name, scale in scales.items():
        added = "predictor" in name or "fast" in name
        assert scale == pytest.approx(1.0 if added else 0.01 if recipe == "dynamicvit_finetune" else 0.2), name


def test_a_model_whose_dense_weights_nobody_serves_asks_for_a_file(settings: Load) -> None:
    recipe = ("dynamicvit_finetune", "model=dynamicvit_deit_256_patch16_224")
    with pytest.raises(ConfigError, match=r"distill\.checkpoint has no value"):
        settings(*recipe, "model.start_from=somewhere")
    with pytest.raises(ConfigError, match=r"model\.start_from has no value"):
        settings(*recipe, "distill.checkpoint=somewhere")


@pytest.mark.parametrize("name", ["dynamicvit_lvvit_small", "dynamicvit_deit_256_patch16_224"])
def test_a_dense_model_in_a_file_is_the_teacher(name: str, settings: Load, tmp_path: Path) -> None:
    recipe = ("dynamicvit_finetune", f"model={name}")
    small: dict[str, Any] = {"depth": 4, "img_size": 32}
    config = settings(*recipe, "model.start_from=x", f"distill.checkpoint={tmp_path / 'dense.pth'}")
    assert config.distill.tokens_loss == ("kl" if "lvvit" in name else "mse")
    config.distill.kwargs |= small
    assert config.distill.teacher is not None
    dense = timm.create_model(config.distill.teacher, num_classes=3, **config.distill.kwargs)
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    splits: Any = SimpleNamespace(
        classes=("a", "b", "c"), size=32, channels=3, dense=False, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    student = timm.create_model(name, num_classes=3, **{**config.model.kwargs, **small}).train()
    _, parts = Objective(student, config, splits, make_teacher(config.distill, splits))(torch.randn(2, 3, 32, 32))
    assert parts.keys() == {"ratio", "logits", "tokens"} and all(part.isfinite() for part in parts.values())


def test_evit_warms_up_from_scratch_only(settings: Load) -> None:
    scratch, fine = settings("evit_imagenet").reduction, settings("evit_finetune").reduction
    assert (scratch.shrink_start_epoch, scratch.shrink_epochs, fine.shrink_epochs) == (10, 100, None)
    assert (
        settings("evit_finetune", "model=evit_deit_base_patch16_224").model.start_from
        == "deit_base_patch16_224.fb_in1k"
    )


TRAINED_ON_PICTURES = [name for name in RECIPES if "_" in name and name not in (*TRAINED_ON_MASKS, "token_reduction")]
SAMPLE = ("nat_imagenet", "unireplknet_finetune", "tome_mae_finetune", "evit_imagenet", *DECIDING)
SAMPLE += ("vim_segmentation", "van_segmentation", "nat_segmentation", "bevanet_camvid", "mobilemamba_distill")
"""A sample that covers every setting of any recipe. `make test-exhaustive` trains the others."""


def _sampled(recipes: Sequence[str]) -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.slow if name in SAMPLE else pytest.mark.exhaustive) for name in recipes
    ]


DRY = ["model.pretrained=false", "train.limit_batches=2", "train.progress=false", "data.workers=0", "data.size=64"]
DRY += ["train.batch_size=2", "train.total_batch=4", "schedule.warmup_epochs=0", "schedule.cooldown_epochs=0"]
"""A randomly initialised model and four pictures per optimizer step; all other settings are as shipped."""


def _picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _stand_in(recipe: str, config: Config, path: Path) -> list[str]:
    """Write random weights of a small model in place of the published ones that a recipe starts or distills from."""
    if recipe in BY_HAND:
        return ["model.checkpoint=null"]
    if recipe == "mobilemamba_distill":
        torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), path)
        return ["distill.teacher=test_resnet", f"distill.checkpoint={path}"]
    if config.model.start_from is None:
        return []
    source = config.model.start_from
    convolutional = "convnext" in source
    shape: dict[str, Any] = {"depths": (1, 1, 4, 1)} if convolutional else {"depth": 4}
    kwargs = shape if convolutional else {**shape, "img_size": 64}
    if recipe != "tome_mae_finetune":  # an autoencoder has no head
        kwargs = {**kwargs, "num_classes": 2}
    torch.save(timm.create_model(source, **kwargs).state_dict(), path)
    [(name, value)] = [(name, str(value).replace("(", "[").replace(")", "]")) for name, value in shape.items()]
    given = [f"model.start_from={path}", f"model.kwargs.{name}={value}"]
    teaches = [f"distill.checkpoint={path}", f"distill.kwargs.{name}={value}"]
    return [*given, *(teaches if config.distill.teacher else [])]


@pytest.mark.parametrize("recipe", _sampled(TRAINED_ON_PICTURES))
def test_a_classification_recipe_trains_on_a_folder(
    recipe: str, settings: Load, tmp_path: Path, no_pictures: None
) -> None:
    rng = np.random.default_rng(0)
    for index in range(16):
        split = "train" if index < 8 else "val"
        pixels = rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)
        _picture(tmp_path / "data" / split / ("cat", "dog")[index % 2] / f"{index}.png", pixels)
    model = [f"model={SMALL[recipe]}"] if recipe in SMALL else []
    model += _stand_in(recipe, settings(recipe, *model), tmp_path / "dense.pth")
    arguments = [f"data.root={tmp_path / 'data'}", f"out={tmp_path / 'run'}", "train.epochs=1", *model, *DRY]
    results = run(settings(recipe, *arguments))
    assert results["epochs"] == 1 and 0 <= results["test"]["accuracy"] <= 1


OTHER_CLASSES = {"bevanet_cityscapes": 19, "bevanet_camvid": 11}
"""Data sets with their own file layout, which other tests read."""


@pytest.mark.parametrize("recipe", _sampled([name for name in TRAINED_ON_MASKS if name != "segmentation"]))
def test_a_segmentation_recipe_trains_on_masks(recipe: str, settings: Load, tmp_path: Path, no_pictures: None) -> None:
    rng = np.random.default_rng(0)
    for index in range(8):
        split = "training" if index < 4 else "validation"
        _picture(tmp_path / "data/images" / split / f"{index}.jpg", rng.integers(0, 256, (70, 90, 3), dtype=np.uint8))
        labels = rng.integers(0, OTHER_CLASSES.get(recipe, 151), (7, 9), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        _picture(tmp_path / "data/annotations" / split / f"{index}.png", labels)
    arguments = [f"data.root={tmp_path / 'data'}", f"out={tmp_path / 'run'}", *DRY]
    arguments += ["train.steps=1", "train.epochs=null"]
    if settings(recipe).evaluate.stride:
        arguments.append("evaluate.stride=[43,43]")  # of windows of 64
    if recipe in OTHER_CLASSES:
        arguments += ["data.source=mask_folder", f"data.classes={OTHER_CLASSES[recipe]}", "augment.crop=[48,64]"]
    arguments += ["model.checkpoint=null"] if recipe in BY_HAND else []
    results = run(settings(recipe, *arguments))
    assert results["epochs"] == 1 and len(results["test_by_class"]) == OTHER_CLASSES.get(recipe, 150)
