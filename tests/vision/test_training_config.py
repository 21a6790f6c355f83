"""Settings: error messages, precedence, and validity of every shipped configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixerzoo.vision.training import settings
from mixerzoo.vision.training.cli import help_text, main
from mixerzoo.vision.training.config import Config, keys
from mixerzoo.vision.training.settings import ConfigError, find_checkpoint, load, to_yaml


@pytest.fixture
def configs(repository: Path) -> Path:
    return repository / "configs"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("modle.name=x", "no key modle.name; did you mean model.name?"),
        ("lr=1e-3", "no key lr; did you mean optim.lr?"),
        ("optim.learning_rate=1", "no key optim.learning_rate"),
        ("epochs=3", "did you mean train.epochs?"),
        ("train.epoch=3", "did you mean train.epochs?"),
        ("zzz=1", "no key zzz; `python train.py --help` lists the keys"),
        ("optim.lr=abc", "optim.lr=abc: optim.lr needs a value of type float"),
        ("optim.lr=true", "optim.lr=true: optim.lr needs a value of type float"),
        ("optim.lr=null", "optim.lr needs a value of type float"),
        ("optim.lr=", "optim.lr= has no value"),
        ("optim.lr", "'optim.lr' is not key=value"),
        ("=3", "'=3' is not key=value"),
        ("optim.lr=nan", "optim.lr=nan: needs a finite number, at least 0"),
        ("optim.lr=.inf", "optim.lr=inf: needs a finite number"),
        ("optim.lr=-1e-3", "optim.lr=-0.001: needs a finite number, at least 0"),
        ("augment.hflip=1.5", "augment.hflip=1.5: needs a finite number, 0 to 1"),
        ("augment.scale=[0.5,1.5]", "augment.scale=1.5: needs a finite number, 0 to 1"),
        ("train.epochs=0", "train.epochs=0: needs a finite number, at least 1"),
        ("train.epochs=1.5", "train.epochs needs a value of type int"),
        ("overwrite=1", "overwrite needs true or false"),
        ("train.precision=fp8", "needs a value of type 32-true | bf16-mixed | 16-mixed"),
        ("augment.scale=0.5", "augment.scale needs a value of type list[float]"),
        ("augment.scale.0=0.5", "augment.scale is one value of type list[float], with nothing below"),
        ("model.kwargs.depths.0=2", "give the list whole"),
        ("optim.lr_scale=0.5", "optim.lr_scale needs a value of type dict[str, float]"),
        ("optim.lr_scale={head: slow}", "optim.lr_scale needs a value of type dict[str, float]"),
        ("optim=3", "optim is a section; set one of optim.name, optim.lr"),
        ("optim.lr.x=3", "optim.lr is one value of type float"),
        ("optim.lr=${optim.nothing}", "a reference ${…} leads nowhere"),
        ("model.name=???", "model.name has no value and no default; give model.name=…"),
        ("data=image_folder", "data.root has no value and no default"),
        ("data=nowhere", "data=nowhere: choose one of ade20k, camvid, cityscapes"),
        ("recipe=clasification", "did you mean classification?"),
        ("resume=nowhere", "there is no checkpoint at nowhere"),
        ("resume=last", "no last.ckpt in any folder of runs/"),
    ],
)
def test_what_is_refused(
    argument: str,
    message: str,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load([argument], configs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert main([argument, "--cfg"], configs=configs) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.layer_decay=null", "optim.layer_decay", None),
        ("optim.layer_decay=0.9", "optim.layer_decay", 0.9),
        ("model.name=1e5", "model.name", "1e5"),
        ("out=a=b", "out", "a=b"),
        ("data.root=null", "data.root", None),
        ("augment.scale=[0.5,1]", "augment.scale", [0.5, 1.0]),
        ("train.precision=bf16-mixed", "train.precision", "bf16-mixed"),
        ("train.epochs=null", "train.epochs", None),
        ('optim.lr_scale={"*.bias": 0.5, head.weight: 2}', "optim.lr_scale", {"*.bias": 0.5, "head.weight": 2.0}),
        ("optim.lr_scale.head=2", "optim.lr_scale", {"head": 2.0}),
        ("optim.lr=${schedule.warmup_lr}", "optim.lr", None),
    ],
)
def test_what_is_understood(argument: str, name: str, value: object, configs: Path) -> None:
    config = load([argument], configs)
    found: object = config
    for part in name.split("."):
        found = getattr(found, part)
    assert found == (config.schedule.warmup_lr if "${" in argument else value)
    assert value is None or type(found) is type(value)


def test_model_arguments_are_open_and_merge(configs: Path) -> None:
    config = load(["model.kwargs.stem_stride=1", "model.kwargs.depths=[1,2]", "model.kwargs.act=gelu"], configs)
    assert config.model.kwargs["stem_stride"] == 1
    assert config.model.kwargs["depths"] == [1, 2] and type(config.model.kwargs["depths"]) is list
    assert config.model.kwargs["act"] == "gelu"


def test_arguments_win_over_the_recipe_and_the_recipe_over_the_data_file(tmp_path: Path) -> None:
    for kind, name, text in (
        ("recipes", "classification", "data: tiny\noptim: {lr: 1e-2, weight_decay: 0.1}\naugment: {shift: 3}\n"),
        ("data", "tiny", "data: {source: digits, size: 16}\naugment: {shift: 1, hflip: 0.25}\n"),
    ):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{name}.yaml").write_text(text)
    config = load(["optim.weight_decay=0.2"], tmp_path)
    assert (config.data.name, config.data.source, config.data.size) == ("tiny", "digits", 16)
    assert (config.optim.lr, config.optim.weight_decay) == (1e-2, 0.2)
    assert (config.augment.shift, config.augment.hflip) == (3, 0.25)


VARIANTS = """
model: {name: nat_mini, kwargs: {depths: [1]}}
data: digits
augment: {mixup: 0.8}
loss: {class_weights: [1, 2], auxiliary_weight: 0.3}
variants:
  nat_*: {model: {kwargs: {drop_path_rate: 0.2}}, optim: {lr: 1e-2}}
  nat_tiny: {model: {kwargs: {drop_path_rate: 0.3}}, augment: {mixup: 0.1}}
"""


@pytest.fixture
def with_variants(configs: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").symlink_to(configs / "data")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "classification.yaml").write_text(VARIANTS)
    return tmp_path


def test_variants_are_settings_for_the_model_that_is_chosen(with_variants: Path) -> None:
    own, tiny, other = (load(given, with_variants) for given in ([], ["model=nat_tiny"], ["model=test_vit"]))
    assert own.model.kwargs == {"depths": [1], "drop_path_rate": 0.2} and own.optim.lr == 1e-2
    assert tiny.model.kwargs == {"drop_path_rate": 0.3} and (tiny.optim.lr, tiny.augment.mixup) == (1e-2, 0.1)
    assert other.model.kwargs == {} and (other.optim.lr, other.augment.mixup) == (1e-3, 0.8)


def test_arguments_win_over_variants_and_another_data_set_drops_what_is_of_theirs(with_variants: Path) -> None:
    config = load(["model=nat_tiny", "data=fashion_mnist", "model.kwargs.drop_path_rate=0"], with_variants)
    assert config.model.kwargs == {"drop_path_rate": 0} and config.augment.mixup == 0 and config.optim.lr == 1e-2
    assert (config.loss.class_weights, config.loss.auxiliary_weight) == ([], 0.3)
    assert load(["model=nat_tiny"], with_variants).loss.class_weights == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: [1]", "classification.yaml: below variants stand names of models"),
        ("variants: {nat_mini: 0.2}", "classification.yaml: below variants stand names of models"),
        ("variants: {nat_*: {optim: {lrr: 1}}}", "classification.yaml, nat_*: there is no key optim.lrr"),
        ("optim: {lrr: 1}", "classification.yaml: there is no key optim.lrr; did you mean optim.lr?"),
        ("optim: {lr: fast}", "classification.yaml: optim.lr needs a value of type float"),
        ("[1, 2]", "must hold `key: value` lines"),
        ("optim: {lr: 1", "classification.yaml cannot be read"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    for kind in ("recipes", "data"):
        (tmp_path / kind).mkdir()
    (tmp_path / "data" / "fashion_mnist.yaml").write_text("data: {size: 32}")
    (tmp_path / "recipes" / "classification.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load([], tmp_path)
    assert message in str(caught.value)


def test_another_model_starts_from_its_own_defaults(configs: Path) -> None:
    own = load([], configs).model
    assert own.name == "nat_mini" and own.kwargs
    assert load(["model=nat_mini"], configs).model == own
    for argument in ("model=convnext_atto", "model.name=convnext_atto"):
        other = load([argument, "model.kwargs.patch_size=2"], configs).model
        assert other.name == "convnext_atto" and other.kwargs == {"patch_size": 2}


def test_a_folder_is_a_data_set(configs: Path, tmp_path: Path) -> None:
    data = load([f"data={tmp_path}"], configs).data
    assert (data.name, data.source, data.root) == ("image_folder", "image_folder", str(tmp_path))


def test_the_default_recipe(configs: Path) -> None:
    assert load([], configs).recipe == "classification"


def test_shipped_data_files_parse_with_recipes_of_other_data(configs: Path, tmp_path: Path) -> None:
    for recipe in ("classification", "segmentation"):
        for data in settings.choices(configs, "data"):
            config = load([f"recipe={recipe}", f"data={data}", f"data.root={tmp_path}"], configs)
            assert config.data.name == data


def test_help_lists_every_key_with_its_words(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], configs=configs) == 0
    text = capsys.readouterr().out
    assert text == help_text(configs)
    flat = " ".join(text.split())
    for key in keys():
        assert f"{key.name} default " in flat
        assert " ".join(key.doc.split()) in flat
    assert "seed default 0; int; at least 0" in flat and "overwrite default false; bool" in flat
    assert all(len(line) <= 120 for line in text.splitlines())


def test_every_key_is_documented_and_its_default_inside_its_range() -> None:
    for key in keys():
        assert key.doc and not key.doc.endswith("."), key.name
        for value in key.default if isinstance(key.default, list) else [key.default]:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert (key.low is None or value >= key.low) and (key.high is None or value <= key.high), key.name
            elif value is None:
                assert key.optional, key.name


def test_printed_settings_read_back(configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "optim.lr=0.5", "model.kwargs.depths=[1,1]"], configs=configs) == 0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    config = load([f"resume={tmp_path}", "train.epochs=99"], configs)
    assert (config.optim.lr, config.train.epochs) == (0.5, 99)
    assert config.model.kwargs["depths"] == [1, 1]
    assert config.out == str(tmp_path) and config.resume == str(tmp_path / "checkpoints" / "last.ckpt")
    assert load([f"resume={tmp_path}", "model=nat_mini", "recipe=classification"], configs).model == config.model
    with pytest.raises(ConfigError, match="the run to resume has model=nat_mini"):
        load([f"resume={tmp_path}", "model=nat_tiny"], configs)


def test_last_is_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("b", "c", "a")):
        path = tmp_path / "runs" / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert find_checkpoint("last") == Path("runs/b/checkpoints/last.ckpt")
    assert find_checkpoint("last", "runs/a") == Path("runs/a/checkpoints/last.ckpt")
    with pytest.raises(ConfigError, match=r"no last\.ckpt in runs/d/checkpoints"):
        find_checkpoint("last", "runs/d")


def test_a_run_killed_between_two_renames_is_still_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written by renaming last.ckpt to previous.ckpt first: for a moment there is no last.ckpt."""
    import os

    monkeypatch.chdir(tmp_path)
    killed = tmp_path / "runs" / "killed" / "checkpoints"
    killed.mkdir(parents=True)
    (killed / "previous.ckpt").touch()
    assert find_checkpoint("last") == Path("runs/killed/checkpoints/last.ckpt")
    assert find_checkpoint("last", "runs/killed") == Path("runs/killed/checkpoints/last.ckpt")

    older = tmp_path / "runs" / "older" / "checkpoints" / "last.ckpt"
    older.parent.mkdir(parents=True)
    older.touch()
    os.utime(older, (1000, 1000))
    assert find_checkpoint("last") == Path("runs/killed/checkpoints/last.ckpt")


def test_a_yaml_round_trip_changes_nothing(configs: Path) -> None:
    from omegaconf import OmegaConf

    config = load(["model.kwargs.a=[1,[2,3]]", "optim.clip_grad=1"], configs)
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(to_yaml(config))))
    assert again == config


def test_unknown_options_are_refused(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lr", "3"], configs=configs) == 2
    assert "no option --lr" in capsys.readouterr().err


def test_another_data_set_keeps_its_own_size_and_augmentation(repository: Path) -> None:
    folder = repository / "configs"
    own, digits = load([], folder), load(["data=digits"], folder)
    assert own.data.size == 28 and own.augment.shift == 0
    assert digits.data.size == 32 and digits.augment.shift == 2
    assert digits.model.kwargs == own.model.kwargs
