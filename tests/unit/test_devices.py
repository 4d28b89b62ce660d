"""Devices are those asked for, or an error."""

import pytest
import torch

from mlflow_kdguard import devices
from mlflow_kdguard.errors import DeviceError


def test_cpu_is_cpu() -> None:
    assert devices.pick("cpu") == torch.device("cpu")
    assert devices.describe(torch.device("cpu")) == "cpu"
    assert devices.providers(torch.device("cpu")) == ["CPUExecutionProvider"]


def test_cuda_that_is_absent_is_an_error_and_not_a_cpu_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda") as caught:
        devices.pick("cuda")
    assert caught.value.exit_code == 2
    assert "--device cpu" in caught.value.remedy
    assert devices.pick("auto") == torch.device("cpu")


def test_a_name_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(DeviceError, match="tpu"):
        devices.pick("tpu")  # type: ignore[arg-type]


def test_onnxruntime_on_cuda_computes_in_full_float32() -> None:
    ((name, options),) = devices.providers(torch.device("cuda", 1))  # type: ignore[misc]
    assert name == "CUDAExecutionProvider"
    assert options == {"device_id": 1, "use_tf32": 0}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_determinism_is_asked_for_on_cuda_only_and_put_back(kind: str) -> None:
    def settings() -> tuple[bool, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        )

    before = settings()
    with devices.deterministic(torch.device(kind)):
        assert settings() == ((True, True, True, False) if kind == "cuda" else before)
    assert settings() == before


@pytest.mark.cuda
def test_cuda_is_named() -> None:
    device = devices.pick("cuda")
    assert device == devices.pick("auto")
    assert devices.describe(device).startswith("cuda:0 ")
