"""Loading of models for the command-line tools: timm models by name, and the models of `train.py`'s runs.

Weights may come from `train.py`, from timm or from the authors of a model. Unusual: every file goes through timm's own
loading, so that the model's filter renames published layouts; and every weight must be found, whereas timm silently
drops a head of another size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import resolve_model_input_args
from timm.utils.misc import ParseKwargs
from torch import Tensor, nn

from ._messages import did_you_mean, one_line
from ._published import require_published
from ._reading import read_checkpoint
from .data.pictures import read_lines
from .label_sets import LABEL_SETS
from .segmentation import build_segmenter
from .segmentation.evaluation import published_evaluation
from .segmentation.features import takes_any_size

FRAME = "frame"
"""`crop_mode` of models whose pictures are prepared by `PicturesInMemory`: enlarged by a whole factor and framed with
black. timm has no such transform and takes an unknown mode for "center", which resizes; `… predict` frames."""

_Number = TypeVar("_Number", int, float)


def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Build a timm model by name, in eval mode, with random weights unless `pretrained` or `checkpoint` is given.

    Args:
        checkpoint: a file of `train.py`, of timm or of the model's authors. It must hold all weights, and decides the
            number of classes and input channels; one of `train.py` also brings the arguments of the model and the
            preparation of its images.
        num_classes: 0 drops the head.
        image_size: (height, width), for models that are built for one size.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(no_model(name))
    if checkpoint is not None and pretrained:
        raise ValueError("weights come from pretrained or from a checkpoint; give one of them")
    overlay: dict[str, Any] | None = None
    if checkpoint is not None:
        state, facts = read_checkpoint(Path(checkpoint))
        if facts.get("model", name) != name:
            raise ValueError(f"{checkpoint} holds a {facts['model']}, not a {name}")
        model_kwargs = facts.get("model_kwargs", {}) | model_kwargs
        overlay = weights_overlay(name, state, facts, num_classes, model_kwargs)
        num_classes = overlay.get("num_classes") if num_classes is None else num_classes
        model_kwargs.setdefault("in_chans", overlay["input_size"][0])
        image_size = overlay["input_size"][1:] if image_size is None else image_size
    try:
        if pretrained:
            require_published(name)
        arguments = resolve_model_input_args(name, {"img_size": image_size}, num_classes=num_classes, **model_kwargs)
        load = pretrained or overlay is not None
        model = timm.create_model(**arguments, pretrained=load, pretrained_cfg_overlay=overlay)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        source = f" with the weights of {checkpoint}" if checkpoint is not None else ""
        raise ValueError(f"cannot build {name}{source}: {one_line(error)}") from error
    except OSError as error:
        raise ValueError(no_weights(name, error)) from error
    return model.eval()


def no_model(name: str) -> str:
    """Return the error message for a name that timm does not know."""
    return f"no model is called {name!r}{did_you_mean(name, timm.list_models(), most=3, cutoff=0.6)}"


def no_weights(name: str, error: OSError) -> str:
    """Return the error message for published weights that are not cached and cannot be downloaded."""
    return (
        f"the published weights of {name} are not on this machine and could not be fetched; fetch them where there is "
        f"a network, or give a checkpoint ({one_line(error)})"
    )


@dataclass(frozen=True)
class Trained:
    """A model in eval mode with the facts of its checkpoint: classes, size, mean, std, in_chans, …"""

    model: nn.Module
    facts: dict[str, Any]
    checkpoint: Path | None

    @property
    def dense(self) -> bool:
        """Whether the model is a segmenter."""
        return self.facts["head"] is not None


def load_run(path: str | Path, *, image_size: tuple[int, int] | None = None) -> Trained:
    """Load the classifier or segmenter of a run folder (its best weights, or else the last) or of a checkpoint of one.

    Args:
        image_size: (height, width), for models that are built for one size.
    """
    file = find_weights(Path(path))
    state, facts = read_checkpoint(file, segmenters=True)
    if not facts:
        raise ValueError(f"{file} is none of train.py, so that its model is unknown; name that, and give --checkpoint")
    if facts["head"] is None:
        model = load_model(facts["model"], checkpoint=file, image_size=image_size)
    else:
        model = _load_segmenter(file, state, facts, image_size)
    return Trained(model, facts, file)


_OF_A_NAME = ("checkpoint", "pretrained", "head", "head_kwargs", "classes", "num_classes", "model_kwargs")


def path_of(arguments: argparse.Namespace) -> Path | None:
    """Return the file or folder that a command's MODEL stands for, or None where it is a timm name.

    A name with a separator (`./nat_mini`) is a path. One without is a timm name if there is such a model, and else a
    path. Where both exist, options that belong to a timm name (`--checkpoint`, …) decide, and without them it is an
    error: to guess would run other weights than the ones that were meant.
    """
    name: str = arguments.model
    if name.startswith("local-dir:"):
        return _refuse_options(arguments, Path(name.removeprefix("local-dir:")))
    path = Path(name)
    is_model, is_written_as_path = timm.is_model(name.partition(".")[0]), name != path.name
    if not path.exists():
        if is_written_as_path and not is_model:
            raise ValueError(f"there is no run folder or checkpoint {name}, and no timm model is called so")
        return None
    if is_written_as_path or not is_model:
        return _refuse_options(arguments, path)
    if any(getattr(arguments, option, None) for option in _OF_A_NAME):
        return None
    raise ValueError(
        f"{name} is a timm model and also a {'folder' if path.is_dir() else 'file'} here; write ./{name} for that, or "
        "give --checkpoint or --pretrained for the model"
    )


def _refuse_options(arguments: argparse.Namespace, path: Path) -> Path:
    given = [option for option in _OF_A_NAME if getattr(arguments, option, None)]
    if given:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in given)
        raise ValueError(f"{path} brings its model, weights and classes; leave out {options}, meant for timm names")
    return path


def find_weights(path: Path) -> Path:
    """Return the best or else the last checkpoint of a run folder. A path to a file is returned as it is."""
    if not path.is_dir():
        return path
    files = [path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError(f"{path} is no run folder of train.py: there is no {files[0]}")
    return found


def _load_segmenter(
    file: Path, state: dict[str, Tensor], facts: dict[str, Any], image_size: tuple[int, int] | None
) -> nn.Module:
    arguments = dict(facts["model_kwargs"])
    if built_for_one_size(facts["model"]):  # as it was in training: the positions that it learned are of that size
        own = image_size if takes_one_size(facts["model"], arguments) else None
        arguments.setdefault("img_size", own or facts["size"])
    try:
        model = build_segmenter(
            facts["model"], len(facts["classes"]), head=facts["head"], in_chans=facts["in_chans"], **arguments
        )
        model.load_state_dict(state)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"cannot build the segmenter of {file}: {one_line(error)}") from error
    return model.eval()


def load_segmenter(
    name: str,
    classes: Sequence[str],
    *,
    head: Mapping[str, Any],
    checkpoint: Path | None = None,
    size: int | None = None,
    **model_kwargs: Any,
) -> Trained:
    """Build a segmenter from the names of its backbone and its head, with weights from a file or random ones.

    Pictures are normalised with ImageNet's statistics and evaluated as published for these classes
    (segmentation/evaluation.py).

    Args:
        size: side of the input, for models that are built for one size.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(no_model(name))
    arguments = dict(model_kwargs)
    judged = published_evaluation(name, str(head.get("name")), classes)
    if takes_one_size(name, arguments):
        judged |= {"size": size or judged["size"], "short_side": None}
        arguments.setdefault("img_size", judged["size"])
    try:
        model = build_segmenter(name, len(classes), head=head, checkpoint=checkpoint, **arguments)
        if checkpoint is not None:
            _refuse_new_head(model, checkpoint)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        weights = f" with the weights of {checkpoint}" if checkpoint is not None else ""
        raise ValueError(f"cannot build {name} under {head.get('name')}{weights}: {one_line(error)}") from error
    facts = {"model": name, "model_kwargs": model_kwargs, "head": dict(head), "classes": list(classes), "in_chans": 3}
    facts |= {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD), **judged}
    return Trained(model.eval(), facts, checkpoint)


def _refuse_new_head(model: nn.Module, checkpoint: Path) -> None:
    """Raise a ValueError if the file had no weights for the head. Only training may start from a backbone alone."""
    known = {_fingerprint(tensor) for tensor in _tensors(read_checkpoint(checkpoint, segmenters=True)[0])}
    new = [
        f"{name} {list(weight.shape)}"
        for name, weight in model.named_parameters()
        if name.startswith(("decode_head.", "network."))  # `network` is smp's model
        and not name.startswith("network.encoder.")
        and weight.ndim > 1
        and _fingerprint(weight) not in known
    ]
    if new:
        raise ValueError(f"it has nothing for {new[0]}: it is of a backbone alone, or of another number of classes")


def _tensors(values: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):  # such as {'state_dict': …}
            yield from _tensors(value)


def _fingerprint(tensor: Tensor) -> tuple[tuple[int, ...], float]:
    return tuple(tensor.shape), tensor.detach().double().sum().item()


def built_for_one_size(name: str) -> bool:
    """Return whether a timm model is built for one input size (timm's `img_size`)."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and bool(cfg.fixed_input_size)


def takes_one_size(name: str, model_kwargs: Mapping[str, Any]) -> bool:
    """Return whether a segmenter with this timm backbone accepts only one input size."""
    return built_for_one_size(name) and not takes_any_size(name, model_kwargs)


def weights_overlay(
    name: str, state: dict[str, Tensor], facts: dict[str, Any], num_classes: int | None, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the `pretrained_cfg_overlay` that makes timm load all of `state`.

    timm silently drops a head whose number of classes is not the configured one, so the number is read from the
    weights. If a published layout names the head differently, it is `num_classes` or else the configured one.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise ValueError(f"{name} declares no pretrained configuration, so a checkpoint cannot be matched to it")
    overlay: dict[str, Any] = {"state_dict": state, "custom_load": False}
    head, stem = (state.get(f"{_first(layer)}.weight") for layer in (cfg.classifier, cfg.first_conv))
    if head is not None and num_classes not in (None, 0, head.shape[0]):
        raise ValueError(f"the checkpoint has {head.shape[0]} classes, not {num_classes}; leave num_classes out")
    if head is not None or num_classes:
        overlay["num_classes"] = num_classes if head is None else head.shape[0]
    channels = stem.shape[1] if stem is not None else model_kwargs.get("in_chans", cfg.input_size[0])
    size = (facts["size"], facts["size"]) if facts else cfg.input_size[1:]
    overlay["input_size"] = (channels, *size)
    if facts:
        overlay.update(mean=tuple(facts["mean"]), std=tuple(facts["std"]), label_names=list(facts["classes"]))
        overlay |= _preparation(facts)
    return overlay


def _preparation(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's configuration says of the way data/classification.py prepares pictures for evaluation."""
    if facts.get("framed", len(facts["mean"]) == 1):  # runs before `framed` was stated: all grey pictures, no others
        return {"crop_pct": 1.0, "crop_mode": FRAME, "interpolation": "bilinear"}
    return {
        "crop_pct": facts.get("crop") or (0.9 if facts["size"] > 64 else 1.0),
        "crop_mode": "squash" if facts.get("crop") == 1 else "center",
        "interpolation": facts.get("interpolation", "bilinear"),
    }


def _first(names: str | Sequence[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else names[0]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.rpartition('.')[2]}: {message}\n")


_YAML = {"true": True, "false": False, "null": None}


class KeyValue(ParseKwargs):
    """timm's argparse action for KEY=VALUE that also knows YAML's true, false and null, as train.py does.

    Words without `=` are an error with a message.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        wrong = [value for value in values if "=" not in value]
        if wrong:
            parser.error(f"{option_string} takes key=value, got {wrong[0]!r}")
        super().__call__(parser, namespace, values, option_string)
        parsed = getattr(namespace, self.dest)
        parsed.update({key: _YAML[value] for key, value in parsed.items() if value in ("true", "false", "null")})


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that turn a timm name into a segmenter: --head, --head-kwargs and --classes."""
    add = parser.add_argument
    add("--head", metavar="NAME", help="of a timm name: the segmentation head on top of it, such as upernet")
    add("--head-kwargs", nargs="+", action=KeyValue, default={}, metavar="KEY=VALUE", help="settings of that head")
    add("--classes", help=f"under --head: {', '.join(LABEL_SETS)}, a file with a name a line, or how many there are")


def class_names(text: str | None) -> Sequence[str]:
    """Return the class names that `--classes` stands for.

    `text` is a known data set, a file with one name a line, or a number of classes, which are then named 0, 1, ….
    """
    if text in LABEL_SETS:
        return LABEL_SETS[text].names
    if text is not None and text.isdecimal() and int(text) > 0:
        return [str(index) for index in range(int(text))]
    if text is not None and Path(text).is_file():
        return read_lines(Path(text))
    raise ValueError(
        f"--classes {text}: a head needs its classes: {', '.join(LABEL_SETS)}, a file with a name a line, or their "
        "number"
    )


def load_under_head(arguments: argparse.Namespace, size: int | None) -> Trained:
    """Build the segmenter that the options of `add_head_options` describe; `size` as in `load_segmenter`."""
    if arguments.pretrained:
        raise ValueError("--pretrained fetches classifiers; a segmenter's weights come from --checkpoint FILE")
    return load_segmenter(
        arguments.model,
        class_names(arguments.classes),
        head={"name": arguments.head, **arguments.head_kwargs},
        checkpoint=arguments.checkpoint,
        size=size,
        **arguments.model_kwargs,
    )


def numbers(text: str) -> tuple[int, ...]:
    """Parse `512` or `512,1024`, as a type for argparse."""
    return _separated(text, int, "whole numbers")


def factors(text: str) -> tuple[float, ...]:
    """Parse `0.75,1,1.25`, as a type for argparse."""
    return _separated(text, float, "numbers")


def _separated(text: str, kind: Callable[[str], _Number], what: str) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs {what} separated by commas, got {text!r}") from None
