"""Hostile and damaged model files: each its own clear error, and nothing in them runs."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import nn

import toys
from mlflow_kdguard.errors import ModelError, NonFiniteError, UnsafeModelError
from mlflow_kdguard.nets import checkpoints, load, zoo


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def checkpoint(document: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(document, buffer, **options)
    return buffer.getvalue()


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def malicious(kind: str, mark: Path) -> tuple[str, bytes]:
    payload = Payload(mark)
    weights = {"w": torch.zeros(1)}
    cases = {
        "raw pickle called .pt": ("t.pt", pickle.dumps({"weight": payload}, protocol=2)),
        "raw pickle, protocol 0": ("t.pt", pickle.dumps(payload, protocol=0)),
        "raw pickle, protocol 4": ("t.pth", pickle.dumps(payload, protocol=4)),
        "raw pickle called .safetensors": ("t.safetensors", pickle.dumps(payload)),
        "plain pickle": ("t.pkl", pickle.dumps(payload)),
        "joblib": ("t.joblib", pickle.dumps(payload)),
        "whole module": ("t.pt", checkpoint(nn.Sequential(nn.Linear(2, 2)))),
        "module beside weights": ("t.pt", checkpoint({"state_dict": weights, "more": payload})),
        "archive with a payload": (
            "t.pt",
            _replaced(checkpoint(weights), pickle.dumps(payload, 2)),
        ),
        "torchscript": (
            "t.pt",
            _zip(
                {
                    "net/data.pkl": pickle.dumps(payload, protocol=2),
                    "net/code/__torch__.py": b"raise SystemExit",
                    "net/constants.pkl": b"\x80\x02).",
                }
            ),
        ),
    }
    return cases[kind]


def _replaced(data: bytes, pickled: bytes) -> bytes:
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for name in source.namelist():
            file.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return target.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        "raw pickle called .pt",
        "raw pickle, protocol 0",
        "raw pickle, protocol 4",
        "raw pickle called .safetensors",
        "plain pickle",
        "joblib",
        "whole module",
        "module beside weights",
        "archive with a payload",
        "torchscript",
    ],
)
def test_what_would_run_code_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "payload-ran"
    name, data = malicious(kind, mark)
    path = write(tmp_path, name, data)
    with pytest.raises(UnsafeModelError) as caught:
        load.load(path, architecture=toys.architecture())
    assert not mark.exists()
    assert str(path) in caught.value.message
    assert "kdguard teacher import" in caught.value.remedy
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5


def test_the_payload_of_these_tests_is_live(tmp_path: Path) -> None:
    mark = tmp_path / "payload-ran"
    pickle.loads(malicious("plain pickle", mark)[1])
    assert mark.exists()


def test_the_refusal_names_what_would_be_called(tmp_path: Path) -> None:
    path = write(tmp_path, "t.pt", malicious("archive with a payload", tmp_path / "x")[1])
    with pytest.raises(UnsafeModelError, match=r"posix\.mkdir|nt\.mkdir"):
        load.load(path, architecture=toys.architecture())


def broken(kind: str) -> tuple[str, bytes, type[Exception], str]:
    net = toys.cnn()
    weights = net.state_dict()
    good_pt, good_st = checkpoint(weights), to_safetensors(weights)
    first = {**weights, "body.conv1.weight": weights["body.conv1.weight"].clone()}
    first["body.conv1.weight"][0, 0, 0, 0] = float("nan")
    huge = struct.pack("<Q", 2**62) + good_st[8:]
    header = {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    lying = struct.pack("<Q", len(text)) + text + b"\0" * 4
    other = toys.net("cnn:4,7").state_dict()
    mlp = toys.mlp().state_dict()
    cases: dict[str, tuple[str, bytes, type[Exception], str]] = {
        "NaN in .pt": ("t.pt", checkpoint(first), NonFiniteError, "body.conv1.weight"),
        "NaN in .safetensors": ("t.safetensors", to_safetensors(first), NonFiniteError, "NaN"),
        "truncated .pt": ("t.pt", good_pt[:-40], ModelError, "not a readable"),
        "half a .pt": ("t.pt", good_pt[: len(good_pt) // 2], ModelError, "not a readable"),
        "truncated .safetensors": ("t.safetensors", good_st[:-4], ModelError, "not a valid"),
        "header of 2^62 bytes": ("t.safetensors", huge, ModelError, "not a valid"),
        "shape of 2^80 numbers": ("t.safetensors", lying, ModelError, "not a valid"),
        "text": ("t.pt", b"not a model at all", ModelError, "not a readable"),
        "empty": ("t.pt", b"", ModelError, "empty"),
        "empty onnx": ("t.onnx", b"", ModelError, "empty"),
        "text as onnx": ("t.onnx", b"not a model", ModelError, "ONNX"),
        "unknown suffix": ("t.h5", good_pt, ModelError, "unknown kind"),
        "other archive": ("t.pt", _zip({"a/readme": b"x"}), ModelError, "not a torch checkpoint"),
        "wrong shape": ("t.pt", checkpoint(other), ModelError, "of another shape: body.conv2"),
        "wrong network": ("t.pt", checkpoint(mlp), ModelError, "missing: body.conv1.weight"),
        "no state dict": ("t.pt", checkpoint({"epoch": 3}), ModelError, "no state dict"),
        "a list": ("t.pt", checkpoint([torch.zeros(2)]), ModelError, "no state dict"),
        "sparse": ("t.pt", checkpoint({"w": torch.eye(2).to_sparse()}), ModelError, "dense"),
    }
    return cases[kind]


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        "NaN in .pt", "NaN in .safetensors", "truncated .pt", "half a .pt",
        "truncated .safetensors", "header of 2^62 bytes", "shape of 2^80 numbers", "text",
        "empty", "empty onnx", "text as onnx", "unknown suffix", "other archive", "wrong shape",
        "wrong network", "no state dict", "a list", "sparse",
    ],
)  # fmt: skip
def test_damaged_and_foreign_files(kind: str, tmp_path: Path) -> None:
    name, data, error, words = broken(kind)
    path = write(tmp_path, name, data)
    with pytest.raises(error) as caught:
        load.load(path, architecture=toys.architecture())
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 5  # type: ignore[attr-defined]
    assert caught.value.remedy  # type: ignore[attr-defined]


def test_every_prefix_of_a_checkpoint_is_refused_cleanly(tmp_path: Path) -> None:
    for name, data in (
        ("t.pt", checkpoint(toys.cnn().state_dict())),
        ("t.pth", checkpoint(toys.cnn().state_dict(), _use_new_zipfile_serialization=False)),
        ("t.safetensors", to_safetensors(toys.cnn().state_dict())),
    ):
        for cut in range(1, len(data), max(1, len(data) // 60)):
            with pytest.raises(ModelError):
                load.loads(data[:cut], name=name, architecture=toys.architecture())


def test_flipped_bytes_never_raise_anything_else() -> None:
    """A flip may change a weight unseen (weights carry no digest); nothing else may happen."""
    draw = np.random.default_rng(0)
    for name, data in (
        ("t.pt", checkpoint(toys.cnn().state_dict())),
        ("t.safetensors", to_safetensors(toys.cnn().state_dict())),
    ):
        for _ in range(60):
            flipped = bytearray(data)
            flipped[draw.integers(len(data) // 2)] ^= 1 << draw.integers(8)
            try:
                back = load.loads(bytes(flipped), name=name, architecture=toys.architecture())
            except ModelError:
                continue
            assert isinstance(back, zoo.Classifier)


def test_a_header_that_begins_as_a_pickle_does_is_still_safetensors() -> None:
    """One safetensors file in 32 has a header of 128 bytes more than a multiple of 256."""
    weights = {"w": torch.arange(3.0)}
    sizes = {}
    for length in range(0, 400, 4):
        data = to_safetensors(weights, {"note": "x" * length})
        sizes[data[0]] = data
    assert 0x80 in sizes
    found = checkpoints.from_safetensors(sizes[0x80], where="w.safetensors")
    assert torch.equal(found["w"], weights["w"])
