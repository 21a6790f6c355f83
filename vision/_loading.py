"""A timm model by name with weights from any of the files that people have, or the model of a run of `train.py`: what
the command-line tools share.

Unusual: every route goes through timm's own loading, so that published layouts are renamed by the model's filter; and
every weight must be found, where timm would drop a head of another size without a word.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import resolve_model_input_args
from timm.utils.misc import ParseKwargs
from torch import Tensor, nn

from ._reading import one_line, read_checkpoint
from .label_sets import LABEL_SETS, class_list
from .segmentation import build_segmenter
from .segmentation.evaluation import published_evaluation
from .segmentation.features import takes_any_size

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
    """A timm model by name, in eval mode. A checkpoint may be one of `train.py`, of timm, or of the model's authors.

    Classes and input channels are those of the checkpoint, which must hold all weights; `num_classes=0` drops the head.
    A checkpoint of `train.py` also knows the model's arguments and how its images were prepared.
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
    """What to say where timm knows no model of this name."""
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"no model is called {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")


def no_weights(name: str, error: OSError) -> str:
    """What to say where published weights are neither at hand nor to be had."""
    return (
        f"the published weights of {name} are not on this machine and could not be fetched; fetch them where there is "
        f"a network, or give a checkpoint ({one_line(error)})"
    )


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, and what a checkpoint of `train.py` tells of it: classes, size, mean, std, in_chans, …"""

    model: nn.Module
    facts: dict[str, Any]
    checkpoint: Path | None

    @property
    def dense(self) -> bool:
        """Whether it answers for each pixel."""
        return self.facts["head"] is not None


def load_run(path: str | Path, *, image_size: tuple[int, int] | None = None) -> Trained:
    """The classifier or segmenter of a run folder (the best weights, or else the last) or of one of its checkpoints.

    `image_size` is for models that are built for one size; others take any.
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


def find_weights(path: Path) -> Path:
    """The checkpoint that stands for a run folder; a file stands for itself."""
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
    """A segmenter by the names of its backbone and its head, with the weights of a published file or random ones.

    Its pictures are normalised as ImageNet's, and judged as published for its classes (segmentation/evaluation.py).
    `size` is for models that are built for one size; others take any.
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
    """Training may begin with a backbone alone, or with other classes than the file's; what is used may not."""
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
        elif isinstance(value, Mapping):  # an envelope
            yield from _tensors(value)


def _fingerprint(tensor: Tensor) -> tuple[tuple[int, ...], float]:
    return tuple(tensor.shape), tensor.detach().double().sum().item()


def built_for_one_size(name: str) -> bool:
    """Whether a timm model is told the size of its pictures when it is built (timm's `img_size`)."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and bool(cfg.fixed_input_size)


def takes_one_size(name: str, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a segmenter around a timm model takes pictures of one size, and no other."""
    return built_for_one_size(name) and not takes_any_size(name, model_kwargs)


def weights_overlay(
    name: str, state: dict[str, Tensor], facts: dict[str, Any], num_classes: int | None, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Changes to a model's pretrained_cfg that make timm load `state`, and all of it.

    timm drops the head, without a word, where its class count is not the configured one; so the count is read from the
    weights. A published layout names the head differently: then the count is the one asked for, or the configured one.
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
        # As data/classification.py prepares pictures for evaluation.
        overlay["crop_pct"] = facts.get("crop") or (0.9 if facts["size"] > 64 else 1.0)
        overlay["crop_mode"] = "squash" if facts.get("crop") == 1 else "center"
        overlay["interpolation"] = facts.get("interpolation", "bilinear")
    return overlay


def _first(names: str | Sequence[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else names[0]


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.rpartition('.')[2]}: {message}\n")


class KeyValue(ParseKwargs):
    """timm's argparse action for KEY=VALUE, which says what is wrong instead of failing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        wrong = [value for value in values if "=" not in value]
        if wrong:
            parser.error(f"{option_string} takes key=value, got {wrong[0]!r}")
        super().__call__(parser, namespace, values, option_string)


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """What a command asks to make a segmenter of a timm name."""
    add = parser.add_argument
    add("--head", metavar="NAME", help="of a timm name: the segmentation head on top of it, such as upernet")
    add("--head-kwargs", nargs="+", action=KeyValue, default={}, metavar="KEY=VALUE", help="settings of that head")
    add("--classes", help=f"under --head: {', '.join(LABEL_SETS)}, a file with a name a line, or how many there are")


def load_under_head(arguments: argparse.Namespace, size: int | None) -> Trained:
    """The segmenter that these options name; `size` as in `load_segmenter`."""
    if arguments.pretrained:
        raise ValueError("--pretrained fetches classifiers; a segmenter's weights come from --checkpoint FILE")
    return load_segmenter(
        arguments.model,
        class_list(arguments.classes),
        head={"name": arguments.head, **arguments.head_kwargs},
        checkpoint=arguments.checkpoint,
        size=size,
        **arguments.model_kwargs,
    )


def numbers(text: str) -> tuple[int, ...]:
    """What argparse takes for `512` or `512,1024`."""
    return _separated(text, int, "whole numbers")


def factors(text: str) -> tuple[float, ...]:
    """What argparse takes for `0.75,1,1.25`."""
    return _separated(text, float, "numbers")


def _separated(text: str, kind: Callable[[str], _Number], what: str) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs {what} separated by commas, got {text!r}") from None
