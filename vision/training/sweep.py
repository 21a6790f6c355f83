"""Sweeps: `optim.lr=1e-3,2e-3 model=nat_mini,van_b0` trains four runs one after the other, each in its own process.

    DIR/sweep.json                    the arguments, so that the sweep can be resumed
    DIR/lr=1e-3_model=nat_mini/       a normal run folder
    DIR/sweep.csv, DIR/sweep.md       a table with one row per run, best first

Unusual:

* Runs are ordered by their validation metric, not by the test metric beside it: settings that are chosen by the test
  make its numbers too optimistic.
* A comma separates values, except in the path of an existing file or folder and inside brackets or quotes.
* A run that fails does not stop the others. A stopped sweep continues when the same command is started again, or with
  `resume=DIR`: finished runs are skipped, interrupted ones resumed, and failed ones started again.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .launch import FORWARDED, PARENT_VARIABLE, Forwarding, started_by
from .resume import LAST, PREVIOUS, has_checkpoint
from .settings import ConfigError
from .signals import Interrupted, exit_code

_FILE = "sweep.json"
_ONE_ONLY = ("out", "resume", "overwrite", "resume_force")
"""Keys that cannot be swept: a comma in their value does not separate values."""

_OPEN_CODES = (None, 0, *(128 + number for number in FORWARDED), *(-number for number in FORWARDED))
"""Exit codes of a run without results that has not failed: it was not started, was requeued, or was stopped."""

_PAIRS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Run:
    """One combination of swept values; `choices` maps the swept keys to their values as they were typed."""

    name: str
    choices: dict[str, str]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep. With `overwrite` it starts from the beginning even if the folder holds a sweep."""

    folder: Path
    given: tuple[str, ...]
    runs: tuple[Run, ...]
    overwrite: bool = False


def plan(given: Sequence[str]) -> Plan | None:
    """Return the sweep that the arguments describe, or None if they describe a single run."""
    pairs = {name.strip(): text for name, _, text in (argument.partition("=") for argument in given)}
    resumed = Path(pairs.get("resume", "")) / _FILE
    if "resume" in pairs and resumed.is_file():
        more = [argument for argument in given if not argument.startswith("resume=")]
        return _resumed(resumed.parent, more)
    axes = {name: parts for name, text in pairs.items() if name not in _ONE_ONLY and len(parts := _values(text)) > 1}
    if not axes:
        return None
    for name, parts in axes.items():
        if empty := [part for part in parts if not part.strip()]:
            raise ConfigError(f"{name}={pairs[name]}: {len(empty)} of the values between the commas are empty")
        if len(set(parts)) < len(parts):
            raise ConfigError(f"{name}={pairs[name]}: a value stands there twice")
    if pairs.get("resume", "auto") != "auto":
        raise ConfigError(f"resume={pairs['resume']} is one run; a sweep goes on by itself, with the out=… it had")
    if started_by() is not None:
        raise ConfigError("a sweep starts processes of its own; give train.devices=… instead of torchrun or srun")
    folder = Path(pairs.get("out") or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-sweep")
    kept = tuple(argument for argument in given if argument.partition("=")[0].strip() not in _ONE_ONLY)
    return Plan(folder, kept, _runs(kept, axes), overwrite=pairs.get("overwrite") == "true")


def run(plan: Plan, command: Sequence[str], say: Callable[[str], None], complain: Callable[[str], None]) -> int:
    """Train the runs that are not finished, print the table of results, and return the exit code of the sweep."""
    _begin(plan)
    codes: dict[str, int] = {}
    stopped: int | None = None
    for number, one in enumerate(plan.runs, 1):
        folder = plan.folder / one.name
        if _is_finished(folder):
            continue
        say(f"[{number}/{len(plan.runs)}] {one.name}")
        codes[one.name], stopped = _train([*command, *one.arguments, *_place(folder)])
        if stopped is not None:
            break
    rows = _rows(plan, codes)
    if any(row["state"] != "open" for row in rows):
        say("\n" + _show(plan, rows))
    if stopped is not None and any(row["state"] != "done" for row in rows):
        complain(f"stopped by {signal.Signals(stopped).name}; go on with resume={plan.folder}")
        last, code = list(codes.items())[-1]
        return _code_of_stop(stopped, code, finished=_is_finished(plan.folder / last))
    say(f"everything is in {plan.folder}")
    return 1 if any(row["state"] != "done" for row in rows) else 0


def _code_of_stop(stopped: int, code: int, *, finished: bool) -> int:
    """Return the exit code of a sweep after a signal: that of the stopped run, which knows whether Slurm requeued it.

    A run that ended before it took notice of SIGUSR1 has requeued nothing, so the sweep does.
    """
    requeued = stopped == signal.SIGUSR1 and code == 0 and not finished
    return code if requeued or code == 128 + stopped else exit_code(Interrupted(stopped, None), first=True)


def _values(text: str) -> list[str]:
    """Return the swept values of an argument; the path of an existing file or folder is one, whatever its commas."""
    return [text] if os.path.exists(text) else _split(text)


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes."""
    parts, open_, quote = [""], [], ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _PAIRS:
            open_.append(_PAIRS[letter])
        elif open_ and letter == open_[-1]:
            open_.pop()
        elif letter == "," and not open_:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def _runs(given: Sequence[str], axes: dict[str, list[str]]) -> tuple[Run, ...]:
    fixed = [argument for argument in given if argument.partition("=")[0].strip() not in axes]
    runs = []
    for values in itertools.product(*axes.values()):
        choices = dict(zip(axes, values, strict=True))
        runs.append((choices, (*fixed, *(f"{name}={value}" for name, value in choices.items()))))
    names = [_name(choices) for choices, _ in runs]
    if len(set(names)) < len(names) or max(map(len, names)) > 120:
        names = [f"{number:03d}" for number in range(1, len(runs) + 1)]
    return tuple(Run(name, *parts) for name, parts in zip(names, runs, strict=True))


def _name(choices: dict[str, str]) -> str:
    """Return the folder name of a run, without characters that have a meaning in arguments or paths."""
    leaves = [name.rsplit(".", 1)[-1] for name in choices]
    short = leaves if len(set(leaves)) == len(leaves) else list(choices)
    words = (re.sub(r"[^\w.+-]+", "-", value).strip("-") or "empty" for value in choices.values())
    return "_".join(f"{name}={word}" for name, word in zip(short, words, strict=True))


def _resumed(folder: Path, more: Sequence[str]) -> Plan:
    try:
        saved = json.loads((folder / _FILE).read_text())["arguments"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / _FILE} cannot be read ({error}); start the sweep as before, out={folder}"
        ) from None
    if more:
        raise ConfigError(f"resume={folder} goes on with a sweep as it was; {more[0]} would change it")
    again = plan([*saved, f"out={folder}"])
    assert again is not None
    return again


def _begin(plan: Plan) -> None:
    """Create the folder of the sweep, or check that it already holds this sweep."""
    path = plan.folder / _FILE
    if path.is_file() and not plan.overwrite:
        if json.loads(path.read_text())["arguments"] != list(plan.given):
            raise ConfigError(f"out={plan.folder} holds another sweep; choose another folder, or overwrite=true")
        return
    if not path.is_file() and plan.folder.exists() and any(plan.folder.iterdir()) and not plan.overwrite:
        raise ConfigError(f"out={plan.folder} exists already and holds no sweep; choose another, or overwrite=true")
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"arguments": plan.given}, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"out={plan.folder} cannot be written: {error}") from error
    for name in ("results.json", f"checkpoints/{LAST}", f"checkpoints/{PREVIOUS}"):
        for one in plan.runs:
            (plan.folder / one.name / name).unlink(missing_ok=True)


def _is_finished(folder: Path) -> bool:
    return (folder / "results.json").is_file()


def _place(folder: Path) -> list[str]:
    """Return the arguments that resume the run, or start it, overwriting a folder without a checkpoint."""
    if has_checkpoint(folder):
        return [f"resume={folder}"]
    return [f"out={folder}", *(["overwrite=true"] if folder.exists() else [])]


def _train(command: Sequence[str]) -> tuple[int, int | None]:
    """Run the command; return its exit code and the signal that stopped it, if any."""
    with Forwarding() as signals:
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        signals.processes.append(process)
        try:
            signals.release()
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    ended_by = next((number for number in FORWARDED if code in (128 + number, -number)), None)  # sent to it alone
    return code, signals.received or ended_by


def _rows(plan: Plan, codes: dict[str, int]) -> list[dict[str, Any]]:
    """Return a row for each run, best validation metric first and runs without one last."""
    rows = [
        {"run": one.name, **one.choices, **_result(plan.folder / one.name, codes.get(one.name))} for one in plan.runs
    ]
    return sorted(rows, key=lambda row: -row["validation"] if row["validation"] is not None else 1.0)


def _result(folder: Path, code: int | None) -> dict[str, Any]:
    unknown = {"validation": None, "test": None, "metric": None, "epoch": None, "seconds": None}
    if not _is_finished(folder):
        return unknown | {"state": "open" if code in _OPEN_CODES else f"failed ({code})"}
    results = json.loads((folder / "results.json").read_text())
    metric = results["metric"]
    return {
        "validation": results["validation"],
        "test": results["test"][metric],
        "metric": metric,
        "epoch": results["best_epoch"],
        "seconds": round(results["seconds"]),
        "state": "done",
    }


def _show(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """Write sweep.csv and sweep.md; return the table as text for a terminal."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (plan.folder / "sweep.csv").write_text(text.getvalue())
    columns = [name for name in rows[0] if name != "run" and any(row[name] is not None for row in rows)]
    cells = [columns, *([_cell(row[name]) for name in columns] for row in rows)]
    (plan.folder / "sweep.md").write_text("\n".join(_markdown(cells)) + "\n")
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)


def _markdown(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    yield head
    yield "|" + "---|" * len(cells[0])
    yield from lines


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
