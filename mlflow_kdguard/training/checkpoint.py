"""Checkpoints: whole or absent, tensors only, and never those of something else."""

import hashlib
import io
import logging
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlflow_kdguard.files import read_bytes, write_bytes

_log = logging.getLogger(__name__)


def state_sha256(*modules: nn.Module | None) -> str:
    """Hex SHA-256 of the names, types, shapes and values of modules' parameters and buffers."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items() if module is not None else ()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(_bytes(tensor))
        digest.update(b"|")
    return digest.hexdigest()


class Checkpoint:
    """One file that holds the state of one training run, named by its fingerprint.

    `path` None keeps nothing. A file of another run, or one that cannot be read, is logged and
    treated as absent: training from the start is always right, resuming it never is.
    """

    def __init__(self, path: Path | None, fingerprint: str, *, every: float) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._every = every
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether `every` seconds have passed since the last save."""
        return self.path is not None and time.monotonic() - self._saved >= self._every

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file by `state` atomically; UsageError where it cannot be written."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        torch.save({**state, "fingerprint": self._fingerprint}, buffer)
        write_bytes(self.path, buffer.getvalue())
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The saved state of this very run, on the CPU, or None."""
        if self.path is None:
            return None
        for torn in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            torn.unlink(missing_ok=True)  # what a kill left of an unfinished write
        if not self.path.exists():
            return None
        data = read_bytes(self.path, what="the checkpoint")
        try:
            state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            _log.warning("checkpoint %s is unreadable (%s): starting over", self.path, reason)
            return None
        if not isinstance(state, dict) or state.get("fingerprint") != self._fingerprint:
            _log.warning("checkpoint %s belongs to another run: starting over", self.path)
            return None
        return state


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
