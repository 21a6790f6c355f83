"""Build a checked `Config` from the data file and the recipe in `configs/` and then the `key=value` arguments.

OmegaConf merges the settings and checks their types. Keys are merged one at a time, so that an error can name the
argument or file it came from. Unusual:

* If `model=` names another model than the recipe's, the recipe's model arguments (`stem_stride`, `dims`) are dropped,
  because they are meaningless for it. Likewise, if `data=` names another data set, the recipe's image size,
  augmentation and class weights are dropped.
* A recipe may have a section `variants`: shell patterns of model names, each with settings for the models it matches.
  Authors often change a few settings from one model size to the next.
* The value of a key of type str is used as typed. YAML would turn a model called `1e5` into 100000.0.
* Lists must be given whole. OmegaConf reads `betas.0=…` as a mapping and fails with a message about containers.
* A resumed run takes its settings from the config.yaml in its folder; the recipe and data files are not read again.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .._messages import closest, did_you_mean
from ..data.sources import recognize
from .config import SHORTHANDS, Config, Key, keys
from .resume import BEST, BOUND, LAST, changes, has_checkpoint, saved_at

_KEYS = {key.name: key for key in keys()}
_SECTIONS = {name.split(".")[0] for name in _KEYS if "." in name}
_OPEN = tuple(name for name, key in _KEYS.items() if key.describe_type().startswith("dict"))  # any key may stand below

_PHOTOS = ("image_folder", "timm")  # read in different ways, but a recipe's size and augmentation are meant for both


class ConfigError(ValueError):
    """A setting cannot be used. The message says which one, why, and what to write instead."""


def load(arguments: Sequence[str], folder: Path) -> Config:
    """Return the checked settings of a run from its command-line arguments and the files in `folder`."""
    given = dict(_parse(argument) for argument in arguments)
    texts = {argument.partition("=")[0].strip(): argument for argument in arguments}
    if given.get("resume") == "auto":
        given["resume"] = _out_with_checkpoint(given.get("out"))
    if given.get("resume") in (None, "auto"):
        trees = _from_files(given, folder)
        saved = None
    else:
        checkpoint = find_checkpoint(given["resume"], given.get("out"))
        _same_folder(given, checkpoint.parent.parent)
        saved = _saved_settings(checkpoint)
        _same_experiment(given, saved)
        given |= {"resume": str(checkpoint), "out": str(checkpoint.parent.parent)}
        given.setdefault("resume_force", False)  # config.yaml of a run that was once resumed by force holds true
        trees = []
    trees += [(texts.get(name, name), {name: value}) for name, value in given.items()]
    config = _merge(trees, saved or Config())
    if saved is not None:
        _refuse_changes(saved, config)
    return config


def _out_with_checkpoint(out: str | None) -> str:
    """Resolve `resume=auto`: return the run folder if it has a checkpoint, otherwise "auto"."""
    if out is None:
        raise ConfigError("resume=auto goes on in the folder out=, or begins there; give out=FOLDER")
    return out if has_checkpoint(Path(out)) else "auto"


def _merge(trees: Sequence[tuple[str, Mapping[str, Any]]], base: Config) -> Config:
    """Return `base` updated with the settings of all trees, checked; later trees take precedence."""
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
    """Return the checkpoint that `resume=` refers to: at a path, or for "last" in `out` or the newest run in runs/.

    For a run folder this is always the path of last.ckpt, even if a kill between two renames has left only
    previous.ckpt: `resume.first_whole` then falls back to that one.
    """
    if resume != "last":
        path = Path(resume)
        path = path / "checkpoints" / LAST if path.is_dir() else path
        if not path.is_file() and not (path.name == LAST and has_checkpoint(path.parent.parent)):
            raise ConfigError(f"resume={resume}: there is no checkpoint at {path}; give a run folder or a .ckpt file")
        return path
    folders = [folder for folder in ([Path(out)] if out else Path("runs").glob("*")) if has_checkpoint(folder)]
    if not folders:
        place = f"{out}/checkpoints" if out else "any folder of runs/"
        raise ConfigError(f"resume=last: no {LAST} in {place}; start without resume=, or name the run folder")
    return max(folders, key=saved_at) / "checkpoints" / LAST


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def choices(folder: Path, kind: str) -> list[str]:
    """Return the names that `recipe=` or `data=` accepts."""
    return sorted(path.stem for path in (folder / kind).glob("*.yaml"))


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
    """Remove quotes around a whole value. They protect its commas from being read as a sweep (sweep.py)."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _known(name: str, origin: str) -> None:
    """Raise a `ConfigError` for a key that is not in the schema, suggesting the closest one that is."""
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
    leaf = closest(name.rsplit(".", 1)[-1], leaves, cutoff=0.6)
    guesses = closest(name, _KEYS, cutoff=0.75) or [leaves[part] for part in leaf]
    hint = f"; did you mean {guesses[0]}?" if guesses else "; `python train.py --help` lists the keys"
    raise ConfigError(f"{origin}: there is no key {name}{hint}")


def _from_files(given: dict[str, Any], folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the settings of the data file and of the recipe, in this order: a recipe may override its data file."""
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
    """Remove from a recipe the settings of its own data set; if both data sets are `alike`, only the class weights."""
    rest = {name: value for name, value in part.items() if alike or name not in ("data", "augment")}
    if isinstance(loss := rest.get("loss"), dict):
        rest["loss"] = {name: value for name, value in loss.items() if name != "class_weights"}
    return rest


def _place(data: str, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Resolve `data=`: return the name of a file in configs/data and the settings that a path or timm name implies."""
    if data not in names and (recognized := recognize(data)) is not None:
        source, location = recognized
        return source, {f"data.{name}": value for name, value in location.items()}
    return data, {}


def _of_variant(variants: Any, model: str, origin: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the settings of all `variants` of a recipe that match this model, in the order of the file."""
    if not isinstance(variants, dict) or not all(isinstance(part, dict) for part in variants.values()):
        raise ConfigError(f"{origin}: below variants stand names of models, and settings below each of them")
    return [(f"{origin}, {name}", part) for name, part in variants.items() if fnmatch.fnmatch(model, str(name))]


def _check_choice(key: str, value: str, names: list[str]) -> None:
    if value in names:
        return
    if key == "data" and Path(value).is_file():
        raise ConfigError(f"data={value} is a file; give a folder, a .tar or one of {', '.join(names)}")
    if key == "data" and "/" in value:
        raise ConfigError(f"data={value}: there is no such folder; give one that exists, or one of {', '.join(names)}")
    raise ConfigError(f"{key}={value}: choose one of {', '.join(names)}{did_you_mean(value, names)}")


def _read(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        # OmegaConf's reader, not PyYAML's: 1e-3 is a number here, as it is in an argument.
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not a list")
    return [(str(path), {str(name): value for name, value in tree.items()})]


def _saved_settings(checkpoint: Path) -> Config:
    """Return the settings in the config.yaml of a run folder, which must have all keys: defaults may not be the run's.

    Raises a `ConfigError` if it is missing, damaged or incomplete.
    """
    path = checkpoint.parent.parent / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume: {checkpoint} has no {path} beside it, so its settings are unknown")
    [(origin, tree)] = _read(path)
    found = {name for name, _ in _flatten(tree, origin)}
    if missing := [name for name in _KEYS if name not in found]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{path} is not whole: it lacks {', '.join(missing[:3])}{more}; write what the run had into it (`python "
            "train.py --cfg` with the arguments of the run prints all of it), or start a new run"
        )
    return _merge([(origin, tree)], Config())


def _same_folder(given: Mapping[str, Any], folder: Path) -> None:
    """Raise if `out=` names another folder than that of the run to resume."""
    out = given.get("out")
    if out is not None and Path(out).resolve() != folder.resolve():
        raise ConfigError(
            f"out={out}: resume={given['resume']} goes on in {folder}; leave out= away, or copy the run first, as with "
            f"cp -r {folder} {out}, and give resume={out}"
        )


def _same_experiment(given: dict[str, Any], saved: Config) -> None:
    """Remove recipe, model and data from the arguments; raise if they name another experiment than the saved one."""
    for name in ("recipe", *SHORTHANDS):
        wanted = given.pop(name, None) or given.pop(f"{name}.name", None)
        was = saved.recipe if name == "recipe" else getattr(saved, name).name
        if name == "data" and wanted is not None:
            wanted, meant = _place(wanted, [was])
            given.update({key: value for key, value in meant.items() if key not in given})
        if wanted not in (None, was):
            raise ConfigError(
                f"{name}={wanted}: the run to resume has {name}={was}; leave resume= out to start a new run"
            )


def _refuse_changes(saved: Config, config: Config) -> None:
    """Raise if settings differ that change what a step computes: the result would not be that of one whole run.

    With `resume_force` only those in `BOUND` are refused.
    """
    before, now = (
        {name: OmegaConf.select(tree, name) for name in _KEYS} for tree in map(OmegaConf.structured, (saved, config))
    )
    if config.resume_force:
        if found := changes(before, {name: now[name] for name in now if name in BOUND}):
            best = Path(str(config.resume)).with_name(BEST)
            raise ConfigError(
                f"resume={config.resume}: {', '.join(found)}; the saved state of the optimizer does not fit that, even "
                f"with resume_force=true: leave it out, or start a new run with model.start_from={best}"
            )
    elif found := changes(before, now):
        raise ConfigError(
            f"resume={config.resume}: {', '.join(found)}; leave out what differs, or go on with it by resume_force=true"
        )


def _flatten(tree: Mapping[str, Any], origin: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of a tree. Mappings with arbitrary keys (model.kwargs) are yielded whole."""
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if isinstance(value, dict) and (name in _SECTIONS or (name not in _KEYS and not prefix)):
            yield from _flatten(value, origin, f"{name}.")
            continue
        _known(name, origin)
        yield (f"{name}.name" if name in SHORTHANDS else name), value


def _set(config: DictConfig, name: str, value: Any, origin: str) -> DictConfig:
    """Return the settings with one key changed and its type checked. Mappings are merged, other values replaced."""
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
    """Resolve references, check the range of every number, and convert to dataclasses."""
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
