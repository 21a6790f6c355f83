"""BEVANet for segmentation: the two branches of its backbone, a context stage at 1/64, and three heads.

Paper: "BEVANet" (ICIP 2025, arXiv 2508.07300), on the plan of PIDNet (CVPR 2023, arXiv 2206.02066). Code and weights:
github.com/maomao0819/BEVANet (MIT).

The published configurations, as arguments of `build_segmenter`:

    S      "bevanet_s", 19, head={"name": "bevanet"}; for CamVid with 11 classes
    base   "bevanet", 19, head={"name": "bevanet"}; for ADE20K with 150 classes
    SW     "bevanet", 19, head={"name": "bevanet"}, depths=(2, 2, 3, 2, 2)
    L      "bevanet", 19, head={"name": "bevanet", "channels": 256, "neck_channels": 112}, depths=(3, 3, 4, 2, 2)

What is unusual:
* Logits are upsampled from 1/8 to the picture's size with `align_corners=True`, the authors' default. All other
  resizing uses `align_corners=False`.
* The auxiliary head takes the detail branch after its first fusion, the boundary head after its second. The boundary
  features that guide the final fusion come from the same detail map through separate layers (`to_boundary`).
* A checkpoint of the ImageNet classifier provides the four stages and the end of the detail branch; its last stage, at
  1/32, differs from the one at 1/64 here. A published segmenter provides all weights, or an error lists the missing
  ones.
* Exported with free sizes, a model takes pictures from 257 pixels per side if it was traced with such a size: a pooled
  map with a single row or column would become a constant of the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers import BGAF, DLKPPM
from .._reading import read_checkpoint
from ..backbones._checkpoints import rename, unwrap
from ..backbones.bevanet import CONTEXT_KERNEL, TRUNK, BasicBlock, BEVANet, Bottleneck, EVANBlock, rename_parts
from .segmenter import Segmenter, SegmenterOutput
from .weights import StateDict, load_segmenter

_log = logging.getLogger(__name__)

_PUBLISHED = [
    *((pattern, f"backbone.model.{ours}") for pattern, ours in TRUNK),
    (r"layer5_down_semantic_seg\.0\.", "decode_head.downsample."),
    *((rf"layer5_semantic_{k + 1}_seg\.", f"decode_head.blocks.{k}.") for k in range(2)),
    *((rf"norm5_semantic_{k + 1}_seg\.", f"decode_head.blocks.{k}.norm.") for k in range(2)),
    (r"layer5_detail_boundary\.0\.", "decode_head.to_boundary."),
    (r"spp\.scale0\.", "decode_head.pool.full."),
    *((rf"spp\.scale{k}\.1\.", f"decode_head.pool.pooled.{i}.0.") for i, k in enumerate((1, 2, 4, 5))),
    *((rf"spp\.scale{k}\.3\.", f"decode_head.pool.pooled.{i}.2.") for i, k in enumerate((1, 2, 4, 5))),
    (r"spp\.bn\.", "decode_head.pool.norm."),
    (r"spp\.lska\.", "decode_head.pool.attention."),
    (r"spp\.layer_scale_lska", "decode_head.pool.layer_scale"),
    *((rf"spp\.process{k}\.", f"decode_head.pool.process.{i}.") for i, k in enumerate(("1", "2", "_lska", "4", "5"))),
    (r"spp\.compression\.", "decode_head.pool.compress."),
    (r"spp\.shortcut\.", "decode_head.pool.shortcut."),
    (r"dfm\.", "decode_head.fuse."),
    (r"head\.", "decode_head.head."),
    (r"seghead_ds\.", "auxiliary_head."),
    (r"seghead_db\.", "boundary_head."),
]


class PredictionHead(nn.Module):
    """Maps [B, in_dim, H, W] to logits [B, num_classes, H, W] by a 3 x 3 and a 1 x 1 convolution, each after norm and
    ReLU."""

    def __init__(self, in_dim: int, inner_dim: int, num_classes: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_dim)
        self.conv1 = nn.Conv2d(in_dim, inner_dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner_dim)
        self.conv2 = nn.Conv2d(inner_dim, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class BilateralHead(nn.Module):
    """Fuses context at 1/32 and two detail maps at 1/8 into logits [B, num_classes, H / 8, W / 8].

    Args:
        dim: channels of the backbone's first stage.
        depth: blocks of the context stage at 1/64.
        channels, pool_channels: width of the head and of each branch of the pyramid pooling.
    """

    def __init__(self, dim: int, num_classes: int, *, depth: int, channels: int, pool_channels: int) -> None:
        super().__init__()
        self.downsample = BasicBlock(8 * dim, 16 * dim, stride=2)
        self.blocks = nn.Sequential(*(EVANBlock(16 * dim, CONTEXT_KERNEL) for _ in range(depth)))
        self.pool = DLKPPM(16 * dim, pool_channels, 4 * dim)
        self.to_boundary = Bottleneck(2 * dim, 2 * dim)
        self.fuse = BGAF(4 * dim)
        self.head = PredictionHead(4 * dim, channels, num_classes)

    def forward(self, context: Tensor, detail: Tensor, refined: Tensor) -> Tensor:
        context = self.pool(self.blocks(self.downsample(context)))
        context = F.interpolate(context, size=refined.shape[2:], mode="bilinear", align_corners=False)
        return self.head(self.fuse(refined, context, self.to_boundary(detail)))


class BEVANetSegmenter(Segmenter):
    """A `Segmenter` of BEVANet; in training it also returns the logits of the auxiliary and the boundary head.

    Args:
        backbone: a `BEVANet` behind timm's features_only=True, at least with the maps 1 and 3.
        depth: blocks of the context stage at 1/64.
        auxiliary: whether to add the auxiliary and the boundary head, which are used in training alone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        depth: int = 2,
        channels: int = 128,
        pool_channels: int = 96,
        auxiliary: bool = True,
    ) -> None:
        network: Any = getattr(backbone, "model", None)
        if not isinstance(network, BEVANet) or len(network.stages) < 4 or isinstance(network.refine, nn.Identity):
            raise ValueError(
                "needed the features of a BEVANet with its detail branch (features_only=True, out_indices=(1, 3)); got "
                f"{type(network or backbone).__name__}"
            )
        dim: int = network.stages[0].dim
        super().__init__(
            backbone,
            BilateralHead(dim, num_classes, depth=depth, channels=channels, pool_channels=pool_channels),
            PredictionHead(2 * dim, channels, num_classes) if auxiliary else None,
        )
        self.boundary_head = PredictionHead(2 * dim, dim, 1) if auxiliary else None

    def forward_heads(self, images: Tensor) -> SegmenterOutput:
        """Return the logits of all heads at an eighth of the picture's size, rounded up."""
        network: Any = self.backbone.model
        context, detail, earlier = network.forward_branches(images)
        logits = self.decode_head(context, detail, network.refine(detail))
        auxiliary = () if self.auxiliary_head is None else (self.auxiliary_head(earlier),)
        return SegmenterOutput(logits, auxiliary, None if self.boundary_head is None else self.boundary_head(detail))

    def forward(self, images: Tensor) -> Tensor | SegmenterOutput:
        """Map [B, C, H, W] to logits [B, num_classes, H, W]; in training return the logits of all heads."""

        def enlarge(logits: Tensor) -> Tensor:
            return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=True)

        if self.auxiliary_head is None or self.boundary_head is None or not self.training:
            network: Any = self.backbone.model
            context, detail, _ = network.forward_branches(images)
            return enlarge(self.decode_head(context, detail, network.refine(detail)))
        logits, auxiliary, boundary = self.forward_heads(images)
        assert boundary is not None
        return SegmenterOutput(enlarge(logits), tuple(map(enlarge, auxiliary)), enlarge(boundary))


def build_bevanet(
    name: str,
    num_classes: int,
    *,
    channels: int | None = None,
    neck_channels: int | None = None,
    auxiliary: bool = True,
    checkpoint: str | Path | None = None,
    **model_kwargs: Any,
) -> BEVANetSegmenter:
    """Build BEVANet for segmentation from the name of its classifier, for the head "bevanet" of `build_segmenter`.

    Args:
        channels: width of the classification heads; 128 by default.
        neck_channels: width of each branch of the pyramid pooling; 96 by default.
        auxiliary: whether to add the two heads that are used in training alone.
        checkpoint: a published segmenter, one of ours, or an ImageNet classifier.
        model_kwargs: arguments of the backbone; the last of `depths` is that of the context stage at 1/64.
    """
    state = None if checkpoint is None else _read(checkpoint)
    if checkpoint is not None:
        model_kwargs["pretrained"] = state is None
        if state is None:
            model_kwargs["pretrained_cfg_overlay"] = {"file": str(checkpoint)}
    backbone = timm.create_model(name, features_only=True, out_indices=(1, 3), **model_kwargs)
    model = BEVANetSegmenter(
        backbone,
        num_classes,
        depth=model_kwargs.get("depths", (2,))[-1],
        channels=channels or 128,
        pool_channels=neck_channels or 96,
        auxiliary=auxiliary,
    )
    if state is not None:
        if not auxiliary:  # load_segmenter itself drops the auxiliary head
            state = {name: tensor for name, tensor in state.items() if not name.startswith("boundary_head.")}
        load_segmenter(model, state, source=str(checkpoint))
    elif model_kwargs.get("pretrained"):
        parts = "the last stage of the context (stages.4), last_conv and the classifier"
        _log.info("BEVANet begins with a classifier's weights; not used of them: %s; new: all heads", parts)
    return model


def _read(file: str | Path) -> StateDict | None:
    """Read a segmenter's weights under our names; return None if the file holds a classifier."""
    state, _ = read_checkpoint(Path(file), segmenters=True)
    if any(name.startswith("decode_head.") for name in state):
        return state
    published = unwrap({name.removeprefix("model."): tensor for name, tensor in unwrap(state).items()})
    if not any(name.startswith(("spp.", "dfm.", "seghead_")) for name in published):
        return None
    return from_published(published)


def from_published(state: Mapping[str, Tensor]) -> StateDict:
    """Rename a segmenter's weights from the authors' names to ours, dropping the buffers of their losses."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(("sem_loss.", "boundary_loss."))}
    return rename({rename_parts(name): tensor for name, tensor in kept.items()}, _PUBLISHED)
