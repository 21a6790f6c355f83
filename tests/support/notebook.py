"""Runs the code cells of a notebook in order and writes what they print and show into it, as Jupyter would.

    python tests/support/notebook.py docs/tutorial.ipynb
    python tests/support/notebook.py docs/tutorial.ipynb --set EPOCHS=1 --output small.ipynb

Unusual: no Jupyter is needed. Known are Python, lines `!command {expression}`, and a last expression that has a picture
(`_repr_png_`, as Pillow's have) or a text. A command that fails ends the run, which Jupyter would go on with. A hash of
the code is kept beside the outputs, so that a test can tell whether they are those of this code.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_hash(notebook: dict[str, Any]) -> str:
    """Of the code that the outputs belong to."""
    return hashlib.sha256(json.dumps(["".join(cell["source"]) for cell in code_cells(notebook)]).encode()).hexdigest()


def run_notebook(notebook: dict[str, Any]) -> None:
    """Executes all code cells in one namespace and replaces their outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__", "run_command": run_command}
    for number, cell in enumerate(code_cells(notebook), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = _execute(translate("".join(cell["source"])), f"cell {number}", namespace)
        text = printed.getvalue()
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}] if text else []
        if value is not None:
            shown = {"data": _data(value), "execution_count": number, "metadata": {}}
            cell["outputs"].append({"output_type": "execute_result", **shown})
        cell["execution_count"] = number
    notebook["metadata"]["code_sha256"] = code_hash(notebook)


def translate(source: str) -> str:
    """Lines `!command {expression}` as calls, the expressions filled in."""
    return re.sub(r"^!(.*)$", lambda found: f"run_command(f{found[1]!r})", source, flags=re.MULTILINE)


def run_command(command: str) -> None:
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if done.returncode != 0:
        raise RuntimeError(f"{command}\nended with {done.returncode}:\n{done.stdout}")


def _execute(source: str, name: str, namespace: dict[str, Any]) -> Any:
    """Runs the statements; the value is that of a last expression, unless a semicolon follows it."""
    tree = ast.parse(source, name)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr) or source.rstrip().endswith(";"):
        exec(compile(tree, name, "exec"), namespace)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def _data(value: Any) -> dict[str, Any]:
    if hasattr(value, "_repr_png_"):
        return {"image/png": base64.b64encode(value._repr_png_()).decode(), "text/plain": ["<picture>"]}
    return {"text/plain": repr(value).splitlines(True)}


def set_parameters(notebook: dict[str, Any], assignments: Sequence[str]) -> None:
    """`NAME=VALUE` for names that the cell tagged `parameters` assigns."""
    (cell,) = (cell for cell in code_cells(notebook) if "parameters" in cell["metadata"].get("tags", ()))
    source = "".join(cell["source"])
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        source, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"the cell of parameters assigns {name} {count} times, not once")
    cell["source"] = source.splitlines(True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="in the cell tagged `parameters`")
    parser.add_argument("--output", type=Path, help="default: into the notebook itself")
    arguments = parser.parse_args(argv)
    notebook = json.loads(arguments.notebook.read_text())
    output = (arguments.output or arguments.notebook).absolute()  # cells may change the folder
    set_parameters(notebook, arguments.set)
    run_notebook(notebook)
    output.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
