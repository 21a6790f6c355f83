"""A table of our models: parameters, multiply-adds, image size, published accuracy, licence.

    python -m mixerzoo.vision.models 'dinat_*'

Unusual: parameters and multiply-adds are counted on the meta device, from shapes alone, so no weights are made and the
largest model takes as long as the smallest. Accuracies are those that the authors state for the default weights.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from typing import NamedTuple

import timm
import torch

from . import backbones
from .training.summary import summarize

# ImageNet-1k top-1 at the size of the table, as stated beside the default weights: NAT.md and DiNAT.md of
# github.com/SHI-Labs/Neighborhood-Attention-Transformer; the READMEs of github.com/ziplab/LITv2,
# github.com/AILab-CVC/UniRepLKNet, github.com/Visual-Attention-Network/VAN-Classification and
# github.com/TerryPei/EfficientVMamba; van_b4, whose weights the authors do not host, from mmpretrain; VMamba from
# assets/performance.md of github.com/MzeroMiko/VMamba; of the models with fewer tokens the READMEs of
# github.com/facebookresearch/ToMe, youweiliang/evit, raoyongming/DynamicViT, zihangJiang/TokenLabeling and
# changsn/STViT-R. Ours load those weights, and give those outputs.
STATED_TOP1 = {
    "nat_mini.in1k": 81.8,
    "nat_tiny.in1k": 83.2,
    "nat_small.in1k": 83.7,
    "nat_base.in1k": 84.3,
    "dinat_mini.in1k": 81.8,
    "dinat_tiny.in1k": 82.7,
    "dinat_small.in1k": 83.8,
    "dinat_base.in1k": 84.4,
    "dinat_large.in22k_ft_in1k": 86.6,
    "dinat_large_384.in22k_ft_in1k": 87.4,
    "dinat_large_11x11_384.in22k_ft_in1k": 87.5,
    "dinat_s_tiny.in1k": 81.8,
    "dinat_s_small.in1k": 83.5,
    "dinat_s_base.in1k": 83.8,
    "dinat_s_large.in22k_ft_in1k": 86.5,
    "dinat_s_large_384.in22k_ft_in1k": 87.4,
    "nat_isotropic_small.in1k": 80.0,
    "nat_isotropic_base.in1k": 81.6,
    "dinat_isotropic_small.in1k": 80.8,
    "dinat_isotropic_base.in1k": 82.1,
    "vitrpb_small.in1k": 81.2,
    "vitrpb_base.in1k": 82.5,
    "litv2_s.in1k": 82.0,
    "litv2_m.in1k": 83.3,
    "litv2_b.in1k": 83.6,
    "unireplknet_a.in1k": 77.0,
    "unireplknet_f.in1k": 78.6,
    "unireplknet_p.in1k": 80.2,
    "unireplknet_n.in1k": 81.6,
    "unireplknet_t.in1k": 83.2,
    "unireplknet_s.in1k": 83.9,
    "unireplknet_b.in22k_ft_in1k": 87.4,
    "unireplknet_l.in22k_ft_in1k": 87.9,
    "unireplknet_xl.in22k_ft_in1k": 88.0,
    "van_b0.in1k": 75.4,
    "van_b1.in1k": 81.1,
    "van_b2.in1k": 82.8,
    "van_b3.in1k": 83.9,
    "van_b4.in1k": 84.1,
    "vim_tiny.in1k": 76.1,
    "vim_tiny_stride8.in1k": 78.3,
    "vim_small.in1k": 80.5,
    "vim_small_stride8.in1k": 81.6,
    "vim_base.in1k": 81.9,
    "vig_tiny.in1k": 77.2,
    "vig_small.in1k": 81.7,
    "vig_base.in1k": 82.6,
    "vig_h_tiny.in1k": 82.8,
    "vig_h_small.in1k": 83.8,
    "vig_h_base.in1k": 84.2,
    "mobilemamba_t2.in1k": 73.6,
    "mobilemamba_t4.in1k": 76.1,
    "mobilemamba_s6.in1k": 78.0,
    "mobilemamba_b1.in1k": 79.9,
    "mobilemamba_b2.in1k": 81.6,
    "mobilemamba_b4.in1k": 82.5,
    "vmamba_tiny_s1l8.in1k": 82.6,
    "vmamba_tiny_s2l5.in1k": 82.5,
    "vmamba_small_s1l20.in1k": 83.3,
    "vmamba_small_s2l15.in1k": 83.6,
    "vmamba_base_s1l20.in1k": 83.8,
    "vmamba_base_s2l15.in1k": 83.9,
    "vmambav0_tiny.in1k": 82.2,
    "vmambav0_small.in1k": 83.5,
    "vmambav0_base.in1k": 83.7,
    "efficientvmamba_tiny.in1k": 76.5,
    "efficientvmamba_small.in1k": 78.7,
    "efficientvmamba_base.in1k": 81.8,
    "tome_mae_vit_base_patch16_224.r16_in1k": 81.9,
    "tome_mae_vit_large_patch16_224.r8_in1k": 85.1,
    "tome_mae_vit_huge_patch14_224.r7_in1k": 86.5,
    "evit_deit_small_patch16_224.k07_fuse_in1k": 79.5,
    "dynamicvit_deit_256_patch16_224.r07_in1k": 76.5,
    "dynamicvit_deit_small_patch16_224.r07_in1k": 79.3,
    "dynamicvit_deit_base_patch16_224.r07_in1k": 81.4,
    "dynamicvit_lvvit_small.r07_in1k": 83.1,
    "dynamicvit_lvvit_medium.r07_in1k": 83.8,
    "dynamicvit_convnext_tiny.r07_in1k": 81.6,
    "dynamicvit_convnext_small.r07_in1k": 82.6,
    "dynamicvit_convnext_base.r07_in1k": 83.5,
    "dynamicvit_swin_tiny.r07_in1k": 80.9,
    "dynamicvit_swin_small.r07_in1k": 83.2,
    "dynamicvit_swin_base.r07_in1k": 83.4,
    "lvvit_small.in1k": 83.3,
    "lvvit_medium.in1k": 84.0,
    "stvitr_swin_small.in1k": 82.7,
    "stvitr_swin_base.in1k": 83.2,
}


class Row(NamedTuple):
    """One model with its default weights."""

    model: str
    weights: str
    parameters: str
    macs: str
    image: str
    top1: str
    licence: str


HEADER = Row("model", "weights", "params (M)", "GMACs", "image", "top-1", "licence")


def names(pattern: str = "*") -> list[str]:
    """The names that this library has registered, in the order in which the backbone files define them."""
    entries = {name: timm.model_entrypoint(name) for name in fnmatch.filter(timm.list_models(), pattern)}
    ours = {name: entry for name, entry in entries.items() if entry.__module__.startswith(backbones.__name__)}
    return sorted(ours, key=lambda name: (ours[name].__module__, ours[name].__code__.co_firstlineno))


def describe(name: str) -> Row:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None  # a test of the backbones holds this
    with torch.device("meta"):
        summary = summarize(timm.create_model(name), (3, *cfg.input_size[1:]))
    stated = STATED_TOP1.get(f"{name}.{cfg.tag}")
    return Row(
        name,
        cfg.tag or "",
        f"{summary.parameters / 1e6:.1f}",
        f"{summary.macs / 1e9:.1f}",
        str(cfg.input_size[-1]),
        "" if stated is None else f"{stated:.1f}",
        cfg.license or "",
    )


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    if markdown:
        body = [f"`{row.model}` | " + " | ".join(row[1:]) for row in rows]
        lines = [" | ".join(HEADER), "--- | --- | ---: | ---: | ---: | ---: | ---", *body]
        return "\n".join(f"| {line} |".replace("  ", " ") for line in lines)
    widths = [max(len(row[column]) for row in [HEADER, *rows]) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [HEADER, *rows]
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mixerzoo.vision.models", description="List our models.")
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern of names, such as 'dinat_*'")
    parser.add_argument("--markdown", action="store_true", help="as in docs/models.md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    found = names(arguments.pattern)
    if not found:
        print(f"models: no model of ours matches {arguments.pattern!r}", file=sys.stderr)
        return 2
    print(table([describe(name) for name in found], markdown=arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
