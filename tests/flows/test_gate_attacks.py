"""Walks around the gate on the command line: mix-ups, replays, edited policies, odd arguments.

A version with a certificate that passes lies in a registry of its own; each test changes one
thing. No network is trained: what is attacked is the way from documents to a decision.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import certificates as c
import toys
from mlflow_kdguard import attest
from mlflow_kdguard.attest import signing
from mlflow_kdguard.config import RegistrySection
from mlflow_kdguard.draw import draw
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.records import (
    AuditReport,
    CertifiedSample,
    CertifyReport,
    CertifySummary,
    Exported,
    Finding,
    Measurement,
    Model,
    Record,
    Status,
    format_time,
)
from mlflow_kdguard.registry import Registry
from mlflow_kdguard_cli.main import answer

NAME = "attacked"

BELIEVED = "certificate: {figures_from: any}\n"
"""What an operator states who takes the builder's word: these certificates are the builder's."""


@dataclass(frozen=True)
class Place:
    """A registry with one version, its key, and the files that its figures are about."""

    folder: Path
    registry: Registry
    uri: str
    onnx: dict[str, Path]
    documents: dict[str, Path]

    @property
    def digests(self) -> dict[str, str]:
        return {role: sha256(path.read_bytes()) for role, path in self.onnx.items()}

    def write(self, name: str, content: str | Record) -> Path:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content.document()))
        return path


def _documents(digests: dict[str, str]) -> dict[str, Record]:
    """What the other commands print about the three models, so that the packaged policy passes."""
    student, teacher, reference = (
        Model(sha256=digests[role]) for role in ("student", "teacher", "reference")
    )
    parts = (reference.sha256, student.sha256, c.TEST.sha256)
    drawn = draw(c.POPULATION, c.SAMPLES, *parts, "")
    samples = tuple(
        CertifiedSample(
            index=i,
            label=0,
            reference_class=0,
            lower=0,
            bound=0.1,
            float32_margin=0,
            upper=0.1,
            status=Status.PROVED,
            method="",
        )
        for i in drawn
    )
    summary = CertifySummary(
        n=c.SAMPLES, lower_mean=0, bound_mean=0.1, float32_margin_mean=0, upper_mean=0.1,
        upper_p95=0.1, upper_max=0.1, seconds_mean=0, share_within={},
    )  # fmt: skip
    found = (Finding(name="inversion", score=1.0),)
    taken = c.figures()
    return {
        "measure": Measurement(
            model=student, data=c.TEST, provider="CPU", accuracy=taken.accuracy, asr=taken.asr,
            teacher=teacher, paired=taken.paired, reference=c.gap(model=reference),
        ),
        "certify": CertifyReport(
            norm="linf", eps=0.01, delta=0.2, classes="all", reference=reference, student=student,
            data=c.TEST, population=c.POPULATION, selection="uniform-seeded", nonce="",
            device="cpu", samples=samples, control=c.faithful().control, summary=summary,
        ),
        "audit": AuditReport(model=teacher, data=c.TEST, detectors=found, verdict="suspect"),
        "audit-student": AuditReport(
            model=student, data=c.TEST, detectors=found, verdict="undecided"
        ),
        "export": Exported(
            path="student.onnx", sha256=student.sha256, parity=c.parity(model=student)
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("attacks")
    onnx = {}
    for seed, role in enumerate(("student", "teacher", "reference", "other")):
        onnx[role] = folder / f"{role}.onnx"
        onnx[role].write_bytes(toys.onnx_tiny(shape=(1, 8, 8), classes=10, seed=seed))
    signing.keygen(folder / "key", owner="Bea", role="builder")
    registry = Registry(RegistrySection(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"))
    with registry.run("attacks") as run:
        version = registry.register_student(NAME, onnx["student"].read_bytes(), run=run)
    stored = folder / "bundle"
    stored.mkdir()
    for path, data in registry.download(version.uri).files.items():
        (stored / path).write_bytes(data)
    made = Place(folder, registry, version.uri, onnx, {})
    for name, record in _documents(made.digests).items():
        made.documents[name] = made.write(f"{name}.json", record)
    return made


@pytest.fixture(autouse=True)
def _certified(place: Place) -> None:
    """Every test starts with the certificate that passes."""
    assert _attest(place, place.documents) == 0
    place.registry.store_certificate(place.uri, (place.folder / "out.json").read_bytes())


def _attest(place: Place, documents: dict[str, Path], **models: Path) -> int:
    files = {"student": place.folder / "bundle"} | models
    command = ["attest", str(files.pop("student"))]
    for role in ("teacher", "reference"):
        command += [f"--{role}", str(files.get(role, place.onnx[role]))]
    for name, path in documents.items():
        command += [f"--{name.partition('-')[0]}", str(path)]
    command += ["--model-name", NAME, "--registry", place.registry.identity]
    return answer([*command, "--key", str(place.folder / "key"), *_out(place)])


def _out(place: Place) -> list[str]:
    return ["--out", str(place.folder / "out.json")]


def _asked(place: Place, *more: str, uri: str = "", command: str = "gate") -> int:
    """Ask under a policy that believes the builder, who signed here, unless told otherwise."""
    own = ["--key", str(place.folder / "key.pub"), "--pin", c.TEST.sha256]
    if "--policy" not in more:
        own += ["--policy", str(place.write("builder.yaml", BELIEVED))]
    return answer(
        [command, uri or place.uri, *own, "--tracking-uri", place.registry.identity, *more]
    )


def test_the_version_passes_as_it_is_where_the_builder_is_believed(place: Place) -> None:
    assert _asked(place) == 0
    assert _asked(place, "--policy", str(place.write("packaged.yaml", "policy: {}"))) == 3


# ── Documents about other models ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("measure", "student"),
        ("measure", "teacher"),
        ("measure", "reference"),
        ("certify", "student"),
        ("certify", "reference"),
        ("audit", "teacher"),
        ("audit-student", "student"),
        ("export", "student"),
    ],
)
def test_a_document_about_another_model_is_not_signed(
    place: Place, name: str, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backdoored student with the measurement of a clean one, and all its kin."""
    others = _documents(place.digests | {role: place.digests["other"]})
    other = place.write(f"other-{name}.json", others[name])
    assert _attest(place, place.documents | {name: other}) == 8
    assert "model" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["student", "teacher", "reference"])
def test_another_model_than_that_of_the_documents_is_not_signed(place: Place, role: str) -> None:
    assert _attest(place, place.documents, **{role: place.onnx["other"]}) == 8


def test_of_two_audits_of_one_model_none_is_chosen(place: Place) -> None:
    twice = {"audit": place.documents["audit"], "audit-again": place.documents["audit"]}
    assert _attest(place, place.documents | twice) == 8


@pytest.mark.parametrize("arguments", [
    ["--days", "1e9"], ["--days", "nan"], ["--days", "inf"], ["--days", "0"],
    ["--model-name", " "], ["--teacher", "/nonexistent"], ["--reference", ""],
])  # fmt: skip
def test_odd_arguments_of_attest_are_usage(place: Place, arguments: list[str]) -> None:
    own = ["attest", str(place.folder / "bundle"), "--key", str(place.folder / "key"), *_out(place)]
    models = [f"--{role}={place.onnx[role]}" for role in ("teacher", "reference")]
    assert answer([*own, *models, "--model-name", NAME, *arguments]) == 2


def test_a_bundle_that_serves_another_model_is_neither_signed_nor_good(place: Place) -> None:
    folder = place.folder / "redirected"
    folder.mkdir()
    for path in (place.folder / "bundle").iterdir():
        (folder / path.name).write_bytes(path.read_bytes().replace(b"mlflow.onnx", b"evil.onnx"))
    assert _attest(place, {}, student=folder) == 5
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    now = datetime.now(UTC)
    made = c.imported(
        subjects=attest.subjects_of(files),
        issued=format_time(now),
        expires=format_time(now + timedelta(days=1)),
    )
    signed = place.folder / "redirected.json"
    signed.write_bytes(attest.issue(made, signing.Signer.load(place.folder / "key")))
    trusted = ["--key", str(place.folder / "key.pub")]
    assert answer(["check", str(signed), "--model", str(folder), *trusted]) == 5
    # One of the other certified files is not the model.
    requirements = str(folder / "requirements.txt")
    assert answer(["check", str(signed), "--model", requirements, *trusted]) == 8
    assert answer(["check", str(signed), "--model", str(folder / "model.onnx"), *trusted]) == 0


# ── The version ─────────────────────────────────────────────────────────────────────────────────


def test_an_alias_that_moves_meanwhile_does_not_promote_another_version(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.registry.set_alias(NAME, "candidate", place.uri.rpartition("/")[2])
    with place.registry.run("another") as run:
        worse = place.registry.register_student(NAME, place.onnx["other"].read_bytes(), run=run)
    kept = Registry.record_decision

    def moved(registry: Registry, *rest: Any) -> None:
        registry.set_alias(NAME, "candidate", worse.version)
        kept(registry, *rest)

    monkeypatch.setattr(Registry, "record_decision", moved)
    assert _asked(place, uri=f"models:/{NAME}@candidate", command="promote") == 0
    assert place.registry.alias(NAME, "champion") == place.uri.rpartition("/")[2]


@pytest.mark.parametrize("uri", ["", "x" * 5000, f"models:/{NAME}/١", f"models:/{NAME}/{'9' * 30}"])
def test_a_name_that_no_version_has_is_usage(place: Place, uri: str) -> None:
    own = ["--key", str(place.folder / "key.pub"), "--tracking-uri", place.registry.identity]
    assert answer(["gate", uri, *own]) == 2


@pytest.mark.parametrize(
    ("uri", "code"), [("http://[", 4), ("sqlite:///{folder}", 4), ("sqlite:///{folder}/key", 4)]
)
def test_a_store_that_is_none_is_told_at_once(place: Place, uri: str, code: int) -> None:
    """MLflow itself tries for minutes to open a folder as a database."""
    own = ["--key", str(place.folder / "key.pub")]
    store = uri.format(folder=place.folder)
    assert answer(["gate", place.uri, *own, "--tracking-uri", store]) == code


@pytest.mark.parametrize("source", ["", "bundle", "x" * 5000, "http://[", "ftp://host/x"])
def test_a_version_with_an_odd_source_is_not_fetched_from_here(
    place: Place, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty or relative one would be the folder that the gate happens to be started in."""
    monkeypatch.chdir(place.folder / "bundle" if not source else place.folder)
    monkeypatch.setattr(
        "mlflow.tracking.MlflowClient.get_model_version_download_uri", lambda *_: source
    )
    assert _asked(place) in (4, 5)


# ── What the operator states ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        (f"{BELIEVED}asr: {{upper_at_most: 0.0001}}", 3),
        ("asr: {upper_at_most: yes}", 2),
        ("asr: {upper_at_most: 0.0001}\nasr: {panel: []}", 2),
        ("asr: {upper_at_most: 0.0001, upper_at_most: 0.9}", 2),
        ("policy: {}\nasr: {upper_at_most: 0.0001}", 2),
        ("asr: &a {upper_at_most: 0.9}\nexport: *a", 2),
        ("asr: {upper_at_most: 2026-13-45}", 2),
        ("asr: {upper_at_most: !!bool x}", 2),
        ("asr: {upper_at_most: !!timestamp x}", 2),
        ('asr: {upper_at_most: !!int ""}', 2),
        (f"asr: {{upper_at_most: {'9' * 5000}}}", 2),
        ("[" * 5000, 2),
        (f"{BELIEVED}asr: {{panel: ['{c.TRIGGER}:1']}}", 3),
        (f"{BELIEVED}asr: {{panel: ['{c.TRIGGER}:0']}}", 0),
    ],
)
def test_a_policy_is_read_in_one_way(place: Place, policy: str, code: int) -> None:
    file = place.write("policy.yaml", policy)
    assert _asked(place, "--policy", str(file)) == code


def test_a_demand_is_not_dropped_with_an_unset_variable(place: Place) -> None:
    assert _asked(place, "--require-trigger", "") == 2
    assert _asked(place, "--require-trigger", ":0") == 2
    assert _asked(place, "--policy", "") == 2
    assert _asked(place, "--require-trigger", "x" * 5000) == 2


def test_a_trigger_of_the_panel_is_aimed_where_the_operator_says(place: Place) -> None:
    assert _asked(place, "--require-trigger", f"{c.TRIGGER}:0") == 0
    assert _asked(place, "--require-trigger", f"{c.TRIGGER}:00") == 0
    assert _asked(place, "--require-trigger", c.TRIGGER) == 0
    assert _asked(place, "--require-trigger", f"{c.TRIGGER}:3") == 3


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_keys_does_not_decide_about_a_compromise(place: Place, first: bool) -> None:
    record = json.loads((place.folder / "key.pub").read_text())
    known = place.folder / "known.pub"
    known.write_bytes(canonical_json(record | {"compromised": "2020-01-01T00:00:00Z"}) + b"\n")
    keys = [place.folder / "key.pub", known]
    keys = keys if first else keys[::-1]
    named = [part for key in keys for part in ("--key", str(key))]
    own = ["--pin", c.TEST.sha256, "--tracking-uri", place.registry.identity]
    assert answer(["gate", place.uri, *named, *own]) == 2
    assert answer(["gate", place.uri, "--key", str(known), *own]) == 3
