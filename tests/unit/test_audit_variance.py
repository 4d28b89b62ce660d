"""Feature variance in the audit: exact over parts, and never a verdict."""

import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard import audit, features
from mlflow_kdguard.audit.variance import variances
from mlflow_kdguard.config import AuditSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.nets.taps import Taps, auto
from mlflow_kdguard.records import silent

CPU = torch.device("cpu")
ALONE = AuditSection(detectors=("variance",))


def digits(n: int = 60) -> Dataset:
    return Dataset.of(*toys.digits(n), uri="digits", classes=10)


def examined(net: nn.Module) -> audit.Audited:
    return audit.examine(
        net, config=ALONE, data=digits(), seed=0, device=CPU, model_sha256="0" * 64
    )


@pytest.mark.parametrize("arch", toys.ARCHES)
def test_variances_over_parts_are_those_of_one_batch(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = toys.net(arch), digits(50)
    question = audit.Question(data, ALONE, 0, CPU, silent)
    monkeypatch.setattr("mlflow_kdguard.audit.variance._IMAGES", 7)
    found = variances(net, question)
    names = auto(net, data.shape)
    with torch.no_grad(), Taps(net, names) as taps:
        net(torch.from_numpy(data.x))
    assert tuple(found) == names
    for name in names:
        for reading in features.READINGS:
            whole = float(features.variance(taps.features[name].double(), reading))
            assert found[name][reading] == pytest.approx(whole, rel=1e-4)


def test_variance_never_decides() -> None:
    done = examined(toys.cnn())
    (finding,) = done.report.detectors
    assert set(finding.details["layers"]) == set(auto(toys.cnn(), (1, 8, 8)))
    assert not finding.flagged
    assert finding.p_value is None
    assert done.report.verdict == "undecided"
    assert done.recovered == ()


def test_a_net_without_layers_to_tap_says_so() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :10]

    done = examined(Bare())
    assert "no feature map" in done.report.detectors[0].details["why"]
