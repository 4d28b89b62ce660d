"""Hostile bytes: read to the function that onnxruntime computes, or refused; nothing else."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto
from onnx.numpy_helper import to_array

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.errors import KDGuardError, ModelError


@pytest.mark.parametrize("data", [b"", b"\x00", b"garbage", b"\x08\x0a", b"\x80\x04K\x01.", b"PK"])
def test_bytes_that_are_not_a_model(data: bytes) -> None:
    with pytest.raises(ModelError, match="toy"):
        graph.read(data, where="toy")


def test_every_prefix_is_refused() -> None:
    data = toys.onnx_tiny()
    for cut in range(len(data)):
        with pytest.raises(ModelError):
            graph.read(data[:cut], where="toy")


def outcome(data: bytes) -> np.ndarray[Any, Any] | None:
    """Logits if the bytes are read, None if they are refused; anything else is a failure.

    What is read must be what onnxruntime computes, where that loads the file at all.
    """
    try:
        read = graph.read(data, where="toy", require_clip=False)
    except KDGuardError:
        return None
    x = np.linspace(0, 1, 2 * math.prod(read.input_shape)).reshape(2, *read.input_shape)
    logits = graph.evaluate(read, x)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:
        return logits
    (other,) = session.run(None, {session.get_inputs()[0].name: x.astype(np.float32)})
    largest = max((abs(t).max() for t in map(to_array, constants_of(data))), default=1.0)
    np.testing.assert_allclose(other, logits, rtol=1e-4, atol=1e-5 * max(1.0, float(largest)) ** 2)
    return logits


def constants_of(data: bytes) -> list[TensorProto]:
    return list(ModelProto.FromString(data).graph.initializer)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_read_or_refused_and_nothing_else(flips: list[tuple[int, int]]) -> None:
    data = bytearray(toys.onnx_tiny())
    for place, change in flips:
        data[place % len(data)] ^= change
    outcome(bytes(data))


def test_every_single_byte_of_the_structure_may_be_flipped() -> None:
    data = toys.onnx_tiny()
    for place in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            flipped = bytearray(data)
            flipped[place] ^= change
            outcome(bytes(flipped))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert outcome(data) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2), st.integers(-(2**63), 2**63 - 1), st.sampled_from(["kernel", "pads"]))
def test_numbers_of_any_size_in_attributes(place: int, number: int, what: str) -> None:
    sides = [2, 2, 2, 2]
    sides[place] = number
    kernel, pads = (sides[:2], [0] * 4) if what == "kernel" else ([3, 3], sides)
    nodes = [
        toys.node("AveragePool", ("p",), "y", kernel_shape=kernel, pads=pads),
        toys.node("Flatten", ("y",), "logits"),
    ]
    model = toys.proto(nodes, shape=(1, 6, 6), classes=25)
    outcome(model.SerializeToString())


def test_reading_needs_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys; from mlflow_kdguard import graph; import toys; "
        "graph.evaluate(graph.read(toys.onnx_tiny(), where='t'), toys.images(2, (1, 2, 2))); "
        "bad = {'torch', 'onnxruntime', 'mlflow', 'sklearn'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
