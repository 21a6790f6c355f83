"""Effective receptive fields: the gradient of the central feature of a map with respect to the image.

W. Luo et al.: Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, NeurIPS 2016,
https://arxiv.org/abs/1701.04128. The share of the image that holds t % of it is the "high-contribution area ratio" of
X. Ding et al.: Scaling Up Your Kernels to 31x31 (RepLKNet), CVPR 2022, https://arxiv.org/abs/2203.06717.

Unusual:

* The channels of the central feature are summed with random signs. After a norm their plain sum is constant and has no
  gradient; RepLKNet sums them after a ReLU.
* Shares are computed from the gradient itself. RepLKNet takes the logarithm of 1 + gradient first, so that its table
  depends on the scale of a model's features.
* Initial weights hide what a model can reach: layer scales of 1e-6 and norms with zero weight leave only the skip
  connections. `open_branches` sets both to one; such a field shows an architecture, not a trained network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


@dataclass(frozen=True)
class ReceptiveField:
    """The mean magnitude [H, W] of the gradient of the central feature of a map of `map_size`."""

    gradient: Tensor
    map_size: tuple[int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """The (y, x) of the strongest part in pixels. Strided convolutions shift it by up to half a position of the
        map."""
        strong = torch.nonzero(self.gradient >= self.gradient.max() / 10).double() + 0.5
        y, x = strong.mean(0).tolist()
        return y, x

    def side(self, share: float) -> int:
        """Return the side in pixels of the smallest square around the centre that holds `share` of the gradient."""
        return math.ceil(2 * self._radius(share) + 1)

    def area(self, share: float) -> float:
        """Return the fraction of the image, 0 to 1, that the square with `share` of the gradient covers."""
        return (self._distance() <= self._radius(share)).double().mean().item()

    @property
    def reach(self) -> tuple[int, int, int, int]:
        """The first row, first column, height and width of the pixels with a gradient: the theoretical receptive
        field."""
        rows, columns = (torch.nonzero(self.gradient.amax(axis) > 0).flatten().tolist() for axis in (1, 0))
        return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1

    def _distance(self) -> Tensor:
        """Return the Chebyshev distance of every pixel from the centre, [H, W]."""
        rows, columns = (
            (torch.arange(size) + 0.5 - middle).abs()
            for size, middle in zip(self.gradient.shape, self.centre, strict=True)
        )
        return torch.maximum(rows[:, None], columns[None])

    def _radius(self, share: float) -> float:
        if not 0 < share < 1:
            raise ValueError(f"a share of the gradient lies between 0 and 1; got {share}")
        distance = self._distance().flatten()
        order = distance.argsort()
        mass = self.gradient.flatten()[order].double().cumsum(0)
        return distance[order[int((mass < share * mass[-1]).sum())]].item()


def receptive_fields(model: nn.Module, images: Tensor, *, last: int | None = None) -> list[ReceptiveField]:
    """Compute a field per stage of a timm model, or for the `last` stages, averaged over `images` [B, C, H, W]."""
    network: Any = model
    if images.ndim != 4 or not len(images):
        raise ValueError(f"receptive fields need images [B, C, H, W], at least one; got {list(images.shape)}")
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, so it shows no maps; name a timm model")
    totals: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    for image in images.split(1):  # one by one: a large image takes gigabytes
        image = image.clone().requires_grad_()
        features = network.forward_intermediates(image, indices=last, intermediates_only=True)
        sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
        gradients = [_central_gradient(feature, image, keep=feature is not features[-1]) for feature in features]
        totals = [total + new for total, new in zip(totals, gradients, strict=True)] if totals else gradients
    return [ReceptiveField(_checked(total / len(images)), size) for total, size in zip(totals, sizes, strict=True)]


def _central_gradient(feature: Tensor, image: Tensor, *, keep: bool) -> Tensor:
    """Return the gradient magnitude [H, W] of the centre of a map [1, C, h, w], averaged over the image's channels."""
    central = feature[:, :, feature.shape[2] // 2, feature.shape[3] // 2]
    signs = torch.randint(0, 2, central.shape).to(central) * 2 - 1
    (gradient,) = torch.autograd.grad((central * signs).sum(), image, retain_graph=keep)
    return gradient.abs().mean((0, 1))


def _checked(gradient: Tensor) -> Tensor:
    if not gradient.isfinite().all() or not gradient.any():
        what = "zero everywhere" if gradient.isfinite().all() else "not finite"
        raise ValueError(
            f"the gradient of the central feature is {what}: these weights have no receptive field to show"
        )
    return gradient


@torch.no_grad()
def open_branches(model: nn.Module, images: Tensor) -> int:
    """Set to one what suppresses the residual branches of an untrained model; return how many vectors were changed.

    These are layer scales (learnable vectors with a single value between 0 and 1) and norms with zero weight. Batch
    norm statistics are then recomputed on `images`, since the branches change their inputs.
    """
    changed = 0
    for module in model.modules():
        is_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
        for name, parameter in module.named_parameters(recurse=False):
            low, high = parameter.min().item(), parameter.max().item()
            is_vector = parameter.numel() == max(parameter.shape, default=1) and parameter.requires_grad
            closes = high == 0 if is_norm and name == "weight" else 0 < high < 1
            if is_vector and low == high and closes:
                parameter.fill_(1.0)
                changed += 1
    update_bn([images], model)
    return changed
