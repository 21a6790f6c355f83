"""From files and arguments to a checked `Config`: recipe and data set from `configs/`, then `key=value`, in this order.

OmegaConf merges and checks types. It is asked key by key, so that an error names the argument or file it came from.
Unusual:

* A name given for a model starts from that model's own defaults: arguments that a recipe passes to its own model
  (`stem_stride`, `dims`) mean nothing to another, so they are dropped with the recipe's name. So are a recipe's picture
  size and augmentation where another data set is named, and the weights of its classes.
* A recipe may hold `variants`, shell patterns of model names with settings for these: what authors change from one
  size of a model to the next. It stands beside the recipe's own model and applies to whichever model is chosen.
* A value for a key of type str is taken as it stands. YAML would turn a model called `1e5` into 100000.0.
* Lists are given whole. OmegaConf reads `betas.0=…` as a mapping and fails with a message about containers.
* A resumed run is described by the config.yaml of its folder; recipe and data file are not read again.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import SHORTHANDS, Config, Key, keys
from .resume import LAST, changes, has_checkpoint

_KEYS = {key.name: key for key in keys()}
_SECTIONS = {name.split(".")[0] for name in _KEYS if "." in name}
_OPEN = tuple(name for name, key in _KEYS.items() if key.describe_type().startswith("dict"))  # any key may stand below

_PHOTOS = ("image_folder", "timm")  # read in different ways, but a recipe's size and augmentation are meant for both
_TIMM_PREFIXES = ("hfds", "hfids", "wds", "tfds", "torch")


class ConfigError(ValueError):
    """A setting that cannot be used. The message says which, why, and what to write."""


def load(arguments: Sequence[str], folder: Path) -> Config:
    """The checked settings of a run, from its command-line arguments and the files in `folder`."""
    given = dict(_parse(argument) for argument in arguments)
    texts = {argument.partition("=")[0].strip(): argument for argument in arguments}
    if given.get("resume") == "auto":
        given["resume"] = _out_with_checkpoint(given.get("out"))
    if given.get("resume") in (None, "auto"):
        trees = _from_files(given, folder)
        saved = None
    else:
        checkpoint = find_checkpoint(given["resume"], given.get("out"))
        trees = _read(_saved_config(checkpoint))
        _same_experiment(given, trees[0][1])
        saved = _merge(trees, Config())
        given |= {"resume": str(checkpoint), "out": str(checkpoint.parent.parent)}
        trees = []
    trees += [(texts.get(name, name), {name: value}) for name, value in given.items()]
    config = _merge(trees, saved or Config())
    if saved is not None and not given.get("resume_force"):
        _refuse_changes(saved, config)
    return config


def _out_with_checkpoint(out: str | None) -> str:
    """What `resume=auto` means: the run folder, or itself where there is nothing yet to go on from."""
    if out is None:
        raise ConfigError("resume=auto goes on in the folder out=, or begins there; give out=FOLDER")
    return out if has_checkpoint(Path(out)) else "auto"


def _merge(trees: Sequence[tuple[str, Mapping[str, Any]]], base: Config) -> Config:
    """`base` with the settings of all trees, checked; later ones win."""
    config = OmegaConf.structured(base)
    unset: set[str] = set()  # merging ignores `???`, so that it would leave the default in place
    for origin, tree in trees:
        for name, value in _flatten(tree, origin):
            unset = unset | {name} if value == "???" else unset - {name}
            config = _set(config, name, value, origin)
    if unset:
        raise ConfigError(f"{min(unset)} has no value and no default; give {min(unset)}=…")
    return _finish(config)


def find_checkpoint(resume: str, out: str | None = None) -> Path:
    """The checkpoint that `resume=` means: of the run folder `out`, of the newest one in runs/, or at a path."""
    if resume != "last":
        path = Path(resume)
        path = path / "checkpoints" / LAST if path.is_dir() else path
        if not path.is_file() and not (path.name == LAST and has_checkpoint(path.parent.parent)):
            raise ConfigError(f"resume={resume}: there is no checkpoint at {path}; give a run folder or a .ckpt file")
        return path
    found = list((Path(out) if out else Path("runs")).glob(f"{'' if out else '*/'}checkpoints/{LAST}"))
    if not found:
        place = f"{out}/checkpoints" if out else "any folder of runs/"
        raise ConfigError(f"resume=last: no {LAST} in {place}; start without resume=, or name the run folder")
    return max(found, key=lambda path: path.stat().st_mtime)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def choices(folder: Path, kind: str) -> list[str]:
    """The names that `recipe=` or `data=` can take."""
    return sorted(path.stem for path in (folder / kind).glob("*.yaml"))


def nearest(word: str, words: Sequence[str] | set[str]) -> str:
    """A sentence with what may have been meant, or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _parse(argument: str) -> tuple[str, Any]:
    name, equals, text = argument.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"{argument!r} is not key=value; `python train.py --help` lists the keys")
    _known(name, argument)
    if text.strip() == "":
        raise ConfigError(f"{argument} has no value; write {name}=null where a key may be empty")
    key = _KEYS.get(f"{name}.name" if name in SHORTHANDS else name)
    if key is not None and key.base is str:
        return name, None if text == "null" and key.optional else _unquoted(text)
    try:
        return name, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # pyright: ignore
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{argument}: {_first_line(error)}") from None


def _unquoted(text: str) -> str:
    """Quotes around the whole of a value keep it together (sweep.py); they are not part of it."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _known(name: str, origin: str) -> None:
    """Refuses a key that the schema does not have, with the nearest one that it has."""
    if name in _KEYS or name in SHORTHANDS or name.startswith(tuple(f"{key}." for key in _OPEN)):
        if any(part.isdigit() for part in name.split(".")):
            raise ConfigError(f"{origin}: one entry of a list cannot be set; give the list whole, as in key=[1,2]")
        return
    if name in _SECTIONS:
        members = ", ".join(key for key in _KEYS if key.startswith(f"{name}."))
        raise ConfigError(f"{origin}: {name} is a section; set one of {members}")
    parent = next((key for key in _KEYS if name.startswith(f"{key}.")), None)
    if parent is not None:
        raise ConfigError(
            f"{origin}: {parent} is one value of type {_KEYS[parent].describe_type()}, with nothing below"
        )
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(_KEYS)}
    leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaves), n=1, cutoff=0.6)
    close = difflib.get_close_matches(name, list(_KEYS), n=1, cutoff=0.75)
    guess = close[0] if close else leaves[leaf[0]] if leaf else None
    hint = f"; did you mean {guess}?" if guess else "; `python train.py --help` lists the keys"
    raise ConfigError(f"{origin}: there is no key {name}{hint}")


def _from_files(given: dict[str, Any], folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The trees of the data file and of the recipe, data first: a recipe may refine its data set."""
    recipe = given.get("recipe") or _KEYS["recipe"].default
    _check_choice("recipe", recipe, choices(folder, "recipes"))
    [(origin, tree)] = _read(folder / "recipes" / f"{recipe}.yaml")
    tree = {
        name: {"name": value} if name in SHORTHANDS and isinstance(value, str) else value
        for name, value in tree.items()
    }

    variants = tree.pop("variants", {})
    model = given.get("model") or given.get("model.name")
    own = tree.get("model", {}).get("name")
    parts = _of_variant(variants, str(model or own or _KEYS["model.name"].default), origin)
    if model is not None and own is not None and model != own:
        tree["model"] = {"name": model}

    data = str(
        given.pop("data", None) or given.pop("data.name", None) or tree.get("data", {}).get("name", "fashion_mnist")
    )
    names = choices(folder, "data")
    data, meant = _place(data, names)
    given |= {key: value for key, value in meant.items() if key not in given}
    _check_choice("data", data, names)
    trees = [(origin, tree), *parts]
    usual = tree.get("data", {}).get("name", data)
    if data != usual:
        alike = {data, usual} <= set(_PHOTOS)
        trees = [(place, _for_other_data(part, alike=alike)) for place, part in trees]
    [data_tree] = _read(folder / "data" / f"{data}.yaml")
    return [data_tree, *trees, (origin, {"recipe": recipe, "data": {"name": data}})]


def _for_other_data(part: Mapping[str, Any], *, alike: bool) -> dict[str, Any]:
    """A recipe's settings without those of its own data set; where both are `alike`, only the weights of classes."""
    rest = {name: value for name, value in part.items() if alike or name not in ("data", "augment")}
    if isinstance(loss := rest.get("loss"), dict):
        rest["loss"] = {name: value for name, value in loss.items() if name != "class_weights"}
    return rest


def _place(data: str, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The file in configs/data for what `data=` names, and what a path or one of timm's names stands for besides."""
    if data not in names:
        if (folder := Path(data)).is_dir():
            masks = (folder / "images").is_dir() and any((folder / name).is_dir() for name in ("annotations", "masks"))
            return "mask_folder" if masks else "image_folder", {"data.root": data}
        if data.endswith(".tar"):
            return "timm", {"data.root": data}
        if data.partition("/")[0].lower() in _TIMM_PREFIXES and "/" in data:
            return "timm", {"data.dataset": data}
    return data, {}


def _of_variant(variants: Any, model: str, origin: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The settings that a recipe has for this model, in the order of the file."""
    if not isinstance(variants, dict) or not all(isinstance(part, dict) for part in variants.values()):
        raise ConfigError(f"{origin}: below variants stand names of models, and settings below each of them")
    return [(f"{origin}, {name}", part) for name, part in variants.items() if fnmatch.fnmatch(model, str(name))]


def _check_choice(key: str, value: str, names: list[str]) -> None:
    if value not in names:
        raise ConfigError(f"{key}={value}: choose one of {', '.join(names)}{nearest(value, names)}")


def _read(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        # OmegaConf's reader, not PyYAML's: 1e-3 is a number here, as it is in an argument.
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not a list")
    return [(str(path), {str(name): value for name, value in tree.items()})]


def _saved_config(checkpoint: Path) -> Path:
    path = checkpoint.parent.parent / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume: {checkpoint} has no {path} beside it, so its settings are unknown")
    return path


def _same_experiment(given: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Drops from the arguments what names the resumed experiment, and refuses to resume as another one."""
    for name in ("recipe", *SHORTHANDS):
        wanted = given.pop(name, None) or given.pop(f"{name}.name", None)
        was = saved[name] if name == "recipe" else saved[name]["name"]
        if name == "data" and wanted is not None:
            wanted, meant = _place(wanted, [was])
            given.update({key: value for key, value in meant.items() if key not in given})
        if wanted not in (None, was):
            raise ConfigError(
                f"{name}={wanted}: the run to resume has {name}={was}; leave resume= out to start a new run"
            )


def _refuse_changes(saved: Config, config: Config) -> None:
    """A resumed run ends like an uninterrupted one only if its steps are computed in the same way."""
    before, now = (
        {name: OmegaConf.select(tree, name) for name in _KEYS} for tree in map(OmegaConf.structured, (saved, config))
    )
    if found := changes(before, now):
        raise ConfigError(
            f"resume={config.resume}: {', '.join(found)}; leave out what differs, or go on with it by resume_force=true"
        )


def _flatten(tree: Mapping[str, Any], origin: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a tree; the values of open mappings (model.kwargs) stay whole."""
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and (name in _SECTIONS or (name not in _KEYS and not prefix)):
            yield from _flatten(value, origin, f"{name}.")
            continue
        _known(name, origin)
        yield (f"{name}.name" if name in SHORTHANDS else name), value


def _set(config: DictConfig, name: str, value: Any, origin: str) -> DictConfig:
    """The settings with one key changed, its type checked. Mappings are merged, everything else is replaced."""
    key = _KEYS.get(name)
    tree: Any = value
    for part in reversed(name.split(".")):
        tree = {part: tree}
    try:
        if (
            key is not None
            and key.base is bool
            and not isinstance(value, bool)
            and not (key.optional and value is None)
        ):
            raise ConfigError(f"{origin}: {name} needs true or false{', or null' * key.optional}")
        merged = OmegaConf.unsafe_merge(config, tree)  # in place: copying all for each key takes most of a start
    except OmegaConfBaseException as error:
        needed = f"a value of type {key.describe_type()}" if key else "another value"
        raise ConfigError(f"{origin}: {name} needs {needed} ({_first_line(error)})") from None
    assert isinstance(merged, DictConfig)
    return merged


def _finish(config: DictConfig) -> Config:
    """References resolved, every number inside its range."""
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"a reference ${{…}} leads nowhere: {_first_line(error)}") from None
    for key in _KEYS.values():
        value = OmegaConf.select(config, key.name)
        for number in value if OmegaConf.is_list(value) else [value]:
            _check_range(key, number)
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


def _check_range(key: Key, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low = -math.inf if key.low is None else key.low
    high = math.inf if key.high is None else key.high
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{key.name}={value}: needs a finite number, {key.describe_range() or 'any'}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
