"""The base of hierarchical models with dynamic spatial sparsification.

In one stage, a predictor ranks the positions of the map. The best positions go through the MLP of each block, the
others through one linear layer. The map stays complete, so nothing else changes.

Paper: Rao et al., "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks"
(TPAMI 2023, arXiv 2207.01580). Code: github.com/raoyongming/DynamicViT, MIT.

What is unusual:
* The number of positions kept depends on the size of the map, never on the image: shapes are static for a given rate.
* Training computes both paths for each position, as evaluation would, and selects one by the sampled decision. The
  published code carries two maps through the stage instead. A position that changes its path at a new decision then
  continues from the map of the path that it had not taken, which never happens in evaluation.
"""

import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import register_notrace_module
from timm.models import checkpoint
from torch import Tensor, nn

from ...kernels.token_reduction import keep_tokens, unmerge_tokens
from ...mixers.token_predictor import draw_decision, kept_count
from ._checkpoints import StateDict
from ._hierarchical import HierarchicalBackbone, Stage
from ._token_reduction import Decided, TokenStage, numbers_of


class DynamicBlock(nn.Module):
    """A mixin that adds a second, fast path to an ordinary block, which is the other base class.

    Tokens are [B, N, C]. A route [B, N] selects the path of each token: in training it is a differentiable decision (1
    for the full path, 0 for the fast one), in evaluation a score by which tokens are ranked.
    """

    keep_ratio: float  # also `predictor`, a `PredictorLG` or None, unannotated because of TorchScript

    def full(self, x: Tensor) -> Tensor:
        """Compute the full path, the MLP, of tokens [B, N, C]."""
        raise NotImplementedError

    def fast(self, x: Tensor) -> Tensor:
        """Compute the fast path of tokens [B, N, C]."""
        raise NotImplementedError

    def tokens(self, x: Tensor) -> Tensor:
        """Flatten a map in the block's layout to tokens [B, N, C]."""
        raise NotImplementedError

    def decide(self, x: Tensor) -> Tensor:
        """Compute the route [B, N] of a map's positions; the block must have a predictor."""
        predictor = self.predictor
        assert predictor is not None
        log_probabilities = predictor(self.tokens(x))  # type: ignore[operator]
        return draw_decision(log_probabilities) if self.training else log_probabilities[:, :, 0]

    def either(self, x: Tensor, route: Tensor) -> Tensor:
        """Compute each token [B, N, C] by the path that its route selects."""
        if self.training:
            decision = route.unsqueeze(2)
            return decision * self.full(x) + (1 - decision) * self.fast(x)
        count = kept_count(x.shape[1], self.keep_ratio)
        ranked, slot = keep_tokens(x, route, x.shape[1], num_prefix=0)
        paths = [self.full(ranked[:, :count]), self.fast(ranked[:, count:])]
        return unmerge_tokens(torch.cat(paths, 1), slot)


class DynamicStage(Stage):
    """A stage of ordinary blocks followed by dynamic blocks; the arguments are those of `Stage`."""

    def __init__(
        self, blocks: Sequence[nn.Module], *, dim: int, reduction: int, downsample: nn.Module | None = None
    ) -> None:
        super().__init__((), dim=dim, reduction=reduction, downsample=downsample)
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]

    def forward_routed(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute the stage; return the map and the route [B, N] of each predictor."""
        x = self.downsample(x)
        routes: list[Tensor] = []
        for block in self.blocks:
            if hasattr(block, "predictor"):
                if block.predictor is not None:
                    routes.append(block.decide(x))  # type: ignore[operator]
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, routes[-1])
                else:
                    x = block(x, routes[-1])
            elif self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x), routes

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]


register_notrace_module(DynamicStage)


class DynamicBackbone(HierarchicalBackbone):
    """A hierarchical backbone with one `DynamicStage`."""

    __jit_unused_properties__: ClassVar[list[str]] = ["target_keep_rates"]  # not compiled by TorchScript

    def final_tokens(self, x: Tensor) -> Tensor:
        """Convert the output of `forward_features` to normalised tokens [B, N, C]."""
        raise NotImplementedError

    @property
    def target_keep_rates(self) -> list[float]:
        """The target share of positions kept by each predictor."""
        blocks = [module for module in self.modules() if isinstance(module, DynamicBlock)]
        return [block.keep_ratio for block in blocks if block.predictor is not None]

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def forward_decided(self, x: Tensor) -> Decided:
        """Classify images, and return what the training losses need; no position is dropped, so there is no mask."""
        x = self.stem(x)
        routes: list[Tensor] = []
        for stage in self.stages:
            if isinstance(stage, DynamicStage):
                x, routes = stage.forward_routed(x)
            else:
                x = stage(x)
        if not self.training:
            routes = [_kept(score, rate) for score, rate in zip(routes, self.target_keep_rates, strict=True)]
        x = self.norm(x)
        return Decided(self.forward_head(x), self.final_tokens(x), routes, None)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def trace_tokens(self, x: Tensor) -> list[TokenStage]:
        """Return a `TokenStage` per predictor, in which positions on the fast path from its block on have index -1."""
        predicting = [
            (number, i)
            for number, stage in enumerate(self.stages)
            for i, block in enumerate(stage.blocks)  # pyright: ignore[reportArgumentType]
            if getattr(block, "predictor", None) is not None
        ]
        decisions = self.forward_decided(x).decisions
        positions = torch.arange(decisions[0].shape[1], device=x.device)
        return [
            TokenStage(block, torch.where(kept > 0, positions, -1), None, stage)
            for (stage, block), kept in zip(predicting, decisions, strict=True)
        ]


def _kept(score: Tensor, rate: float) -> Tensor:
    """Convert scores [B, N] to the decision of evaluation: 1 for the best positions, 0 for the others."""
    count = kept_count(score.shape[1], rate)
    return (keep_tokens(score.unsqueeze(2), score, count, num_prefix=0)[1] >= 0).to(score.dtype)


def keep_ratios(keep_rate: float | Sequence[float], locations: Sequence[int], depth: int) -> list[float | None]:
    """Return the share that the predictor of each of `depth` blocks keeps, or None for blocks without a predictor.

    Args:
        keep_rate: one share per location; or one number for the published schedule: that share at the first location,
            and 0.2 less at each later one.
        locations: blocks of the dynamic stage, ascending.
    """
    if not locations or sorted(set(locations)) != list(locations) or not 0 <= locations[0] <= locations[-1] < depth:
        raise ValueError(
            f"locations are blocks of the dynamic stage, ascending, from 0 to {depth - 1}; got {list(locations)}"
        )
    if isinstance(keep_rate, numbers.Real):
        rates = [float(keep_rate) - step for step in (0.0, 0.2, 0.4, 0.6, 0.8)[: len(locations)]]
    else:
        rates = numbers_of("keep_rate", keep_rate, or_number=True)
    if len(rates) != len(locations) or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(
            f"keep_rate is one share per location, {len(locations)}, each above 0 and up to 1; or one number, which "
            f"falls by 0.2 at each of the {len(locations)} locations and has to leave something; got {keep_rate}"
        )
    return [rates[locations.index(i)] if i in locations else None for i in range(depth)]


def with_fresh_predictors(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Add the model's initial predictors and fast paths to the weights of a dense model, from which training starts."""
    added = (".predictor.", ".fast_path", ".fastmlp.")
    if any(part in name for name in state_dict for part in added):
        return state_dict
    initial: dict[str, Any] = model.state_dict()
    return {**{name: tensor for name, tensor in initial.items() if any(part in name for part in added)}, **state_dict}
