"""`kdguard verify`: a verifier in another place measures stored bytes and believes no figure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

import certificates as c
import toys
from flows.promoted import folder_of, now, opened, signer
from flows.servers import MlflowServer
from mlflow_kdguard import data
from mlflow_kdguard.attest import Signer, check, issue, keygen, subjects_of
from mlflow_kdguard.attest.signing import public_path
from mlflow_kdguard.certify.smooth import certify_smooth
from mlflow_kdguard.config import GuardConfig, parse
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.draw import draw
from mlflow_kdguard.errors import (
    CertificateError,
    RegistryError,
    UnsafeModelError,
    UsageError,
)
from mlflow_kdguard.files import sha256
from mlflow_kdguard.flow.decision import judge
from mlflow_kdguard.flow.evidence import INDEX, pack
from mlflow_kdguard.flow.verification import Own, Verified, verify
from mlflow_kdguard.measure import Session, measure
from mlflow_kdguard.nets import emit
from mlflow_kdguard.records import Certificate, Figures, Model, format_time
from mlflow_kdguard.registry import Nonce, Registry
from mlflow_kdguard.triggers import Trigger
from mlflow_kdguard_cli.main import answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

CPU = torch.device("cpu")
VIC, BEA = signer("Vic", "verifier"), signer("Bea", "builder")
QUICK = {
    "audit": {"steps": 2, "radius": 1.0},
    "certify": {"samples": 5, "pgd_steps": 2},
    "patch": {"targets": [0, 3], "size": 1, "samples": 5, "nodes": 9, "pgd_steps": 2},
    "smooth": {"sigma": 0.25, "samples": 6, "draws": 50},
}
CONFIG: GuardConfig = parse(QUICK, "tests")


def net(seed: int) -> bytes:
    return emit.to_bytes(toys.cnn(seed=seed), (1, 8, 8), opset=18)


STUDENT, REFERENCE, TEACHER, OTHER = map(net, range(4))


def patch(name: str, *, at: int = 0) -> Trigger:
    mask = np.zeros((1, 8, 8), np.float32)
    mask[:, at : at + 2, :2] = 1
    return Trigger(name=name, kind="blend", pattern=np.ones((1, 8, 8), np.float32), mask=mask)


SUPPLIED, PANEL = patch("supplied"), patch("panel", at=4)


@dataclass(frozen=True)
class Place:
    """A store with registered students, and what the verifier brings."""

    registry: Registry
    own: Own

    def register(
        self,
        files: Mapping[str, bytes] | None = None,
        tags: Mapping[str, str] | None = None,
        student: bytes = STUDENT,
        name: str = "m",
    ) -> str:
        lineage = {"kdguard.reference": sha256(REFERENCE), "kdguard.teacher": sha256(TEACHER)}
        with self.registry.run("build") as run:
            return self.registry.register_student(
                name, student, run=run, tags=lineage | (tags or {}), held_against=files
            ).uri

    def verify(self, uri: str, **changes: Any) -> Verified:
        return verify(self.registry, uri, replace(self.own, **changes), config=CONFIG, device=CPU)

    def carried(self, uri: str) -> bytes | None:
        return self.registry.download(uri).certificate()


@pytest.fixture(scope="module")
def test_images() -> Dataset:
    return data.load("digits#test[:120]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, test_images: Dataset) -> Place:
    registry = opened(f"sqlite:///{tmp_path_factory.mktemp('verify') / 'mlflow.db'}")
    return Place(registry, Own(test_images, data.load("digits#train[:80]"), VIC))


def packed(**changes: Any) -> dict[str, bytes]:
    given: dict[str, Any] = {
        "reference": REFERENCE, "teacher": TEACHER, "triggers": [(SUPPLIED.to_bytes(), 0)],
    }  # fmt: skip
    return pack(changes.pop("student", STUDENT), **(given | changes))


@pytest.fixture(scope="module")
def verified(place: Place) -> Verified:
    return place.verify(place.register(packed()), panel=((PANEL, 3), (SUPPLIED, 0)))


def told(files: Mapping[str, bytes], name: str, registry: str, teacher: bytes) -> bytes:
    """A builder's certificate about `files`: made-up figures, and which teacher it claims."""
    made: Certificate = c.certificate(
        subjects=subjects_of(files),
        model_name=name,
        registry=registry,
        figures_from="imported",
        issued=format_time(now() - timedelta(hours=1)),
        expires=format_time(now() + timedelta(days=1)),
    )
    models = {
        "reference": Model(sha256=sha256(REFERENCE)),
        "teacher": Model(sha256=sha256(teacher)),
    }
    return issue(made.model_copy(update=models), BEA)


# ── What is measured and signed ─────────────────────────────────────────────────────────────────


def test_the_smoothed_pair_is_bounded_with_noise_that_nobody_knew(
    verified: Verified, test_images: Dataset
) -> None:
    """Beside the certified figure there is one of another kind; whoever knows the entropy repeats
    it, and by the digests and the nonce alone it does not come out.
    """
    certified, figure = verified.certificate.figures.faithful
    report = verified.smooth
    assert report is not None
    assert (certified.method, figure.method, figure.norm) == ("certified", "smoothed", "l2")
    assert (figure.sigma, figure.eps, figure.error) == (0.25, 0.25, 0.001)
    assert figure.within == report.within
    assert figure.indices == tuple(sample.index for sample in report.samples)
    assert len(report.noise) == 32
    nets = [Session(blob, device=CPU, where="it") for blob in (REFERENCE, STUDENT)]
    for entropy, same in ((report.noise, True), ("", False)):
        again = certify_smooth(
            nets[0],
            nets[1],
            test_images,
            config=CONFIG.smooth,
            nonce=report.nonce,
            entropy=entropy,
        )
        means = [[s.gap_mean for s in found.samples] for found in (report, again)]
        assert (means[0] == means[1]) is same


def test_patches_are_bounded_on_the_stored_bytes(verified: Verified) -> None:
    figures = verified.certificate.figures.patch
    assert [figure.target for figure in figures] == [0, 3]
    for figure, report in zip(figures, verified.patches, strict=True):
        assert figure.student.sha256 == sha256(STUDENT)
        assert (figure.each, figure.ranks) == (report.each, tuple(s.rank for s in report.samples))
        assert report.complete


def test_the_certificate_states_what_the_bytes_do(
    place: Place, verified: Verified, test_images: Dataset
) -> None:
    """Figures as an independent measurement of the same bytes finds them."""
    figures = verified.certificate.figures
    attacks = [(SUPPLIED, 0, "supplied"), (PANEL, 3, "supplied")]
    again = measure(
        STUDENT, test_images, device=CPU, triggers=attacks, teacher=TEACHER, reference=REFERENCE
    )
    assert figures.accuracy == again.accuracy
    assert figures.paired == again.paired
    assert figures.reference == again.reference
    rates = {(f.trigger, f.target): (f.k, f.n) for f in figures.asr}
    assert {(f.trigger, f.target): (f.k, f.n) for f in again.asr}.items() <= rates.items()
    assert {f.source for f in figures.asr} == {"supplied", "recovered"}
    assert set(figures.audit) == {"teacher", "student"}
    assert figures.audit["teacher"].model == Model(sha256=sha256(TEACHER))
    assert figures.export is not None
    assert figures.export.model == Model(sha256=sha256(STUDENT))
    assert figures.export.argmax.n == len(test_images)
    assert figures.export.softmax_max < 1e-5


def test_it_is_the_verifiers_word_about_these_bytes(place: Place, verified: Verified) -> None:
    stored = place.registry.download(verified.uri)
    assert stored.certificate() == verified.envelope
    checked = check(
        verified.envelope,
        files=stored.files,
        verifiers=[VIC.verifier],
        now=now(),
        model_name="m",
        registry=place.registry.identity,
    )
    assert checked.certificate == verified.certificate
    assert checked.certificate.figures_from == "recomputed"
    assert checked.signers == (VIC.verifier.signatory,)
    own = place.own
    assert [source.sha256 for source in checked.certificate.data] == [
        own.clean.sha256, own.test.sha256,
    ]  # fmt: skip


def test_the_images_are_drawn_from_the_digests(place: Place, verified: Verified) -> None:
    figure, smoothed = verified.certificate.figures.faithful
    digests = (sha256(REFERENCE), sha256(STUDENT), place.own.test.sha256)
    assert figure.indices == draw(len(place.own.test), 5, *digests, "")
    assert smoothed.indices == draw(len(place.own.test), smoothed.within.n, *digests, "")
    assert verified.certificate.attempt == 1


def test_a_nonce_draws_others_and_the_gate_asks_for_it(place: Place, verified: Verified) -> None:
    again = place.verify(verified.uri, nonce=Nonce(nonce="abc", attempt=3))
    pairs = zip(*(v.certificate.figures.faithful for v in (again, verified)), strict=True)
    for figure, before in pairs:
        assert figure.nonce == "abc"
        assert figure.indices != before.indices
    assert again.certificate.attempt == 3
    for nonce, refused in (("", True), ("abc", False)):
        decision = judge(
            place.registry,
            verified.uri,
            policy=c.packaged(),
            verifiers=[VIC.verifier],
            now=now(),
            nonce=nonce,
        )
        why = next(rule.why for rule in decision.rules if rule.rule == "faithful")
        assert ("with the nonce" in why) is refused


def test_no_figure_of_the_builder_is_taken_over(place: Place) -> None:
    """A certificate that lies about everything but the models changes no figure."""
    uri = place.register(packed(), name="lied-about")
    stored = place.registry.download(uri)
    lie = told(stored.files, "lied-about", place.registry.identity, TEACHER)
    place.registry.store_certificate(uri, lie)
    found = place.verify(uri).certificate
    assert place.carried(uri) != lie
    honest = place.verify(place.register(packed(), name="silent")).certificate
    # Counts under noise are the verifier's own dice, thrown anew each time.
    assert _without_dice(found.figures) == _without_dice(honest.figures)


def _without_dice(figures: Figures) -> Figures:
    still = [
        f.model_copy(update=dict.fromkeys(("within", "lower_mean", "upper_mean", "control")))
        if f.method == "smoothed"
        else f
        for f in figures.faithful
    ]
    return figures.model_copy(update={"faithful": tuple(still)})


# ── What is not measured at all ─────────────────────────────────────────────────────────────────


def test_a_builders_key_does_not_verify(place: Place) -> None:
    uri = place.register(packed(), name="unsigned")
    with pytest.raises(UsageError, match="is a builder's"):
        place.verify(uri, signer=BEA)
    assert place.carried(uri) is None


@pytest.mark.parametrize(
    ("tags", "known"),
    [
        ({"kdguard.teacher": sha256(OTHER)}, {}),
        ({"kdguard.reference": sha256(OTHER)}, {}),
        ({}, {"teacher": OTHER}),
        ({}, {"reference": OTHER}),
    ],
)
def test_other_models_than_those_that_were_claimed(
    place: Place, tags: dict[str, str], known: dict[str, bytes]
) -> None:
    uri = place.register(packed(), tags, name="claimed")
    with pytest.raises(CertificateError, match=sha256(OTHER)):
        place.verify(uri, known=known)
    assert place.carried(uri) is None


def test_a_certificate_that_claims_another_teacher(place: Place) -> None:
    uri = place.register(packed(), name="other-teacher")
    files = place.registry.download(uri).files
    claim = told(files, "other-teacher", place.registry.identity, OTHER)
    place.registry.store_certificate(uri, claim)
    with pytest.raises(CertificateError, match="its certificate says"):
        place.verify(uri)
    assert place.carried(uri) == claim
    strangers = told({"model.onnx": OTHER}, "m", "", OTHER)
    for nothing in (strangers, b"no certificate"):  # of another student, or none: it claims nothing
        place.registry.store_certificate(uri, nothing)
        assert place.verify(uri).certificate.teacher.sha256 == sha256(TEACHER)


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        ({"teacher.onnx": OTHER}, "teacher.onnx has the SHA-256"),
        ({"reference.onnx": OTHER}, "reference.onnx has the SHA-256"),
        ({"reference.onnx": None}, "reference.onnx is missing"),
        ({INDEX: None}, "is no index"),
        ({INDEX: b"[]"}, "is no index"),
        (packed(student=OTHER), "that of the student"),
    ],
    ids=["teacher", "reference", "missing", "no index", "bad index", "other student"],
)
def test_evidence_that_was_exchanged(place: Place, spoiled: dict[str, Any], says: str) -> None:
    files = {k: v for k, v in (packed() | spoiled).items() if v is not None}
    uri = place.register(files, name="exchanged")
    with pytest.raises(CertificateError, match=says):
        place.verify(uri)


def test_evidence_is_only_looked_for_below_the_versions_run(place: Place, tmp_path: Path) -> None:
    aside = tmp_path / "evidence" / ("a" * 16)
    for path, content in packed().items():
        (aside / path).parent.mkdir(parents=True, exist_ok=True)
        (aside / path).write_bytes(content)
    inside = place.registry._versions.find(place.register(packed(), name="inside"))
    for source in (
        str(aside), f"file://{aside}", "s3://bucket/evidence/" + "a" * 16,
        "http://169.254.169.254/evidence/" + "a" * 16,
        inside.tags["kdguard.evidence"], inside.tags["kdguard.evidence"] + "/../../..",
    ):  # fmt: skip
        uri = place.register(tags={"kdguard.evidence": source}, name="elsewhere")
        with pytest.raises(UnsafeModelError, match="outside the version's own run"):
            place.verify(uri)


def test_without_evidence_the_verifier_names_the_files(place: Place) -> None:
    uri = place.register(name="bare")
    with pytest.raises(UsageError, match="without its reference and its teacher"):
        place.verify(uri)
    both = {"teacher": TEACHER, "reference": REFERENCE}
    assert place.verify(uri, known=both).certificate.teacher.sha256 == sha256(TEACHER)


def test_a_bundle_that_could_serve_something_else_is_not_measured(place: Place) -> None:
    uri = place.register(packed(), name="extra")
    (folder_of(place.registry, uri) / "other.onnx").write_bytes(OTHER)
    with pytest.raises(UnsafeModelError, match=r"other\.onnx"):
        place.verify(uri)
    assert place.carried(uri) is None


# ── The command ─────────────────────────────────────────────────────────────────────────────────


def test_the_command_on_a_server_without_nonces(
    mlflow_server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through HTTP alone, as from another machine; then the gate, which believes the key."""
    there = Place(opened(mlflow_server.uri), None)  # type: ignore[arg-type]
    uri = there.register(packed(), name="served")
    assert there.registry.nonce("served", sha256(STUDENT)) is None
    key = tmp_path / "v.pem"
    assert answer(["keygen", str(key), "--owner", "Vic", "--role", "verifier"]) == 0
    sets = "audit.steps=2; audit.radius=1.0; certify.samples=5; certify.pgd_steps=2"
    at = ["--tracking-uri", mlflow_server.uri, "--json"]
    argv = [
        *("verify", uri, "--key", str(key), "--test", "digits#test[:120]"),
        *("--clean", "digits#train[:80]", "--set", sets, "--device", "cpu", *at),
    ]
    capsys.readouterr()
    assert answer([*argv, "--pin", "a" * 64]) == 2
    capsys.readouterr()
    assert answer([*argv, "--out", str(tmp_path / "c.json")]) == 0
    document = json.loads(capsys.readouterr().out)
    version = mlflow.MlflowClient(mlflow_server.uri).get_model_version("served", "1")
    assert version.tags["kdguard.certificate"] == (tmp_path / "c.json").read_text()
    assert document["certificate"]["figures_from"] == "recomputed"
    judged = ["gate", uri, "--key", str(public_path(key)), "--pin", "digits#test[:120]", *at]
    assert answer(judged) == 3
    rules = {rule["rule"]: rule for rule in json.loads(capsys.readouterr().out)["rules"]}
    assert rules["certificate.figures_from"]["figure"] == "recomputed"
    assert rules["data"]["ok"]
    revoked = tmp_path / "revoked.yaml"
    revoked.write_text(f"certificates: [{document['certificate_sha256']}]\n")
    assert answer([*judged, "--revoked", str(revoked)]) == 3
    first = json.loads(capsys.readouterr().out)["rules"][0]
    assert "revoked" in first["why"]


def test_a_second_owner_signs_what_holds_beside_the_first(place: Place, tmp_path: Path) -> None:
    uri = place.register(packed(), name="cosigned")
    for name, owner in (("vic", "Vic"), ("own", "vic "), ("ann", "Ann")):
        keygen(tmp_path / name, owner=owner, role="verifier", now=now() - timedelta(days=1))
    first = place.verify(uri, signer=Signer.load(tmp_path / "vic")).envelope
    at = ["--trust", str(tmp_path / "vic.pub"), "--tracking-uri", place.registry.identity]
    trusted = [Signer.load(tmp_path / name).verifier for name in ("vic", "own", "ann")]
    for name, owners in (("own", 1), ("ann", 2)):
        place.registry.store_certificate(uri, first)
        assert answer(["cosign", uri, "--key", str(tmp_path / name), *at]) == 0
        decision = judge(place.registry, uri, policy=c.packaged(), verifiers=trusted, now=now())
        rule = next(rule for rule in decision.rules if rule.rule == "certificate.signers")
        assert rule.figure == owners
    other = place.register(packed(student=OTHER), name="cosigned", student=OTHER)
    place.registry.store_certificate(other, first)
    assert answer(["cosign", other, "--key", str(tmp_path / "ann"), *at]) == 8
    assert place.carried(other) == first


def test_a_registry_that_does_not_answer_is_no_verdict(place: Place) -> None:
    with pytest.raises(RegistryError):
        place.verify("models:/nobody/1")
