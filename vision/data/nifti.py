"""Reads volumes from NIfTI-1 files (`.nii`, `.nii.gz`), the format of brain imaging:
https://nifti.nimh.nih.gov/nifti-1.

A header of 348 bytes describes the axes, the data type, the scaling and the orientation of each axis; the values follow
at an offset, with the first axis contiguous.

Unusual: volumes are reoriented so that their axes run to the right, to the front and upwards. An oblique axis is
assigned to the nearest direction, without resampling.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_HEADER = np.dtype(
    {
        "names": ["dim", "datatype", "pixdim", "vox_offset", "scale", "forms", "quaternion", "rows", "magic"],
        "formats": ["8i2", "i2", "8f4", "f4", "2f4", "2i2", "3f4", "(3,4)f4", "S4"],
        "offsets": [40, 70, 76, 108, 112, 252, 256, 280, 344],
        "itemsize": 348,
    }
)


def read_nifti(path: Path) -> np.ndarray:
    """Return the volume [right, front, up] in the file's type, or as floats if the file scales its values."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from error
    order: Literal["<", ">"] = "<" if data[:4] == (348).to_bytes(4, "little") else ">"
    if len(data) < 348 or int.from_bytes(data[:4], "little" if order == "<" else "big") != 348:
        raise ValueError(f"{path} is no NIfTI-1 file: its header does not begin with 348, its length")
    header = np.frombuffer(data, _HEADER.newbyteorder(order), 1)[0]
    if header["magic"] != b"n+1":
        raise ValueError(f"{path} has its numbers in a file of their own, or is no NIfTI-1 file: {header['magic']}")
    kind = _TYPES.get(int(header["datatype"]))
    shape = tuple(int(length) for length in header["dim"][1 : 1 + max(int(header["dim"][0]), 0)])
    if kind is None or len(shape) < 3 or shape[:3] != tuple(length for length in shape if length > 1):
        raise ValueError(f"{path} is no volume of plain numbers: axes {shape}, NIfTI's type {header['datatype']}")
    start, count = int(header["vox_offset"]), int(np.prod(shape, dtype=np.int64))
    if len(data) - start < count * np.dtype(kind).itemsize:
        raise ValueError(f"{path} is damaged: it ends before its {count} numbers do; fetch it again")
    values = np.frombuffer(data, np.dtype(kind).newbyteorder(order), count, start).reshape(shape[:3], order="F")
    slope, intercept = (float(number) for number in header["scale"])
    if slope not in (0, 1) or (slope == 1 and intercept):  # 0: not scaled
        values = values * slope + intercept
    return _upright(values.astype(values.dtype.newbyteorder("=")), _directions(header))


def _directions(header: np.void) -> np.ndarray:
    """Return [3, 3], whose columns are the directions of the file's axes as (right, front, up)."""
    by_quaternion, by_rows = (int(code) for code in header["forms"])
    if by_rows > 0:
        return header["rows"][:, :3].astype(np.float64)
    if by_quaternion <= 0:
        return np.eye(3)
    b, c, d = (float(part) for part in header["quaternion"])
    a = max(1 - b * b - c * c - d * d, 0.0) ** 0.5
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    turn[:, 2] *= -1 if header["pixdim"][0] < 0 else 1
    return turn


def _upright(values: np.ndarray, directions: np.ndarray) -> np.ndarray:
    free, order = np.abs(directions / np.linalg.norm(directions, axis=0)), [0, 0, 0]
    for _ in range(3):  # the clearest first, so that no direction is assigned twice
        world, axis = (int(place) for place in np.unravel_index(free.argmax(), free.shape))
        order[world] = axis
        free[world], free[:, axis] = -1, -1
    signs = [directions[world, axis] for world, axis in enumerate(order)]
    turned = values.transpose(order)
    return np.ascontiguousarray(turned[tuple(slice(None, None, -1 if sign < 0 else 1) for sign in signs)])
