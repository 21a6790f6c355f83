"""What `… predict` asks: a model, the names of its classes, and how a picture becomes its input.

Unusual: nothing is said about pictures here that the model's own evaluation does not say. A classifier of a run sees
what its test saw; a segmenter answers through the settings of its run (`evaluate.…`), at the picture's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn

from ._loading import Trained, takes_one_size
from ._reading import one_line
from .data.classification import PicturesInMemory
from .data.loading import Request
from .segmentation.inference import Inference, label_map, of_settings


@dataclass(frozen=True)
class Predictor:
    """A model in eval mode, the names of its classes, and what makes its input [C, H, W] of an RGB picture.

    A segmenter has an `inference`, which says at what sizes and in what pieces it sees the picture; `side` is that of
    the squares it was trained with, and of windows that are not told.
    """

    model: nn.Module
    classes: Sequence[str]
    prepare: Callable[[Image.Image], Tensor]
    inference: Inference | None = None
    side: int = 0
    trained: bool = True

    @property
    def dense(self) -> bool:
        """Whether it answers for each pixel."""
        return self.inference is not None

    @torch.no_grad()
    def classify(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Probabilities [B, classes]."""
        images = torch.stack([self.prepare(picture) for picture in pictures])
        return self._try(images, self.model).float().softmax(1).cpu()

    def segment(self, picture: Image.Image) -> Tensor:
        """The class of each pixel, int64 [H, W] of the picture's own size."""
        inference = self.inference
        if inference is None:
            raise ValueError(f"{type(self.model).__name__} is a classifier; it answers for whole pictures (classify)")
        answer = self._try(self.prepare(picture)[None], lambda images: label_map(self.model, images, inference))
        return answer[0].cpu()

    def _try(self, images: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        device = next(self.model.parameters()).device
        try:
            return ask(images.to(device))
        except (AssertionError, RuntimeError, ValueError) as error:
            size = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(
                f"the model fails with {len(images)} of {size} ({one_line(error)}); try another --input-size, or a "
                "smaller --batch-size if memory is short"
            ) from error


def of_run(trained: Trained, size: int | None = None) -> Predictor:
    """With the preparation of its own evaluation; `size` in place of that of the training.

    Of a segmenter that is the picture's shorter side. Windows stay those of the run, unless the model takes one size.
    """
    facts = trained.facts
    side: int = size or facts["size"]
    mean, std = facts["mean"], facts["std"]
    if trained.dense:
        short_side = facts.get("short_side") if size is None else size
        fixed = takes_one_size(facts["model"], facts["model_kwargs"])
        evaluate = dict(facts.get("evaluate") or {})
        if not fixed:
            side = facts["size"]
        elif side != facts["size"]:
            evaluate |= {"window": None, "stride": None}
        inference = of_settings(evaluate, size=side, short_side=short_side, fixed=fixed)
        prepare, weights = _Whole(tuple(mean), tuple(std)), trained.checkpoint is not None
        return Predictor(trained.model, facts["classes"], prepare, inference, side, trained=weights)
    if facts["in_chans"] == 1:  # grey pictures are those that are held in memory, see data/classification.py
        return Predictor(trained.model, facts["classes"], _Framed(side, mean[0], std[0]))
    return of_timm(trained.model, size=size)


def of_timm(model: nn.Module, *, size: int | None = None, trained: bool = True) -> Predictor:
    """With timm's data configuration of the model. Classes are named by its configuration or, of ImageNet, by timm."""
    network: Any = model
    count = getattr(network, "num_classes", 0)
    if not count:
        raise ValueError(f"{type(model).__name__} has no classifier (num_classes=0): there is nothing to predict")
    config = resolve_data_config({}, model=model)
    if size is not None:
        config["input_size"] = (config["input_size"][0], size, size)
    transform: Any = create_transform(**config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    return Predictor(model, class_names(model), lambda picture: transform(picture.convert(mode)), trained=trained)


def class_names(model: nn.Module) -> list[str]:
    network: Any = model
    count = network.num_classes
    names = (getattr(network, "pretrained_cfg", None) or {}).get("label_names")
    if names and len(names) == count:
        return list(names)
    subset = infer_imagenet_subset(network)
    if subset is None:
        return [str(index) for index in range(count)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(count)]


@dataclass(frozen=True)
class _Framed:
    """Grey, enlarged by a whole factor and framed with black, as `PicturesInMemory` does it; squeezed if too large."""

    size: int
    mean: float
    std: float

    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = np.array(picture.convert("L"))[None]
        held = PicturesInMemory(pixels, np.zeros(1, np.int64), size=self.size, mean=self.mean, std=self.std)
        return held.__getitems__(Request([0], 0))[0][0]


@dataclass(frozen=True)
class _Whole:
    """The whole picture at its own size; what a segmenter sees of it is its `Inference`'s."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = np.array(picture.convert("L" if len(self.mean) == 1 else "RGB"))
        values = torch.from_numpy(pixels).float().div(255).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        return (values - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
