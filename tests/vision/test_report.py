"""report.html: self-contained, safe for any class name, and written however a run ends."""

from __future__ import annotations

import base64
import importlib
import json
import logging
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from mixerzoo.vision import export
from mixerzoo.vision.training import pictures
from mixerzoo.vision.training.journal import MOST_WARNINGS, Journal, read_journal
from mixerzoo.vision.training.mistakes import Mistakes
from mixerzoo.vision.training.report import main, write_report
from mixerzoo.vision.training.run import run
from mixerzoo.vision.training.settings import load, to_yaml
from mixerzoo.vision.training.signals import Interrupted
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

ONE_EPOCH = ("model=test_convnext", "train.epochs=1", "train.progress=false")
NAMES = ("$5 bill$ <b>", "a & 'b' \"c\"")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The parsed contents of a page; a closing tag without its opening tag is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.commands: list[str] = []
        self.raw = path.read_text()
        self.feed(self.raw)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            found = dict(attrs)
            assert found["alt"]
            self.sources.append(found["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
        if self.open and self.open[-1] == "pre":
            self.commands.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


@pytest.fixture(scope="module")
def configs(repository: Path) -> Path:
    return repository / "configs"


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing of the curves, which takes half a second."""
    monkeypatch.setattr(pictures, "draw_curves", lambda *_, **__: None)


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory, configs: Path) -> Path:
    """Return a run on pictures whose class names contain syntax of HTML and of matplotlib."""
    root = tmp_path_factory.mktemp("report")
    for split, name in [(split, name) for split in ("train", "val") for name in NAMES]:
        folder = root / "pictures" / split / name
        folder.mkdir(parents=True)
        for index in range(6):
            pixels = np.random.default_rng(index).integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    settings = ("data.size=32", "data.workers=0", "train.batch_size=4", f"out={root / 'run'}")
    run(load([f"data={root / 'pictures'}", *ONE_EPOCH, *settings], configs))
    return root / "run"


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory, configs: Path) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    settings = ("data.scenes=8", "data.size=48", "train.batch_size=4", "head.channels=16", "data.download=false")
    run(load(["recipe=segmentation", *ONE_EPOCH, *settings, f"out={folder}"], configs))
    return folder


@pytest.mark.parametrize("kind", ["classified", pytest.param("segmented", marks=pytest.mark.slow)])
def test_the_page_needs_nothing_beside_it(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    page = Page(folder / "report.html")
    assert page.raw.startswith("<!DOCTYPE html>") and "<title>test_convnext" in page.raw
    drawn = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert set(drawn) == {f"{name}.png" for name in ("batch", "confusion", "curves", "mistakes", "predictions")}
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.sources)
    embedded = [base64.b64decode(source.removeprefix(prefix)) for source in page.sources]
    assert sorted(embedded) == sorted(drawn.values())
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    assert {name for name, _ in page.attributes}.isdisjoint({"srcset", "onclick", "onload", "action"})
    assert all(value and value.startswith("#") for name, value in page.attributes if name == "href")
    targets = {value for name, value in page.attributes if name == "id"}
    assert {value for name, value in page.attributes if name == "href"} == {f"#{target}" for target in targets}
    assert "http" not in page.raw and "url(" not in page.raw and "@import" not in page.raw
    assert "prefers-color-scheme: dark" in page.raw and "@media print" in page.raw


def test_names_of_classes_are_text(classified: Path) -> None:
    page = Page(classified / "report.html")
    assert "b" not in page.tags and all(name in page.texts for name in NAMES)


@pytest.mark.parametrize("kind", ["classified", pytest.param("segmented", marks=pytest.mark.slow)])
def test_the_page_says_what_was_done(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    page = Page(folder / "report.html")
    results = json.loads((folder / "results.json").read_text())
    metric = "mean_iou" if kind == "segmented" else "accuracy"
    assert f"{100 * results['test'][metric]:.2f} %" in page.texts
    assert any(text.startswith("Finished on 2") for text in page.texts)
    # Settings: what differs from the default stands before what does not.
    places = [page.texts.index(name) for name in ("train.epochs", "out", "optim.name", "schedule.name")]
    assert max(places[:2]) < min(places[2:])
    assert f"{results['parameters']:,}" in page.texts  # the model's table
    assert f"python -m mixerzoo.vision.predict {folder} path/to/pictures" in page.texts
    assert page.texts.count(f"python train.py resume={folder}") == 1  # not also at the top
    [start] = read_journal(folder)
    assert start["versions"]["torch"] in page.text and start["cpu"] in page.text
    assert "validation pictures" in page.text if kind == "classified" else True  # there is no folder `test`


class _Loaded(Exception):
    """Raised once the model is loaded, instead of an export that takes half a minute."""


@pytest.mark.parametrize("kind", ["classified", pytest.param("segmented", marks=pytest.mark.slow)])
def test_every_command_of_the_page_works(
    kind: str,
    request: pytest.FixtureRequest,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_curves: None,
) -> None:
    def loaded(_: Any, name: str, model: Any, size: Any) -> None:
        raise _Loaded

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "_write", loaded)
    folder = tmp_path / "two words"
    shutil.copytree(request.getfixturevalue(kind), folder)
    (tmp_path / "path" / "to" / "pictures").mkdir(parents=True)
    Image.new("RGB", (40, 48), "gold").save(tmp_path / "path" / "to" / "pictures" / "x.png")
    commands = [shlex.split(command) for command in Page(write_report(folder)).commands]
    assert len(commands) == 4
    for python, *words in commands:
        assert python == "python"
        if words[0] == "train.py":
            assert load(words[1:], configs).out == str(folder)
            continue
        assert words[0] == "-m"
        module = importlib.import_module(words[1])
        if module is export:
            with pytest.raises(_Loaded):
                module.main(words[2:])
        else:
            assert module.main(words[2:]) == 0


def test_numbers_of_each_class_are_in_the_results(classified: Path) -> None:
    results = json.loads((classified / "results.json").read_text())
    rows = results["test_by_class"]
    assert [row["class"] for row in rows] == sorted(NAMES)
    right = [round((row["recall"] or 0) * row["count"]) for row in rows]
    assert sum(row["count"] for row in rows) == 12
    assert sum(right) / 12 == pytest.approx(results["test"]["accuracy"], abs=1e-5)
    for row, other, correct in zip(rows, reversed(rows), right, strict=True):
        wrong = row["count"] - correct
        assert (row["taken_for"], row["taken_for_count"]) == (other["class"] if wrong else None, wrong)


def _started(folder: Path, configs: Path) -> Journal:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load(["data=digits"], configs)))
    (folder / "metrics.csv").write_text("epoch,train/loss,train/lr,val/accuracy,val/loss\n0,2.0,0.1,0.25,1.5\n")
    return Journal()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("no <room>"), "Failed: no <room>"),
        (Interrupted(2, Path("out/checkpoints/last.ckpt")), "Interrupted by SIGINT"),
    ],
)
def test_a_run_that_does_not_end_well_leaves_a_page(
    error: BaseException, words: str, configs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(type(error)), _started(folder, configs) as journal:
        journal.begin(folder)
        raise error
    page = Page(folder / "report.html")
    assert any(text.startswith(words) and "after 1 whole epoch of 3" in text for text in page.texts)
    assert page.texts.count(f"python train.py resume={folder}") == 2
    assert "25.00 %" in page.texts and len(page.sources) == 1  # the curves so far
    assert read_journal(folder)[-1]["state"] == words[0].lower() + words[1:]


@pytest.mark.parametrize("error", [Interrupted(2, None), KeyboardInterrupt()])
def test_who_interrupts_twice_does_not_wait_for_a_page(error: BaseException, configs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(type(error)), _started(folder, configs) as journal:
        journal.begin(folder)
        raise error
    assert read_journal(folder)[-1]["state"].startswith("interrupted at once")
    assert not (folder / "report.html").exists()


def test_a_killed_run_is_told_from_a_finished_one(configs: Path, tmp_path: Path, no_curves: None) -> None:
    folder = tmp_path / "run"
    _started(folder, configs).begin(folder)
    assert main([str(folder)]) == 0
    assert "was killed without a chance to say so" in Page(folder / "report.html").text


def test_warnings_and_earlier_starts_are_kept(configs: Path, tmp_path: Path, no_curves: None) -> None:
    folder = tmp_path / "run"
    log = logging.getLogger("mixerzoo.vision.data.items")
    with pytest.raises(ValueError), _started(folder, configs) as journal:
        log.warning("before there was a folder")
        journal.begin(folder)
        for _ in range(3):
            log.warning("skipped %s", "<x>.jpg")
        for index in range(MOST_WARNINGS):
            log.warning("another %d", index)
        raise ValueError
    with Journal() as journal:
        journal.begin(folder, resumed=True)
    log.warning("after all of it")
    first, second = read_journal(folder)
    assert first["warnings"][:3] == ["before there was a folder", "skipped <x>.jpg (3 times)", "another 0"]
    assert first["warnings"][-1] == "and 2 more" and len(first["warnings"]) == MOST_WARNINGS + 1
    assert (first["state"], second["state"], second["warnings"]) == ("failed: ValueError", "finished", [])
    page = Page(folder / "report.html")
    assert "skipped <x>.jpg (3 times)" in page.texts and "after all of it" not in page.text


def test_the_error_of_the_run_is_the_one_that_is_raised(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the cause"), _started(folder, configs) as journal:
        journal.begin(folder)
        monkeypatch.setattr("mixerzoo.vision.training.journal.write_text", full)
        raise RuntimeError("the cause")


def test_no_secrets_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    journal = Journal()
    journal.begin(tmp_path)
    text = (tmp_path / "env.json").read_text()
    assert "hunter2" not in text and "4711" in text


def test_the_page_can_be_made_again_from_a_moved_folder(
    classified: Path, tmp_path: Path, no_curves: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "two words"
    shutil.copytree(classified, folder)
    (folder / "report.html").unlink()
    assert main([str(folder)]) == 0
    assert f"wrote {folder / 'report.html'}" in capsys.readouterr().out
    assert f"resume='{folder}'" in Page(folder / "report.html").text
    assert main([str(tmp_path)]) == 2 and "is no run folder" in capsys.readouterr().err


def test_a_table_of_many_classes_is_folded(classified: Path, tmp_path: Path, no_curves: None) -> None:
    folder = tmp_path / "run"
    shutil.copytree(classified, folder)
    results = json.loads((folder / "results.json").read_text())
    [row, _] = results["test_by_class"]
    results["test_by_class"] = [{**row, "class": f"c{k}", "recall": k / 1000} for k in reversed(range(1000))]
    (folder / "results.json").write_text(json.dumps(results))
    page = Page(write_report(folder))
    assert "all 1000 classes" in page.texts and page.texts.index("c0") < page.texts.index("c1")
    assert page.texts.count("c0") == 2 and page.texts.count("c999") == 1


def test_mistakes_are_the_most_certain_wrong_answers() -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1)
    logits = torch.tensor([[5.0, 0], [0, 1], [0, 3], [0, 2], [4, 0], [0, 0.5]])
    truth = torch.tensor([0, 0, 0, 0, 0, 1])  # the first, the fifth and the last are right
    found = Mistakes(2)
    found.on_test_start(None, None)  # pyright: ignore[reportArgumentType]
    for part in (slice(0, 3), slice(3, 6)):
        found.add(images[part], truth[part], logits[part])
    found.add(images[:0], truth[:0], logits[:0])
    assert [mistake.image.item() for mistake in found.found] == [2, 3]
    assert found.found[0].score == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item())


def test_mistakes_in_pixels_leave_out_the_ignored() -> None:
    truth = torch.tensor([[[0, 1, 255, 255]], [[0, 0, 0, 255]]])
    logits = torch.zeros(2, 2, 1, 4)
    logits[:, 1] = 2.0  # all are taken for class 1
    found = Mistakes(2)
    found.add(torch.arange(2.0).view(2, 1, 1, 1), truth, logits)
    sure = torch.sigmoid(torch.tensor(2.0)).item()
    assert [(m.image.item(), m.score) for m in found.found] == [(1, pytest.approx(sure)), (0, pytest.approx(sure / 2))]


@pytest.mark.parametrize("count", [2, 25, 100, 1000])
def test_a_confusion_matrix_can_be_read(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    confusion = torch.eye(count, dtype=torch.int64) * 9
    confusion[0, count - 1] = 1  # one lone mistake
    names = ["$" * (k % 3) + f"class {k} with quite a long name" for k in range(count)]
    pictures.draw_confusion(tmp_path / "x.png", confusion, names, "100 $ or 200 $")
    axes, *others = figures[0].axes
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert (named[1] == r"\$class 1 with quite a l…") == (count <= 100)
    assert axes.images[0].get_array()[0, -1] == pytest.approx(0.1**0.5)  # seen however many cells are drawn as one
    texts = [text.get_text() for axes in others for text in axes.texts]
    assert any("→" in text and text.endswith(": 1") for text in texts) == (count > 20)
    assert max(figures[0].get_size_inches()) < 22


def test_curves_are_drawn_as_vectors_too(tmp_path: Path) -> None:
    """The text is shapes, so that it looks the same everywhere; the same rows make the same file."""
    rows = [{"epoch": float(epoch), "train/loss": 1.0 / (epoch + 1), "val/accuracy": 0.1 * epoch} for epoch in range(4)]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        pictures.draw_curves(tmp_path / name / "curves.png", rows, "accuracy", "a <run> & its $title$")
        assert {path.name for path in (tmp_path / name).iterdir()} == {"curves.png", "curves.svg"}
    first, second = ((tmp_path / name / "curves.svg").read_bytes() for name in ("first", "second"))
    assert first == second and b"<dc:date>" not in first
    root = ElementTree.fromstring(first)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and {"width", "height", "viewBox"} <= set(root.attrib)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "path" in tags and not {"image", "text"} & tags, "vectors alone, and no fonts"


def test_curves_show_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    first = {"train/loss": 2.0, "train/loss_logits": 1.0, "train/lr": 0.1, "val/loss": 2.5, "val/accuracy": 0.2}
    second = {"train/loss": 1.0, "train/loss_logits": 0.5, "train/lr": 0.2, "val/loss": 1.5, "val/accuracy": 0.5}
    rows = [{"epoch": 0.0, **first}, {"epoch": 1.0, **second}, {"epoch": 2.0, "train/loss": 0.5, "train/lr": 0.0}]
    pictures.draw_curves(tmp_path / "x.png", rows, "accuracy", "a run")
    losses, scores, rates = figures[0].axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "training",
        "training, logits",
        "validation",
    ]
    assert [re.sub(r"\s", "", text.get_text()) for text in scores.texts] == ["50.0%"]
    assert list(rates.lines[0].get_ydata()) == [0.1, 0.2, 0.0]
    pictures.draw_curves(tmp_path / "x.png", rows[2:], "accuracy", "stopped before its first validation")
