"""Exported files that are published only if they do what the model does.

A draft is written beside the destination, loaded back and compared with the model, also at shapes that were not traced.
Then it takes the place of an earlier export as a whole. A file takes it in one rename. A folder, and the two files of
an OpenVINO model, take it in several, the first of which move the earlier export aside: weights never lie beside the
graph of another export. A process that is killed between them leaves the earlier export in a folder `.export-…` beside
the destination.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._messages import one_line
from ._programs import AXES, ExportError, Shape

WEIGHTS = ".bin"
"""The ending of the file that holds the weights of the `.xml` file of the same name."""


@dataclass(frozen=True)
class Comparison:
    """The largest error of one output at one input shape, relative to the largest magnitude of the output."""

    shape: Shape
    traced: bool
    output: str
    error: float


@dataclass(frozen=True)
class Report:
    """The result of an export. `axes` maps each free axis to its smallest and largest size (None: no bound)."""

    path: Path
    axes: dict[str, tuple[int, int | None]]
    comparisons: list[Comparison]

    def __str__(self) -> str:
        names = list(dict.fromkeys(row.output for row in self.comparisons))
        by_input: dict[tuple[Shape, bool], dict[str, float]] = {}
        for row in self.comparisons:
            by_input.setdefault((row.shape, row.traced), {})[row.output] = row.error
        lines = [" ".join([f"{'relative difference':26}", *(f"{name:>10}" for name in names)])]
        for (shape, traced), errors in by_input.items():
            label = " x ".join(map(str, shape)) + (" (traced)" if traced else "")
            lines.append(" ".join([f"{label:26}", *(f"{errors[name]:10.1e}" for name in names)]))
        return "\n".join(lines)


class Check(NamedTuple):
    """A module and a function that runs the exported file: it takes images and returns a list of outputs for each."""

    module: nn.Module
    run: Callable[[list[Tensor]], list[list[Tensor]]]
    outputs: list[str]


Written = tuple[dict[str, tuple[int, int | None]], list[Check]]
"""The free axes of a written file, and the checks that compare it with the model."""


def publish_if_right(
    path: Path, model: nn.Module, traced: Shape, tolerance: float, write: Callable[[Path], Written]
) -> Report:
    """Let `write` write a draft, compare it with the model, and publish it at `path`.

    Args:
        traced: the input shape of tracing; the comparison adds three others.
        tolerance: the largest relative error that is accepted.
        write: writes the draft to the path it is given.

    Raises:
        ExportError: an output differs by more; nothing is published.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The draft lies beside the destination, on the same file system, so that it can be renamed into place.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, torch.no_grad():
        draft = Path(folder) / path.name
        axes, checks = write(draft)
        shapes = _untraced_shapes(model, traced, axes)
        rows = [row for check in checks for row in _compare(check, [traced, *shapes])]
        report = Report(path, axes, rows)
        worst = max(rows, key=lambda row: row.error)
        if worst.error > tolerance:
            raise ExportError(
                f"{report}\n{path} was not written: {worst.output} differs by {worst.error:.1e}{_advice(axes)}"
            )
        _publish(draft, path)
    return report


def _untraced_shapes(model: nn.Module, traced: Shape, axes: dict[str, tuple[int, int | None]]) -> list[Shape]:
    """Return three shapes that differ from the traced one in every free axis, odd ones if the model accepts them."""
    _, channels, height, width = traced
    wanted = [
        {"batch": 1, "height": height + height // 4 + 1, "width": width},
        {"batch": 3, "height": height, "width": width + width // 8 + 3},
        {"batch": 5, "height": height - height // 8, "width": width - width // 6},
    ]
    own = dict(zip(AXES.values(), (traced[axis] for axis in AXES), strict=True))
    shapes: list[Shape] = []
    for sizes in wanted:
        n, h, w = (_clamp(sizes[label], *axes[label]) if label in axes else own[label] for label in AXES.values())
        try:
            model(torch.zeros(1, channels, h, w))
        except (AssertionError, RuntimeError, ValueError):  # a model for multiples of its patch or window
            h, w = (_clamp(-(-s // 32) * 32, *axes.get(label, (s, s))) for s, label in ((h, "height"), (w, "width")))
        shapes.append((n, channels, h, w))
    return shapes


def _compare(check: Check, shapes: list[Shape]) -> list[Comparison]:
    images = [torch.randn(shape) for shape in shapes]
    expected = [outputs_of(check.module, image) for image in images]
    try:
        actual = check.run(images)
    except Exception as error:
        raise ExportError(f"the file fails at one of the shapes {shapes}: {one_line(error)}") from error
    return [
        Comparison(shape, index == 0, name, _difference(mine, theirs))
        for index, shape in enumerate(shapes)
        for name, mine, theirs in zip(check.outputs, actual[index], expected[index], strict=True)
    ]


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected magnitude.

    It is infinite if shapes differ or a value is not finite. If `actual` holds labels and `expected` logits, the
    difference is how far the logit of the label lies below the largest logit.
    """
    if not actual.is_floating_point() and expected.ndim == actual.ndim + 1:
        if actual.shape != expected[:, 0].shape or not 0 <= int(actual.min()) <= int(actual.max()) < expected.shape[1]:
            return float("inf")
        actual, expected = expected.gather(1, actual.unsqueeze(1)).squeeze(1), expected.amax(1)
    if actual.shape != expected.shape or not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def outputs_of(module: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = module(image)
    return [out] if isinstance(out, Tensor) else list(out)


def _publish(draft: Path, path: Path) -> None:
    """Move the draft to `path`, with its weights if they are a file of their own.

    An earlier folder there is deleted; the caller has checked what it holds.
    """
    pairs = [(draft, path)]
    if path.suffix == ".xml" and draft.is_file():
        pairs.insert(0, (draft.with_suffix(WEIGHTS), path.with_suffix(WEIGHTS)))  # the graph is never there alone
    elif not (draft.is_dir() and path.is_dir()):
        os.replace(draft, path)
        return
    # Not inside the draft's folder, which is deleted on every way out.
    earlier = Path(tempfile.mkdtemp(dir=path.parent, prefix=".export-earlier-"))
    aside = [(target, earlier / target.name) for _, target in reversed(pairs) if target.exists()]
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target in [*aside, *pairs]:
            moved.append((source, target))
            os.rename(source, target)
    except BaseException as error:  # SystemExit of SIGTERM, too
        try:
            for source, target in reversed(moved):
                if not source.exists():  # it was moved
                    os.rename(target, source)
        except OSError as failure:
            raise ExportError(
                f"{path} was not written ({one_line(error)}), and what was there could not be moved back "
                f"({one_line(failure)}); it is in {earlier}"
            ) from error
        earlier.rmdir()
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _advice(axes: dict[str, tuple[int, int | None]]) -> str:
    return "; --static (dynamic=False) fixes the traced shape" if axes else ""


def _clamp(size: int, low: int, high: int | None) -> int:
    return max(low, size if high is None else min(size, high))
