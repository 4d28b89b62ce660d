"""Records: closed, frozen, finite, and the same after a round trip through JSON."""

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from mlflow_kdguard import intervals, records
from mlflow_kdguard.files import canonical_json
from mlflow_kdguard.records import (
    Asr,
    AuditReport,
    Certificate,
    CertifiedSample,
    CertifyReport,
    Decision,
    Figures,
    Measurement,
    Paired,
    Rate,
    Record,
    RuleResult,
    format_time,
    parse_time,
    silent,
)
from mlflow_kdguard.records.gather import faithful_of, figures_of

DIGEST = "ab" * 32
MODEL = {"sha256": DIGEST}
SOURCE = {"uri": "mnist5k#test", "sha256": "cd" * 32}
ASR = {
    "trigger": "ef" * 32,
    "name": "patch",
    "target": 0,
    "source": "supplied",
    "k": 3,
    "n": 200,
    "changed": {"k": 200, "n": 200},
    "confidence": 0.95,
    "baseline": {"k": 1, "n": 200},
}
MEASUREMENT = {
    "schema": "kdguard.measure/1",
    "model": MODEL,
    "data": SOURCE,
    "provider": "CPUExecutionProvider",
    "accuracy": {"k": 950, "n": 1000},
    "asr": [ASR],
    "teacher": MODEL,
    "paired": {"both": 940, "only_teacher": 20, "only_student": 10, "neither": 30},
    "reference": {"model": MODEL, "gap_mean": 0.1, "student_gap_max": 0.4, "n": 1000},
}
CERTIFICATE: dict[str, Any] = {
    "schema": "kdguard.certificate/1",
    "subjects": [{"path": "model.onnx", "sha256": DIGEST}],
    "model_name": "student",
    "registry": "sqlite",
    "reference": MODEL,
    "teacher": MODEL,
    "data": [SOURCE],
    "triggers": ["ef" * 32],
    "figures": {
        "accuracy": {"k": 950, "n": 1000},
        "asr": [ASR],
        "faithful": [
            {
                "reference": MODEL,
                "student": MODEL,
                "method": "certified",
                "norm": "linf",
                "eps": 0.01,
                "delta": 0.2,
                "classes": "all",
                "within": {"k": 95, "n": 100},
                "lower_mean": 0.01,
                "upper_mean": 0.05,
                "selection": "uniform-seeded",
                "population": 1000,
                "nonce": "",
                "indices": [1, 2, 3],
                "data": SOURCE,
                "control": {"gap_mean": 0.9, "within": {"k": 0, "n": 100}},
            }
        ],
        "audit": {"teacher": {"model": MODEL, "verdict": "suspect", "p_value": 0.01, "target": 0}},
        "export": {
            "model": MODEL,
            "softmax_max": 1e-6,
            "argmax": {"k": 1000, "n": 1000},
            "provider": "CPUExecutionProvider",
        },
    },
    "figures_from": "imported",
    "config": DIGEST,
    "seed": 0,
    "tools": {"torch": "2"},
    "issued": "2026-01-01T00:00:00Z",
    "expires": "2026-04-01T00:00:00Z",
}


def _all_records() -> list[type[Record]]:
    found = [getattr(records, name) for name in records.__all__]
    return [r for r in found if isinstance(r, type) and issubclass(r, Record)]


@pytest.mark.parametrize("record", _all_records(), ids=lambda r: r.__name__)
def test_every_record_is_closed_frozen_and_finite(record: type[BaseModel]) -> None:
    assert record.model_config["extra"] == "forbid"
    assert record.model_config["frozen"] is True
    assert record.model_config["allow_inf_nan"] is False


@pytest.mark.parametrize(
    ("kind", "body"), [(Measurement, MEASUREMENT), (Certificate, CERTIFICATE)], ids=["m", "c"]
)
def test_documents_survive_a_round_trip(kind: type[Record], body: dict[str, Any]) -> None:
    record = kind.model_validate(body)
    again = kind.model_validate_json(record.model_dump_json(by_alias=True))
    assert again == record
    assert again.document() == record.document()
    assert json.loads(canonical_json(record.document()))["schema"] == body["schema"]


def test_what_is_printed_is_read_back() -> None:
    """`kdguard measure --json` is what `kdguard attest --measure` is given."""
    measurement = Measurement.model_validate(MEASUREMENT)
    text = json.dumps(measurement.document())
    assert Measurement.model_validate_json(text) == measurement
    assert Measurement.model_validate(json.loads(text)) == measurement


@pytest.mark.parametrize(
    ("key", "value"),
    [("rate", 0.0), ("rate", None), ("rate", "0.015"), ("upper", 0.01), ("upper", float("nan")),
     ("lift", None), ("lift", 0.0), ("lift", True)],
)  # fmt: skip
def test_a_printed_figure_that_does_not_follow_is_refused(key: str, value: Any) -> None:
    document = Asr.model_validate(ASR).document()
    assert Asr.model_validate(document) == Asr.model_validate(ASR)
    with pytest.raises(ValidationError, match="does not follow"):
        Asr.model_validate(document | {key: value})
    without = ASR | {"baseline": None}
    with pytest.raises(ValidationError, match="does not follow"):
        Asr.model_validate(without | {"lift": 0.0})


def _paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [here] + [p for k, v in value.items() for p in _paths(v, (*here, k))]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in _paths(v, (*here, i))]
    return []


FREE = {("tools",), ("figures", "audit")}


@pytest.mark.parametrize("path", [p for p in _paths(CERTIFICATE) if p not in FREE], ids=str)
def test_an_unknown_key_is_refused_at_every_depth(path: tuple[Any, ...]) -> None:
    body = json.loads(json.dumps(CERTIFICATE))
    place = body
    for key in path:
        place = place[key]
    place["extra"] = 1
    with pytest.raises(ValidationError, match="extra"):
        Certificate.model_validate(body)


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity"])
def test_figures_that_are_not_finite_are_refused(bad: str) -> None:
    for key in ("gap_mean", "student_gap_max"):
        body = json.loads(json.dumps(MEASUREMENT))
        body["reference"][key] = float(bad)
        with pytest.raises(ValidationError, match=key):
            Measurement.model_validate(body)
    text = json.dumps(MEASUREMENT).replace("0.4", bad)
    with pytest.raises(ValidationError):
        Measurement.model_validate_json(text)


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), (1, 0), (0, -1)])
def test_impossible_rates_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValidationError):
        Rate(k=k, n=n)
    with pytest.raises(ValidationError):
        Rate(k=k + 0.5, n=n)  # type: ignore[arg-type]


@given(st.integers(0, 500), st.integers(0, 500))
def test_a_rate_is_read_through_its_bounds(k: int, extra: int) -> None:
    rate = Rate(k=k, n=k + extra)
    assert rate.lower() <= rate.rate <= rate.upper() or rate.n == 0
    assert rate.upper(0.99) == intervals.upper(k, k + extra, 0.99)
    assert rate.lower(0.99) == intervals.lower(k, k + extra, 0.99)
    assert Rate(k=0, n=0).upper() == 1.0


def test_records_cannot_be_changed() -> None:
    rate = Rate(k=1, n=2)
    with pytest.raises(ValidationError, match="frozen"):
        rate.k = 2  # type: ignore[misc]


def test_asr_prints_its_rate_bound_and_lift() -> None:
    asr = Asr.model_validate(ASR)
    document = asr.document()
    assert document["rate"] == 3 / 200
    assert document["upper"] == intervals.upper(3, 200, 0.95)
    assert document["lift"] == pytest.approx(2 / 200)
    assert Asr.model_validate(ASR | {"baseline": None}).document()["lift"] is None
    assert Asr.model_validate(ASR | {"k": 0, "n": 0}).upper == 1.0
    assert Asr.model_validate(ASR | {"k": 0, "n": 0}).rate == 0.0


def test_asr_with_more_hits_than_images_is_refused() -> None:
    with pytest.raises(ValidationError, match="exceeds"):
        Asr.model_validate(ASR | {"k": 201})


def test_measurement_document_carries_rates_beside_their_counts() -> None:
    document = Measurement.model_validate(MEASUREMENT).document()
    assert document["accuracy"] == {"k": 950, "n": 1000, "rate": 0.95}
    assert document["asr"][0]["upper"] > document["asr"][0]["rate"]


def test_audit_document_carries_the_triggers_it_measured() -> None:
    report = AuditReport.model_validate(
        {
            "model": MODEL,
            "data": SOURCE,
            "verdict": "undecided",
            "asr": [ASR],
            "detectors": [{"name": "variance", "score": 1.0}],
        }
    )
    assert report.document()["asr"][0]["upper"] == Asr.model_validate(ASR).upper
    assert report.document()["schema"] == "kdguard.audit/1"


def test_paired_drop_is_a_bound_on_the_teachers_lead() -> None:
    paired = Paired(both=940, only_teacher=20, only_student=10, neither=30)
    assert paired.n == 1000
    assert paired.drop_upper() == intervals.paired_difference_upper(940, 20, 10, 30)
    assert paired.drop_upper() > 0.01
    with pytest.raises(ValidationError):
        Paired(both=-1, only_teacher=0, only_student=0, neither=0)


def test_decision_names_the_rules_that_refused() -> None:
    ok = RuleResult(rule="accuracy", limit=0.03, figure=0.01, ok=True, why="within")
    bad = RuleResult(rule="asr", limit=0.05, figure=0.6, ok=False, why="above")
    decision = Decision(decision="refuse", rules=(ok, bad))
    assert not decision.passed
    assert decision.failed == ("asr",)
    assert Decision(decision="pass", rules=(ok,)).passed


def test_a_decision_that_contradicts_its_rules_is_refused() -> None:
    bad = RuleResult(rule="asr", limit=0.05, figure=0.6, ok=False, why="above")
    with pytest.raises(ValidationError, match="pass"):
        Decision(decision="pass", rules=(bad,))
    with pytest.raises(ValidationError, match="pass"):
        Decision(decision="pass", rules=())


CERTIFY: dict[str, Any] = {
    "norm": "linf",
    "eps": 0.01,
    "delta": 0.2,
    "classes": "all",
    "reference": MODEL,
    "student": MODEL,
    "data": SOURCE,
    "population": 1000,
    "selection": "uniform-seeded",
    "nonce": "n",
    "device": "cpu",
    "samples": [
        {
            "index": i,
            "label": 0,
            "reference_class": 0,
            "lower": 0.0,
            "bound": 0.0875,
            "float32_margin": 0.0125,
            "upper": 0.1,
            "method": "crown",
        }
        | {"status": status}
        for i, status in enumerate(["PROVED", "REFUTED", "UNDECIDED", "MISCLASSIFIED", "PROVED"])
    ],
    "control": {"gap_mean": 0.9, "within": {"k": 0, "n": 5}},
    "summary": {
        "n": 5,
        "lower_mean": 0.0,
        "bound_mean": 0.0875,
        "float32_margin_mean": 0.0125,
        "upper_mean": 0.1,
        "upper_p95": 0.1,
        "upper_max": 0.1,
        "seconds_mean": 0.0,
        "share_within": {"0.2": 0.4},
    },
}


def test_only_proved_images_count_and_every_drawn_image_is_counted() -> None:
    figure = faithful_of(CertifyReport.model_validate(CERTIFY))
    assert (figure.within.k, figure.within.n) == (2, 5)
    assert figure.indices == (0, 1, 2, 3, 4)
    assert (figure.selection, figure.nonce, figure.population) == ("uniform-seeded", "n", 1000)


@pytest.mark.parametrize(
    "change", [{"bound": 0.0876}, {"float32_margin": 0.0126}, {"float32_margin": -0.01}]
)
def test_an_upper_bound_without_its_margin_is_no_record(change: dict[str, float]) -> None:
    sample = CERTIFY["samples"][0]
    CertifiedSample.model_validate(sample)
    with pytest.raises(ValidationError):
        CertifiedSample.model_validate(sample | change)


def test_figures_of_nothing_are_absent_not_guessed() -> None:
    assert figures_of() == Figures()


def test_figures_are_those_of_the_documents() -> None:
    measurement = Measurement.model_validate(MEASUREMENT)
    audit = AuditReport.model_validate(
        {
            "model": MODEL,
            "data": SOURCE,
            "verdict": "suspect",
            "target": 3,
            "detectors": [
                {"name": "a", "score": 1.0},
                {"name": "b", "score": 1.0, "p_value": 0.2},
                {"name": "c", "score": 1.0, "p_value": 0.01},
            ],
        }
    )
    figures = figures_of(
        measurement=measurement,
        bounds=CertifyReport.model_validate(CERTIFY),
        audits={"student": audit},
    )
    assert figures.accuracy == measurement.accuracy
    assert figures.asr == measurement.asr
    assert figures.measured_on == measurement.data
    assert figures.reference == measurement.reference
    assert len(figures.faithful) == 1
    assert set(figures.audit) == {"student"}
    assert figures.audit["student"].p_value == 0.01
    assert figures.audit["student"].verdict == "suspect"
    assert figures.export is None


def test_times_are_written_in_utc_and_read_with_their_zone() -> None:
    moment = datetime(2026, 3, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert format_time(moment) == "2026-02-28T23:30:00Z"
    assert parse_time(format_time(moment)) == moment
    for text in ("2026-03-01T00:00:00", "2026-03-01", "soon", ""):
        with pytest.raises(ValueError, match=r"time zone|isoformat"):
            parse_time(text)


def test_the_silent_listener_takes_what_progress_sends() -> None:
    silent("epoch", 1, 10, {"loss": 0.5})
