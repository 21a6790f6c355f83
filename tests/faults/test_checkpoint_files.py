"""Damaged, mismatched and malicious checkpoints are detected and named, and their code is never executed."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.vision._checksum import find_damage, is_sealed, write_sealed
from mixerzoo.vision._loading import load_model
from mixerzoo.vision._reading import read_checkpoint
from mixerzoo.vision.data.splits import Splits
from mixerzoo.vision.training.checkpoints import AtomicCheckpointIO, load_checkpoint, refuse_another
from mixerzoo.vision.training.config import Config
from mixerzoo.vision.training.resume import first_whole
from mixerzoo.vision.training.settings import ConfigError, load
from warm import Finished


def _write(path: Path, content: Any) -> Path:
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def _empty(data: bytes) -> bytes:
    return b""


def _cut(data: bytes) -> bytes:
    return data[:-200]


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _text(data: bytes) -> bytes:
    return b"no checkpoint at all, but long enough to hold a checksum at its end if it had one: it has none, however"


DAMAGE = (_empty, _cut, _flip, _text)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_file_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = _write(tmp_path / "file.ckpt", {"weights": torch.arange(1000)})
    assert find_damage(path) is None and is_sealed(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"file\.ckpt (is empty|has no checksum|does not have the checksum)"):
        load_checkpoint(path)


def test_every_byte_counts(tmp_path: Path) -> None:
    path = _write(tmp_path / "file.ckpt", {"weights": torch.arange(3)})
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        assert find_damage(path) is not None, place


def test_a_sealed_file_loads_everywhere(tmp_path: Path) -> None:
    """torch.load, also memory-mapped, and timm read the file, and its checksum covers what torch wrote."""
    from timm.models import load_state_dict

    content = {"state_dict": {"weight": torch.randn(7, 5)}}
    path = _write(tmp_path / "file.ckpt", content)
    for loaded in (torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)):
        assert torch.equal(loaded["state_dict"]["weight"], content["state_dict"]["weight"])
    assert torch.equal(load_state_dict(str(path))["weight"], content["state_dict"]["weight"])


@pytest.mark.parametrize("damage", [*DAMAGE, None])
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(
    damage: Callable[[bytes], bytes] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With None, last.ckpt is missing."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        _write(last, {"step": step})
    assert first_whole(last) == last and load_checkpoint(last)["step"] == 2
    if damage is None:
        last.unlink()
    else:
        last.write_bytes(damage(last.read_bytes()))
    with caplog.at_level(logging.WARNING):
        found = first_whole(last)
    assert load_checkpoint(found)["step"] == 1
    assert str(last) in caplog.text and f"going on from {last.with_name('previous.ckpt')}" in caplog.text


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(
    tiny: tuple[str, ...], run_train: Callable[..., Finished], tmp_path: Path
) -> None:
    """A run whose last.ckpt is damaged resumes from the previous one; with both damaged it ends with one line."""
    command = (*tiny, "train.epochs=2", f"out={tmp_path / 'run'}")
    assert run_train(*command).code == 0
    folder = tmp_path / "run" / "checkpoints"
    table = (tmp_path / "run" / "metrics.csv").read_text()
    (folder / "last.ckpt").write_bytes(_flip((folder / "last.ckpt").read_bytes()))
    again = run_train(*command, "resume=auto")
    assert again.code == 0 and "last.ckpt does not have the checksum" in again.err
    assert (tmp_path / "run" / "metrics.csv").read_text() == table

    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes(b"")
    for resume in ("auto", str(tmp_path / "run")):
        lost = run_train(*command, f"resume={resume}")
        assert lost.code == 2
        errors = [line for line in lost.err.splitlines() if "error" in line]
        assert len(errors) == 1 and "no checkpoint is left" in errors[0] and "Traceback" not in lost.err
    assert (tmp_path / "run" / "metrics.csv").read_text() == table


# A checkpoint of something else


def test_another_model_is_told_apart_in_one_line() -> None:
    own = {"model.a": torch.zeros(2, 3), "model.b": torch.zeros(4), **{f"model.c{n}": torch.zeros(1) for n in range(9)}}
    saved = {"model.a": torch.zeros(2, 5), "model.d": torch.zeros(4)}
    with pytest.raises(ConfigError) as caught:
        refuse_another({"state_dict": saved}, own, {}, force=True)
    assert str(caught.value) == (
        "the checkpoint is of another model: it lacks model.b, model.c0, model.c1 and 7 more; it has besides model.d; "
        "it has model.a [2, 5] instead of [2, 3]"
    )
    refuse_another({"state_dict": own}, own, {})


def test_other_data_is_refused_unless_forced() -> None:
    saved = {"state_dict": {}, "mixerzoo": {"classes": ["cat", "dog"], "training_pictures": 100}}
    facts = {"classes": ["cat", "dog"], "training_pictures": 101}
    with pytest.raises(ConfigError, match="training_pictures was 100 and is now 101; go on with it by resume_force"):
        refuse_another(saved, {}, facts)
    refuse_another(saved, {}, facts, force=True)


def test_changed_settings_are_refused_unless_forced(repository: Path, tmp_path: Path) -> None:
    from mixerzoo.vision.training.settings import to_yaml

    configs = repository / "configs"
    saved = load(["data=digits", "train.epochs=3", f"out={tmp_path}"], configs)
    (tmp_path / "config.yaml").write_text(to_yaml(saved))
    _write(tmp_path / "checkpoints" / "last.ckpt", {})
    command = [f"out={tmp_path}", "resume=auto"]
    with pytest.raises(ConfigError, match=r"data\.size was 32 and is now 64, optim\.lr was .* resume_force=true") as e:
        load([*command, "optim.lr=0.5", "data.size=64", "train.epochs=9"], configs)
    assert "\n" not in str(e.value) and "train.epochs" not in str(e.value)
    assert load([*command, "optim.lr=0.5", "resume_force=true"], configs).optim.lr == 0.5
    assert load([*command, "train.epochs=9", "data.workers=2"], configs).train.epochs == 9
    assert load([*command, "data=digits"], configs).resume == str(tmp_path / "checkpoints" / "last.ckpt")


def test_resume_auto_begins_where_nothing_is(repository: Path, tmp_path: Path) -> None:
    config = load(["data=digits", f"out={tmp_path / 'new'}", "resume=auto"], repository / "configs")
    assert config.resume == "auto"
    with pytest.raises(ConfigError, match="give out=FOLDER"):
        load(["data=digits", "resume=auto"], repository / "configs")


# Files that would run code


class _Evil:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


def _zip(path: Path, content: Any) -> None:
    torch.save(content, path)


def _sealed_zip(path: Path, content: Any) -> None:
    with open(path, "wb") as file:
        write_sealed(file, lambda archive: torch.save(content, archive))


def _legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _plain_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


def _legacy_tar(path: Path, content: Any) -> None:
    """Write the format of torch before 0.1.10, a tar archive of pickles."""
    parts = path.parent / "parts"
    parts.mkdir()
    for name in ("sys_info", "pickle", "storages", "tensors"):
        (parts / name).write_bytes(pickle.dumps(content))
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.add(parts / name, arcname=name)


def _lightning(content: Any) -> dict[str, Any]:
    """Write the object where Lightning keeps hyper-parameters (CVE-2026-58659)."""
    weights = {"model.head.weight": torch.zeros(1)}
    return {"state_dict": weights, "hyper_parameters": content, "mixerzoo": {"model": "test_convnext"}}


def _resume(path: Path, configs: Path) -> None:
    AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


@functools.cache
def _digits(configs: Path) -> tuple[Config, Splits]:
    from mixerzoo.vision.training.run import load_data

    config = load(["data=digits", "data.limit=10", "model=test_convnext", "distill.teacher=test_convnext"], configs)
    return config, load_data(config)


def _train_with(key: str) -> Callable[[Path, Path], None]:
    def train(path: Path, configs: Path) -> None:
        from mixerzoo.vision.training.build import build_model
        from mixerzoo.vision.training.distillation import make_teacher

        config, splits = _digits(configs)
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: str(path)})
        config = dataclasses.replace(config, **{section: part})
        if section == "distill":
            make_teacher(config.distill, splits)
        else:
            build_model(config, splits)

    train.__name__ = key
    return train


def _export(path: Path, configs: Path) -> None:
    load_model("test_convnext", checkpoint=path)


LOADERS = (
    _resume,
    lambda path, configs: read_checkpoint(path),
    _export,
    *(_train_with(key) for key in ("model.checkpoint", "model.start_from", "distill.checkpoint")),
)


@pytest.mark.parametrize(
    ("write", "suffix"),
    [
        (_zip, "pth"),
        (_zip, "bin"),
        (_sealed_zip, "ckpt"),
        (_legacy, "pth"),
        (_plain_pickle, "pt"),
        (_legacy_tar, "tar"),
    ],
)
def test_files_that_would_run_code_are_refused(
    write: Callable[[Path, Any], None], suffix: str, repository: Path, tmp_path: Path
) -> None:
    """Every reader of weights rejects every format, wherever the malicious object is in the file."""
    victim = tmp_path / "owned"
    for number, content in enumerate((_Evil(victim), _lightning(_Evil(victim)), {"state_dict": _Evil(victim)})):
        path = tmp_path / str(number) / f"weights.{suffix}"
        path.parent.mkdir()
        write(path, content)
        for loader in LOADERS:
            with pytest.raises(ValueError, match=r"weights\."):
                loader(path, repository / "configs")
            assert not victim.exists(), (loader, number)
    pickle.loads(pickle.dumps(_Evil(victim)))
    assert victim.exists()  # the trap works


def test_no_loader_of_ours_can_run_code(repository: Path) -> None:
    """Every torch.load in the sources passes weights_only=True."""
    calls = [
        line.strip()
        for folder in ("vision", "mixers", "kernels")
        for path in (repository / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if "torch.load(" in line or "load_state_dict(str" in line
    ]
    assert len(calls) >= 3
    wrong = [line for line in calls if "weights_only=True" not in line]
    assert not wrong, wrong
