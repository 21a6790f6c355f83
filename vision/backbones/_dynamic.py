"""Hierarchical models with dynamic spatial sparsification: in one stage a predictor ranks the positions of the map, the
best go through the MLP of each block, the rest through one linear layer. The map stays whole, so nothing else changes.

Paper: Rao et al., "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks"
(TPAMI 2023, arXiv 2207.01580). Code: github.com/raoyongming/DynamicViT, MIT.

Unusual:
* How many positions are kept depends on the map's size, never on the picture: shapes are static for a given rate.
* Training computes of each position what evaluation does, both ways, and takes one by the drawn decision. The published
  code carries two maps through the stage instead, and at a new decision lets a position that changes its way go on from
  the map of the way that it had not taken, which evaluation never does.
"""

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
from ._token_reduction import Decided, TokenStage


class DynamicBlock(nn.Module):
    """What a block with two ways adds to an ordinary one, which is its other base class.

    Tokens are [B, N, C]; a route [B, N] says of each where it goes: while training a decision of 1 or 0 with gradient,
    otherwise a score.
    """

    keep_ratio: float  # beside it `predictor`, a `PredictorLG` or None, which TorchScript must not see annotated

    def full(self, x: Tensor) -> Tensor:
        """The MLP, of [B, N, C]."""
        raise NotImplementedError

    def fast(self, x: Tensor) -> Tensor:
        """What takes its place."""
        raise NotImplementedError

    def tokens(self, x: Tensor) -> Tensor:
        """A map of the block's layout to [B, N, C]."""
        raise NotImplementedError

    def decide(self, x: Tensor) -> Tensor:
        """The route of a map's positions; only for a block that has a predictor."""
        predictor = self.predictor
        assert predictor is not None
        log_probabilities = predictor(self.tokens(x))  # type: ignore[operator]
        return draw_decision(log_probabilities) if self.training else log_probabilities[:, :, 0]

    def either(self, x: Tensor, route: Tensor) -> Tensor:
        """Each token by its way, [B, N, C]."""
        if self.training:
            decision = route.unsqueeze(2)
            return decision * self.full(x) + (1 - decision) * self.fast(x)
        count = kept_count(x.shape[1], self.keep_ratio)
        ranked, place = keep_tokens(x, route, x.shape[1], num_prefix=0)
        ways = [self.full(ranked[:, :count]), self.fast(ranked[:, count:])]
        return unmerge_tokens(torch.cat(ways, 1), place)


class DynamicStage(Stage):
    """A stage of ordinary blocks, then of dynamic ones; arguments as of `Stage`."""

    def __init__(
        self, blocks: Sequence[nn.Module], *, dim: int, reduction: int, downsample: nn.Module | None = None
    ) -> None:
        super().__init__((), dim=dim, reduction=reduction, downsample=downsample)
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]

    def forward_routed(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The map, and each predictor's route [B, N]."""
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
    """A pyramid one stage of which is a `DynamicStage`."""

    __jit_unused_properties__: ClassVar[list[str]] = ["keep_rates"]  # TorchScript compiles all others

    def final_tokens(self, x: Tensor) -> Tensor:
        """What `forward_features` gives as normed tokens [B, N, C]."""
        raise NotImplementedError

    @property
    def keep_rates(self) -> list[float]:
        """The share of the positions that each predictor is to keep."""
        blocks = [module for module in self.modules() if isinstance(module, DynamicBlock)]
        return [block.keep_ratio for block in blocks if block.predictor is not None]

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def forward_decided(self, x: Tensor) -> Decided:
        """Classify, and give what the losses of training need. All positions stay, so they all count: no mask."""
        x = self.stem(x)
        routes: list[Tensor] = []
        for stage in self.stages:
            if isinstance(stage, DynamicStage):
                x, routes = stage.forward_routed(x)
            else:
                x = stage(x)
        if not self.training:
            routes = [_kept(score, rate) for score, rate in zip(routes, self.keep_rates, strict=True)]
        x = self.norm(x)
        return Decided(self.forward_head(x), self.final_tokens(x), routes, None)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def trace_tokens(self, x: Tensor) -> list[TokenStage]:
        """For each block with a predictor: positions that get the MLP from there on stay in place, the rest is -1."""
        predicting = [
            i
            for stage in self.stages
            for i, block in enumerate(stage.blocks)  # pyright: ignore[reportArgumentType]
            if getattr(block, "predictor", None) is not None
        ]
        decisions = self.forward_decided(x).decisions
        places = torch.arange(decisions[0].shape[1], device=x.device)
        return [
            TokenStage(block, torch.where(kept > 0, places, -1), None)
            for block, kept in zip(predicting, decisions, strict=True)
        ]


def _kept(score: Tensor, rate: float) -> Tensor:
    """The decision that evaluation takes by a score [B, N]: 1 for the best."""
    count = kept_count(score.shape[1], rate)
    return (keep_tokens(score.unsqueeze(2), score, count, num_prefix=0)[1] >= 0).to(score.dtype)


def keep_ratios(keep_rate: float, locations: Sequence[int], depth: int) -> list[float | None]:
    """Of each of `depth` blocks the share that its predictor keeps; None for those without a predictor.

    The published schedule: `keep_rate` at the first location and 0.2 less at each one after it.
    """
    rates = [keep_rate - step for step in (0.0, 0.2, 0.4, 0.6, 0.8)[: len(locations)]]
    if not locations or sorted(set(locations)) != list(locations) or not 0 <= locations[0] <= locations[-1] < depth:
        raise ValueError(
            f"locations are blocks of the dynamic stage, ascending, from 0 to {depth - 1}; got {list(locations)}"
        )
    if len(rates) != len(locations) or not 0 < rates[-1] <= keep_rate <= 1:
        raise ValueError(
            f"keep_rate must be up to 1 and falls by 0.2 at each of the {len(locations)} locations, "
            f"which has to leave something; got {keep_rate}"
        )
    return [rates[locations.index(i)] if i in locations else None for i in range(depth)]


def with_fresh_predictors(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The weights of a dense model, from which training starts, with the model's own for what those do not have."""
    added = (".predictor.", ".fast_path", ".fastmlp.")
    if any(part in name for name in state_dict for part in added):
        return state_dict
    own: dict[str, Any] = model.state_dict()
    return {**{name: tensor for name, tensor in own.items() if any(part in name for part in added)}, **state_dict}
