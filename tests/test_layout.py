"""The shape of the house: the tree, the arrows between the folders, the package list, and what an import costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    *(".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"),
    *("README.md", "pyproject.toml", "train.py"),
    *("benchmarks", "configs", "docs", "kernels", "mixers", "tests", "vision"),
}

# From bottom to top. A folder or module may import what stands in its own layer and in those above it in this list.
LAYERS = (
    ("kernels",),
    ("mixers",),
    ("vision/backbones", "vision/__init__"),
    (
        *("vision/_checksum", "vision/_machine", "vision/_messages", "vision/_published", "vision/_reading"),
        *("vision/_sizes", "vision/label_sets"),
    ),
    ("vision/data",),
    ("vision/segmentation",),
    ("vision/_loading", "vision/drawing", "vision/summary"),
    ("vision/training",),
    ("vision", "vision/data/__main__"),  # the commands, and what they alone need
    ("train",),
)
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "mixers": {"torch", "timm.layers"},
    "vision/backbones": {"torch", "timm", "torchvision.ops"},  # torchvision comes with timm
}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
LIGHTNING_MAY_BE_USED_BY = ("vision/data/", "vision/training/", "train.py")

MOST_LINES = 500
LONG_FILES = {  # a kernel's path -> why it is longer
    "kernels/neighborhood_attention/_triton.py": "forward, two backward passes and their launches share one tiling",
}


def _modules() -> list[str]:
    folders = [path for name in ("kernels", "mixers", "vision") for path in sorted((ROOT / name).rglob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in [*folders, ROOT / "train.py"] if path.exists()]


def _entry(module: str) -> tuple[int, str]:
    """The layer of a module, given as a path with or without `.py`, and the longest entry of LAYERS that it is in."""
    path = module.removesuffix(".py")
    entries = [(number, entry) for number, layer in enumerate(LAYERS) for entry in layer]
    return max((pair for pair in entries if f"{path}/".startswith(f"{pair[1]}/")), key=lambda pair: len(pair[1]))


def _imports(module: str) -> Iterator[str]:
    """Dotted names of all that a module imports, also inside functions; ours as paths from the root: `kernels/…`."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (_ours(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from ...mixers import X` in vision/backbones/nat.py: three dots are mixerzoo, the repository root.
            parts = list(Path(module).parent.parts)
            base = parts[: len(parts) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                yield _ours(f"{name}.{alias.name}", relative=node.level > 0)


def _ours(name: str, *, relative: bool = False) -> str:
    if relative:
        return name.replace(".", "/")
    if name == "mixerzoo" or name.startswith("mixerzoo."):
        return name.removeprefix("mixerzoo").lstrip(".").replace(".", "/")
    return name


def test_top_level_is_the_users_own() -> None:
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    present = {Path(file).parts[0] for file in files if (ROOT / file).exists()}
    assert present == TOP_LEVEL


def test_package_list_equals_the_tree() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {Path(module).parent.as_posix() for module in _modules()} - {"."}
    assert sorted(setuptools["packages"]) == sorted("mixerzoo." + folder.replace("/", ".") for folder in folders)
    assert setuptools["package-dir"] == {f"mixerzoo.{name}": name for name in ("kernels", "mixers", "vision")}
    # Without __init__.py, `import kernels` in the repository root still finds Hugging Face's package of that name.
    initialised = {folder for folder in folders if (ROOT / folder / "__init__.py").exists()}
    assert initialised == folders - {"kernels"}
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("module", _modules())
def test_imports_follow_the_arrows(module: str) -> None:
    layer, folder = _entry(module)
    for name in _imports(module):
        package = name.split(".")[0]
        if "/" in name or name in TOP_LEVEL or name == "":
            assert name, f"{module} imports mixerzoo itself; name the module it needs"
            below, source = _entry(name)
            assert below <= layer, f"{module} ({folder}) must not import {name} ({source})"
        elif package in LIGHTNING:
            assert module.startswith(LIGHTNING_MAY_BE_USED_BY), f"{module} must do without Lightning"
        elif package not in sys.stdlib_module_names and folder in THIRD_PARTY:
            allowed = any(f"{name}.".startswith(f"{prefix}.") for prefix in THIRD_PARTY[folder])
            assert allowed, f"{module} imports {name}; {folder} may use {sorted(THIRD_PARTY[folder])}"


@pytest.mark.parametrize("module", [module for module in _modules() if Path(module).stem != "_compat"])
def test_private_names_live_in_compat(module: str) -> None:
    """A private name of torch, triton or timm may go with any release; a _compat module is the place to repair."""
    libraries = ("torch", "triton", "timm")
    names = [name for name in _imports(module) if name.split(".")[0] in libraries]
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in libraries:
            names.append(ast.unparse(node))
    private = {name for name in names for part in name.split(".") if part.startswith("_") and not part.endswith("__")}
    assert not private, f"{module} uses private names {sorted(private)}; import them through a _compat module"


def test_files_stay_short() -> None:
    files = [ROOT / "train.py", *(ROOT / "kernels" / "cpu").iterdir()]
    for folder in ("kernels", "mixers", "vision", "tests", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    sources = [file for file in files if file.suffix in (".py", ".cpp", ".h")]
    long = {file.relative_to(ROOT).as_posix() for file in sources if file.read_text().count("\n") > MOST_LINES}
    assert long <= set(LONG_FILES), f"split {sorted(long - set(LONG_FILES))}"
    assert all(source.startswith("kernels/") for source in LONG_FILES)


_LIGHT_IMPORT = """
import json, pkgutil, sys, warnings

# A package that is not installed: importing it fails.
for name in ("pytorch_lightning", "omegaconf", "torchmetrics", "matplotlib", "triton", "onnx"):
    sys.modules[name] = None
import timm, timm.models, torch

names = set(timm.list_models())
stems = {module.name for module in pkgutil.iter_modules(timm.models.__path__)}
before = set(sys.modules)
warnings.simplefilter("error")  # timm only warns when a name is registered over another
import mixerzoo.vision, mixerzoo.vision.backbones as backbones

print(json.dumps(dict(
    new=sorted(set(timm.list_models()) - names),
    lost=sorted(names - set(timm.list_models())),
    clashes=sorted(stems & {module.name for module in pkgutil.iter_modules(backbones.__path__)}),
    cuda=torch.cuda.is_initialized(),
    loaded=sorted(set(sys.modules) - before),
)))
"""


def test_import_is_light_and_takes_no_name_from_timm() -> None:
    """`import mixerzoo.vision` needs torch and timm alone, starts nothing, and takes nothing away from timm."""
    done = subprocess.run([sys.executable, "-c", _LIGHT_IMPORT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["new"]) >= 23, "models were not registered"
    assert (found["lost"], found["clashes"], found["cuda"]) == ([], [], False)
    assert {name.split(".")[0] for name in found["loaded"]} <= {"mixerzoo", *sys.stdlib_module_names}
    assert not [name for name in found["loaded"] if "_triton" in name], "kernels are defined when they are first needed"
