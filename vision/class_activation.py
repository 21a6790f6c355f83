"""Class activation maps: the places of an image from which a classifier takes its evidence for a class.

A map is HiResCAM: the features of a stage times the gradient of the class score, summed over channels.

* R. L. Draelos, L. Carin: Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks,
  2020, https://arxiv.org/abs/2011.08891.
* R. R. Selvaraju et al.: Grad-CAM, ICCV 2017, https://arxiv.org/abs/1610.02391. It averages the gradient over the
  positions first; under a head that pools by the mean, both are the same.

Unusual:

* The gradient is taken at the output of a stage's module, in that module's own layout. The products are carried to the
  raster by the same linear steps (transposition, class token, merged or pruned tokens) that carry the features there:
  their Jacobian, applied as the gradient of a gradient. So token sequences and pruned models need no code of their own.
* The evidence of a merged token is divided evenly among its positions. A position whose token left before the stage has
  none.
* The head of many vision transformers reads only the class token of the last block. Stages with no position that
  influences the class are skipped, from the last to the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ClassActivation(NamedTuple):
    """Maps of evidence for one class per image.

    Attributes:
        maps: evidence [B, h, w] on the raster of the stage; positive for the class, negative against it.
        classes: the class of each map, int64 [B].
        scores: the class scores (logits) [B, classes].
        stage: the stage whose features were used, an index into `model.feature_info`.
    """

    maps: Tensor
    classes: Tensor
    scores: Tensor
    stage: int


def class_activation_maps(
    model: nn.Module, images: Tensor, classes: Sequence[int] | Tensor | None = None, *, stage: int | None = None
) -> ClassActivation:
    """Compute where a timm classifier in eval mode finds its evidence for a class.

    Args:
        images: preprocessed images [B, C, H, W].
        classes: the class of each image, [B]; by default the one with the highest score.
        stage: an index into `model.feature_info`, negative from the end; by default the last stage that the class
            depends on at more than the class token.

    Raises:
        ValueError: if the model has no classifier or no stages, or if a class or the stage does not exist.
    """
    network: Any = model
    if not getattr(network, "num_classes", 0) or not hasattr(network, "forward_intermediates"):
        raise ValueError(
            f"{type(model).__name__} is no timm classifier with forward_intermediates: it has no class maps"
        )
    if model.training:
        raise ValueError("class activation maps need a model in eval mode; call model.eval() first")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be [B, C, H, W] with at least one image; got {list(images.shape)}")
    names = [info["module"] for info in network.feature_info]
    stages = range(len(names)) if stage is None else [_existing(stage, len(names))]
    with torch.enable_grad():
        score, features, outputs = _run(network, images, {names[index] for index in stages})
        classes = score.argmax(1) if classes is None else _checked_classes(classes, score)
        chosen = score.gather(1, classes[:, None]).sum()
        for index in reversed(stages):
            # Where the named module does not exist or is never called, the map of the stage may do.
            for output in outputs.get(names[index]) or [features[index]]:
                maps = _evidence(chosen, output, features[index])
                if maps is not None:
                    return ClassActivation(maps, classes, score.detach(), index)
    where = "the stages" if stage is None else f"stage {stage}"
    raise ValueError(
        f"no position of {where} of {type(model).__name__} was seen to influence the class; give another stage, or "
        "other weights if these are zero"
    )


def _existing(stage: int, count: int) -> int:
    if not -count <= stage < count:
        raise ValueError(f"there is no stage {stage}; the model has {count}, numbered from 0")
    return stage % count


def _checked_classes(classes: Sequence[int] | Tensor, score: Tensor) -> Tensor:
    chosen = torch.as_tensor(classes, device=score.device)
    count = score.shape[1]
    if chosen.shape != score.shape[:1] or chosen.is_floating_point() or chosen.min() < 0 or chosen.max() >= count:
        raise ValueError(
            f"classes must be {len(score)} whole numbers from 0 to {count - 1}, one per image; got {classes}"
        )
    return chosen.long()


def _run(network: Any, images: Tensor, names: set[str]) -> tuple[Tensor, list[Tensor], dict[str, list[Tensor]]]:
    """Return class scores, the maps of all stages [B, C, h, w], and the outputs of the named modules."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, list(_tensors(output)))

    modules = {name: module for name, module in network.named_modules() if name in names}
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        # The gradient is needed even where all parameters are frozen.
        final, features = network.forward_intermediates(images.detach().clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    return network.forward_head(final).float(), features, outputs


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in the output of a module, which may nest them in tuples."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _evidence(score: Tensor, output: Tensor, feature: Tensor) -> Tensor | None:
    """Return output times gradient on the raster of `feature` [B, C, h, w], summed over channels.

    None if the score does not depend on this output at any position of the raster.
    """
    if not output.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(score, output, retain_graph=True, allow_unused=True)
    if gradient is None:
        return None
    ones = torch.ones_like(feature, requires_grad=True)
    # `spread` is linear in `ones`. At ones, it counts the positions of the raster that each element is copied to.
    (spread,) = torch.autograd.grad(feature, output, ones, create_graph=True, allow_unused=True)
    if spread is None:
        return None
    product = (output * gradient).detach() / spread.detach().clamp(min=1)
    (reached,) = torch.autograd.grad(spread, ones, gradient, retain_graph=True)
    if not reached.any():
        return None
    (on_raster,) = torch.autograd.grad(spread, ones, product)
    return on_raster.sum(1)
