"""STViT-R: Swin whose third stage mixes a few semantic tokens in most of its blocks, and recovers the map from them.

Paper: Chang et al., "Making Vision Transformers Efficient from a Token Sparsification View" (CVPR 2023, arXiv
2303.08685). Code: github.com/changsn/STViT-R and, for `stvitr_det_*`, STViT-R-Object-Detection, both MIT. Weights of
both: huggingface.co/csncsn/STViT-R.

What is unusual:
* The third stage repeats units of six blocks: window attention on the map; two blocks in which the maxima of each
  window, 9 for 49 positions, gather from their surroundings; window attention and attention among these tokens alone;
  and one block that writes them back to the map. `depths` counts the units, so the published 18 blocks are 3. After
  every unit the map is complete again: features need no reconstruction.
* The released classifier matches its training logs: layer scale only in blocks that process semantic tokens, no
  learned token positions ("global"), and no shortcut around a unit's first attention, whose output is the tokens.
* The published classifier accepts 224-pixel images only. Here windows are spread evenly over any map (see
  `mixers/semantic_tokens.py`), with the same results at 224 pixels. An axis of one window is not shifted.
* The published detector is another graph with the same weights: the map is zero-padded to whole windows, tokens attend
  to zero-padded windows of it with shortcuts around, and the map attends to zero-padded windows of tokens. It has norms
  for its four outputs and no classifier: loading its file leaves the classifier at its initialisation.
* The detector's mask is kept as published, since its weights were trained with it. It hides the zeros outside the
  padded map, but of the padding to whole windows only the corner where both axes are padded, or the strip if one is;
  if neither is, it hides nothing, not even the zeros outside. In the recovery, that corner has as many semantic tokens
  as it has positions on the map.
* The stem has two convolutions; the image is first padded to a multiple of 4. Exported files have one image size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.fx
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    DropPath,
    LayerScale,
    Mlp,
    calculate_drop_path_rates,
    register_notrace_module,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels._compat import divide_with_remainder, is_exporting
from ...mixers.semantic_tokens import (
    CrossAttention,
    WindowCrossAttention,
    cut_windows,
    join_windows,
    pool_to_tokens,
)
from ._checkpoints import StateDict, keep_fresh_norms, refuse_mismatch, rename, unwrap
from ._hierarchical import HierarchicalBackbone, Stage
from .dinat_s import PatchMerging

for _name in ("pool_to_tokens", "_part_of", "_seen"):  # they compute with sizes, which are not concrete under FX
    torch.fx.wrap(_name)

_WINDOW = 7
_TOKENS = 3  # a window's semantic tokens along each axis
_UNIT = ("window", "generate", "refine", "local", "mix", "recover")  # the six blocks of a unit, in order


def _beyond(length: int, side: int) -> int:
    """Return the padding of an axis to whole windows, written so that the exporter can prove divisibility."""
    return (length + side - 1) // side * side - length


class Stem(nn.Module):
    """Embed [B, in_chans, H, W] as [B, ceil(H / 4), ceil(W / 4), dim]."""

    def __init__(self, in_chans: int, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        args: dict[str, Any] = {"stride": 2, "act_layer": nn.Hardswish, "device": device, "dtype": dtype}
        self.conv1 = ConvNormAct(in_chans, dim // 2, 3, **args)
        self.conv2 = ConvNormAct(dim // 2, dim, 3, **args)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, [0, _beyond(x.shape[3], 4), 0, _beyond(x.shape[2], 4)])
        return self.conv2(self.conv1(x)).permute(0, 2, 3, 1)


def _part_of(x: Tensor, down: int, across: int, height: int, width: int) -> Tensor:
    """Return `height` x `width` positions of a map from (down, across) on, with circular indexing.

    Unlike rolling and slicing, this gives the exporter a known output size. Offsets are less than a side of the map.
    """
    _, rows = divide_with_remainder(torch.arange(height, device=x.device) + (down + x.shape[1]), x.shape[1])
    _, columns = divide_with_remainder(torch.arange(width, device=x.device) + (across + x.shape[2]), x.shape[2])
    return x.index_select(1, rows).index_select(2, columns)


def _parts(length: int, turned: int, side: int, device: torch.device) -> Tensor:
    """Return the region label of each position of an axis, [length]: the wrapped part of the last window differs."""
    position = torch.arange(length, device=device)
    return (position >= length - side).int() + (position >= length - turned).int()


def _wrapping_mask(x: Tensor, down: int, across: int, side: int) -> Tensor:
    """Return Swin's mask of position pairs that only wrapping brought together: [windows, queries, keys].

    While exporting, the mask covers the windows of all images, so that no axis has the length of one image's windows.
    """
    rows, columns = _parts(x.shape[1], down, side, x.device), _parts(x.shape[2], across, side, x.device)
    part = (3 * rows[:, None] + columns)[None, :, :, None]
    part = cut_windows(part.expand(x.shape[0] if is_exporting() else 1, -1, -1, -1), side)
    return (part != part.transpose(1, 2)).to(x.dtype) * -100.0


class WindowBlock(nn.Module):
    """Apply Swin's block to [B, H, W, C]: attention in windows, optionally shifted, then an MLP.

    A map that does not consist of whole windows is zero-padded at the bottom and on the right before it is shifted.

    Args:
        shift: offset of the windows, with wrap-around.
        shifts_single: whether to shift an axis of one window as well.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        shift: int,
        shifts_single: bool,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.window_size, self.shift, self.shifts_single = window_size, shift, shifts_single
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = WindowAttention(dim, num_heads, window_size=window_size, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _shift_along(self, windows: int) -> int:
        """Return the shift along an axis without branching: the number of windows may be symbolic while exporting."""
        return self.shift if self.shifts_single else self.shift * (1 - 1 // windows)

    def _attend(self, x: Tensor) -> Tensor:
        batch, height, width, side = x.shape[0], x.shape[1], x.shape[2], self.window_size
        below, right = _beyond(height, side), _beyond(width, side)
        padded = is_exporting() or below > 0 or right > 0
        if padded:
            x = F.pad(x, [0, 0, 0, right, 0, below])
        rows, columns = (height + below) // side, (width + right) // side
        down, across = self._shift_along(rows), self._shift_along(columns)
        mask: Tensor | None = None
        if self.shift > 0:
            mask = _wrapping_mask(x, down, across, side)
            x = _part_of(x, down, across, height + below, width + right)
        windows = self.attn(cut_windows(x, side), mask)
        x = join_windows(windows, batch, height + below, width + right, side)
        return _part_of(x, -down, -across, height, width) if padded or self.shift > 0 else x

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self._attend(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


register_notrace_module(WindowBlock)


class SemanticBlock(nn.Module):
    """Apply attention between two token sets and an MLP as pre-norm branches with layer scale; [B, H, W, C].

    Args:
        shortcut: whether the attention is a residual branch.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        init_values: float,
        proj_drop: float,
        drop_path: float,
        shortcut: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.shortcut = shortcut
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 and shortcut else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        attended = self.ls1(self.attn(self.norm1(x), self.norm1(context), mask))
        x = x + self.drop_path1(attended) if self.shortcut else attended
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SemanticUnit(nn.Module):
    """Apply one unit, six blocks, of the classifier's third stage; [B, H, W, C].

    Args:
        drop_paths: rates of the six blocks.
    """

    shortcut = False  # around the first attention of the tokens
    windows: ClassVar[dict[str, dict[str, Any]]] = {
        "generate": {"window_size": _TOKENS, "key_window_size": 10, "sees_query": True},
        "local": {"window_size": _TOKENS, "key_window_size": _TOKENS},
    }

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        init_values: float,
        proj_drop: float,
        drop_paths: Sequence[float],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.window_size, self.tokens = _WINDOW, _TOKENS
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        args: dict[str, Any] = {"mlp_ratio": mlp_ratio, "proj_drop": proj_drop, **dd}
        rates: dict[str, float] = dict(zip(_UNIT, drop_paths, strict=True))

        def block(name: str, shortcut: bool = True) -> SemanticBlock:
            kind = WindowCrossAttention if name in self.windows else CrossAttention
            attn = kind(dim, num_heads, proj_drop=proj_drop, **self.windows.get(name, {}), **dd)
            return SemanticBlock(dim, attn, init_values=init_values, drop_path=rates[name], shortcut=shortcut, **args)

        self.window = WindowBlock(
            dim, num_heads, window_size=_WINDOW, shift=0, shifts_single=False, drop_path=rates["window"], **args
        )
        self.generate = block("generate", self.shortcut)
        self.refine = block("refine")
        self.local = block("local")
        self.mix = block("mix")
        self.recover = block("recover")

    def forward(self, x: Tensor) -> Tensor:
        x = self.window(x)
        tokens = self.generate(pool_to_tokens(x, self.window_size, self.tokens), x)
        tokens = self.refine(tokens, torch.cat([tokens.flatten(1, 2), x.flatten(1, 2)], dim=1))
        tokens = self.local(tokens, tokens)
        tokens = self.mix(tokens, tokens)
        return self.recover(x, tokens)


def _surrounded(x: Tensor, more: int) -> Tensor:
    """Zero-pad a map on all sides so that its windows, `more` wider and higher, fit."""
    before, after = more // 2, (more + 1) // 2
    return F.pad(x, [0, 0, before, after, before, after])


def _seen(surrounded: Tensor, rows: int, columns: int, below: int, right: int) -> Tensor:
    """Return the published mask, [H, W] for a zero-padded map that contains `rows` x `columns` positions.

    Args:
        below, right: rows and columns that pad the image's map to whole windows.
    """
    before = (surrounded.shape[1] - rows) // 2
    row = torch.arange(surrounded.shape[1], device=surrounded.device)[:, None] - before
    column = torch.arange(surrounded.shape[2], device=surrounded.device) - before
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    # Python's slice [-n:] is the last n elements, but all of them if n is 0.
    last_rows = row >= (rows - below) * (1 - 1 // (below + 1))
    last_columns = column >= (columns - right) * (1 - 1 // (right + 1))
    return inside & ~(last_rows & last_columns)


class WindowedSemanticUnit(SemanticUnit):
    """Apply one unit of the detector's third stage, [B, H, W, C], with windows wherever the classifier is global."""

    shortcut = True
    windows: ClassVar[dict[str, dict[str, Any]]] = {
        "generate": {"window_size": _TOKENS, "key_window_size": 2 * _WINDOW},
        "refine": {"window_size": _TOKENS, "key_window_size": 3 * _WINDOW},
        "local": {"window_size": _TOKENS, "key_window_size": _TOKENS},
        "recover": {"window_size": _WINDOW, "key_window_size": 9 * _TOKENS},
    }

    def forward(self, x: Tensor) -> Tensor:
        x = self.window(x)
        height, width, window, tokens_side = x.shape[1], x.shape[2], self.window_size, self.tokens
        below, right = _beyond(height, window), _beyond(width, window)
        x = F.pad(x, [0, 0, 0, right, 0, below])

        surrounded = _surrounded(x, window)
        visible = _seen(surrounded, x.shape[1], x.shape[2], below, right)
        tokens = self.generate(pool_to_tokens(x, window, tokens_side), surrounded, visible)
        surrounded = _surrounded(x, 2 * window)
        visible = _seen(surrounded, x.shape[1], x.shape[2], below, right)
        tokens = self.refine(tokens, surrounded, visible)
        tokens = self.local(tokens, tokens)
        tokens = self.mix(tokens, tokens)
        surrounded = _surrounded(tokens, 8 * tokens_side)
        visible = _seen(surrounded, tokens.shape[1], tokens.shape[2], below, right)
        return _part_of(self.recover(x, surrounded, visible), 0, 0, height, width)


class STViTR(HierarchicalBackbone):
    """STViT-R.

    Args:
        depths: blocks of each stage; in the third stage units of six blocks.
        embed_dim: channels of the first stage; each later one has twice as many.
        detection: whether to build the published detection backbone's graph, with norms of the features.
        init_values: initial layer scale of the blocks that process semantic tokens.
        drop_rate, proj_drop_rate: dropout before the classifier, and after the projections of attention and MLP.
    """

    exports_free_sizes = False  # windows of symbolic sizes: tracing takes an hour, and ONNX export does not finish

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 3, 2),
        embed_dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        detection: bool = False,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-5,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(f"depths and num_heads have an entry for each of four stages; got {depths}, {num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        args: dict[str, Any] = {"mlp_ratio": mlp_ratio, "proj_drop": proj_drop_rate, **dd}
        counts = [depth * (len(_UNIT) if i == 2 else 1) for i, depth in enumerate(depths)]
        rates: Any = calculate_drop_path_rates(drop_path_rate, counts, stagewise=True)

        def block(stage: int, number: int) -> nn.Module:
            dim, heads = embed_dim * 2**stage, num_heads[stage]
            if stage == 2:
                unit = WindowedSemanticUnit if detection else SemanticUnit
                drop_paths = rates[stage][number * len(_UNIT) : (number + 1) * len(_UNIT)]
                return unit(dim, heads, init_values=init_values, drop_paths=drop_paths, **args)
            return WindowBlock(
                dim,
                heads,
                window_size=_WINDOW,
                shift=_WINDOW // 2 if number % 2 else 0,
                shifts_single=detection,
                drop_path=rates[stage][number],
                **args,
            )

        stages = [
            Stage(
                [block(i, number) for number in range(depth)],
                dim=embed_dim * 2**i,
                reduction=4 * 2**i,
                downsample=PatchMerging(embed_dim * 2 ** (i - 1), **dd) if i else None,
                out_norm=nn.LayerNorm(embed_dim * 2**i, **dd) if detection else None,
            )
            for i, depth in enumerate(depths)
        ]
        dim = stages[-1].dim
        super().__init__(
            Stem(in_chans, embed_dim, **dd),
            stages,
            ClassifierHead(dim, num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd),
            norm=nn.LayerNorm(dim, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: HierarchicalBackbone) -> StateDict:
    """Rename published parameters to ours; detectors have no classifier, so the model keeps its own."""
    derived = ("attn_mask", "relative_position_index")
    state_dict = {name: tensor for name, tensor in unwrap(checkpoint).items() if not name.endswith(derived)}
    rules = [
        (r"patch_embed\.proj\.0\.c\.", "stem.conv1.conv."),
        (r"patch_embed\.proj\.0\.bn\.", "stem.conv1.bn."),
        (r"patch_embed\.proj\.2\.c\.", "stem.conv2.conv."),
        (r"patch_embed\.proj\.2\.bn\.", "stem.conv2.bn."),
        (r"norm(\d)\.", r"stages.\1.out_norm."),
        (r"head\.(weight|bias)", r"head.fc.\1"),
        *((rf"layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(len(model.stages))),
    ]
    depth = len(_UNIT)
    units: Any = model.stages[2].blocks if len(model.stages) > 2 else ()
    for number in range(depth * len(units)):
        ours = f"stages.2.blocks.{number // depth}.{_UNIT[number % depth]}."
        rules += [
            (rf"layers\.2\.blocks\.{number}\.layer_scale_(\d)", rf"{ours}ls\1.gamma"),
            (rf"layers\.2\.blocks\.{number}\.", ours),
        ]
    state_dict = rename(state_dict, [*rules, (r"layers\.", "stages.")])
    if any(".out_norm." in name for name in state_dict):
        head_weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
        state_dict = {**head_weights, **state_dict}
    state_dict = keep_fresh_norms(state_dict, model)
    refuse_mismatch(state_dict, model)
    return state_dict


def _create_stvitr(name: str, pretrained: bool, **kwargs: Any) -> STViTR:
    return build_model_with_cfg(
        STViTR,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": "csncsn/STViT-R",
        "hf_hub_filename": file,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/changsn/STViT-R",
        "paper_name": "Making Vision Transformers Efficient from a Token Sparsification View",
        "paper_ids": "arXiv:2303.08685",
        **kwargs,
    }


def _detector(size: str) -> dict[str, Any]:
    return _cfg(
        f"cascade_mask_rcnn_swin_{size}_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_3x_coco.pth",
        origin_url="https://github.com/changsn/STViT-R-Object-Detection",
        description="backbone of a detector: no classifier",
    )


default_cfgs = generate_default_cfgs(
    {
        "stvitr_swin_small.in1k": _cfg("STViT-R-Swin-S.pth"),
        "stvitr_swin_base.in1k": _cfg("STViT-R-Swin-B.pth"),
        "stvitr_det_swin_small.coco": _detector("small"),
        "stvitr_det_swin_base.coco": _detector("base"),
    }
)

_SMALL = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.3}
_BASE = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.4}


@register_model
def stvitr_swin_small(pretrained: bool = False, **kwargs: Any) -> STViTR:
    return _create_stvitr("stvitr_swin_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def stvitr_swin_base(pretrained: bool = False, **kwargs: Any) -> STViTR:
    return _create_stvitr("stvitr_swin_base", pretrained, **{**_BASE, **kwargs})


@register_model
def stvitr_det_swin_small(pretrained: bool = False, **kwargs: Any) -> STViTR:
    model_args = {**_SMALL, "detection": True, "drop_path_rate": 0.2}
    return _create_stvitr("stvitr_det_swin_small", pretrained, **{**model_args, **kwargs})


@register_model
def stvitr_det_swin_base(pretrained: bool = False, **kwargs: Any) -> STViTR:
    model_args = {**_BASE, "detection": True, "drop_path_rate": 0.3}
    return _create_stvitr("stvitr_det_swin_base", pretrained, **{**model_args, **kwargs})
