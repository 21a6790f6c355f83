"""The sequence model: timm's VisionTransformer with the two seams that it lacks.

* **State** goes from block to block as an argument: a block maps (tokens, state) to (tokens, state). What it is, is
  the subclass's business: the grid, where each patch of the grid went, a second residual stream. `initial_state`
  makes the first, `final_tokens` sees the last.
* **`dense_tokens`** puts a sequence that was pruned, merged or reordered back on the raster of its patches, so that
  `forward_intermediates` and `features_only` work like those of any backbone.

All else (embedding, positions, pooling, classifier, pruning, resizing, weight groups) is timm's. Unusual against it:
the attention mask arguments are gone, since blocks here are not all attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ._compat import feature_take_indices


class IsotropicBackbone(VisionTransformer):
    """A stack of equal blocks over [B, N, C] tokens; constructor arguments as of timm's `VisionTransformer`."""

    def __init__(self, **vit_args: Any) -> None:
        super().__init__(**vit_args)
        # Not a Sequential: TorchScript would compile its forward, which hands on one argument.
        self.blocks = nn.ModuleList(self.blocks)

    def initial_state(self, x: Tensor, grid: tuple[int, int], dense: bool = False) -> tuple[int, int]:
        """What the first block gets beside the tokens `x` [B, N, C] of a `grid` (rows, columns) of patches.

        A subclass may return any one type; it is written out, not `Any`, for TorchScript. `dense` says that
        `dense_tokens` will be called: keep what it needs.
        """
        return grid

    def final_tokens(self, x: Tensor, state: tuple[int, int]) -> Tensor:
        """What `forward_features` returns of the last block's tokens."""
        return self.norm(x)

    def dense_tokens(self, x: Tensor, state: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Split tokens into prefix [B, P, C] and patches [B, rows * columns, C] in raster order."""
        return x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image to the tokens of the first block, and the grid of patches they came from."""
        x = self.patch_embed(x)
        if self.dynamic_img_size:  # then the patches are still a map, [B, H, W, C]
            grid = (x.shape[1], x.shape[2])
        else:
            grid = (self.patch_embed.grid_size[0], self.patch_embed.grid_size[1])
        return self.norm_pre(self.patch_drop(self._pos_embed(x))), grid

    def _take(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """The blocks that `indices` mean, among those of which `feature_info` tells, and the last of them."""
        return feature_take_indices(min(len(self.blocks), len(self.feature_info)), indices)  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> Tensor:
        x, grid = self._embed(x)
        state = self.initial_state(x, grid)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, state = checkpoint(block, x, state)
            else:
                x, state = block(x, state)
        return self.final_tokens(x, state)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The outputs of some blocks on the raster, and unless `intermediates_only` what `forward_features` returns.

        Args:
            indices: blocks; None for all, an int for the last so many.
            return_prefix_tokens: give (patches, prefix) pairs.
            norm: whether the final norm is applied to each intermediate.
            stop_early: skip the blocks after the last one asked for.
            output_fmt: "NCHW" or "NLC", of the intermediates.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC'; got {output_fmt!r}")
        taken, last = self._take(indices)
        x, grid = self._embed(x)
        state = self.initial_state(x, grid, dense=True)
        intermediates = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x, state = checkpoint(block, x, state) if self.grad_checkpointing else block(x, state)
            if i in taken:
                prefix, patches = self.dense_tokens(x, state)
                if norm:
                    prefix, patches = self.norm(prefix), self.norm(patches)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                intermediates.append((patches, prefix) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (self.final_tokens(x, state), intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what those intermediates do not need; returns their absolute indices.

        Blocks behind the last one of which `feature_info` tells belong to the head.
        """
        taken, last = self._take(indices)
        rest = self.blocks[last + 1 :] if not prune_head and last + 1 == len(self.feature_info) else []
        super().prune_intermediate_layers(taken, prune_norm, prune_head)
        self.blocks = nn.ModuleList([*self.blocks, *rest])
        return taken

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """DINO's name for `forward_intermediates`."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, False, output_fmt, intermediates_only=True)
