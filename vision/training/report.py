"""Write report.html, which shows a run folder on one self-contained page without further files or a network.

    python -m mixerzoo.vision.training.report runs/first

A run writes it whenever it ends, also after an error; missing parts are left out. The page is made only from the files
in the folder, so that it can be written again after a killed run or with a newer version of this library.

Unusual: there is no template language. The page is built by a few functions that return text, and all foreign text
(class names, settings, messages) is escaped by `html.escape` in the helpers that write cells and paragraphs.
"""

from __future__ import annotations

import argparse
import base64
import json
import shlex
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from . import pictures
from .callbacks import read_table
from .checkpoints import write_text
from .config import keys
from .journal import read_journal
from .report_page import page

CLASSES_AT_ONCE = 40  # a longer table is folded

PICTURES = {
    "curves": ("Learning curves", "The ring marks the best epoch, whose weights are in checkpoints/best.ckpt."),
    "confusion": ("Confusions", "What each true class was taken for in the test."),
    "mistakes": (
        "Mistakes",
        "Test pictures on which the model was wrong and most sure of it: wrong labels, odd pictures and classes that "
        "overlap show here first.",
    ),
    "predictions": ("Predictions", "Test pictures taken at even distances, with what the model says."),
    "batch": ("Training batch", "After augmentation, as the model sees it. What looks wrong here is learned wrong."),
}


@dataclass(frozen=True)
class _Run:
    """The contents of the files in a run folder; empty for files that do not exist yet."""

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    rows: list[dict[str, float]]
    starts: list[dict[str, Any]]

    @property
    def title(self) -> str:
        return f"{self.settings['model.name']} on {self.settings['data.name']}"

    @property
    def metric(self) -> str:
        """The name of the validation metric that selects the best epoch."""
        return self.results.get("metric") or (self.starts[-1].get("metric") if self.starts else None) or "accuracy"

    @property
    def best(self) -> tuple[float, int] | None:
        """The highest validation metric and its epoch, counted from 1; None before the first validation."""
        if "validation" in self.results:
            return self.results["validation"], self.results["best_epoch"]
        values = [
            (row[f"val/{self.metric}"], int(row["epoch"]) + 1) for row in self.rows if f"val/{self.metric}" in row
        ]
        return max(values, key=lambda pair: pair[0], default=None)

    @property
    def state(self) -> str:
        return self.starts[-1].get("state", "running") if self.starts else "finished" if self.results else "running"


def write_report(folder: Path) -> Path:
    """Draw the learning curves of a run folder, write its report.html, and return the path of that."""
    run = _read(folder)
    if run.rows:
        averaged = run.settings["ema.decay"] is not None
        pictures.draw_curves(folder / "curves.png", run.rows, run.metric, run.title, averaged=averaged)
    drawn = {title: _picture(folder / f"{name}.png", caption) for name, (title, caption) in PICTURES.items()}
    sections = {
        "Warnings": _warnings(run),
        "Learning curves": drawn.pop("Learning curves"),
        "Classes": _classes(run),
        **drawn,
        "Settings": _settings(run),
        "Model": _model(run),
        "Epochs": _epochs(run),
        "Environment": _environment(run),
        "Use it": _usage(run),
    }
    path = folder / "report.html"
    write_text(path, page(run.title, _summary(run), {name: text for name, text in sections.items() if text}))
    return path


def _read(folder: Path) -> _Run:
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is no run folder: there is no {config}; train.py makes one (out=FOLDER)")
    tree = OmegaConf.load(config)
    results, table = folder / "results.json", folder / "metrics.csv"
    return _Run(
        folder,
        {key.name: _plain(OmegaConf.select(tree, key.name, default=key.default)) for key in keys()},
        json.loads(results.read_text()) if results.is_file() else {},
        read_table(table) if table.is_file() else [],
        read_journal(folder),
    )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _summary(run: _Run) -> str:
    facts = dict(_numbers(run))
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    kind = "good" if run.state == "finished" else "bad" if run.state.startswith("failed") else "open"
    next_step = "" if kind == "good" else f"{_p('To go on with it:')}<pre>{escape(_resume(run))}</pre>"
    return (
        f"<header><h1>{escape(run.title)}</h1>\n{_p(_state_in_words(run), f'state {kind}')}{next_step}\n"
        f"<dl class='tiles'>{tiles}</dl></header>"
    )


def _state_in_words(run: _Run) -> str:
    last = run.starts[-1] if run.starts else {}
    epochs = f"{len(run.rows)} whole epoch{'s' * (len(run.rows) != 1)}{_of_all(run)}"
    if run.state == "finished":
        ended = f" on {_when(last['ended'])}" if "ended" in last else ""
        return f"Finished{ended}. Test numbers are of the weights in checkpoints/best.ckpt."
    if run.state == "running":
        return f"Not finished: {epochs} so far. The run goes on, or was killed without a chance to say so."
    words = run.state[0].upper() + run.state[1:]
    return f"{words}, on {_when(last['ended'])}, after {epochs}. There are no test numbers."


def _of_all(run: _Run) -> str:
    epochs = run.results.get("epochs") or run.settings["train.epochs"]
    return f" of {epochs}" if epochs else ""


def _resume(run: _Run) -> str:
    return f"python train.py resume={shlex.quote(str(run.folder))}"


def _numbers(run: _Run) -> Iterable[tuple[str, str]]:
    """Yield the numbers at the top of the page as (name, value)."""
    for name, value in sorted(run.results.get("test", {}).items(), key=lambda item: item[0] == "loss"):
        yield f"test {pictures.in_words(name)}", _number(name, value)
    if run.best is not None:
        value, epoch = run.best
        yield f"best validation {pictures.in_words(run.metric)}", _number(run.metric, value)
        yield "best epoch", f"{epoch}{_of_all(run)}"
    if "parameters" in run.results:
        yield "parameters", f"{run.results['parameters'] / 1e6:,.2f} M"
        gmacs = run.results["gmacs"]
        yield "multiply-adds", f"{gmacs:,.2f} G" if gmacs >= 0.1 else f"{1000 * gmacs:,.2f} M"
        yield "time", _duration(run.results["seconds"])


def _warnings(run: _Run) -> str:
    messages = [message for start in run.starts for message in start.get("warnings", [])]
    if not messages:
        return ""
    items = "".join(f"<li>{escape(message)}</li>" for message in dict.fromkeys(messages))
    return f"<ul class='warnings'>{items}</ul>"


def _picture(path: Path, caption: str) -> str:
    if not path.is_file():
        return ""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return (
        f"<figure><img alt='{escape(caption)}' width='{width}' height='{height}' src='{source}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _classes(run: _Run) -> str:
    by_class = run.results.get("test_by_class")
    if not by_class:
        return ""
    dense = run.metric == "mean_iou"
    main, count = ("iou", "pixels") if dense else ("recall", "pictures")
    order = sorted(by_class, key=lambda row: 2.0 if row[main] is None else row[main])
    shares = ["iou", "recall", "precision"] if dense else ["recall", "precision"]
    head = ["class", count, *(pictures.in_words(name) for name in shares), "most often taken for"]
    rows = []
    for row in order:
        other = f"{row['taken_for']} ({row['taken_for_count']:,})" if row["taken_for"] is not None else ""
        rows.append([row["class"], row["count"], *(_Share(row[name]) for name in shares), other])
    table = _table(head, rows)
    if len(rows) > CLASSES_AT_ONCE:
        table = _folded(f"all {len(rows)} classes", table)
        table = _table(head, rows[: CLASSES_AT_ONCE // 2]) + table
    return f"{_p('Of the test, worst first; a click on a heading sorts.')}{table}"


def _settings(run: _Run) -> str:
    changed, others = [], []
    for key in keys():
        value = run.settings[key.name]
        if value != key.default:
            changed.append([key.name, _value(value), _value(key.default), key.doc])
        else:
            others.append([key.name, _value(value), key.doc])
    note = _p("Those that differ from the defaults: set by the recipe, the data file or the command line.")
    return (
        f"{note}{_table(['key', 'value', 'default', 'meaning'], changed)}"
        f"{_folded(f'the other {len(others)}', _table(['key', 'default', 'meaning'], others))}"
    )


def _model(run: _Run) -> str:
    path = run.folder / "summary.txt"
    if not path.is_file():
        return ""
    text = path.read_text().rstrip()
    fields = [line.split() for line in text.splitlines()]
    rows = [[*row[:2], *(_count(cell) for cell in row[2:])] for row in fields[1:] if len(row) == 4]
    rows += [["total", "", *(_count(cell) for cell in row[1:])] for row in fields if row[:1] == ["total"]]
    note = _p(text.splitlines()[-1])
    return f"{_table(['part', 'class', 'parameters', 'MMACs'], rows)}{note}"


def _epochs(run: _Run) -> str:
    if not run.rows:
        return ""
    names = [name for name in dict.fromkeys(name for row in run.rows for name in row) if name != "epoch"]
    rows = [[int(row["epoch"]) + 1, *(_short(row.get(name)) for name in names)] for row in run.rows]
    return _folded(f"{len(rows)} rows of metrics.csv", _table(["epoch", *names], rows))


def _environment(run: _Run) -> str:
    if not run.starts:
        return ""
    starts = [[_when(s["started"]), _when(s.get("ended", "")), s.get("state", ""), s["command"]] for s in run.starts]
    last = run.starts[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    facts = {
        "versions": versions,
        "commit": last["commit"],
        "commit of mixerzoo": last["mixerzoo_commit"],
        "started in": last["folder"],
        "machine": f"{last['machine']}, {last['system']}",
        "processor": f"{last['cpu']}, {last['cores']} cores, {last['threads']} threads used",
        "GPUs": ", ".join(last["gpus"]) or "none",
        **last["variables"],
    }
    rows = [[name, value] for name, value in facts.items() if value]
    return f"{_table(['started', 'ended', 'state', 'command'], starts)}{_table(['of the last start', ''], rows)}"


def _usage(run: _Run) -> str:
    folder = shlex.quote(str(run.folder))
    commands = {
        "Go on after an interruption, or train longer (train.epochs=…)": _resume(run),
        "Predict pictures of your own": f"python -m mixerzoo.vision.predict {folder} path/to/pictures",
        "Export, here as ONNX": f"python -m mixerzoo.vision.export {folder} --format onnx",
        "Write this page again": f"python -m mixerzoo.vision.training.report {folder}",
    }
    return "".join(f"{_p(name)}<pre>{escape(command)}</pre>" for name, command in commands.items())


@dataclass(frozen=True)
class _Share:
    """A table cell that shows a fraction as a percentage over a bar."""

    value: float | None


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "\n".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, _Share):
        if value.value is None:
            return "<td class='number' data-sort='-1'>–</td>"
        percent = 100 * value.value
        return f"<td class='number share' data-sort='{value.value}' style='--share:{percent:.1f}%'>{percent:.1f} %</td>"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
        return f"<td class='number' data-sort='{value}'>{text}</td>"
    return f"<td>{escape(str(value))}</td>"


def _p(text: str, kind: str = "") -> str:
    return f"<p class='{kind}'>{escape(text)}</p>" if kind else f"<p>{escape(text)}</p>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _value(value: Any) -> str:
    """Format a value as in YAML or on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(cell: str) -> float:
    number = float(cell.replace(",", ""))
    return int(number) if "." not in cell else number


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"


def _when(stamp: str) -> str:
    return stamp[:19].replace("T", " ")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixerzoo.vision.training.report", description="Write the report.html of a run folder again."
    )
    parser.add_argument("folder", type=Path, help="where train.py wrote: it holds config.yaml")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0: written. 2: no run folder, or one that cannot be written."""
    try:
        print(f"wrote {write_report(parser().parse_args(argv).folder)}")
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
