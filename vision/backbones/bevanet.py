"""BEVANet: two branches that exchange features, one for context down to 1/32, one for detail at 1/8.

Paper: "BEVANet: Bilateral Efficient Visual Attention Network for Real-time Semantic Segmentation" (ICIP 2025, arXiv
2508.07300), based on PIDNet (CVPR 2023, arXiv 2206.02066). Code and weights: github.com/maomao0819/BEVANet (MIT);
files on Google Drive. This is the classifier pretrained on ImageNet; segmentation/bevanet.py builds on its first four
stages.

What is unusual:
* Stages pass on two maps: context and, from the third stage on, detail. The third and the fourth stage each refine the
  detail and fuse the context into it, position by position (`PagFM`); the last stage joins both branches.
* Therefore the second feature map, at 1/8, is the end of the detail branch: requesting it alone runs four stages. The
  fourth map, at 1/32, is the context before the branches are joined; `features_only` omits it unless requested.
* The detail leaves the third stage through ReLU, before the fourth stage and an auxiliary head read it: the authors'
  code applies that in place, to a tensor that it also keeps.
* Images need not be multiples of 32: sizes are rounded up at each stride, and maps are resized to each other's sizes.
* A block's channel gates and a 1 x 1 map pass through batch norm, so training needs at least two images per batch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, calculate_drop_path_rates, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers import SDLSKA
from ...mixers.separable_kernel_attention import GatedProjections
from ._checkpoints import StateDict, drive_url, refuse_drive, refuse_mismatch, rename, unwrap
from ._compat import feature_take_indices
from ._hierarchical import HierarchicalBackbone, Stage
from .van import ConvMlp

CONTEXT_KERNEL, DETAIL_KERNEL = 35, 23


def conv_norm(in_dim: int, dim: int, kernel_size: int, *, stride: int = 1, **dd: Any) -> list[nn.Module]:
    """Return a bias-free convolution and batch norm; a stride rounds the map size up."""
    conv = nn.Conv2d(in_dim, dim, kernel_size, stride=stride, padding=kernel_size // 2, bias=False, **dd)
    return [conv, nn.BatchNorm2d(dim, **dd)]


class Stem(nn.Module):
    """Downsample [B, in_chans, H, W] to [B, dim, ceil(H / 4), ceil(W / 4)], channels_last."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x.contiguous(memory_format=torch.channels_last))).relu()
        return self.norm2(self.conv2(x)).relu()


class BasicBlock(nn.Module):
    """ResNet's basic block: two 3 x 3 convolutions and a shortcut. `act`: whether ReLU follows the sum."""

    def __init__(self, in_dim: int, dim: int, *, stride: int = 1, act: bool = True, **dd: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_dim, dim, 3, stride=stride, **dd)
        self.conv2, self.bn2 = conv_norm(dim, dim, 3, **dd)
        changes = stride > 1 or in_dim != dim
        self.downsample = nn.Sequential(*conv_norm(in_dim, dim, 1, stride=stride, **dd)) if changes else nn.Identity()
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.act(y + self.downsample(x))


class Bottleneck(nn.Module):
    """ResNet's bottleneck, twice as wide outside as inside, without ReLU after the sum."""

    def __init__(self, in_dim: int, inner_dim: int, *, stride: int = 1, **dd: Any) -> None:
        super().__init__()
        dim = 2 * inner_dim
        self.conv1, self.bn1 = conv_norm(in_dim, inner_dim, 1, **dd)
        self.conv2, self.bn2 = conv_norm(inner_dim, inner_dim, 3, stride=stride, **dd)
        self.conv3, self.bn3 = conv_norm(inner_dim, dim, 1, **dd)
        changes = stride > 1 or in_dim != dim
        self.downsample = nn.Sequential(*conv_norm(in_dim, dim, 1, stride=stride, **dd)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return self.bn3(self.conv3(y)) + self.downsample(x)


class EVANBlock(nn.Module):
    """A VAN block with SDLSKA as its gate, followed by a layer norm; [B, C, H, W]."""

    def __init__(self, dim: int, kernel_size: int, *, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = GatedProjections(dim, SDLSKA(dim, kernel_size, **dd), **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, 4 * dim, drop=0.0, **dd)
        self.layer_scale_1 = nn.Parameter(torch.empty(dim, **dd))
        self.layer_scale_2 = nn.Parameter(torch.empty(dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the scales, and the convolutions as normal by their fan-out with zero biases."""
        nn.init.constant_(self.layer_scale_1, 1e-2)
        nn.init.constant_(self.layer_scale_2, 1e-2)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
                nn.init.normal_(conv.weight, std=math.sqrt(2.0 / fan_out))
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        scale_1, scale_2 = self.layer_scale_1.view(-1, 1, 1), self.layer_scale_2.view(-1, 1, 1)
        x = torch.addcmul(x, self.drop_path(self.attn(self.norm1(x))), scale_1)
        return self.norm(torch.addcmul(x, self.drop_path(self.mlp(self.norm2(x))), scale_2))


class PagFM(nn.Module):
    """Fuse detail and context by PIDNet's pixel-attention guidance, at the size of the detail.

    The weight of the context at a position is the sigmoid of the dot product of their projections.
    """

    def __init__(self, dim: int, inner_dim: int, **dd: Any) -> None:
        super().__init__()
        self.f_x = nn.Sequential(*conv_norm(dim, inner_dim, 1, **dd))
        self.f_y = nn.Sequential(*conv_norm(dim, inner_dim, 1, **dd))

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        size = [detail.shape[2], detail.shape[3]]
        query = F.interpolate(self.f_y(context), size=size, mode="bilinear", align_corners=False)
        share = (self.f_x(detail) * query).sum(1, keepdim=True).sigmoid()
        context = F.interpolate(context, size=size, mode="bilinear", align_corners=False)
        return (1 - share) * detail + share * context


class Beginning(nn.Module):
    """Start the detail branch from the stage's own map."""

    def forward(self, context: Tensor, detail: Tensor) -> Tensor:
        return context


class Bypass(nn.Module):
    """Pass the detail on unchanged."""

    def forward(self, context: Tensor, detail: Tensor) -> Tensor:
        return detail


class DetailBranch(nn.Module):
    """Apply layers of the detail branch, then fuse the stage's context into the result."""

    def __init__(self, layers: Sequence[nn.Module], context_dim: int, dim: int, *, act: bool, **dd: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.layers = nn.Sequential(*layers)
        self.compress = nn.Sequential(*conv_norm(context_dim, dim, 1, **dd))
        self.fuse = PagFM(dim, dim // 2, **dd)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, context: Tensor, detail: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            detail = checkpoint_seq(self.layers, detail)
        else:
            detail = self.layers(detail)
        return self.act(self.fuse(detail, self.compress(context)))


class BilateralStage(Stage):
    """Run a stage of the context branch and update the detail alongside."""

    def __init__(self, blocks: Sequence[nn.Module], *, detail: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(blocks, **kwargs)
        self.detail = detail or Beginning()

    def deepen(self, context: Tensor) -> Tensor:
        context = self.downsample(context)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, context)
        else:
            return self.blocks(context)

    def forward(self, context: Tensor, detail: Tensor) -> tuple[Tensor, Tensor]:
        context = self.deepen(context)
        return context, self.detail(context, detail)


class JoiningStage(BilateralStage):
    """The last stage of the classifier: downsample the detail to the size of the context and add it."""

    def __init__(self, blocks: Sequence[nn.Module], *, project: nn.Module, down: nn.Module, **kwargs: Any) -> None:
        super().__init__(blocks, detail=Bypass(), **kwargs)
        self.project, self.down = project, down

    def forward(self, context: Tensor, detail: Tensor) -> tuple[Tensor, Tensor]:
        return (self.project(self.deepen(context)) + self.down(detail)).relu(), detail


def _residual(in_dim: int, dim: int, depth: int, stride: int, *, act: bool = True, **dd: Any) -> list[nn.Module]:
    """Return a sequence of basic blocks; `act`: whether ReLU follows the last one."""
    return [
        BasicBlock(dim if i else in_dim, dim, stride=1 if i else stride, act=act or i < depth - 1 or depth == 1, **dd)
        for i in range(depth)
    ]


def bilateral_stages(
    depths: Sequence[int], dim: int, drop_paths: Sequence[Sequence[float]], **dd: Any
) -> list[BilateralStage]:
    """Return the four stages shared by classifier and segmenter; `depths` and `drop_paths` are those of `BEVANet`."""
    detail_dim = 2 * dim
    early = _residual(detail_dim, detail_dim, depths[0], 1, act=False, **dd)
    late = [BasicBlock(detail_dim, detail_dim, **dd), EVANBlock(detail_dim, DETAIL_KERNEL, **dd)]
    return [
        BilateralStage(_residual(dim, dim, depths[0], 1, **dd), dim=dim, reduction=4),
        BilateralStage(_residual(dim, 2 * dim, depths[1], 2, **dd), dim=2 * dim, reduction=8),
        BilateralStage(
            _residual(2 * dim, 4 * dim, depths[2], 2, **dd),
            dim=4 * dim,
            reduction=16,
            detail=DetailBranch(early, 4 * dim, detail_dim, act=True, **dd),
        ),
        BilateralStage(
            [EVANBlock(8 * dim, CONTEXT_KERNEL, drop_path=rate, **dd) for rate in drop_paths[3]],
            dim=8 * dim,
            reduction=32,
            downsample=BasicBlock(4 * dim, 8 * dim, stride=2, **dd),
            detail=DetailBranch(late, 8 * dim, detail_dim, act=False, **dd),
        ),
    ]


class BEVANet(HierarchicalBackbone):
    """BEVANet's classifier.

    Args:
        depths: residual blocks of the first three stages, EVAN blocks of the other two. The detail branch begins with
            as many blocks as the first stage.
        embed_dim: channels of the first stage; each later one has twice as many.
        last_dim: channels that are pooled.
        drop_path_rate: stochastic depth of the context's EVAN blocks.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 3, 2, 2),
        embed_dim: int = 32,
        last_dim: int = 2048,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(depths) != 5 or min(depths) < 1:
            raise ValueError(f"depths needs five entries of at least 1; got {tuple(depths)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dim = embed_dim
        down = [
            *(*conv_norm(4 * dim, 8 * dim, 3, stride=2, **dd), nn.ReLU(inplace=True)),
            *conv_norm(8 * dim, 16 * dim, 3, stride=2, **dd),
        ]
        last = JoiningStage(
            [EVANBlock(16 * dim, CONTEXT_KERNEL, drop_path=rate, **dd) for rate in drop_paths[4]],
            dim=16 * dim,
            reduction=32,
            downsample=Bottleneck(8 * dim, 8 * dim, **dd),
            project=Bottleneck(16 * dim, 8 * dim, **dd),
            down=nn.Sequential(*down),
        )
        super().__init__(
            Stem(in_chans, dim, **dd),
            [*bilateral_stages(depths, dim, drop_paths, **dd), last],
            ClassifierHead(last_dim, num_classes, global_pool, drop_rate, input_fmt="NCHW", **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NCHW",
        )
        self.last_conv: nn.Module = nn.Sequential(*conv_norm(16 * dim, last_dim, 1, **dd), nn.ReLU(inplace=True))
        self.ends_in_detail = False  # True if pruned such that the last requested map is the detail
        self.refine: nn.Module = Bottleneck(2 * dim, 2 * dim, **dd)
        self.stages: Any = nn.ModuleList(self.stages)  # torch.nn.Sequential cannot pass on two maps
        self.num_features = last_dim
        self.feature_info[1].update(num_chs=4 * dim, module="refine")

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group modules by depth; modules of a stage outside its blocks join the last block's group."""
        groups: dict[str, Any] = super().group_matcher(coarse)
        others = r"^stages\.(\d+)\.(?:detail|project|down)\."
        groups["blocks"] += [(r"^(?:refine|last_conv)\.", (99999,)), *([] if coarse else [(others, (99999,))])]
        return groups

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, Stage | DetailBranch):
                module.grad_checkpointing = enable

    def forward_branches(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return both branches after four stages: context [B, 8 * dim, H / 32, W / 32], detail [B, 2 * dim, H / 8,
        W / 8], and the detail as it left the third stage."""
        context = self.stem(x)
        detail = earlier = context
        for i, stage in enumerate(self.stages):
            if i < 4:
                earlier = detail
                context, detail = stage(context, detail)
        return context, detail, earlier

    def forward_features(self, x: Tensor) -> Tensor:
        context = self.stem(x)
        detail = context
        for i, stage in enumerate(self.stages):
            if i == 4:
                detail = self.refine(detail)
            context, detail = stage(context, detail)
        return self.refine(detail) if self.ends_in_detail else self.last_conv(context)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return intermediate features as the base class does; index 1 is the detail at the end of its branch."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC'; got {output_fmt!r}")
        taken, _ = feature_take_indices(len(self.stages), indices)  # type: ignore[arg-type]
        count = _stages_for(taken) if stop_early else len(self.stages)
        context = self.stem(x)
        detail = context
        taps = {}
        for i, stage in enumerate(self.stages[:count]):
            context, detail = stage(context, detail)
            taps[i] = context
            if i == 3:
                taps[1] = detail = self.refine(detail)
        intermediates = [self._tap(taps[i], i, norm, output_fmt) for i in sorted(taken)]
        if intermediates_only:
            return intermediates
        if self.ends_in_detail:
            return detail, intermediates
        return (self.last_conv(context) if count == len(self.stages) else context), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all that these intermediates do not need, including the detail branch; return absolute indices."""
        taken, last = feature_take_indices(len(self.stages), indices)  # type: ignore[arg-type]
        count = _stages_for(taken)
        shortened = count < len(self.stages)
        self.ends_in_detail = last == 1
        self.num_features = self.feature_info[last]["num_chs"]
        self.stages = self.stages[:count]
        if not {1, 4} & set(taken):
            self.refine = nn.Identity()
            for stage in self.stages[2:]:
                stage.detail = Bypass()
        if shortened or prune_head:
            self.last_conv = nn.Identity()
            self.num_classes = 0
            self.head.reset(0, "", reset_other=True, in_features=self.num_features, **get_device_dtype(self))
            self.head_hidden_size = self.head.num_features
        else:
            self.num_features = self.head.num_features
        return taken


def _stages_for(indices: Sequence[int]) -> int:
    """Return the number of stages that these feature maps need."""
    return max(4 if index == 1 else index + 1 for index in indices)


_PARTS = [
    (r"(?<!mlp)\.(?:pw|dw)conv\.(weight|bias)$", r".\1"),  # the authors wrap each convolution in a module of its own
    (r"\bDW_conv_([hv])\.", r"conv0\1."),
    (r"\bDW_conv\.", "conv0."),
    (r"\bDW_D_conv_([hv])\.", r"conv_spatial_\1."),
    (r"(spatial_gating_unit\.|^)pwconv\.", r"\1conv1."),
    (r"\bFS_kernel\.", "select."),
    (r"\bfc_reduce\.", "reduce."),
    (r"\bfc_expand_small\.", "expand.0."),
    (r"\bfc_expand_big_h\.", "expand.1."),
    (r"\bfc_expand_big_v\.", "expand.2."),
    (r"\bconv_squeeze\.", "squeeze."),
]


def rename_parts(name: str) -> str:
    """Convert the authors' name of a parameter of a block or mixer to ours, anywhere in a network."""
    for pattern, replacement in _PARTS:
        name = re.sub(pattern, replacement, name)
    return name


TRUNK = [
    *((rf"conv1\.{k}\.", f"stem.{ours}.") for k, ours in enumerate(("conv1", "norm1", "", "conv2", "norm2")) if ours),
    *((rf"layer{i + 1}\.", f"stages.{i}.blocks.") for i in range(2)),
    (r"layer3_semantic\.", "stages.2.blocks."),
    (r"layer3_detail\.", "stages.2.detail.layers."),
    (r"layer4_down_semantic\.0\.", "stages.3.downsample."),
    *((rf"layer4_semantic_{k + 1}\.", f"stages.3.blocks.{k}.") for k in range(2)),
    *((rf"norm4_semantic_{k + 1}\.", f"stages.3.blocks.{k}.norm.") for k in range(2)),
    (r"layer4_detail_conv\.0\.", "stages.3.detail.layers.0."),
    (r"layer4_detail\.", "stages.3.detail.layers.1."),
    (r"norm4_detail\.", "stages.3.detail.layers.1.norm."),
    *((rf"compression{k}\.", f"stages.{k - 1}.detail.compress.") for k in (3, 4)),
    *((rf"fuse_sd_{k}\.", f"stages.{k - 1}.detail.fuse.") for k in (3, 4)),
    (r"layer5_detail_semantic\.0\.", "refine."),
]
"""(pattern, replacement) from the authors' names to ours, for the stages that classifier and segmenter share."""

_CLASSIFIER = [
    (r"layer5_down_semantic_cls\.0\.", "stages.4.downsample."),
    *((rf"layer5_semantic_{k + 1}_cls\.", f"stages.4.blocks.{k}.") for k in range(2)),
    *((rf"norm5_semantic_{k + 1}_cls\.", f"stages.4.blocks.{k}.norm.") for k in range(2)),
    (r"layer5_semantic_bn_cls\.0\.", "stages.4.project."),
    (r"layer5_down\.", "stages.4.down."),
    (r"last_layer\.", "last_conv."),
    (r"head\.(weight|bias)", r"head.fc.\1"),
]


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename the authors' parameters to ours."""
    state_dict = {rename_parts(name): tensor for name, tensor in unwrap(checkpoint).items()}
    state_dict = rename(state_dict, [*TRUNK, *_CLASSIFIER])
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_bevanet(name: str, pretrained: bool, **kwargs: Any) -> BEVANet:
    if pretrained:
        refuse_drive(name, kwargs)
    return build_model_with_cfg(
        BEVANet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 4), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(drive_id: str) -> dict[str, Any]:
    return {
        "url": drive_url(drive_id),
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        "paper_name": "BEVANet: Bilateral Efficient Visual Attention Network for Real-time Semantic Segmentation",
        "paper_ids": "arXiv:2508.07300",
        "origin_url": "https://github.com/maomao0819/BEVANet",
    }


default_cfgs = generate_default_cfgs(
    {
        "bevanet_s.in1k": _cfg("1adaWjRHfoS97lxyEZHkM0vOn_1KFbI7j"),
        "bevanet.in1k": _cfg("1klSGNlUs6h7FHJ_lvOvKQEyzeWx_wrd0"),
    }
)


@register_model
def bevanet_s(pretrained: bool = False, **kwargs: Any) -> BEVANet:
    return _create_bevanet("bevanet_s", pretrained, **kwargs)


@register_model
def bevanet(pretrained: bool = False, **kwargs: Any) -> BEVANet:
    model_args = {"depths": (2, 2, 4, 2, 2), "embed_dim": 64}
    return _create_bevanet("bevanet", pretrained, **{**model_args, **kwargs})
