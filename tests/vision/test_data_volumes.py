"""Volumes with masks: the NIfTI format, what the atlas and the tissues become, and that held-out slices stay apart."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from mixerzoo.vision.data import fetching, volumes
from mixerzoo.vision.data.loading import Request
from mixerzoo.vision.data.module import SOURCES
from mixerzoo.vision.data.nifti import read_nifti
from mixerzoo.vision.data.splits import Splits
from mixerzoo.vision.training.config import AugmentConfig, DataConfig

_CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "u2": 512}


def _nifti(
    values: np.ndarray,
    *,
    order: str = "<",
    rows: np.ndarray | None = None,
    quaternion: tuple[float, ...] | None = None,
    scale: tuple[float, float] = (0.0, 0.0),
    handed: float = 1.0,
) -> bytes:
    """A NIfTI-1 file, written field by field from the format's description."""
    header = bytearray(352)
    shape = (*values.shape, *(1,) * (7 - values.ndim))
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, values.ndim, *shape)
    struct.pack_into(f"{order}hh", header, 70, _CODES[values.dtype.str[1:]], 8 * values.itemsize)
    struct.pack_into(f"{order}f", header, 76, handed)
    struct.pack_into(f"{order}fff", header, 108, 352, *scale)
    if quaternion is not None:
        struct.pack_into(f"{order}h3f", header, 252, 1, 0, 0, 0)
        struct.pack_into(f"{order}3f", header, 256, *quaternion)
    if rows is not None:
        struct.pack_into(f"{order}h", header, 254, 1)
        struct.pack_into(f"{order}12f", header, 280, *np.concatenate([rows, np.zeros((3, 1))], 1).flatten())
    header[344:348] = b"n+1\0"
    return bytes(header) + values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")


def _save(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


_VALUES = np.arange(2 * 3 * 4).reshape(2, 3, 4)


@pytest.mark.parametrize("kind", _CODES)
@pytest.mark.parametrize("order", "<>")
def test_numbers_of_every_type_and_byte_order_are_read(kind: str, order: str, tmp_path: Path) -> None:
    path = _save(tmp_path / "a.nii.gz", _nifti(_VALUES.astype(kind), order=order))
    read = read_nifti(path)
    assert read.dtype == np.dtype(kind) and np.array_equal(read, _VALUES)


def test_a_plain_file_with_a_fourth_axis_of_one_and_scaled_numbers_is_read(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.nii", _nifti(_VALUES[..., None].astype("i2"), scale=(0.5, 10.0)))
    assert np.allclose(read_nifti(path), 0.5 * _VALUES + 10)
    assert np.array_equal(read_nifti(_save(path, _nifti(_VALUES.astype("u1"), scale=(1.0, 0.0)))), _VALUES)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
@pytest.mark.parametrize("tilt", [0.0, 0.2])
def test_axes_are_turned_to_the_right_the_front_and_upwards(
    order: tuple[int, ...], signs: tuple[int, ...], tilt: float, tmp_path: Path
) -> None:
    """`order`: the direction that each axis of the file has; millimetres differ from axis to axis."""
    stored = _VALUES.transpose(order)
    stored = stored[tuple(slice(None, None, sign) for sign in signs)]
    rows = np.full((3, 3), tilt)
    for axis, (direction, sign) in enumerate(zip(order, signs, strict=True)):
        rows[direction, axis] = sign * (1.0 + axis)
    read = read_nifti(_save(tmp_path / "a.nii", _nifti(stored.astype("u1"), rows=rows)))
    assert np.array_equal(read, _VALUES)


@pytest.mark.parametrize(
    ("quaternion", "handed", "expected"),
    [
        ((0.0, 0.0, 0.0), 1.0, _VALUES),
        ((0.0, 0.0, 0.0), -1.0, _VALUES[:, :, ::-1]),  # the third axis points the other way
        ((0.0, 0.0, 1.0), 1.0, _VALUES[::-1, ::-1]),  # half a turn about the third axis
        ((0.0, 0.0, 0.5**0.5), 1.0, _VALUES.transpose(1, 0, 2)[::-1]),  # a quarter: the first axis points to the front
    ],
)
def test_a_rotation_is_read_where_there_is_no_matrix(
    quaternion: tuple[float, ...], handed: float, expected: np.ndarray, tmp_path: Path
) -> None:
    data = _nifti(_VALUES.astype("u1"), quaternion=quaternion, handed=handed)
    assert np.array_equal(read_nifti(_save(tmp_path / "a.nii", data)), expected)


def _with(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


_WHOLE = _nifti(_VALUES.astype("u1"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no volume", "no NIfTI-1 file"),
        (_WHOLE[:100], "no NIfTI-1 file"),
        (_WHOLE[:-1], "ends before its 24 numbers do"),
        (_with(_WHOLE, 344, b"ni1\0"), "numbers in a file of their own"),
        (_with(_WHOLE, 70, struct.pack("<h", 128)), r"no volume of plain numbers: axes \(2, 3, 4\), NIfTI's type 128"),
        (_nifti(_VALUES[..., None].repeat(2, 3).astype("u1")), r"no volume of plain numbers: axes \(2, 3, 4, 2\)"),
        (_nifti(_VALUES[0].astype("u1")), r"no volume of plain numbers: axes \(3, 4\)"),
    ],
)
def test_what_is_no_volume_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"a.nii .*{message}"):
        read_nifti(_save(tmp_path / "a.nii", data))


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.nii.gz", _WHOLE)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.nii\.gz cannot be read"):
        read_nifti(path)


def _colin(folder: Path, atlas: np.ndarray | None = None) -> Path:
    """A head of 60 x 50 x 80; two regions of the frontal lobe in front, one of the cerebellum behind, nothing below."""
    head, regions = np.zeros((60, 50, 80), np.uint8), np.zeros((60, 50, 80), np.uint8)
    head[5:55, 5:45] = 100
    head[..., :] += np.arange(80, dtype=np.uint8)  # every slice has a brightness of its own
    regions[10:30, 25:45, 10:], regions[30:50, 25:45, 10:], regions[10:50, 5:25, 10:] = 1, 2, 90
    _save(folder / "ch2.nii.gz", _nifti(head))
    _save(folder / "aal.nii.gz", _nifti(regions if atlas is None else atlas))
    (folder / "aal.nii.txt").write_text("1 Precentral_L 2001\r\n2 Precentral_R 2002\r\n90 Vermis 9001\r\n\r\n")
    return folder


def _load(source: str, *, seed: int = 0, **settings: object) -> Splits:
    augment = AugmentConfig(resize=[1.0, 1.0], hflip=0.0)
    return SOURCES[source](DataConfig(**{"size": 64, "short_side": 0, "download": False, **settings}), augment, seed)


def test_the_regions_of_an_atlas_become_lobes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    splits = _load("colin27", root=str(_colin(tmp_path)))
    assert len(splits.classes) == 9 and splits.dense and splits.whole
    images, masks = splits.val.__getitems__(Request([0], 0))
    assert images.shape == (1, 3, 50, 60) and masks.shape == (1, 50, 60)
    front, back = masks[0, 10:20, 20:40], masks[0, 30:40, 20:40]  # the face is at the top
    assert [splits.classes[int(part.unique().item())] for part in (front, back)] == ["frontal lobe", "cerebellum"]
    assert "the numbers say nothing about other people" in caplog.text
    cut, labels = splits.train.__getitems__(Request([0, 3], 0))
    assert cut.shape == (2, 3, 64, 64) and labels.unique().tolist() == [0, 1, 8, 255]


def test_slices_of_the_parts_are_apart(tmp_path: Path) -> None:
    splits = _load("colin27", root=str(_colin(tmp_path)))
    parts = {name: list(getattr(splits, name).indices) for name in ("train", "val", "test")}
    assert min(map(len, parts.values())) >= 10 and min(min(part) for part in parts.values()) == 10
    for name, part in parts.items():
        others = [index for other, indices in parts.items() if other != name for index in indices]
        assert min(abs(index - other) for index in part for other in others) > volumes.GAP


def test_a_limit_draws_training_slices_by_the_seed(tmp_path: Path) -> None:
    root = str(_colin(tmp_path))
    whole = list(_load("colin27", root=root).train.indices)
    drawn = [list(_load("colin27", root=root, seed=seed, limit=7).train.indices) for seed in (0, 0, 1)]
    assert all(len(part) == len({*part} & {*whole}) == 7 for part in drawn)
    assert drawn[0] == drawn[1] != drawn[2] and whole[:7] not in drawn
    assert list(_load("colin27", root=root, seed=3, limit=500).train.indices) == whole


def test_tissues_are_what_is_likelier_than_not(tmp_path: Path) -> None:
    head = np.zeros((40, 40, 70), np.uint8)
    head[5:35, 5:35] = 150
    grey, white = np.zeros_like(head), np.zeros_like(head)
    grey[5:20, 5:35], white[20:34, 5:35], grey[20:34, 5:35] = 255, 128, 120
    for kind, values in (("t1", head), ("gm", grey), ("wm", white)):
        _save(tmp_path / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz", _nifti(values))
    white[0, 0, 0] = 255  # the whole range is used somewhere
    _save(tmp_path / "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz", _nifti(white))
    splits = _load("mni_tissue", root=str(tmp_path))
    _, masks = splits.val.__getitems__(Request([0], 0))
    row = masks[0, 20].tolist()
    assert [row[place] for place in (2, 10, 25, 34, 38)] == [0, 2, 3, 1, 0]
    assert splits.classes == ("background", "fluid and other", "grey matter", "white matter")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without these packages and without a network; returns its cache folder."""
    monkeypatch.delenv("MIXERZOO_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(volumes, "folder_of_package", lambda name: None)
    monkeypatch.setattr(volumes, "_COLIN_FOLDER", str(tmp_path / "not_installed")[1:])

    def run(command: list[str], folder: Path) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr(fetching, "_run", run)
    return tmp_path / "cache" / "mixerzoo"


@pytest.mark.parametrize(
    ("source", "command"), [("colin27", "apt-get install mricron-data"), ("mni_tissue", "pip install nilearn")]
)
@pytest.mark.parametrize("download", [True, False])
def test_what_is_nowhere_is_named_with_the_command(source: str, command: str, download: bool, nowhere: Path) -> None:
    with pytest.raises(ValueError, match=rf"are not in the usual places .*; `{command}` brings them"):
        _load(source, download=download)
    with pytest.raises(ValueError, match=rf"are not in data\.root={nowhere}, .*`{command}`"):
        _load(source, root=str(nowhere))


def test_an_installed_package_is_found_and_else_it_is_unpacked_once(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt-get and dpkg are stood in for by what they leave behind."""

    def run(command: list[str], folder: Path) -> None:
        if command[0] == "apt-get":
            (folder / "package.deb").touch()
        else:
            _colin(folder / volumes._COLIN_FOLDER)

    monkeypatch.setattr(fetching, "_run", run)
    monkeypatch.setattr(fetching.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert str(nowhere / "colin27") in _load("colin27", download=True).origin
    monkeypatch.setattr(fetching, "_run", None)  # a second call finds the files and fetches nothing
    assert len(_load("colin27").classes) == 9
    _colin(tmp_path / "not_installed")
    assert str(tmp_path / "not_installed") in _load("colin27").origin


def test_volumes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _colin(tmp_path, np.full((60, 50, 80), 7, np.uint8))
    with pytest.raises(ValueError, match=r"aal\.nii\.gz holds regions \[7\], which aal\.nii\.txt does not name"):
        _load("colin27", root=str(tmp_path))
    _colin(tmp_path, np.full((60, 50, 79), 1, np.uint8))
    with pytest.raises(ValueError, match=r"\(60, 50, 80\) and \(60, 50, 79\) are no pair of volumes"):
        _load("colin27", root=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "classes"), [("colin27", 9), ("mni_tissue", 4)])
def test_the_real_volumes_when_they_are_here(source: str, classes: int) -> None:
    try:
        splits = _load(source)
    except ValueError:
        pytest.skip("the package is not on this machine")
    assert len(splits.train) > 60 and len(splits.val) >= 20 and len(splits.test) >= 20
    slices = splits.train.dataset
    assert set(np.unique(slices.masks)) == set(range(classes))
    images, masks = splits.test.__getitems__(Request([0], 0))
    assert images.shape[2:] == masks.shape[1:] and masks.dtype == torch.int64
