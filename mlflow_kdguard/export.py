"""Export: the network as ONNX bytes, believed only after both were compared.

The file is compared with the torch network through onnxruntime, at several batch sizes, and with
our own float64 reading of the same bytes. It is written only if all agree.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mlflow_kdguard import devices, files, graph
from mlflow_kdguard.config import ExportSection
from mlflow_kdguard.errors import DeviceError, ExportError, ModelError, NonFiniteError, UsageError
from mlflow_kdguard.nets import emit
from mlflow_kdguard.records import Exported, Model, Parity, Rate

Images = NDArray[np.float32]
Logits = NDArray[np.float32]

PARITY = 1e-4
"""Largest difference of a softmax output between torch and the exported file."""
TIE = 1e-5
"""Softmax outputs closer than this may swap places."""
BATCHING = 1e-5
"""Largest difference of a softmax output between batch sizes."""
_BATCHES = (1, 2, 64)
_READ = 8
"""Images on which our own reading is compared: it is exact and slow."""


@dataclass(frozen=True, slots=True)
class _Runtime:
    """onnxruntime on the bytes, on the device that was asked for."""

    session: Any
    provider: str

    def logits(self, x: Images, batch: int) -> Logits:
        parts = [
            self.session.run(["logits"], {"x": x[start : start + batch]})[0]
            for start in range(0, len(x), batch)
        ]
        return np.concatenate(parts)


def to_onnx(
    net: nn.Module,
    path: Path,
    *,
    shape: tuple[int, int, int],
    classes: int,
    images: Images,
    config: ExportSection,
    device: torch.device,
) -> Exported:
    """Write `net` (in eval mode, which the caller's copy is not put into) to `path`.

    `shape` is (C, H, W), `images` N×C×H×W pixels in [0,1], of which the first
    `config.parity_images` are compared. One file, IR 10, `config.opset`, Clip(0,1) first; the same
    weights give the same bytes.

    Raises ExportError (exit 7) where the file disagrees with the network, ModelError where the
    network has no canonical form, NonFiniteError for NaN or infinity, UsageError for images that
    do not fit.
    """
    images = _checked(images, shape, config.parity_images)
    data = emit.to_bytes(net, shape, opset=config.opset)
    read = graph.read(data, where=f"the export of {type(net).__name__}")
    if read.classes != classes:
        raise ModelError(
            f"the network has {read.classes} classes and the data {classes}.",
            remedy="Build it for the classes of the data.",
        )
    runtime = _runtime(data, device)
    exported = Model(sha256=read.sha256)
    # First what the file itself says: weights too large for float32 are no bug of the export.
    _compare_reading(read, runtime, images[:_READ])
    parity = _compare(_torch_logits(net, images, device), runtime, images, exported)
    _compare_batches(runtime, images)
    files.write_bytes(path, data)
    return Exported(path=str(path), sha256=read.sha256, parity=parity)


def reading_parity(data: bytes, images: Images, *, where: str, device: torch.device) -> Parity:
    """How far onnxruntime is from our own float64 reading of the bytes, on every image.

    The bounds speak of the reading, the figures of onnxruntime, and what serves is the bytes: the
    trained network that they came from is not asked. `images` is N×C×H×W in [0,1]. A difference is
    a figure, not an error. Raises ModelError for bytes that are not read, NonFiniteError for NaN
    or infinity.
    """
    read = graph.read(data, where=where)
    runtime = _runtime(data, device)
    channels, height, width = read.input_shape
    images = _checked(images, (channels, height, width), len(images))
    parts = [images[start : start + _BATCHES[-1]] for start in range(0, len(images), _BATCHES[-1])]
    exact = np.concatenate([graph.evaluate(read, part.astype(np.float64)) for part in parts])
    parity = _parity(exact, runtime, images, Model(sha256=read.sha256))
    return parity.model_copy(update={"provider": f"{parity.provider}, against float64"})


def _checked(images: Images, shape: tuple[int, int, int], count: int) -> Images:
    if images.ndim != 4 or images.shape[1:] != tuple(shape) or not len(images):
        raise UsageError(
            f"images of shape {images.shape} cannot test an export for N×{tuple(shape)}.",
            remedy="Give at least one image of the network's shape.",
        )
    return np.ascontiguousarray(images[:count], dtype=np.float32)


def _runtime(data: bytes, device: torch.device) -> _Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=devices.providers(device))
    provider = str(session.get_providers()[0])
    if device.type == "cuda" and provider != "CUDAExecutionProvider":
        raise DeviceError(
            f"onnxruntime runs on {provider}, not on CUDA as asked.",
            remedy="Install onnxruntime-gpu for this CUDA, or use --device cpu.",
        )
    return _Runtime(session, provider)


def _torch_logits(net: nn.Module, images: Images, device: torch.device) -> Logits:
    own = copy.deepcopy(net).to(device).float().eval()
    parts = []
    with torch.no_grad(), devices.deterministic(device):
        for start in range(0, len(images), _BATCHES[-1]):
            batch = torch.from_numpy(images[start : start + _BATCHES[-1]]).to(device)
            parts.append(own(batch).cpu().numpy())
    return np.concatenate(parts)


def _compare(expected: Logits, runtime: _Runtime, images: Images, exported: Model) -> Parity:
    parity = _parity(expected, runtime, images, exported)
    same = parity.argmax
    if parity.softmax_max > PARITY or same.k < same.n:
        raise ExportError(
            f"the exported graph disagrees with the network: softmax by {parity.softmax_max:.2e} "
            f"(limit {PARITY:.0e}), the class on {same.n - same.k} of {same.n} images.",
            remedy="Do not use this export; report the architecture as a bug.",
        )
    return parity


def _parity(expected: NDArray[Any], runtime: _Runtime, images: Images, exported: Model) -> Parity:
    actual = runtime.logits(images, _BATCHES[-1])
    if not np.isfinite(expected).all() or not np.isfinite(actual).all():
        raise NonFiniteError(
            "the network answers some images with NaN or infinity.",
            remedy="Train again, or export from a checkpoint taken before training diverged.",
        )
    equal = _same_class(expected, actual)
    return Parity(
        model=exported,
        softmax_max=_distance(expected, actual),
        argmax=Rate(k=int(equal.sum()), n=len(images)),
        provider=runtime.provider,
    )


def _compare_batches(runtime: _Runtime, images: Images) -> None:
    batch = np.resize(images, (_BATCHES[-1], *images.shape[1:]))
    outputs = [runtime.logits(batch, size) for size in _BATCHES]
    difference = max(_distance(outputs[-1], other) for other in outputs[:-1])
    if difference > BATCHING:
        raise ExportError(
            f"the exported graph answers the same images differently in batches of "
            f"{', '.join(map(str, _BATCHES))}: softmax by {difference:.2e}.",
            remedy="No layer may look across the batch in eval mode.",
        )


def _compare_reading(read: graph.Graph, runtime: _Runtime, images: Images) -> None:
    exact = graph.evaluate(read, images.astype(np.float64))
    difference = _distance(exact, runtime.logits(images, _BATCHES[-1]))
    if difference > PARITY:
        raise ExportError(
            f"onnxruntime and exact arithmetic disagree about the exported graph: softmax by "
            f"{difference:.2e} (limit {PARITY:.0e}).",
            remedy="The weights are too large for float32; rescale or train again.",
        )


def _distance(left: NDArray[Any], right: NDArray[Any]) -> float:
    return float(np.abs(_softmax(left) - _softmax(right)).max())


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers: NDArray[np.float64] = np.exp(shifted)
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _same_class(expected: Logits, actual: Logits) -> NDArray[np.bool_]:
    """Whether both name one class, or classes that the network itself holds to be tied."""
    shares = _softmax(expected)
    rows = np.arange(len(shares))
    gap = shares.max(axis=1) - shares[rows, actual.argmax(axis=1)]
    tied: NDArray[np.bool_] = gap <= TIE
    return tied
