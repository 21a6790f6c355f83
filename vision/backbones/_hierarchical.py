"""The base of hierarchical backbones: stem, downsampling stages, norm and head, with timm's whole model contract.

A model file builds its modules and passes them in; nothing here depends on an architecture. What is unusual compared
with timm's own models:
* `Stage.out_norm` normalises only what `forward_intermediates` (and thus `features_only`) returns: the layout of most
  published segmentation and detection backbones. A norm whose output later stages also see is `Stage.norm`.
* Invalid arguments of the contract raise `ValueError`, not `AssertionError`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq, named_apply
from torch import Tensor, nn

from ._compat import feature_take_indices


class Stage(nn.Module):
    """Apply downsampling, blocks and a norm to a map.

    Args:
        dim: channels of the blocks.
        reduction: pixels of the image per position of the map, along each axis.
        norm: applied to the stage's output, for the next stage and for intermediate features.
        out_norm: applied to intermediate features only.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        dim: int,
        reduction: int,
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
        out_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.reduction = dim, reduction
        self.grad_checkpointing = False
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()
        self.out_norm = out_norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


class HierarchicalBackbone(nn.Module):
    """Compose built modules into stem -> stages -> norm -> head.

    Args:
        stem: maps [B, in_chans, H, W] to the input of the first stage, in `output_fmt`.
        head: pools and classifies a map in `output_fmt`; one of timm's, with `fc`, `num_features` and `reset`.
        norm: applied to the last map, before the head.
        output_fmt: memory layout of the maps between stem and head.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        head: nn.Module,
        *,
        norm: nn.Module | None = None,
        in_chans: int,
        num_classes: int,
        output_fmt: Literal["NCHW", "NHWC"],
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.output_fmt = in_chans, num_classes, output_fmt
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm or nn.Identity()
        self.head: Any = head
        self.num_features = stages[-1].dim
        self.head_hidden_size = self.head.num_features
        self.feature_info = [
            {"num_chs": stage.dim, "reduction": stage.reduction, "module": f"stages.{i}"}
            for i, stage in enumerate(stages)
        ]
        self.init_weights(needs_reset=False)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all parameters; with `needs_reset=False`, skip those that a constructor has just initialised."""
        named_apply(partial(self.init_module, needs_reset=needs_reset), self)

    @staticmethod
    def init_module(module: nn.Module, name: str, needs_reset: bool) -> None:
        """Initialise one module's own parameters: linear layers as in ViT, others by their `reset_parameters`."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif needs_reset and callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        last = 99999
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:norm|out_norm)", (last,)),
            (r"^norm", (last,)),
        ]
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (last,))] if coarse else fine}

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable  # pyright: ignore[reportArgumentType]

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `num_classes` 0 removes it, `global_pool` None keeps the pooling, "" removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def _tap(self, x: Tensor, stage: int, norm: bool, output_fmt: str) -> Tensor:
        """Return the intermediate feature of a stage from its output `x`."""
        x = self.stages[stage].out_norm(x)  # pyright: ignore[reportCallIssue]
        if norm and stage == len(self.stages) - 1:
            x = self.norm(x)
        if self.output_fmt == output_fmt:
            return x
        return x.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x.permute(0, 2, 3, 1).contiguous()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the outputs of selected stages and, unless `intermediates_only`, the result of `forward_features`.

        Args:
            indices: stages; None for all, an int n for the last n.
            norm: whether to apply the final norm to the last stage's output.
            stop_early: skip the stages after the last one selected.
            output_fmt: "NCHW" or "NHWC", for the intermediates.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC'; got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)  # type: ignore[arg-type]
        x = self.stem(x)
        intermediates = []
        count = last + 1 if stop_early else len(self.stages)
        for i, stage in enumerate(self.stages[:count]):
            x = stage(x)
            if i in taken:
                intermediates.append(self._tap(x, i, norm, output_fmt))
        if intermediates_only:
            return intermediates
        return (self.norm(x) if count == len(self.stages) else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove everything that the selected intermediates do not need; return their absolute indices."""
        taken, last = feature_take_indices(len(self.stages), indices)  # type: ignore[arg-type]
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.num_features = self.stages[last].dim
        for i, stage in enumerate(self.stages):
            if i not in taken:
                stage.out_norm = nn.Identity()
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.num_classes = 0
            self.head.reset(0, "", reset_other=True, in_features=self.num_features, **get_device_dtype(self))
            self.head_hidden_size = self.head.num_features
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
