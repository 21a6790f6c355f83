"""What a user installs: a wheel that holds every module and works away from the repository, and a whole sdist."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from that sdist alone. Of a copy: builds leave litter."""
    if importlib.util.find_spec("build") is None:
        pytest.fail("the tests need the extra dev: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("kernels", "mixers", "vision"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / "tree")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "dist"


def _sources(suffixes: tuple[str, ...]) -> set[str]:
    folders = ("kernels", "mixers", "vision")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_sdist_holds_all_sources(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert _sources((".py", ".cpp", ".h")) | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_wheel_holds_all_modules_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    python = {name for name in names if name.endswith(".py")}
    assert python == {f"mixerzoo/{name}" for name in _sources((".py",))}
    assert all(Path(name).suffix in (".so", ".pyd", ".dylib") for name in names - python), names - python


_IMPORT_ALL = """
import importlib, json, pkgutil, sys
target, root = sys.argv[1:]
# An editable install in this environment would answer for the wheel: take its finder and its path away.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
# `make` keeps its environment inside the checkout; what is installed there stays.
in_checkout = lambda path: path.startswith(root) and "site-packages" not in path
away = lambda path: path and not in_checkout(path) and "__editable__" not in path
sys.path[:] = [target, *filter(away, sys.path)]
import mixerzoo
names = [module.name for module in pkgutil.walk_packages(mixerzoo.__path__, "mixerzoo.")]
# A namespace package (kernels/ has no __init__.py) is not walked into.
import mixerzoo.kernels
names += [module.name for module in pkgutil.walk_packages(mixerzoo.kernels.__path__, "mixerzoo.kernels.")]
files = [importlib.import_module(name).__file__ for name in sorted(set(names)) if "._cpu" not in name]
import timm, torch
model = timm.create_model("nat_mini", depths=(1,), embed_dim=16, num_heads=(1,), num_classes=3)
shape = tuple(model(torch.zeros(1, 3, 48, 40)).shape)
print(json.dumps([[file for file in files if file], shape]))
"""


def test_installed_wheel_works_away_from_the_repository(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    run = [sys.executable, "-c", _IMPORT_ALL, target, ROOT]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    files, shape = json.loads(done.stdout.splitlines()[-1])
    assert shape == [1, 3]
    assert all(Path(file).is_relative_to(target) for file in files)
    imported = {Path(file).relative_to(target / "mixerzoo").as_posix() for file in files}
    assert imported == _sources((".py",)) - {"kernels/__init__.py"}
