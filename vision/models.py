"""Lists our models with parameters, multiply-adds, accuracy, licences and papers, filtered and sorted.

    python -m mixerzoo.vision.models 'dinat_*'
    python -m mixerzoo.vision.models --max-params 30 --min-top1 82 --sort top1
    python -m mixerzoo.vision.models --mixer scan --format csv

Unusual: counts are stored in model_counts.py, since counting all models takes two minutes; `--count` rewrites it.
Models are counted on the meta device. Accuracies are those that the authors state for the default weights. The licence
of the code is that of the authors' code; ours is Apache-2.0 for every model.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fnmatch
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch

from . import backbones
from .backbones._checkpoints import refuse_drive
from .model_counts import COUNTS

Format = Literal["table", "markdown", "csv", "json"]


class Family(NamedTuple):
    """A backbone file: what mixes its tokens, and the licence of the code that its authors published.

    `none`: published without a licence. Empty: no code was published.
    """

    mixer: str
    code: str


FAMILIES = {
    "bevanet": Family("large separable kernel attention", "mit"),
    "dinat_s": Family("neighborhood attention", "mit"),
    "dynamicvit": Family("attention, tokens dropped by a predictor", "mit"),
    "dynamicvit_convnext": Family("depth-wise convolution, positions chosen by a predictor", "mit"),
    "dynamicvit_swin": Family("window attention, positions chosen by a predictor", "mit"),
    "eet": Family("attention, tokens dropped by their content", "none"),
    "efficientvmamba": Family("selective scan", "none"),
    "evit": Family("attention, tokens kept by the class token", "apache-2.0"),
    "litv2": Family("HiLo attention", "apache-2.0"),
    "lookupvit": Family("attention among tokens that look up the others", ""),
    "lvvit": Family("attention", "apache-2.0"),
    "mobilemamba": Family("selective scan, wavelet, depth-wise convolution", "mit"),
    "nat": Family("neighborhood attention", "mit"),
    "nat_isotropic": Family("neighborhood attention", "mit"),
    "spatten": Family("attention, tokens and heads dropped in a cascade", "none"),
    "stvitr": Family("window attention, semantic tokens", "mit"),
    "tome": Family("attention, tokens merged", "cc-by-nc-4.0"),
    "unireplknet": Family("large-kernel depth-wise convolution", "apache-2.0"),
    "van": Family("large kernel attention", "apache-2.0"),
    "vig": Family("gated linear attention", "mit"),
    "vig_h": Family("gated linear attention", "mit"),
    "vim": Family("selective scan", "apache-2.0"),
    "vmamba": Family("selective scan", "mit"),
}

# ImageNet-1k top-1 at the size of the table, as stated beside the default weights: NAT.md and DiNAT.md of
# github.com/SHI-Labs/Neighborhood-Attention-Transformer; the READMEs of github.com/ziplab/LITv2,
# github.com/AILab-CVC/UniRepLKNet, github.com/Visual-Attention-Network/VAN-Classification,
# github.com/TerryPei/EfficientVMamba and maomao0819/BEVANet; van_b4, whose weights the authors do not host, from
# mmpretrain; VMamba from assets/performance.md of github.com/MzeroMiko/VMamba; of the models with fewer tokens those of
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
    "bevanet_s.in1k": 71.1,
    "bevanet.in1k": 76.3,
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


@dataclass(frozen=True)
class Model:
    """A model with its default weights; the fields are the columns of `--format csv` and the keys of `json`."""

    model: str
    family: str
    mixer: str
    weights: str
    """The tag of the default weights; empty where none are published."""
    pretrained: str
    """`yes`: fetched by `pretrained=True`; `by hand`: from a page that wants a person; `no`: none are published."""
    parameters: int
    macs: int
    image: int
    top1: float | None
    weights_licence: str
    code_licence: str
    paper: str
    arxiv: str
    origin: str


HEADER = ("model", "weights", "pretrained", "params (M)", "GMACs", "image", "top-1", "weights licence", "code", "paper")
LEFT = ("model", "weights", "pretrained", "weights licence", "code", "paper")  # the others are numbers


def names(pattern: str = "*") -> list[str]:
    """Return the names that this library registers, in the order of their definition in the backbone files."""
    entries = {name: timm.model_entrypoint(name) for name in fnmatch.filter(timm.list_models(), pattern)}
    ours = {name: entry for name, entry in entries.items() if entry.__module__.startswith(backbones.__name__)}
    return sorted(ours, key=lambda name: (ours[name].__module__, ours[name].__code__.co_firstlineno))


def family(name: str) -> str:
    """Return the name of the backbone file that defines a model."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def count(name: str) -> tuple[int, int]:
    """Count parameters, and multiply-adds for one picture at the size of the default weights."""
    from .summary import summarize

    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None  # a test of the backbones holds this
    with torch.device("meta"):
        summary = summarize(timm.create_model(name), (3, *cfg.input_size[1:]))
    return summary.parameters, summary.macs


def describe(name: str) -> Model:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    parameters, macs = COUNTS.get(name) or count(name)
    group = FAMILIES[family(name)]
    published = bool(cfg.has_weights)
    return Model(
        model=name,
        family=family(name),
        mixer=group.mixer,
        weights=(cfg.tag or "") if published else "",
        pretrained="no" if not published else "yes" if _is_fetched(name) else "by hand",
        parameters=parameters,
        macs=macs,
        image=cfg.input_size[-1],
        top1=STATED_TOP1.get(f"{name}.{cfg.tag}"),
        weights_licence=(cfg.license or "") if published else "",
        code_licence=group.code,
        paper=cfg.paper_name or "",
        arxiv=str(cfg.paper_ids or "").removeprefix("arXiv:"),
        origin=cfg.origin_url or "",
    )


def _is_fetched(name: str) -> bool:
    try:
        refuse_drive(name, {})
    except ValueError:
        return False
    return True


def _cells(model: Model, *, links: bool = False) -> tuple[str, ...]:
    paper = f"[{model.arxiv}](https://arxiv.org/abs/{model.arxiv})" if links else model.arxiv
    return (
        f"`{model.model}`" if links else model.model,
        model.weights,
        model.pretrained,
        f"{model.parameters / 1e6:.1f}",
        f"{model.macs / 1e9:.1f}",
        str(model.image),
        "" if model.top1 is None else f"{model.top1:.1f}",
        model.weights_licence,
        model.code_licence,
        paper,
    )


def table(models: Sequence[Model], *, markdown: bool = False) -> str:
    if markdown:
        rule = ["---" if title in LEFT else "---:" for title in HEADER]
        lines = [HEADER, rule, *(_cells(model, links=True) for model in models)]
        return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)
    lines = [HEADER, *map(_cells, models)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust if title in LEFT else str.rjust for title in HEADER]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)) for line in lines
    )


def render(models: Sequence[Model], format: Format) -> str:
    if format in ("table", "markdown"):
        return table(models, markdown=format == "markdown")
    rows = [dataclasses.asdict(model) for model in models]
    if format == "json":
        return json.dumps(rows, indent=2)
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Model)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


# Ascending, but by descending accuracy; unknown accuracies come last.
ORDERS: dict[str, Callable[[Model], Any]] = {
    "name": lambda model: model.model,
    "params": lambda model: model.parameters,
    "gmacs": lambda model: model.macs,
    "top1": lambda model: -(model.top1 or 0.0),
}


def select(arguments: argparse.Namespace) -> list[Model]:
    """Return the models that match the command's arguments, in the requested order."""
    matching = list(dict.fromkeys(name for pattern in arguments.patterns or ["*"] for name in names(pattern)))
    if not matching:
        raise ValueError(f"no model of ours matches {' '.join(map(repr, arguments.patterns))}")
    models = [model for model in map(describe, matching) if _wanted(model, arguments)]
    if not models:
        raise ValueError(f"none of {len(matching)} models is what the options ask for")
    return models if arguments.sort is None else sorted(models, key=ORDERS[arguments.sort])


def _wanted(model: Model, arguments: argparse.Namespace) -> bool:
    return (
        model.parameters <= 1e6 * arguments.max_params
        and model.macs <= 1e9 * arguments.max_gmacs
        and (model.top1 or 0.0) >= arguments.min_top1
        and fnmatch.fnmatch(model.family, arguments.family)
        and arguments.mixer.lower() in model.mixer.lower()
        and fnmatch.fnmatch(model.weights_licence, arguments.licence)
        and (model.pretrained != "no" or not arguments.pretrained)
    )


def write_counts(path: Path) -> None:
    """Count every model again, and write model_counts.py."""
    counts = {name: count(name) for name in names()}
    lines = [f'    "{name}": ({parameters:_}, {macs:_}),' for name, (parameters, macs) in counts.items()]
    said = "Parameters and multiply-adds of each model, written by `python -m mixerzoo.vision.models --count`."
    path.write_text("\n".join([f'"""{said}"""', "", "COUNTS: dict[str, tuple[int, int]] = {", *lines, "}", ""]))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mixerzoo.vision.models", description="List our models.")
    add = parser.add_argument
    add("patterns", nargs="*", metavar="PATTERN", help="shell patterns of names, such as 'dinat_*'; default all")
    add("--max-params", type=float, default=float("inf"), metavar="M", help="at most so many million parameters")
    add("--max-gmacs", type=float, default=float("inf"), metavar="G", help="at most so many billion multiply-adds")
    add("--min-top1", type=float, default=0.0, metavar="PERCENT", help="at least this stated ImageNet-1k accuracy")
    add("--family", default="*", help=f"shell pattern of {', '.join(FAMILIES)}")
    add("--mixer", default="", metavar="WORD", help="what mixes the tokens: 'scan', 'neighborhood', 'convolution', …")
    add("--licence", default="*", metavar="PATTERN", help="of the default weights: 'mit', 'apache*', …")
    add("--pretrained", action="store_true", help="only models with published weights")
    add("--sort", choices=ORDERS, help="by name, params, gmacs (smallest first) or top1 (best first); default: by file")
    add("--format", choices=get_args(Format), default="table")
    add("--markdown", action="store_const", const="markdown", dest="format", help="as in docs/models.md")
    add("--count", action="store_true", help="count every model again and write model_counts.py; two minutes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.count:
        write_counts(Path(__file__).with_name("model_counts.py"))
        return 0
    try:
        print(render(select(arguments), arguments.format))
    except ValueError as error:
        print(f"models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
