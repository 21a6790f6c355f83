"""Finding and loading the compiled CPU kernels; what they compute is tested with each operator."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mixerzoo.kernels import _native


@pytest.fixture(autouse=True)
def fresh_search() -> Iterator[None]:
    _native.library.cache_clear()
    yield
    _native.library.cache_clear()


def test_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXERZOO_NATIVE", "0")
    assert not _native.is_available()


def test_missing_or_broken_library_means_not_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    assert not _native.is_available()
    assert not caplog.records

    _native.library.cache_clear()
    (tmp_path / f"_cpu_baseline{_native.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert not _native.is_available()
    assert "cannot be used" in caplog.text


def test_a_library_of_an_older_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not _native.is_available():
        pytest.skip("no compiled kernels: installed without a C++ compiler")
    _native.library.cache_clear()
    monkeypatch.setitem(_native._FUNCTIONS, "mixerzoo_of_the_future", [])
    assert not _native.is_available()
    assert "mixerzoo_of_the_future" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_uses_the_openmp_runtime_of_torch() -> None:
    script = """
import torch
from mixerzoo.kernels.depthwise_conv import depthwise_conv2d
from mixerzoo.kernels.neighborhood_attention import na2d
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line and ".so" in line}
before = runtimes()
torch.set_num_threads(2)
q = torch.randn(1, 20, 20, 2, 8)
na2d(q, q, q, 3)
depthwise_conv2d(torch.randn(1, 32, 20, 20), torch.randn(32, 1, 5, 5))
assert runtimes() == before, runtimes() - before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
