"""The three readings of feature variance, against loops over their definitions."""

import numpy as np
import pytest
import torch

from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.features import READINGS, total, variance


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_definition(f: np.ndarray, reading: str) -> float:
    if reading == "A":
        return float(np.mean([np.mean((m - m.mean()) ** 2) for m in f]))
    if reading == "B":
        channels = [np.array([c.mean() for c in m]) for m in f]
        return float(np.mean([np.mean((c - c.mean()) ** 2) for c in channels]))
    places = f.reshape(len(f), -1).T
    return float(np.mean([np.mean((p - p.mean()) ** 2) for p in places]))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (1, 3, 2, 2), (6, 7)])
def test_readings_are_their_definitions(reading: str, shape: tuple[int, ...]) -> None:
    f = maps(*shape)
    expected = by_definition(f.numpy(), reading)
    assert float(variance(f, reading)) == pytest.approx(expected, abs=1e-12)


def test_a_tap_without_spatial_axes_is_a_map_of_one_place() -> None:
    f = maps(6, 7)
    for reading in READINGS:
        assert torch.allclose(variance(f, reading), variance(f[..., None, None], reading))


def test_the_total_is_the_sum_over_layers() -> None:
    one, two = maps(4, 2, 3, 3), maps(4, 5)
    both = total({"one": one, "two": two}, "A")
    assert torch.allclose(both, variance(one, "A") + variance(two, "A"))


def test_nothing_to_vary_over_is_refused() -> None:
    with pytest.raises(UsageError, match="no channels"):
        variance(torch.zeros(3), "A")
    with pytest.raises(UsageError, match="no channels"):
        variance(torch.zeros(0, 3), "B")
    with pytest.raises(UsageError, match="no layer"):
        total({}, "A")
