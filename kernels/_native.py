"""Load the compiled CPU kernels of kernels/cpu, if the install built them.

setuptools compiles those files into one library for AVX2 and one for any processor (pyproject.toml). An install without
a compiler has neither library, and everything else works. The libraries depend on neither Python nor torch: they export
plain C functions over pointers and strides, called through ctypes, which releases the GIL. They use the OpenMP runtime
that torch has loaded, and therefore its threads; they fail to load if that runtime lacks a symbol they need.

Set `MIXERZOO_NATIVE=0` in the environment to disable them.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_logger = logging.getLogger(__name__)

_BEST = {"AVX512": ["_cpu_avx2"], "AVX2": ["_cpu_avx2"]}
"""Libraries to try before the baseline, keyed by torch's name for the CPU capability. There is no AVX-512 build: a
window of seven fills eight lanes, not sixteen."""

_pointer, _float = ctypes.c_void_p, ctypes.c_float
_FUNCTIONS = {
    "mixerzoo_na_forward": [_pointer, _pointer, _float],
    "mixerzoo_na_backward": [_pointer, _pointer, _float],
    "mixerzoo_depthwise_forward": [_pointer] * 5,
    "mixerzoo_depthwise_weight_grad": [_pointer] * 4,
    "mixerzoo_scan_forward": [_pointer] * 4,
    "mixerzoo_scan_backward": [_pointer] * 4,
    "mixerzoo_token_match": [_pointer] * 2,
    "mixerzoo_token_merge": [_pointer] * 3,
}

BAD_GEOMETRY, NO_MEMORY = 1, 2
"""Non-zero return codes of the functions: `Status` in kernels/cpu/memory.h."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the best library for this processor, or None if there is none."""
    if os.environ.get("MIXERZOO_NATIVE", "1") == "0":
        return None
    for name in [*_BEST.get(torch.backends.cpu.get_cpu_capability(), []), "_cpu_baseline"]:
        for suffix in EXTENSION_SUFFIXES:
            path = Path(__file__).with_name(name + suffix)
            if not path.is_file():
                continue
            try:
                loaded = ctypes.CDLL(str(path))
                for function, arguments in _FUNCTIONS.items():
                    getattr(loaded, function).argtypes = arguments
                    getattr(loaded, function).restype = ctypes.c_int
            except (OSError, AttributeError) as error:
                _logger.warning("the native kernels of %s cannot be used, plain PyTorch serves: %s", path, error)
                continue
            return loaded
    return None


def is_available() -> bool:
    """Return whether compiled kernels are installed, run on this processor and are not disabled."""
    return library() is not None


def as_words(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Pack integers and addresses into an array of 64-bit words, the layout of the C structs."""
    return (ctypes.c_int64 * len(values))(*values)
