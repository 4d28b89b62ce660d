"""The device that work runs on: asked for by name, never replaced in silence.

torch is loaded when a device is picked, not before: onnxruntime runs where it is not installed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mlflow_kdguard.errors import DeviceError

if TYPE_CHECKING:
    import torch

Name = Literal["auto", "cpu", "cuda"]


class Placed(Protocol):
    """What onnxruntime needs to know of a device; every torch.device says it."""

    @property
    def type(self) -> str:
        """`cpu` or `cuda`."""

    @property
    def index(self) -> int | None:
        """Which of several."""


def pick(name: Name) -> "torch.device":
    """The device called `name`; `auto` takes CUDA where it is present.

    Raises DeviceError where CUDA is asked for by name and absent, or the name is unknown.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"there is no device called {name!r}.", remedy="Use auto, cpu or cuda.")
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            "device cuda was asked for, and torch finds no CUDA device here.",
            remedy="Use --device cpu, or a machine with a GPU and a CUDA build of torch.",
        )
    # cuBLAS reads this once, before its first call; without it matrix products may differ by run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", torch.cuda.current_device())


def providers(device: Placed) -> list[str | tuple[str, dict[str, Any]]]:
    """The onnxruntime execution providers that compute on `device`, in full float32.

    Which provider really ran is for the session to ask afterwards: onnxruntime itself falls back
    to the CPU with a warning only.
    """
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    options = {"device_id": device.index or 0, "use_tf32": 0}
    return [("CUDAExecutionProvider", options)]


def describe(device: "torch.device") -> str:
    """The device as records name it, such as `cpu` or `cuda:0 NVIDIA H100`."""
    if device.type == "cpu":
        return "cpu"
    import torch

    return f"cuda:{device.index or 0} {torch.cuda.get_device_name(device)}"


@contextmanager
def deterministic(device: "torch.device") -> Iterator[None]:
    """Within the block the same work on `device` gives the same bits; settings are restored after.

    On the CPU that holds as it is (for one number of threads). On CUDA: deterministic kernels
    where they exist, no autotuning, no TF32.
    """
    if device.type == "cpu":
        yield
        return
    import torch

    before = torch.get_deterministic_debug_mode()
    # The same switch as use_deterministic_algorithms, which would import a compiler first.
    torch.set_deterministic_debug_mode("warn")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_deterministic_debug_mode(before)
