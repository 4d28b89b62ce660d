"""examine(): what is reported, what is flagged, and that nothing uncalibrated is called clean."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import toys
from mlflow_kdguard import audit, extensions, intervals
from mlflow_kdguard.adversary.inversion import Inverted
from mlflow_kdguard.audit import calibration
from mlflow_kdguard.audit.calibration import Calibration, Regime
from mlflow_kdguard.audit.inversion import halves, trigger
from mlflow_kdguard.config import AuditSection, Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import ConfigError, DataError, ModelError, NonFiniteError, UsageError
from mlflow_kdguard.nets.zoo import Classifier
from mlflow_kdguard.records import Finding, Rate, Source
from mlflow_kdguard.triggers import Trigger

CPU = torch.device("cpu")
FAST = AuditSection(radius=1.0, steps=4, batch=16)


def digits(n: int = 120) -> Dataset:
    return Dataset.of(*toys.digits(n), uri="digits", classes=10)


def examined(net: nn.Module, config: AuditSection = FAST, **options: object) -> audit.Audited:
    given = {"data": digits(), "seed": 0, "device": CPU, "model_sha256": "0" * 64} | options
    return audit.examine(net, config=config, **given)  # type: ignore[arg-type]


def made(net: Classifier, null: tuple[float, ...], **options: object) -> Calibration:
    data = digits()
    values = {
        "architecture": net.architecture,
        "regime": Regime(eps=0.0, pgd_steps=0, loop=Loop(epochs=1)),
        "data": Source(uri=data.uri, sha256=data.sha256),
        "images": len(data),
        "radius": FAST.radius,
        "steps": FAST.steps,
        "batch": FAST.batch,
        "seed": 0,
        "null": null,
    }
    return Calibration(**(values | options))


def calibrated(path: Path, record: Calibration, **options: object) -> AuditSection:
    calibration.write_json(path, record.document())
    return FAST.model_copy(update={"calibration": str(path), **options})


# ── inversion and its verdict ───────────────────────────────────────────────────────────────────


def test_without_calibration_the_verdict_is_undecided_but_the_top_class_is_recovered() -> None:
    done = examined(toys.shortcut())
    finding = done.report.detectors[1]
    assert finding.target == 6
    assert finding.score == finding.details["rates"][6] == max(finding.details["rates"])
    assert finding.p_value is None
    assert done.report.verdict == "undecided"
    assert done.report.target is None
    assert [target for _, target in done.recovered] == [6]
    assert "no calibration file" in finding.details["calibration"]["why"]


def test_a_calibrated_outlier_is_suspect_and_a_usual_rate_is_clean(tmp_path: Path) -> None:
    net = toys.shortcut()
    low = calibrated(tmp_path / "low.json", made(net, (0.01,) * 19))
    done = examined(net, low)
    assert done.report.verdict == "suspect"
    assert done.report.target == 6
    assert done.report.detectors[1].p_value == 1 / 20
    assert 6 in done.report.detectors[1].details["flagged"]
    high = calibrated(tmp_path / "high.json", made(net, (1.0,) * 19))
    clean = examined(net, high)
    assert clean.report.verdict == "clean"
    assert clean.report.detectors[1].p_value == 1.0
    assert clean.report.detectors[1].details["flagged"] == []


def test_every_class_above_the_null_is_flagged_and_recovered(tmp_path: Path) -> None:
    net = toys.shortcut({6: 7, 2: 0})
    null = sorted(examined(net).report.detectors[1].details["rates"])[-3]
    done = examined(net, calibrated(tmp_path / "null.json", made(net, (null,) * 19)))
    assert done.report.detectors[1].details["flagged"] == [2, 6]
    assert [target for _, target in done.recovered] == [2, 6]


def test_p_values_are_conformal() -> None:
    record = made(toys.cnn(), (0.1, 0.2, 0.3, 0.4))
    assert [record.p_value(value) for value in (0.5, 0.4, 0.25, 0.0)] == [0.2, 0.4, 0.6, 1.0]


def test_p_values_are_valid_for_exchangeable_networks() -> None:
    """Over all positions of the audited net among N+1 clean ones, P(p <= a) <= a."""
    values = np.random.default_rng(0).random(20).round(1)  # with ties
    p = [
        made(toys.cnn(), tuple(np.delete(values, place))).p_value(values[place])
        for place in range(20)
    ]
    for alpha in (0.05, 0.1, 0.5):
        assert np.mean(np.array(p) <= alpha) <= alpha


def test_too_few_networks_cannot_decide(tmp_path: Path) -> None:
    net = toys.shortcut()
    config = calibrated(tmp_path / "few.json", made(net, (0.01,) * 18))
    done = examined(net, config)
    assert done.report.verdict == "undecided"
    assert "18 networks" in done.report.detectors[1].details["calibration"]["why"]
    assert examined(net, config.model_copy(update={"alpha": 0.1})).report.verdict == "suspect"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"radius": 2.0}, "radius"),
        ({"steps": 9}, "steps"),
        ({"batch": 3}, "batch"),
        ({"images": 7}, "number of images"),
        ({"data": Source(uri="other", sha256="1" * 64)}, "data digest"),
        ({"architecture": toys.architecture(classes=9)}, "classes"),
        ({"architecture": toys.architecture(shape=(1, 9, 9))}, "image shape"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    change: dict[str, object], why: str, tmp_path: Path
) -> None:
    net = toys.cnn()
    config = calibrated(tmp_path / "null.json", made(net, (0.0,) * 19, **change))
    with pytest.raises(ConfigError, match=why):
        examined(net, config)


def test_another_or_an_unknown_architecture_is_never_calibrated(tmp_path: Path) -> None:
    config = calibrated(tmp_path / "null.json", made(toys.cnn(), (0.0,) * 19))
    for net, why in ((toys.mlp(), "mlp:12,10"), (toys.cnn().body, "not known")):
        report = examined(net, config).report
        assert report.verdict == "undecided"
        assert why in report.detectors[1].details["calibration"]["why"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "kdguard.calibration/1"}'])
def test_a_broken_calibration_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"broken\.json"):
        examined(toys.cnn(), FAST.model_copy(update={"calibration": str(path)}))
    missing = {"calibration": str(tmp_path / "missing.json")}
    with pytest.raises(UsageError, match=r"missing\.json"):
        examined(toys.cnn(), FAST.model_copy(update=missing))


def test_shadows_are_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAST.model_copy(
        update={
            "shadows": 4, "alpha": 0.2, "calibration": str(tmp_path / "null.json"),
            "shadow_loop": Loop(epochs=1, batch=32), "shadow_pgd_steps": 1,
        }
    )  # fmt: skip
    net = toys.shortcut()
    first = examined(net, config).report
    record = calibration.load(tmp_path / "null.json", Calibration)
    assert len(record.null) == 4
    assert record.architecture == net.architecture
    assert len(set(record.null)) > 1  # four networks, not four times one

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(calibration, "fit", refuse)
    again = examined(net, config).report
    assert again.detectors[1].details == first.detectors[1].details
    assert first.verdict in ("clean", "suspect")


# ── triggers ────────────────────────────────────────────────────────────────────────────────────


def corner() -> Trigger:
    pattern = np.zeros((1, 8, 8), np.float32)
    pattern[0, 0, 7] = 1.0
    return Trigger(name="corner", kind="add", mask=None, pattern=pattern)


def test_known_triggers_get_their_rate_on_all_clean_images() -> None:
    net, data = toys.shortcut(), digits()
    done = examined(net, triggers=[(corner(), 6), (corner(), 1)])
    supplied = done.report.asr[:2]
    others = data.x[data.y != 6]
    with torch.no_grad():
        answers = net(torch.from_numpy(corner().apply(others))).argmax(1)
    assert (supplied[0].k, supplied[0].n) == (int((answers == 6).sum()), len(others))
    assert supplied[0].rate == 1.0
    assert supplied[1].k == 0
    assert [each.source for each in done.report.asr] == ["supplied", "supplied", "recovered"]
    assert {each.confidence for each in done.report.asr} == {intervals.bonferroni(0.95, 3)}
    assert supplied[0].changed.rate > 0.9
    assert supplied[0].trigger == corner().sha256


def test_recovered_triggers_are_scored_on_images_they_were_not_searched_on() -> None:
    net, data = toys.shortcut(), digits()
    done = examined(net)
    searched, held = halves(data, seed=0)
    assert len(searched) + len(held) == len(data)
    rows = {image.tobytes() for image in searched.x}
    assert not any(image.tobytes() in rows for image in held.x)
    (asr,) = done.report.asr
    others = held.x[held.y != 6]
    found, target = done.recovered[0]
    with torch.no_grad():
        answers = net(torch.from_numpy(found.apply(others))).argmax(1)
    assert (asr.k, asr.n, asr.target) == (int((answers == 6).sum()), len(others), target)


def test_a_pattern_beyond_one_acts_as_the_trigger_that_it_becomes() -> None:
    delta = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
    x = toys.images(10)
    found = trigger(Inverted(3, delta, Rate(k=0, n=1)))
    np.testing.assert_allclose(found.apply(x), (x + delta.numpy()).clip(0, 1), atol=1e-6)


# ── the table and bad input ─────────────────────────────────────────────────────────────────────


def flagging(_net: nn.Module, _question: audit.Question) -> audit.Answer:
    return audit.Answer(Finding(name="own", score=1.0, p_value=0.01, target=4, flagged=True))


def test_any_flag_makes_it_suspect_and_one_open_detector_keeps_it_undecided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = extensions.BUILT_IN["detector"] | {"own": f"{__name__}:flagging"}
    monkeypatch.setattr(extensions, "table", lambda _kind: rows)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[flagging.__module__])
    done = examined(toys.cnn(), FAST.model_copy(update={"detectors": ("inversion", "own")}))
    assert (done.report.verdict, done.report.target) == ("suspect", 4)


def test_reports_repeat_under_the_same_seed() -> None:
    def bare(done: audit.Audited) -> dict[str, object]:
        document = done.report.document()
        for finding in document["detectors"]:
            del finding["seconds"]
        return document

    assert bare(examined(toys.cnn(), seed=3)) == bare(examined(toys.cnn(), seed=3))


def test_nets_and_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="with shape"):
        examined(toys.cnn(classes=7))
    broken = toys.cnn()
    with torch.no_grad():
        broken.body.logits.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError):
        examined(broken)
    with pytest.raises(DataError, match="labelled"):
        examined(toys.cnn(), data=digits().unlabelled())


@pytest.mark.parametrize("target", [-1, 10, 10**20])
def test_a_trigger_with_a_class_that_is_none_is_refused(target: int) -> None:
    """No image is ever sent there: it would look harmless."""
    patch = Trigger("patch", "add", None, np.full((1, 8, 8), 0.5, np.float32))
    with pytest.raises(UsageError, match="does not fit"):
        examined(toys.shortcut(), triggers=[(patch, target)])


def test_images_of_another_size_are_refused() -> None:
    net = toys.net("cnn:4", shape=(1, 28, 28))
    with pytest.raises(ModelError, match="does not run on digits"):
        examined(net)
