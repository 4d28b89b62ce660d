"""Array files in their published formats: IDX (plain and gzipped) and NPZ."""

import gzip
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_kdguard import data
from mlflow_kdguard.errors import DataError
from requirements import require

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
ROWS = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
PICTURES = (ROWS.reshape(4, 3, 32, 32) / 255).astype(np.float32)


def refused(uri: str, says: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        data.load(uri, **options)
    assert uri in caught.value.message
    assert says in caught.value.message
    assert caught.value.remedy


# ── IDX ─────────────────────────────────────────────────────────────────────────────────────────


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 3, 2) * 10
LABELS = np.array([3, 0, 1, 3], np.uint8)


def write_idx(folder: Path, *, packed: bool) -> Path:
    folder.mkdir(parents=True)
    for stem, cut in (("train", slice(0, 3)), ("t10k", slice(3, 4))):
        for kind, array in (("images-idx3", IMAGES[cut]), ("labels-idx1", LABELS[cut])):
            content = idx(array)
            name = f"{stem}-{kind}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_idx_folders_also_with_awkward_names(tmp_path: Path, packed: bool) -> None:
    place = write_idx(tmp_path / "my #1 set?", packed=packed)
    uri = f"idx:{data.quote(place)}"
    whole = data.load(uri)
    assert np.array_equal(whole.x, (IMAGES[:, None] / 255).astype(np.float32))
    assert np.array_equal(whole.y, LABELS)
    assert data.load(f"{uri}#train").classes == 4
    assert np.array_equal(data.load(f"{uri}#test").y, [3])


def test_mnist_and_fashion_mnist_under_a_root(tmp_path: Path) -> None:
    for name, folder in (("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")):
        write_idx(tmp_path / folder / "raw", packed=False)
        found = data.load(f"{name}#train", root=tmp_path)
        assert (len(found), found.classes, found.shape) == (3, 10, (1, 3, 2))


def test_fashion_mnist_from_debians_package_and_never_past_a_named_root(tmp_path: Path) -> None:
    require("fashion-mnist", DEBIAN.is_dir(), "Debian's dataset-fashion-mnist is not installed")
    found = data.load("fashion-mnist#test")
    assert (len(found), found.classes, found.shape) == (10_000, 10, (1, 28, 28))
    assert np.bincount(found.y).tolist() == [1000] * 10
    assert found.sha256 == data.load(f"idx:{DEBIAN}#test").sha256
    assert len(data.load("fashion-mnist#train")) == 60_000
    refused("fashion-mnist", "FashionMNIST", root=tmp_path)


IDX_FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated gzip": (lambda raw: gzip.compress(raw)[:-12], "cannot read"),
    "corrupt gzip": (lambda raw: gzip.compress(raw)[:10] + b"\xff" * 30, "cannot read"),
    "wrong checksum": (lambda raw: gzip.compress(raw)[:-8] + bytes(8), "cannot read"),
    "not gzip": (lambda raw: raw, "cannot read"),
    "empty": (lambda raw: b"", "begins with"),
    "wrong magic": (lambda raw: gzip.compress(b"\0\0\x0d\x03" + raw[4:]), "begins with 00000d03"),
    "ends in header": (lambda raw: gzip.compress(raw[:9]), "header"),
    "too short": (lambda raw: gzip.compress(raw[:-1]), "declares 18 bytes and holds 17"),
    "too long": (lambda raw: gzip.compress(raw + b"\0"), "holds more"),
    "absurd size": (lambda raw: gzip.compress(raw[:4] + b"\xff" * 12), "claims the shape"),
    "no pixels": (lambda raw: gzip.compress(raw[:12] + bytes(4)), "claims the shape"),
    "fewer": (lambda raw: gzip.compress(idx(IMAGES[:2])), "2 images, but 3 labels"),
}


@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_idx_faults(tmp_path: Path, fault: str) -> None:
    place = write_idx(tmp_path / "set", packed=True)
    spoil, says = IDX_FAULTS[fault]
    (place / "train-images-idx3-ubyte.gz").write_bytes(spoil(idx(IMAGES[:3])))
    refused(f"idx:{place}#train", says)


def test_idx_files_that_are_not_there(tmp_path: Path) -> None:
    refused(f"idx:{tmp_path}/none", "not a folder")
    refused(f"idx:{tmp_path}", "no train-images")
    place = write_idx(tmp_path / "set", packed=False)
    (place / "t10k-labels-idx1-ubyte").unlink()
    refused(f"idx:{place}#test", "t10k-labels")
    (place / "t10k-images-idx3-ubyte").unlink()
    assert len(data.load(f"idx:{place}")) == 3


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    place = write_idx(tmp_path / "set", packed=True)
    bomb = gzip.compress(idx(IMAGES[:3]) + bytes(200_000_000), compresslevel=1)
    (place / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    refused(f"idx:{place}#train", "holds more")


def test_labels_beyond_the_classes(tmp_path: Path) -> None:
    place = write_idx(tmp_path / "MNIST" / "raw", packed=False)
    (place / "train-labels-idx1-ubyte").write_bytes(idx(np.array([0, 1, 10], np.uint8)))
    refused("mnist#train", "labels range from 0 to 10", root=tmp_path)


# ── NPZ ─────────────────────────────────────────────────────────────────────────────────────────


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


X = PICTURES[:, :2, :4, :4]
Y = np.array([2, -1, 0, 1])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_flat_and_in_halves(tmp_path: Path, save: Callable[..., None]) -> None:
    flat, halves = tmp_path / "flat.npz", tmp_path / "halves.npz"
    save(flat, x=np.asfortranarray(X), y=Y.astype(">i8"))
    save(halves, x_train=X[:3], y_train=Y[:3], x_test=X[3:].astype(">f4"), y_test=Y[3:])
    whole = data.load(f"npz:{flat}")
    assert np.array_equal(whole.x, X)
    assert (whole.y.tolist(), whole.classes) == (Y.tolist(), 3)
    assert data.load(f"npz:{halves}").sha256 == whole.sha256
    assert data.load(f"npz:{flat}#[1:3]").sha256 == whole.take([1, 2]).sha256
    # The number of classes is the file's, not the split's.
    assert data.load(f"npz:{halves}#test").classes == 3
    save(flat, x=X, y=Y, classes=7)
    assert data.load(f"npz:{flat}").classes == 7


def test_a_saved_set_reads_back_as_itself(tmp_path: Path) -> None:
    bare = data.Dataset.of(X, None, uri="bare", classes=0)
    grey = data.Dataset.of(ROWS.reshape(4, 3, 32, 32), Y, uri="grey levels", classes=9)
    for dataset in (bare, grey, grey.take([2, 0])):
        for path in (tmp_path / "one.npz", tmp_path / "two.npz"):
            data.save(dataset, path)
        assert data.load(f"npz:{path}").sha256 == dataset.sha256
        assert path.read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_npz_without_any_label(tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", x=X, y=np.full(4, -1))
    bare = data.load(f"npz:{tmp_path}/bare.npz")
    assert (bare.classes, bare.y.tolist()) == (0, [-1] * 4)


NPZ_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no y": ({"x": X}, "neither x, y"),
    "both forms": (
        dict.fromkeys(["x", "x_train", "x_test"], X) | dict.fromkeys(["y", "y_train", "y_test"], Y),
        "both a flat",
    ),
    "half a half": ({"x_train": X, "y_train": Y}, "neither"),
    "float64": ({"x": X.astype(np.float64), "y": Y}, "x is float64"),
    "uint8": ({"x": ROWS.reshape(4, 3, 32, 32), "y": Y}, "x is uint8"),
    "three axes": ({"x": X[:, 0], "y": Y}, "(4, 4, 4)"),
    "no pixels": ({"x": X[:, :0], "y": Y}, "(4, 0, 4, 4)"),
    "above one": ({"x": X + np.float32(1), "y": Y}, "not within [0,1]"),
    "below zero": ({"x": X - np.float32(1), "y": Y}, "not within [0,1]"),
    "nan": ({"x": np.where(X.max() == X, np.float32("nan"), X), "y": Y}, "nan"),
    "infinite": ({"x": np.where(X.max() == X, np.float32("inf"), X), "y": Y}, "inf"),
    "int32 labels": ({"x": X, "y": Y.astype(np.int32)}, "y is int32"),
    "float labels": ({"x": X, "y": Y / 2}, "y is float64"),
    "one-hot": ({"x": X, "y": np.eye(4, dtype=np.int64)}, "y is int64 of shape (4, 4)"),
    "shorter": ({"x": X, "y": Y[:3]}, "4 images, but 3 labels"),
    "label -2": ({"x": X, "y": Y - 1}, "labels range from -2"),
    "label too large": ({"x": X, "y": Y, "classes": 2}, "outside -1 to 1"),
    "bad classes": ({"x": X, "y": Y, "classes": 2.5}, "classes is not"),
    "objects": ({"x": np.array([None] * 4), "y": Y}, "unpickled"),
    "text": ({"x": np.array(["a"]), "y": Y}, "unpickled"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "holds nothing"),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_npz_faults(tmp_path: Path, fault: str) -> None:
    arrays, says = NPZ_FAULTS[fault]
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(f"npz:{tmp_path}/bad.npz", says)


def test_a_payload_in_an_npz_does_not_run(tmp_path: Path) -> None:
    bad = np.empty(1, object)
    bad[0] = _Payload(tmp_path / "executed")
    np.savez(tmp_path / "bad.npz", x=X, y=bad)
    refused(f"npz:{tmp_path}/bad.npz", "unpickled")
    (tmp_path / "bad.npz").write_bytes(pickle.dumps(bad))
    refused(f"npz:{tmp_path}/bad.npz", "cannot read")
    assert not (tmp_path / "executed").exists()


def npy(header: str, body: bytes = b"", version: int = 1) -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text + body


_HEAD = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"

MEMBERS = {
    "huge claim": (npy(_HEAD % "(1000000000, 1000000000, 9, 9)"), "too large"),
    "negative side": (npy(_HEAD % "(-1, -4, 1, 1)", bytes(16)), "too large"),
    "short": (npy(_HEAD % "(1, 1, 2, 2)", bytes(15)), "as long as it declares"),
    "long": (npy(_HEAD % "(1, 1, 2, 2)", bytes(17)), "as long as it declares"),
    "no npy": (b"hello", "cannot read x"),
    "future": (npy(_HEAD % "(1, 1, 1, 1)", bytes(4), version=9), "cannot read x"),
    "code": (npy("{'descr': __import__('os').getcwd(), }"), "cannot read x"),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_npz_members_that_lie(tmp_path: Path, member: str) -> None:
    raw, says = MEMBERS[member]
    labels = io.BytesIO()
    np.save(labels, np.zeros(1, np.int64))
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("x.npy", raw)
        archive.writestr("y.npy", labels.getvalue())
    refused(f"npz:{tmp_path}/bad.npz", says)


def test_npz_archives_that_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    refused(f"npz:{path}", "No such file")
    refused(f"npz:{tmp_path}", "directory")
    np.savez(path, x=X, y=Y)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(f"npz:{path}", "not a zip file")
    spoiled = bytearray(whole)
    spoiled[300] ^= 1  # inside the pixels: the archive's checksum notices
    path.write_bytes(spoiled)
    refused(f"npz:{path}", "CRC")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", b"")
    refused(f"npz:{path}", "two members")
