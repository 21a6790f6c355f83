"""Models as `… predict` uses them: with the names of their classes and the preparation of their input.

Unusual: there is no preprocessing of its own here. Pictures are prepared as in the evaluation of the model's run, and a
segmenter infers with the settings of that run (`evaluate.…`), at the picture's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from ._loading import FRAME, Trained, takes_one_size
from ._messages import one_line
from .class_activation import class_activation_maps
from .data.classification import PicturesInMemory
from .data.loading import Request
from .drawing import denormalised
from .segmentation.inference import Inference, label_map, of_settings


class Explanation(NamedTuple):
    """The evidence of a classifier for one class in one picture.

    Attributes:
        image: the picture as the model sees it, [H, W, 3] in 0..1.
        evidence: [H, W], enlarged from the map of the stage; positive for the class, negative against it.
        index: the class.
        probability: of the class.
        stage: the stage of the model that the map belongs to, an index into `feature_info`.
        map_size: height and width of the map before it was enlarged.
    """

    image: np.ndarray
    evidence: np.ndarray
    index: int
    probability: float
    stage: int
    map_size: tuple[int, int]


@dataclass(frozen=True)
class Predictor:
    """A model in eval mode, with its class names and preprocessing.

    Attributes:
        prepare: turns an RGB picture into the input of the model [C, H, W], normalised with `mean` and `std`.
        inference: scales and windows of a segmenter; None for a classifier.
        side: side in pixels of a segmenter's training crops, and of its windows by default.
        trained: whether the weights are other than random.
    """

    model: nn.Module
    classes: Sequence[str]
    prepare: Callable[[Image.Image], Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    inference: Inference | None = None
    side: int = 0
    trained: bool = True

    @property
    def dense(self) -> bool:
        """Whether the model is a segmenter."""
        return self.inference is not None

    @torch.no_grad()
    def classify(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return probabilities [B, classes]."""
        images = torch.stack([self.prepare(picture) for picture in pictures])
        return self._try(images, self.model).float().softmax(1).cpu()

    def segment(self, picture: Image.Image) -> Tensor:
        """Return the class of each pixel, int64 [H, W], at the picture's own size."""
        inference = self.inference
        if inference is None:
            raise ValueError(f"{type(self.model).__name__} is a classifier; it answers for whole pictures (classify)")
        answer = self._try(self.prepare(picture)[None], lambda images: label_map(self.model, images, inference))
        return answer[0].cpu()

    def explain(self, picture: Image.Image, chosen: int | None = None, *, stage: int | None = None) -> Explanation:
        """Return where a classifier finds its evidence for a class, by default the one that it predicts.

        Args:
            stage: see `class_activation_maps`.
        """
        image = self.prepare(picture)[None].to(next(self.model.parameters()).device)
        found = class_activation_maps(self.model, image, None if chosen is None else [chosen], stage=stage)
        evidence = F.interpolate(found.maps[None].float(), image.shape[-2:], mode="bilinear")[0, 0]
        index = int(found.classes[0])
        return Explanation(
            denormalised(image[0], self.mean, self.std),
            evidence.cpu().numpy(),
            index,
            float(found.scores[0].softmax(0)[index]),
            found.stage,
            (found.maps.shape[1], found.maps.shape[2]),
        )

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
    """Make a predictor of a run's model, which prepares pictures as the evaluation of the run does.

    Args:
        size: replaces the input size of the run; for a segmenter, the length of the picture's shorter side. Windows
            keep their size unless the model is built for one input size.
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
        return Predictor(trained.model, facts["classes"], prepare, mean, std, inference, side, trained=weights)
    return of_timm(trained.model, size=size)


def of_timm(model: nn.Module, *, size: int | None = None, trained: bool = True) -> Predictor:
    """Make a predictor of a timm classifier, with the preprocessing and class names of its pretrained_cfg."""
    network: Any = model
    count = getattr(network, "num_classes", 0)
    if not count:
        raise ValueError(f"{type(model).__name__} has no classifier (num_classes=0): there is nothing to predict")
    config = resolve_data_config({}, model=model)
    if size is not None:
        config["input_size"] = (config["input_size"][0], size, size)
    mean, std = config["mean"], config["std"]
    if config["crop_mode"] == FRAME:
        framed = _Framed(config["input_size"][-1], mean[0], std[0])
        return Predictor(model, class_names(model), framed, mean, std, trained=trained)
    transform: Any = create_transform(**config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"

    def prepare(picture: Image.Image) -> Tensor:
        return transform(picture.convert(mode))

    return Predictor(model, class_names(model), prepare, mean, std, trained=trained)


def class_names(model: nn.Module) -> list[str]:
    """Return the class names of the model's configuration, else timm's if it is an ImageNet model, else numbers."""
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
    """Prepares a grey picture as `PicturesInMemory` does: enlarged by a whole factor and framed with black."""

    size: int
    mean: float
    std: float

    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = np.array(picture.convert("L"))[None]
        held = PicturesInMemory(pixels, np.zeros(1, np.int64), size=self.size, mean=self.mean, std=self.std)
        return held.__getitems__(Request([0], 0))[0][0]


@dataclass(frozen=True)
class _Whole:
    """Normalises the whole picture at its own size; `Inference` does the scaling and windowing for a segmenter."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = np.array(picture.convert("L" if len(self.mean) == 1 else "RGB"))
        values = torch.from_numpy(pixels).float().div(255).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        return (values - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
