"""onnxruntime over the bytes of one classifier."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from mlflow_kdguard import devices
from mlflow_kdguard.devices import Placed
from mlflow_kdguard.errors import DeviceError, ModelError, NonFiniteError, UnsafeModelError
from mlflow_kdguard.files import sha256

Floats = NDArray[np.float32]

_SILENT = 4
"""onnxruntime's severity "fatal": whatever matters comes as an exception, not as text."""
_STANDARD = ("", "ai.onnx")


class Session:
    """One classifier: float32 images N×C×H×W in, logits N×K out.

    `provider` is the execution provider that really runs, `shape` is (C, H, W) and `classes` is K
    (None where the graph leaves a size open), `sha256` the digest of the bytes.
    Raises ModelError where onnxruntime or the declared input and output refuse, UnsafeModelError
    where the graph reaches outside itself, DeviceError where CUDA was asked for and onnxruntime
    would silently run on the CPU.
    """

    def __init__(self, data: bytes, *, device: Placed, where: str, threads: int = 0) -> None:
        self.where = where
        self.sha256 = sha256(data)
        _refuse_outside(data, where)
        self._session = _open(data, device, where, threads)
        self.provider: str = self._session.get_providers()[0]
        _refuse_fallback(self.provider, device)
        self._input, self.shape, self._fixed = _input_of(self._session, where)
        self._output, self.classes = _output_of(self._session, where)

    def logits(
        self, x: Floats, batch: int = 256, *, indices: NDArray[np.int64] | None = None
    ) -> Floats:
        """Logits N×K of the images `x` (N×C×H×W, pixels in [0, 1]), at most `batch` at a time.

        `indices` are the names of the images in messages (default: 0 to N-1). Raises ModelError
        where shapes do not fit, NonFiniteError naming the first image whose output is NaN or
        infinite.
        """
        self._check_images(x)
        names = np.arange(len(x)) if indices is None else indices
        step = self._fixed or batch
        parts = [self._run(x[i : i + step], names[i : i + step]) for i in range(0, len(x), step)]
        return np.concatenate(parts) if parts else np.zeros((0, self.classes or 0), np.float32)

    def _check_images(self, x: Floats) -> None:
        fits = x.dtype == np.float32 and x.ndim == 4
        fits = fits and all(b in (None, a) for a, b in zip(x.shape[1:], self.shape, strict=True))
        if not fits:
            raise ModelError(
                f"{self.where} takes float32 images of shape {_show(self.shape)}, "
                f"not {x.dtype} of shape {_show(x.shape[1:])}.",
                remedy="Use the kind of images that it was made for.",
            )

    def _run(self, x: Floats, names: NDArray[np.int64]) -> Floats:
        try:
            raw = self._session.run([self._output], {self._input: np.ascontiguousarray(x)})[0]
        except Exception as error:  # onnxruntime's errors share no other base
            raise ModelError(
                f"{self.where} does not run on images {names[0]} to {names[-1]}: "
                f"{_first_line(error)}"
            ) from error
        answers = np.asarray(raw)
        if answers.ndim != 2 or answers.shape != (len(x), self.classes or answers.shape[1]):
            raise ModelError(
                f"{self.where} answers shape {_show(answers.shape)} for {len(x)} images.",
                remedy="Logits are one row an image, one column a class.",
            )
        bad = np.flatnonzero(~np.isfinite(answers).all(axis=1))
        if bad.size:
            raise NonFiniteError(
                f"{self.where} answers NaN or infinity on image {int(names[bad[0]])}.",
                remedy="No figure of such a model means anything; train or export it again.",
            )
        return answers.astype(np.float32, copy=False)


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax over the last axis, in float64."""
    z = logits.astype(np.float64)
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(z / z.sum(axis=-1, keepdims=True), np.float64)


def _refuse_outside(data: bytes, where: str) -> None:
    """Refuse tensors in other files and operators of other makers before onnxruntime sees them."""
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError, which has no types
        raise ModelError(
            f"{where} is not an ONNX model: {_first_line(error)}",
            remedy="It may be truncated or of another format.",
        ) from error
    for node in _nodes(model):
        if node.domain not in _STANDARD:
            raise UnsafeModelError(
                f"{where} uses the operator {node.op_type} of the domain {node.domain!r}.",
                remedy="Only standard ONNX operators are run.",
            )
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise UnsafeModelError(
                f"{where} keeps the tensor {tensor.name!r} in another file.",
                remedy="Save it as one file (save_as_external_data=False).",
            )


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else ():
                yield from _graphs(inner)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _open(data: bytes, device: Placed, where: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    # An explicit count keeps onnxruntime from pinning threads to cores that it may not use.
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(data, options, providers=devices.providers(device))
    except Exception as error:  # onnxruntime's errors share no other base
        raise ModelError(
            f"onnxruntime refuses {where}: {_first_line(error)}",
            remedy="Export it with IR 10 and opset 18 to 21, as one file.",
        ) from error


def _refuse_fallback(provider: str, device: Placed) -> None:
    if device.type == "cuda" and not provider.startswith("CUDA"):
        raise DeviceError(
            f"onnxruntime cannot use {device}: it would run on {provider}.",
            remedy="Install onnxruntime-gpu and the CUDA libraries it names, or ask for cpu.",
        )


def _input_of(
    session: ort.InferenceSession, where: str
) -> tuple[str, tuple[int | None, ...], int | None]:
    """Name, (C, H, W) and the batch size that the graph insists on, if any."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{i.name}: {i.type} {_show(i.shape)}" for i in inputs)
        raise ModelError(
            f"{where} does not take one float32 tensor N×C×H×W (it takes {found or 'nothing'}).",
            remedy="Only image classifiers are measured.",
        )
    batch, *shape = (size if isinstance(size, int) else None for size in inputs[0].shape)
    if batch not in (None, 1):
        raise ModelError(
            f"{where} insists on batches of {batch} images.",
            remedy="Export it with a free batch size.",
        )
    return inputs[0].name, tuple(shape), batch


def _output_of(session: ort.InferenceSession, where: str) -> tuple[str, int | None]:
    outputs = session.get_outputs()
    if len(outputs) != 1 or outputs[0].type != "tensor(float)" or len(outputs[0].shape) != 2:
        found = ", ".join(f"{o.name}: {o.type} {_show(o.shape)}" for o in outputs)
        raise ModelError(
            f"{where} does not answer one float32 tensor N×K of logits (it answers {found}).",
            remedy="Export the logits alone.",
        )
    classes = outputs[0].shape[1]
    return outputs[0].name, classes if isinstance(classes, int) else None


def _show(shape: Any) -> str:
    return "×".join("?" if not isinstance(size, int) else str(size) for size in shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
