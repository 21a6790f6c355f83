"""The base of sequence models: timm's VisionTransformer with two extension points that it lacks.

* **State** is passed from block to block as an argument: a block maps (tokens, state) to (tokens, state). The subclass
  defines it: the grid of patches, the position of each patch, a second residual stream. `initial_state` creates the
  first state, and `final_tokens` receives the last.
* **`dense_tokens`** restores a pruned, merged or reordered sequence to the raster of its patches, so that
  `forward_intermediates` and `features_only` work as for any other backbone.

All else (embedding, positions, pooling, classifier, pruning, resizing, weight groups) is timm's. Unlike timm's, this
class takes no attention masks, since not all blocks here are attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ._compat import feature_take_indices


class IsotropicBackbone(VisionTransformer):
    """A stack of equal blocks over [B, N, C] tokens; the arguments are those of timm's `VisionTransformer`."""

    def __init__(self, **vit_args: Any) -> None:
        super().__init__(**vit_args)
        # Not a Sequential: TorchScript would compile its forward, which passes on only one argument.
        self.blocks = nn.ModuleList(self.blocks)

    def initial_state(self, x: Tensor, grid: tuple[int, int], dense: bool = False) -> tuple[int, int]:
        """Return the first block's state for the tokens `x` [B, N, C] of a `grid` (rows, columns) of patches.

        A subclass may return any type, but must annotate it explicitly, not as `Any`, for TorchScript. If `dense` is
        True, `dense_tokens` will be called, and the state must hold what it needs.
        """
        return grid

    def final_tokens(self, x: Tensor, state: tuple[int, int]) -> Tensor:
        """Convert the tokens and the state of the last block to the result of `forward_features`."""
        return self.norm(x)

    def dense_tokens(self, x: Tensor, state: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Split tokens into prefix [B, P, C] and patches [B, rows * columns, C] in raster order."""
        return x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed images; return the tokens of the first block and their grid of patches (rows, columns)."""
        x = self.patch_embed(x)
        if self.dynamic_img_size:  # the patches are still a map, [B, H, W, C]
            grid = (x.shape[1], x.shape[2])
        else:
            grid = (self.patch_embed.grid_size[0], self.patch_embed.grid_size[1])
        return self.norm_pre(self.patch_drop(self._pos_embed(x))), grid

    def _take(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Return the blocks that `indices` select among those in `feature_info`, and the last of them."""
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
        output_dict: bool = False,
    ) -> Any:
        """Return the result of `forward_features` and the outputs of the selected blocks on the raster.

        Args:
            indices: blocks to return; None for all, an int for that many from the end.
            return_prefix_tokens: whether to return (patches, prefix) pairs, if there are tokens besides patches.
            norm: whether to apply the final norm to each intermediate.
            stop_early: whether to skip the blocks after the last selected one.
            output_fmt: format of the intermediates, "NCHW" or "NLC".
            intermediates_only: whether to return only the list of intermediates.
            output_dict: whether to return a dictionary instead, with the keys "image_features", "image_intermediates"
                and "image_intermediates_prefix".
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC'; got {output_fmt!r}")
        taken, last = self._take(indices)
        x, grid = self._embed(x)
        state = self.initial_state(x, grid, dense=True)
        intermediates, prefixes = [], []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x, state = checkpoint(block, x, state) if self.grad_checkpointing else block(x, state)
            if i in taken:
                prefix, patches = self.dense_tokens(x, state)
                if norm:
                    prefix, patches = self.norm(prefix), self.norm(patches)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                intermediates.append(patches)
                prefixes.append(prefix)
        wants_prefix = return_prefix_tokens and all(prefix.shape[1] for prefix in prefixes)
        if output_dict:
            outputs = {"image_intermediates": intermediates}
            outputs |= {"image_intermediates_prefix": prefixes} if wants_prefix else {}
            return outputs if intermediates_only else {**outputs, "image_features": self.final_tokens(x, state)}
        taps = list(zip(intermediates, prefixes, strict=True)) if wants_prefix else intermediates
        return taps if intermediates_only else (self.final_tokens(x, state), taps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all that these intermediates do not need; return their absolute indices.

        Blocks after the last one in `feature_info` belong to the head.
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
        """Return intermediate features, as `forward_intermediates` does, with the interface of DINO."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, False, output_fmt, intermediates_only=True)
