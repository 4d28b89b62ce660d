"""CIFAR-10 and CIFAR-100: binary records, and pickles that are not believed."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_kdguard import data
from mlflow_kdguard.data import batches
from mlflow_kdguard.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
ROWS = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
PICTURES = (ROWS.reshape(4, 3, 32, 32) / 255).astype(np.float32)


def refused(uri: str, says: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        data.load(uri, **options)
    assert uri in caught.value.message
    assert says in caught.value.message
    assert caught.value.remedy


def python2_batch(rows: Any, key: str, labels: list[int]) -> bytes:
    """Protocol 2 as Python 2 wrote the official files: bytes are 8-bit strings."""
    out = b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    out += b"K\x00\x85U\x01b\x87R(K\x01J" + struct.pack("<i", len(rows)) + b"M\x00\x0c\x86"
    out += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2
    out += b"K\x00tb\x89T" + struct.pack("<I", rows.size) + rows.tobytes() + b"tb"
    out += b"U" + bytes([len(key)]) + key.encode()
    return out + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu."


WRITERS: dict[str, Callable[[Any, str, list[int]], bytes]] = {"python2": python2_batch} | {
    f"protocol{p}": lambda rows, key, labels, p=p: pickle.dumps(  # type: ignore[misc]
        {"batch_label": "x", key: labels, "data": rows, "filenames": ["a.png"]}, protocol=p
    )
    for p in range(6)
}


def write_ten(root: Path, write: Callable[[Any, str, list[int]], bytes]) -> Path:
    place = root / "cifar-10-batches-py"
    place.mkdir()
    for i in range(5):
        (place / f"data_batch_{i + 1}").write_bytes(write(ROWS[i % 3 : i % 3 + 1], "labels", [i]))
    (place / "test_batch").write_bytes(write(ROWS[2:], "labels", [9, 0]))
    return place


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar10_pickles_of_every_protocol(tmp_path: Path, writer: str) -> None:
    write_ten(tmp_path, WRITERS[writer])
    train, test = (data.load(f"cifar10#{split}", root=tmp_path) for split in ("train", "test"))
    assert np.array_equal(train.x, PICTURES[[0, 1, 2, 0, 1]])
    assert train.y.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(test.x, PICTURES[2:])
    assert (test.y.tolist(), test.classes) == ([9, 0], 10)


def test_the_python2_pickle_is_what_python_itself_reads() -> None:
    raw = python2_batch(ROWS, "labels", [1, 2, 3, 4])
    theirs = pickle.loads(raw, encoding="latin1")
    pixels, labels = batches.read(raw, labels="labels")
    assert np.array_equal(theirs["data"], pixels)
    assert theirs["labels"] == labels


def test_fortran_order_survives() -> None:
    raw = pickle.dumps({"data": np.asfortranarray(ROWS), "labels": [0] * 4}, protocol=4)
    assert np.array_equal(batches.read(raw, labels="labels")[0], ROWS)


def test_binary_and_pickled_cifar_are_the_same_images(tmp_path: Path) -> None:
    write_ten(tmp_path, python2_batch)
    pickled = data.load("cifar10", root=tmp_path)
    place = tmp_path / "cifar-10-batches-bin"
    place.mkdir()
    for i in range(5):
        (place / f"data_batch_{i + 1}.bin").write_bytes(bytes([i]) + ROWS[i % 3].tobytes())
    records = bytes([9]) + ROWS[2].tobytes() + bytes([0]) + ROWS[3].tobytes()
    (place / "test_batch.bin").write_bytes(records)
    assert data.load("cifar10", root=tmp_path).sha256 == pickled.sha256
    (place / "test_batch.bin").write_bytes(records[:-1])
    refused("cifar10#test", "3073-byte records", root=tmp_path)
    (place / "test_batch.bin").write_bytes(b"")
    refused("cifar10#test", "empty", root=tmp_path)


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    for name, rows, fine in (("train", ROWS[:3], [99, 5, 0]), ("test", ROWS[3:], [42])):
        raw = {"fine_labels": fine, "coarse_labels": [1] * len(rows), "data": rows}
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(raw, protocol=2))
    found = data.load("cifar100", root=tmp_path)
    assert (found.y.tolist(), found.classes) == ([99, 5, 0, 42], 100)
    assert np.array_equal(found.x, PICTURES)
    (tmp_path / "cifar-100-binary").mkdir()
    for name, cut, fine in (("train", slice(3), [99, 5, 0]), ("test", slice(3, 4), [42])):
        rows = zip(fine, ROWS[cut], strict=True)
        raw = b"".join(bytes([1, label]) + row.tobytes() for label, row in rows)
        (tmp_path / "cifar-100-binary" / f"{name}.bin").write_bytes(raw)
    assert data.load("cifar100", root=tmp_path).sha256 == found.sha256


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def pickled(**batch: Any) -> bytes:
    return pickle.dumps({"data": ROWS[:1], "labels": [0]} | batch, protocol=2)


def malicious(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would act, or pollute this process, or exhaust it, if they were believed."""
    text = str(marker).encode()
    return {
        "reduce": (pickled(data=_Payload(marker)), "asks to call posix.mkdir"),
        "hidden": (pickled(extra=_Payload(marker)), "asks to call posix.mkdir"),
        "text protocol": (b"cos\nmkdir\n(V" + text + b"\ntR.", "asks to call os.mkdir"),
        "inst": (b"(V" + text + b"\nios\nmkdir\n.", "asks to call os.mkdir"),
        "builtin": (b"cbuiltins\neval\n(Vopen('" + text + b"','w')\ntR.", "builtins.eval"),
        "numpy itself": (b"cnumpy\nload\n(V" + text + b"\ntR.", "asks to call numpy.load"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        "persistent": (b"Pid\n.", "outside object 'id'"),
        "state on a name": (b"cnumpy\nndarray\n(N}Vread\nK\x01stb.", "is not a CIFAR batch"),
        "memo": (b"\x80\x02}r\xff\xff\xff\xff.", "no dictionary with 'data'"),
        "huge bytes": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 61) + b"x.", "not a CIFAR batch"),
        "truncated": (pickled()[:-40], "is not a CIFAR batch"),
        "not a pickle": (b"PK\x03\x04 and so on", "is not a CIFAR batch"),
        "list": (pickle.dumps([1]), "no dictionary"),
        "no labels": (pickle.dumps({"data": ROWS}), "no dictionary"),
        "floats": (pickled(data=ROWS[:1] / 2), "not uint8"),
        "objects": (pickled(data=np.array([[None]])), "not uint8"),
        "nested": (pickled(data=[[0] * 3072]), "found list"),
        "float labels": (pickled(labels=[0.0]), "list of integers"),
        "true labels": (pickled(labels=[True]), "list of integers"),
        "long label": (pickled(labels=[1 << 70]), "too large"),
        "too few": (pickled(labels=[0, 1]), "2 labels"),
        "wrong width": (pickled(data=ROWS[:1, :-1]), "(1, 3071)"),
        "negative": (pickled(labels=[-1]), "labels range from -1"),
        "beyond": (pickled(labels=[10]), "outside 0 to 9"),
        "lying shape": (pickled().replace(b"M\x00\x0c", b"M\x01\x0c"), "array of bytes"),
        "empty": (b"", "is empty"),
    }


@pytest.mark.parametrize("attack", malicious(Path("x")))
def test_nothing_in_a_pickled_batch_is_executed(tmp_path: Path, attack: str) -> None:
    place, marker = write_ten(tmp_path, python2_batch), tmp_path / "executed"
    raw, says = malicious(marker)[attack]
    (place / "test_batch").write_bytes(raw)
    refused("cifar10#test", says, root=tmp_path)
    assert not marker.exists()
    # The stand-ins are as they were: a good batch still reads.
    assert len(data.load("cifar10#train", root=tmp_path)) == 5


def test_the_payload_of_these_tests_is_real(tmp_path: Path) -> None:
    pickle.loads(malicious(tmp_path / "executed")["reduce"][0])
    assert (tmp_path / "executed").is_dir()


def test_cifar_files_that_are_not_there_or_too_large(tmp_path: Path) -> None:
    refused("cifar10", "cifar-10-batches-bin", root=tmp_path)
    place = write_ten(tmp_path, python2_batch)
    (place / "data_batch_3").unlink()
    refused("cifar10#train", "data_batch_3", root=tmp_path)
    assert len(data.load("cifar10#test", root=tmp_path)) == 2
    with (place / "test_batch").open("wb") as file:
        file.truncate((1 << 29) + 1)
    refused("cifar10#test", "larger than 512 MiB", root=tmp_path)
