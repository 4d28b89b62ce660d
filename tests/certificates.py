"""A certificate that passes the packaged policy, and the pieces to spoil it with."""

import math
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from mlflow_kdguard.draw import draw
from mlflow_kdguard.files import sha256
from mlflow_kdguard.policy import Policy, load
from mlflow_kdguard.records import (
    Asr,
    AuditFigure,
    Certificate,
    Control,
    Decision,
    FaithfulFigure,
    Figures,
    Flips,
    Model,
    Paired,
    Parity,
    PatchFigure,
    Rate,
    ReferenceGap,
    Signatory,
    Source,
    Subject,
    format_time,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
FILES = {"model.onnx": b"the student", "MLmodel": b"flavors: {}\n", "requirements.txt": b"numpy\n"}
STUDENT = sha256(FILES["model.onnx"])
REFERENCE, TEACHER = sha256(b"the reference"), sha256(b"the teacher")
TEST = Source(uri="digits#test", sha256=sha256(b"the test images"))
TRIGGER = sha256(b"the trigger")
BUILDER = Signatory(key=sha256(b"builder key"), owner="Bea", role="builder")
VERIFIER = Signatory(key=sha256(b"verifier key"), owner="Vic", role="verifier")
POPULATION, SAMPLES = 1000, 100


def asr(**changes: Any) -> Asr:
    """A trigger that hardly ever succeeds."""
    values: dict[str, Any] = {
        "trigger": TRIGGER, "name": "badnets", "target": 0, "source": "supplied", "k": 10, "n": 900,
        "changed": Rate(k=900, n=900), "confidence": 0.95,
    }  # fmt: skip
    return Asr(**(values | changes))


def indices(samples: int = SAMPLES, population: int = POPULATION, nonce: str = "") -> Any:
    """The draw that the gate repeats."""
    return draw(population, samples, REFERENCE, STUDENT, TEST.sha256, nonce)


def faithful(**changes: Any) -> FaithfulFigure:
    """A student that says what its reference says around 95 of 100 images."""
    values: dict[str, Any] = {
        "reference": Model(sha256=REFERENCE), "student": Model(sha256=STUDENT),
        "method": "certified", "norm": "linf", "eps": 0.01, "delta": 0.2, "classes": "all",
        "within": Rate(k=95, n=SAMPLES), "lower_mean": 0.02, "upper_mean": 0.06,
        "selection": "uniform-seeded", "population": POPULATION, "nonce": "", "data": TEST,
        "indices": indices(), "control": Control(gap_mean=0.85, within=Rate(k=0, n=SAMPLES)),
    }  # fmt: skip
    return FaithfulFigure(**(values | changes))


def smoothed(**changes: Any) -> FaithfulFigure:
    """The same of the pair under noise."""
    kind = {"method": "smoothed", "norm": "l2", "eps": 0.25, "delta": 0.3, "sigma": 0.25}
    return faithful(**(kind | {"error": 0.001} | changes))


def patch(**changes: Any) -> PatchFigure:
    """Patches of 3×3 pixels in one corner, which may flip 2 of 100 images."""
    values: dict[str, Any] = {
        "student": Model(sha256=STUDENT), "target": 0, "size": 3, "positions": ((25, 25),),
        "margin": 1e-4, "each": Flips(attack=1, certified=2, n=SAMPLES),
        "universal": Flips(attack=1, certified=1, n=SAMPLES), "selection": "uniform-seeded",
        "population": 900, "nonce": "", "data": TEST,
    } | changes  # fmt: skip
    told = (STUDENT, TEST.sha256, f"target={values['target']}", values["nonce"])
    ranks = draw(values["population"], values["each"].n, *told)
    return PatchFigure(**({"ranks": ranks} | values))


def gap(**changes: Any) -> ReferenceGap:
    """A reference near the original teacher, and not the student."""
    values = {"model": Model(sha256=REFERENCE), "gap_mean": 0.05, "student_gap_max": 0.4, "n": 1000}
    return ReferenceGap(**(values | changes))


def parity(**changes: Any) -> Parity:
    """An export that computes what was trained."""
    values = {"model": Model(sha256=STUDENT), "softmax_max": 1e-6, "provider": "CPU"}
    return Parity(**(values | {"argmax": Rate(k=1000, n=1000)} | changes))


def figures(**changes: Any) -> Figures:
    """Figures that pass."""
    values: dict[str, Any] = {
        "student": Model(sha256=STUDENT),
        "accuracy": Rate(k=945, n=1000),
        "teacher": Model(sha256=TEACHER),
        "paired": Paired(both=930, only_teacher=20, only_student=15, neither=35),
        "measured_on": TEST,
        "asr": (asr(), asr(trigger=sha256(b"inverted"), name="class-0", source="recovered")),
        "reference": gap(),
        "faithful": (faithful(),),
        "audit": {
            "teacher": AuditFigure(model=Model(sha256=TEACHER), verdict="suspect", target=0),
            "student": AuditFigure(model=Model(sha256=STUDENT), verdict="undecided"),
        },
        "export": parity(),
    }
    return Figures(**(values | changes))


def certificate(**changes: Any) -> Certificate:
    """A verifier's certificate about FILES; what is no field of Certificate changes its figures."""
    named = {key: changes.pop(key) for key in list(changes) if key in Figures.model_fields}
    values: dict[str, Any] = {
        "subjects": tuple(Subject(path=p, sha256=sha256(FILES[p])) for p in sorted(FILES)),
        "model_name": "digits", "registry": "http://registry", "reference": Model(sha256=REFERENCE),
        "teacher": Model(sha256=TEACHER), "data": (TEST,), "triggers": (TRIGGER,),
        "figures": figures(**named), "figures_from": "recomputed", "config": sha256(b"config"),
        "seed": 7, "tools": {"onnxruntime": "1.22"}, "issued": format_time(NOW - timedelta(days=1)),
        "expires": format_time(NOW + timedelta(days=30)),
    }  # fmt: skip
    return Certificate(**(values | changes))


def imported(**changes: Any) -> Certificate:
    """The builder's own certificate about FILES."""
    return certificate(**({"figures_from": "imported"} | changes))


@cache
def packaged() -> Policy:
    """The packaged policy."""
    return load()


def packaged_confidence() -> float:
    """Of each bound at the first attempt."""
    return 1.0 - 0.05 * 6.0 / math.pi**2


def decided(made: Certificate | None, policy: Policy | None = None, **grants: Any) -> Decision:
    """The gate's answer, signed by the verifier with the test data pinned unless told otherwise."""
    from mlflow_kdguard.gate import decide

    values = {"signers": (VERIFIER,), "now": NOW, "pins": (TEST.sha256,)} | grants
    return decide(made, packaged() if policy is None else policy, **values)
