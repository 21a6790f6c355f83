"""Trains each family under the same head on composed scenes for a few minutes; tabulates mean IoU, size and time.

    python benchmarks/bench_scenes.py --out runs/scenes --jobs 2

A row is what `python train.py recipe=segmentation model=NAME` makes on one thread: the settings of each small model,
and those that all share, stand in configs/recipes/segmentation.yaml. Finished rows are kept in `--out`, so that a table
that was interrupted goes on, and rows whose settings have changed since are made anew.

Time is that of the processor, which others on the same machine lengthen less than that of the clock. The whole run
counts: training, a validation after each epoch, test and pictures. A step is the median of some, forward and backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import mixerzoo.vision  # noqa: F401  registers the models
import timm
import torch
from _harness import describe_machine, describe_native, markdown_table
from mixerzoo.vision._loading import load_run
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.training import pictures
from mixerzoo.vision.training.build import build_model
from mixerzoo.vision.training.checkpoints import write_text
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.run import load_data, run
from mixerzoo.vision.training.settings import load

FAMILIES = {
    "nat_mini": "NAT",
    "van_b0": "VAN",
    "vmamba_tiny_s1l8": "VMamba",
    "litv2_s": "LITv2",
    "bevanet_s": "BEVANet, its own head",
    "unireplknet_a": "UniRepLKNet",
    "vig_h_tiny": "ViG-H",
    "tome_deit_tiny_patch16_224": "ToMe on DeiT",
    "efficientvmamba_tiny": "EfficientVMamba",
    "mobilemamba_t2": "MobileMamba",
    "vim_tiny": "Vim",
    "dinat_s_tiny": "DiNAT_s",
    "stvitr_swin_small": "STViT-R",
    "dynamicvit_convnext_tiny": "DynamicViT on ConvNeXt",
    "evit_deit_small_patch16_224": "EViT",
    "lookupvit_tiny_patch16_224": "LookupViT",
    "convnext_atto": "ConvNeXt (timm)",
    "lvvit_small": "LV-ViT",
    "dinat_mini": "DiNAT",
    "vitrpb_small": "ViT-rpb",
    "deit_tiny_patch16_224": "DeiT (timm)",
    "dynamicvit_deit_small_patch16_224": "DynamicViT on DeiT",
    "vig_tiny": "ViG",
    "eet_vit_small": "EET",
    "spatten_deit_tiny_patch16_224": "SpAtten",
}
"""The trained models, in this order, by the name of the model that the recipe has settings for."""

SHOWN = ("nat_mini", "van_b0", "litv2_s", "vmamba_tiny_s1l8", "vig_h_tiny", "bevanet_s", "tome_deit_tiny_patch16_224")
QUICK = ("data.scenes=16", "data.limit=200", "train.epochs=1", "train.batch_size=4")
"""Settings of a dry run, which tests the script and measures nothing."""

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ROW = "row.json"
START, END = "<!-- scenes: {} -->", "<!-- /scenes -->"


class Row(NamedTuple):
    model: str
    mean_iou: float
    parameters: int
    gmacs: float
    cpu_minutes: float
    step_ms: float
    best_epoch: int
    epochs: int
    date: str


class Job(NamedTuple):
    """The input of a row, which can be sent to another process."""

    model: str
    folder: Path
    settings: tuple[str, ...]

    def config(self) -> Config:
        own = ["recipe=segmentation", f"model={self.model}", "train.threads=1", "train.progress=false"]
        return load([*own, *self.settings, f"out={self.folder}", "overwrite=true"], CONFIGS)


def finished(job: Job) -> Row | None:
    """Return the row in the job's folder if it was made with the current settings."""
    path = job.folder / ROW
    if not path.is_file():
        return None
    kept = json.loads(path.read_text())
    now = settings_of(job.config())
    # A key that has come or gone since had its default then, or it would not be settings of this recipe.
    changed = [name for name in now.keys() & kept["settings"].keys() if now[name] != kept["settings"][name]]
    return None if changed else Row(**kept["row"])


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings under dotted names, without the location of the run."""
    flat = {}
    for section, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        flat |= {f"{section}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {section: value}
    return {name: value for name, value in flat.items() if name not in ("out", "overwrite")}


def make(job: Job) -> Row:
    """Train a model and save its row when it is complete."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    config = job.config()
    start = time.process_time()
    results = run(config)
    minutes = (time.process_time() - start) / 60
    row = Row(
        job.model,
        results["test"]["mean_iou"],
        results["parameters"],
        results["gmacs"],
        minutes,
        time_step(config),
        results["best_epoch"],
        results["epochs"],
        time.strftime("%Y-%m-%d"),
    )
    write_text(job.folder / ROW, json.dumps({"row": row._asdict(), "settings": settings_of(config)}, indent=2))
    return row


def time_step(config: Config, rounds: int = 5) -> float:
    """Measure the CPU milliseconds of forward and backward for a batch."""
    splits = load_data(config)
    model = build_model(config, splits).train()
    images, masks = splits.train.__getitems__(Request(list(range(config.train.batch_size)), 0))
    seconds = []
    for _ in range(rounds + 1):
        start = time.process_time()
        output = model(images)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        torch.nn.functional.cross_entropy(logits, masks, ignore_index=255).backward()
        seconds.append(time.process_time() - start)
        model.zero_grad()
    return 1e3 * statistics.median(seconds[1:])


def attempt(job: Job) -> Row | None:
    """Return the row, or None if it fails, which is reported and does not stop the others."""
    try:
        row = make(job)
    except Exception as error:
        print(f"{job.model}: {type(error).__name__}: {error}", flush=True)
        return None
    print(" | ".join(cells(row)), flush=True)
    return row


def make_all(jobs: Sequence[Job], workers: int) -> list[Row]:
    """Return all rows that exist or can be made, with several processes at a time."""
    kept = {job: finished(job) for job in jobs}
    left = [job for job, row in kept.items() if row is None]
    if workers == 1:
        made = [attempt(job) for job in left]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            made = list(pool.map(attempt, left))
    return [row for row in (*kept.values(), *made) if row is not None]


def write_table(rows: Sequence[Row]) -> Iterator[str]:
    header = ["family", "model", "mean IoU, %", "M parameters", "GMACs", "CPU minutes", "ms a step"]
    return markdown_table(header, [cells(row) for row in sorted(rows, key=lambda row: -row.mean_iou)])


def cells(row: Row) -> list[str]:
    return [
        FAMILIES.get(row.model, row.model),
        f"`{row.model}`",
        f"{100 * row.mean_iou:.1f}",
        f"{row.parameters / 1e6:.2f}",
        f"{row.gmacs:.3f}",
        f"{row.cpu_minutes:.1f}",
        f"{row.step_ms:.0f}",
    ]


def describe(rows: Sequence[Row], missing: Sequence[str], config: Config, command: str) -> Iterator[str]:
    """Yield the lines between the markers: a description of the runs, and the table."""
    size, scenes = config.data.size, config.data.scenes
    dates = sorted({row.date for row in rows})
    machine = describe_machine(1, f"timm {timm.__version__}", describe_native()).rpartition("; ")[0]
    yield f"`{command}`: {len(rows)} models, {sum(row.cpu_minutes for row in rows):.0f} minutes of the processor,"
    yield f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. {machine}."
    yield f"{scenes} training scenes of {size} x {size} pixels, {config.train.epochs} epochs in batches of"
    yield f"{config.train.batch_size}; mean IoU of {max(scenes // 4, 1)} test scenes, with the weights of the epoch"
    yield "that was best in validation."
    yield ""
    yield from write_table(rows)
    if missing:
        yield from ("", f"Not trained: {', '.join(FAMILIES.get(model, model) for model in missing)}.")


def insert(path: Path, name: str, lines: Sequence[str]) -> None:
    """Replace the lines between the markers of a page, which must exist."""
    text = path.read_text()
    before, start, rest = text.partition(START.format(name))
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{path} has no lines {START.format(name)} and {END} to write the table between")
    path.write_text("\n".join([f"{before}{start}", *lines, f"{end}{after}"]))


@torch.no_grad()
def draw(jobs: Mapping[str, Job], path: Path, count: int = 3) -> None:
    """Draw test scenes with the truth and the predictions of some models."""
    config = next(iter(jobs.values())).config()
    splits = load_data(config)
    images, truth = splits.test.__getitems__(Request(list(range(count)), 0))
    columns = {"truth": truth}
    for model, job in jobs.items():
        name = FAMILIES.get(model, model).partition(",")[0]
        columns[name] = load_run(job.folder).model(images).argmax(1)
    pictures.draw_masks(path, images, columns, splits.classes, splits.mean, splits.std)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("settings", nargs="*", help="of every run, as train.py takes them, such as train.epochs=8")
    parser.add_argument("--out", type=Path, required=True, help="keep the runs here, and take those that are finished")
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), metavar="NAME", help="these models alone")
    parser.add_argument("--jobs", type=int, default=1, help="models that are trained side by side, a thread each")
    parser.add_argument("--table", action="store_true", help="train nothing: a table of the rows that are finished")
    parser.add_argument("--quick", action="store_true", help="a dry run, which says nothing of accuracy")
    parser.add_argument("--markdown", type=Path, default=Path("docs/segmentation.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/scenes.png"))
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    more = (*(QUICK if arguments.quick else ()), *arguments.settings)
    jobs = {model: Job(model, arguments.out / model, more) for model in arguments.only}
    if arguments.table:
        rows = [row for row in map(finished, jobs.values()) if row is not None]
    else:
        rows = make_all(list(jobs.values()), arguments.jobs)
    if not rows:
        raise SystemExit("no row is finished: there is no table to write")
    made = {model: jobs[model] for model in jobs if model in {row.model for row in rows}}
    missing = [model for model in jobs if model not in made]
    command = shlex.join(["python", "benchmarks/bench_scenes.py", *(a for a in sys.argv[1:] if a != "--table")])
    lines = list(describe(rows, missing, next(iter(jobs.values())).config(), command))
    insert(arguments.markdown, "python benchmarks/bench_scenes.py", lines)
    draw({model: made[model] for model in SHOWN if model in made} or made, arguments.picture)
    print(f"missing: {', '.join(missing)}" if missing else "all rows are there")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
