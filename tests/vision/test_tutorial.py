"""The tutorial notebook runs, and what it shows is what its cells gave."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def runner(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", repository / "tests/support/notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tutorial(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "docs/tutorial.ipynb").read_text())


def _pictures(notebook: dict[str, Any]) -> list[Image.Image]:
    data = [output["data"] for cell in notebook["cells"] for output in cell.get("outputs", ()) if "data" in output]
    return [Image.open(io.BytesIO(base64.b64decode(entry["image/png"]))) for entry in data if "image/png" in entry]


def test_outputs_are_those_of_the_cells(tutorial: dict[str, Any], runner: ModuleType) -> None:
    again = "run python tests/support/notebook.py docs/tutorial.ipynb"
    assert tutorial["metadata"]["code_sha256"] == runner.code_hash(tutorial), again
    cells = runner.code_cells(tutorial)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], again
    assert len(tutorial["cells"]) <= 11 and not any(len(cell["outputs"]) > 2 for cell in cells)
    pictures = _pictures(tutorial)
    assert len(pictures) == 4 and all(min(picture.size) > 200 for picture in pictures)
    text = json.dumps(tutorial)
    assert "Traceback" not in text and "/tmp" not in text and str(Path.home()) not in text


@pytest.mark.slow
def test_tutorial_runs_small(repository: Path, tmp_path: Path) -> None:
    """On a few of scikit-learn's digits, which are always there, with a model that is exported in seconds."""
    small = tmp_path / "small.ipynb"
    command = [sys.executable, "tests/support/notebook.py", "docs/tutorial.ipynb", "--output", str(small)]
    command += ["--set", "PICTURES=8", "EPOCHS=1", "CLOTHES=False", "MODEL='van_b0'"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = json.loads(small.read_text())
    assert len(_pictures(ran)) == 4
    printed = "".join(line for cell in ran["cells"] for out in cell.get("outputs", ()) for line in out.get("text", ()))
    assert "wrote features.onnx; free: batch" in printed and "are of its class" in printed


def _notebook(*sources: str) -> dict[str, Any]:
    cells = [
        {"cell_type": "code", "metadata": {"tags": ["parameters"] * (not number)}, "source": source.splitlines(True)}
        for number, source in enumerate(sources)
    ]
    return {"cells": cells, "metadata": {}}


def test_cells_run_as_in_jupyter(runner: ModuleType) -> None:
    book = _notebook(
        "A = 2  # of them\nB = 'x'",
        "!echo {A + 1} {B}",
        "print(A)\nA * 2",
        "A * 2;",
        "from PIL import Image\nImage.new('L', (3, 4))",
    )
    runner.set_parameters(book, ["A=5"])
    runner.run_notebook(book)
    outputs = [cell["outputs"] for cell in book["cells"]]
    assert outputs[0] == [] and outputs[3] == []
    assert outputs[1] == [{"name": "stdout", "output_type": "stream", "text": ["6 x\n"]}]
    assert [out.get("text") or out["data"]["text/plain"] for out in outputs[2]] == [["5\n"], ["10"]]
    assert _pictures(book)[0].size == (3, 4)
    assert book["metadata"]["code_sha256"] == runner.code_hash(book)
    book["cells"][1]["source"] = ["!echo changed"]
    assert book["metadata"]["code_sha256"] != runner.code_hash(book)
    with pytest.raises(RuntimeError, match="ended with 3"):
        runner.run_notebook(_notebook("!exit 3"))
    with pytest.raises(ValueError, match="assigns C 0 times"):
        runner.set_parameters(book, ["C=1"])
