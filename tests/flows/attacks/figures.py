"""Attempts with figures that must not pass, and statements that are none, under a trusted key."""

import json
from typing import Any

import certificates as c
from flows.attacks import papers
from flows.attacks.documents import dated
from flows.attacks.settled import IDENTITY
from flows.attacks.table import Attempt, Scene, attack, promotion
from flows.attacks.world import World, files
from mlflow_kdguard.errors import KDGuardError
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.records import AuditFigure, Model, Rate, Source, Subject


def _student(files_: Any) -> str:
    return sha256(files_["model.onnx"])


UNFIT: dict[str, Any] = {
    "washed-logits": (lambda s: {"reference": c.gap(gap_mean=0.9)}, "reference"),
    "reference-is-the-student": (
        lambda s: {"reference": c.gap(model=Model(sha256=s), student_gap_max=0.0)},
        "reference",
    ),
    "no-trigger": (lambda s: {"asr": ()}, "asr"),
    "pixel-neutral-trigger": (lambda s: {"asr": (c.asr(changed=Rate(k=0, n=900)),)}, "asr.changed"),
    "backdoor": (lambda s: {"asr": (c.asr(k=800),)}, "asr"),
    "one-bad-trigger": (lambda s: {"asr": (c.asr(), c.asr(trigger=s, k=300))}, "asr"),
    "drop": (lambda s: {"accuracy": Rate(k=600, n=1000),
                        "paired": c.figures().paired.model_copy(  # type: ignore[union-attr]
                            update={"both": 580, "only_teacher": 370, "only_student": 20,
                                    "neither": 30})}, "accuracy"),
    "no-figures-at-all": (
        lambda s: {"accuracy": None, "paired": None, "faithful": (), "export": None, "audit": {},
                   "reference": None, "asr": ()},
        "faithful",
    ),
    "figures-of-another": (lambda s: {"student": Model(sha256=sha256(b"other"))}, "student"),
    "unpinned-data": (
        lambda s: {"measured_on": Source(uri="digits#easy", sha256=sha256(b"easy"))}, "pinned"
    ),
    "friendly-images": (
        lambda s: {"faithful": (papers.faithful(s, indices=tuple(range(c.SAMPLES))),)}, "faithful"
    ),
    "few-images": (
        lambda s: {"faithful": (papers.faithful(s, within=Rate(k=10, n=10),
                                                indices=tuple(range(10))),)}, "faithful"
    ),
    "lucky-images": (
        lambda s: {"faithful": (papers.faithful(s, within=Rate(k=82, n=c.SAMPLES)),)}, "faithful"
    ),
    "tiny-ball": (lambda s: {"faithful": (papers.faithful(s, eps=1e-9),)}, "faithful"),
    "another-pair": (
        lambda s: {"faithful": (papers.faithful(s, student=Model(sha256=sha256(b"x"))),)},
        "faithful",
    ),
    "no-audit": (lambda s: {"audit": {}}, "audit"),
    "audit-of-another": (
        lambda s: {"audit": {"teacher": AuditFigure(model=Model(sha256=s), verdict="clean"),
                             "student": AuditFigure(model=Model(sha256=s), verdict="clean")}},
        "audit",
    ),
    "export-of-another": (
        lambda s: {"export": c.parity(model=Model(sha256=sha256(b"other")))}, "export"
    ),
    "imprecise-export": (
        lambda s: {"export": c.parity(model=Model(sha256=s), softmax_max=0.5)}, "export"
    ),
}  # fmt: skip


@attack(2, variants=UNFIT)
def unfit_figures_by_a_trusted_key(w: World, unfit: Any) -> Scene:
    change, says = unfit
    version = w.blank()
    w.certify(version, w.certificate(version, **change(_student(version.files))))
    yield promotion(w, version, says)


@attack(5)
def tried_again_until_it_passed(w: World) -> Scene:
    """At the hundredth attempt the bound is far wider: 96 of 100 no longer do."""
    version = w.blank()
    borderline = (papers.faithful(_student(version.files), within=Rate(k=88, n=c.SAMPLES)),)
    w.certify(version, w.certificate(version, attempt=100, faithful=borderline))
    yield promotion(w, version, "faithful")


def _payload(version: Any, edit: Any) -> bytes:
    """A payload that our own issuer would refuse, before it is signed by a trusted key."""
    made = papers.certificate(version.files, model_name=version.name, registry=IDENTITY)
    statement = json.loads(papers.payload(made))
    edited = edit(statement)
    return canonical_json(statement) if edited is None else bytes(edited)


MALFORMED: dict[str, Any] = {
    "nan": lambda s: canonical_json(s).replace(b'"gap_mean":0.05', b'"gap_mean":NaN'),
    "infinity": lambda s: canonical_json(s).replace(b'"gap_mean":0.05', b'"gap_mean":-Infinity'),
    "overflow": lambda s: canonical_json(s).replace(b'"gap_mean":0.05', b'"gap_mean":1e999'),
    "minus": lambda s: s["predicate"]["figures"]["reference"].update(gap_mean=-1.0),
    "null": lambda s: s["predicate"]["figures"]["reference"].update(gap_mean=None),
    "text": lambda s: s["predicate"]["figures"]["reference"].update(gap_mean="0.05"),
    "true": lambda s: s["predicate"]["figures"]["reference"].update(gap_mean=True),
    "more-than-all": lambda s: s["predicate"]["figures"]["accuracy"].update(k=2000, n=1000),
    "of-none": lambda s: s["predicate"]["figures"]["accuracy"].update(k=0, n=0),
    "attempt-zero": lambda s: s["predicate"].update(attempt=0),
    "attempt-minus": lambda s: s["predicate"].update(attempt=-1),
    "schema": lambda s: s["predicate"].update(schema="kdguard.certificate/99"),
    "unknown-key": lambda s: s["predicate"].update(approved=True),
    "no-subject": lambda s: s.update(subject=[]),
    "subjects-differ": lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
    "predicate-type": lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"),
    "no-predicate": lambda s: s.pop("predicate") and None,
    "repeated-key": lambda s: canonical_json(s)[:-1] + b',"predicate":{}}',
    "spaces": lambda s: json.dumps(s, indent=1, sort_keys=True).encode(),
    "camel": lambda s: s["predicate"].update(modelName="other"),
    "date": lambda s: s["predicate"].update(expires="never"),
    "date-without-zone": lambda s: s["predicate"].update(expires="2099-01-01T00:00:00"),
    "huge-number": lambda s: s["predicate"]["figures"]["accuracy"].update(k=1, n=10**4000),
    "not-json": lambda s: b"\xff\xfe",
}


@attack(9, variants=MALFORMED)
def malformed_payload_by_a_trusted_key(w: World, edit: Any) -> Scene:
    version = w.blank()
    w.certify(version, papers.enveloped(_payload(version, edit), w.keys["verifier"]))
    yield promotion(w, version, "certificate|accuracy")


SUBJECTS: dict[str, Any] = {
    "one-file-left-out": lambda s: s[1:],
    "one-file-more": lambda s: (*s, Subject(path="extra.bin", sha256=sha256(b""))),
    "only-the-model": lambda s: tuple(x for x in s if x.path == "model.onnx"),
    "one-of-another-file": lambda s: (Subject(path=s[0].path, sha256=sha256(b"?")), *s[1:]),
    "named-twice": lambda s: (*s, s[-1]),
}


@attack(11, variants=SUBJECTS)
def certified_other_files(w: World, choose: Any) -> Scene:
    version = w.blank()
    honest = papers.certificate(version.files)
    made = papers.certificate(
        version.files, model_name=version.name, registry=IDENTITY, subjects=choose(honest.subjects)
    )
    try:
        data = papers.payload(made)
    except KDGuardError:  # our own writer refuses some; a stranger's would not
        statement = json.loads(papers.payload(honest))
        statement["subject"] = [
            {"name": s.path, "digest": {"sha256": s.sha256}} for s in made.subjects
        ]
        statement["predicate"] = made.document()
        data = canonical_json(statement)
    w.certify(version, papers.enveloped(data, w.keys["verifier"]))
    yield promotion(w, version, "certif")


@attack(15)
def everything_wrong_at_once(w: World) -> Scene:
    """Every reason is named, not only the first."""
    version = w.version(seed=2, certified=False)
    made = papers.certificate(
        files(3), model_name="other", registry="https://elsewhere.example",
        asr=(c.asr(k=800),), **dated(-200, -100),
    )  # fmt: skip
    w.certify(version, papers.enveloped(papers.payload(made), w.keys["verifier"]))
    yield promotion(w, version, "expired", "other", "elsewhere", "model.onnx", "asr")


@attack(15)
def certificate_of_a_deleted_version(w: World) -> Scene:
    """The number of a deleted version is not free for another file."""
    good = w.version()
    envelope = w.certificate(good)
    body = {"name": good.name, "version": good.number}
    assert w.call("model-versions/delete", body, method="DELETE").ok
    bad = w.version(good.name, seed=4, certified=False)
    w.certify(bad, envelope)
    yield Attempt(lambda: w.alias(good), status=(404,), logged=None)
    yield promotion(w, bad, "model.onnx")
