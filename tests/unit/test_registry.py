"""What of the registry needs no server: names of figures, bundles, addresses."""

import math
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from mlflow_kdguard import bundle, gate, intervals
from mlflow_kdguard.errors import ModelError, RegistryError, UnsafeModelError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import (
    Asr,
    AuditFigure,
    AuditReport,
    CertifiedSample,
    CertifyReport,
    CertifySummary,
    Control,
    Exported,
    FaithfulFigure,
    Figures,
    Finding,
    Flips,
    Measurement,
    Model,
    Paired,
    Parity,
    PatchPlace,
    PatchReport,
    Rate,
    ReferenceGap,
    SmoothReport,
    SmoothSample,
    Source,
    Status,
)
from mlflow_kdguard.records.gather import patch_of
from mlflow_kdguard.registry import RULES, Bundle, metrics_of
from mlflow_kdguard.registry import bundle as stored
from mlflow_kdguard.registry.bundle import read_folder, student_files, write
from mlflow_kdguard.registry.client import without_password
from mlflow_kdguard.registry.metrics import metric_name

DIGEST = "ab" * 32
DATA = Source(uri="digits#test", sha256=DIGEST)
CONTROL = Control(gap_mean=0.5, within=Rate(k=1, n=9))
MLFLOW_TAKES = re.compile(r"[A-Za-z0-9_\-. :/]+")


def asr(name: str = "patch", target: int = 3, trigger: str = DIGEST) -> Asr:
    return Asr(
        trigger=trigger,
        name=name,
        target=target,
        source="supplied",
        k=2,
        n=8,
        changed=Rate(k=8, n=8),
        confidence=0.95,
        baseline=Rate(k=1, n=8),
    )


def measurement(*figures: Asr) -> Measurement:
    return Measurement(
        model=Model(sha256=DIGEST),
        data=DATA,
        provider="CPUExecutionProvider",
        accuracy=Rate(k=9, n=10),
        asr=figures or (asr(),),
        teacher=Model(sha256=DIGEST),
        paired=Paired(both=8, only_teacher=1, only_student=0, neither=1),
        reference=ReferenceGap(model=Model(sha256=DIGEST), gap_mean=0.1, student_gap_max=0.4, n=10),
    )


def report() -> CertifyReport:
    statuses = (Status.PROVED, Status.UNDECIDED, Status.PROVED, Status.MISCLASSIFIED)
    samples = tuple(
        CertifiedSample(
            index=i,
            label=0,
            reference_class=0,
            lower=0.1,
            bound=0.19,
            float32_margin=0.01,
            upper=0.2,
            status=s,
            method="crown",
        )
        for i, s in enumerate(statuses)
    )
    summary = CertifySummary(
        n=4,
        lower_mean=0.1,
        bound_mean=0.19,
        float32_margin_mean=0.01,
        upper_mean=0.2,
        upper_p95=0.3,
        upper_max=0.4,
        seconds_mean=1.0,
        share_within={"0.05": 0.25, "0.2": 0.5},
    )
    return CertifyReport(
        norm="linf",
        eps=0.01,
        delta=0.2,
        classes="all",
        reference=Model(sha256=DIGEST),
        student=Model(sha256=DIGEST),
        data=DATA,
        population=10,
        selection="uniform-seeded",
        nonce="",
        device="cpu",
        samples=samples,
        control=CONTROL,
        summary=summary,
    )


def audit_report() -> AuditReport:
    layers = {"layer1.0": {"A": 1.0, "B": 2.0, "C": 3.0}}
    return AuditReport(
        model=Model(sha256=DIGEST),
        data=DATA,
        detectors=(
            Finding(name="variance", score=1.0, p_value=None, details={"layers": layers}),
            Finding(name="inversion", score=2.5, p_value=0.04),
        ),
        verdict="suspect",
        target=3,
        asr=(asr("recovered"),),
    )


def exported() -> Exported:
    parity = Parity(
        model=Model(sha256=DIGEST),
        softmax_max=1e-6,
        argmax=Rate(k=10, n=10),
        provider="CPUExecutionProvider",
    )
    return Exported(path="model.onnx", sha256=DIGEST, parity=parity)


def patches() -> PatchReport:
    """One of four images may be flipped, by a patch of its own or not."""
    each, universal = Flips(attack=1, certified=2, n=4), Flips(attack=1, certified=1, n=4)
    place = PatchPlace(position=(0, 0), each=each, universal=universal, patch=(1.0,))
    return PatchReport(
        student=Model(sha256=DIGEST), data=DATA, target=7, size=1, channels=1, margin=1e-4,
        nodes=9, population=40, selection="uniform-seeded", nonce="", device="cpu", complete=True,
        clean=Rate(k=0, n=4), each=each, universal=universal, places=(place,), samples=(),
    )  # fmt: skip


def smooth() -> SmoothReport:
    """A smoothed pair on four images, two of them PROVED."""
    samples = tuple(
        SmoothSample(
            index=i, label=0, reference_class=0, draws=9, lower=0.0, gap_mean=0.1, upper=0.2,
            status=Status.PROVED if i < 2 else Status.UNDECIDED,
        )
        for i in range(4)
    )  # fmt: skip
    control = Control(gap_mean=0.8, within=Rate(k=0, n=4))
    model = Model(sha256=DIGEST)
    return SmoothReport(
        sigma=0.25, radius=0.5, delta=0.3, classes="all", draws=9, error=0.001, reference=model,
        student=model, data=DATA, population=40, selection="uniform-seeded", nonce="", noise="",
        device="cpu", complete=True, lower_mean=0.0, upper_mean=0.2, curve=(), control=control,
        samples=samples,
    )  # fmt: skip


def figures() -> Figures:
    """A certificate's figures with everything in them."""
    taken = measurement()
    faithful = FaithfulFigure(
        reference=Model(sha256=DIGEST),
        student=Model(sha256=DIGEST),
        method="certified",
        norm="linf",
        eps=0.01,
        delta=0.2,
        classes="all",
        within=Rate(k=2, n=4),
        lower_mean=0.1,
        upper_mean=0.2,
        selection="uniform-seeded",
        population=10,
        nonce="",
        indices=(0, 1, 2, 3),
        data=DATA,
        control=CONTROL,
    )
    verdict = AuditFigure(model=Model(sha256=DIGEST), verdict="clean", p_value=0.5)
    return Figures(
        accuracy=taken.accuracy,
        paired=taken.paired,
        asr=taken.asr,
        reference=taken.reference,
        faithful=(faithful,),
        patch=(patch_of(patches()),),
        audit={"teacher": verdict, "student": verdict},
        export=exported().parity,
    )


def everything() -> dict[str, float]:
    """The metrics of one of every document."""
    found: dict[str, float] = {}
    for document in (measurement(), report(), exported(), patches(), smooth()):
        found |= metrics_of(document.document())
    for about in ("teacher", "student"):
        found |= metrics_of(audit_report().document(), about=about)
    return found


def test_the_table_of_rules_points_at_figures_and_names_metrics_that_exist() -> None:
    document, metrics = figures().document(), everything()
    for row in RULES:
        place: Any = document
        for step in row.pointer.split("/")[1:]:
            place = place[0] if step == "*" else place[step]
        assert place is not None, row
        pattern = re.sub(r"<\w+>", "[^/]+", re.escape(row.metric).replace(r"\<", "<"))
        assert any(re.fullmatch(pattern, name) for name in metrics), row
    assert {row.rule for row in RULES} <= {rule.name for rule in gate.RULES}


def test_metrics_of_smoothed_pairs_name_noise_and_radius() -> None:
    found = {n: v for n, v in everything().items() if n.startswith("kdguard/smoothed_")}
    assert found == {
        "kdguard/smoothed_lower_mean/0.25/0.5": 0.0,
        "kdguard/smoothed_upper_mean/0.25/0.5": 0.2,
        "kdguard/smoothed_share_within/0.25/0.5": 0.5,
    }


def test_metrics_of_patches_are_rates_and_bounds() -> None:
    found = {
        name: value for name, value in everything().items() if name.startswith("kdguard/patch_")
    }
    assert found == {
        "kdguard/patch_asr/1/7": 0.5,
        "kdguard/patch_asr_found/1/7": 0.25,
        "kdguard/patch_asr_upper/1/7": intervals.upper(2, 4),
        "kdguard/patch_universal_asr/1/7": 0.25,
        "kdguard/patch_universal_asr_found/1/7": 0.25,
        "kdguard/patch_universal_asr_upper/1/7": intervals.upper(1, 4),
    }


def test_metrics_are_the_figures() -> None:
    found = everything()
    expected = {
        "kdguard/accuracy": 0.9,
        "kdguard/accuracy_drop": 0.1,
        "kdguard/asr/patch/3": 0.25,
        "kdguard/asr_upper/patch/3": asr().upper,
        "kdguard/asr_lift/patch/3": 0.125,
        "kdguard/reference_gap_mean": 0.1,
        "kdguard/faithful_lower_mean/reference": 0.1,
        "kdguard/faithful_upper_p95/reference": 0.3,
        "kdguard/faithful_share_within/reference": 0.5,
        "kdguard/faithful_share_within/reference/0.05": 0.25,
        "kdguard/feature_variance/layer1.0": 1.0,
        "kdguard/feature_variance_c/layer1.0": 3.0,
        "kdguard/audit_p_value/teacher": 0.04,
        "kdguard/audit_p_value/student": 0.04,
        "kdguard/export_parity": 1e-6,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert all(MLFLOW_TAKES.fullmatch(name) for name in found)


def test_absent_figures_are_left_out_never_zero() -> None:
    bare = measurement().model_copy(update={"asr": (), "paired": None, "reference": None})
    assert metrics_of(bare.document()) == {"kdguard/accuracy": 0.9}
    nobody = asr().model_copy(update={"k": 0, "n": 0, "baseline": None, "changed": Rate(k=0, n=0)})
    assert (
        metrics_of(measurement(nobody).document()).keys()
        & {
            "kdguard/asr/patch/3",
            "kdguard/asr_lift/patch/3",
        }
        == set()
    )
    assert metrics_of({"schema": "kdguard.unknown/1", "accuracy": {"k": 1, "n": 1}}) == {}


def test_two_triggers_of_one_name_stay_two_figures() -> None:
    twins = asr(trigger="aa" * 32), asr(trigger="bb" * 32).model_copy(update={"k": 8})
    found = metrics_of(measurement(*twins).document())
    assert found["kdguard/asr/patch/3"] == 0.25
    assert found["kdguard/asr/patch-bbbbbbbb/3"] == 1.0
    same = asr(), asr(), asr()
    with pytest.raises(RegistryError, match="one metric"):
        metrics_of(measurement(*same).document())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_refused(bad: float) -> None:
    document = measurement().document()
    document["reference"]["gap_mean"] = bad
    with pytest.raises(RegistryError, match="kdguard/reference_gap_mean"):
        metrics_of(document)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_every_name_becomes_one_that_mlflow_takes(parts: list[str]) -> None:
    from mlflow.utils.validation import _validate_metric_name

    name = metric_name(*parts)
    _validate_metric_name(name)
    assert len(name) <= 250
    assert name.startswith("kdguard/")


def test_a_bundle_follows_from_the_bytes_and_holds_them_unchanged() -> None:
    blob = toys.onnx_tiny()
    # The same model in another serialisation: MLflow would write neither of the two bytes for byte.
    odd = onnx.load_model_from_string(blob)
    odd.doc_string = "odd"
    other = odd.SerializeToString() + onnx.ModelProto(doc_string="").SerializeToString()
    for data in (blob, other):
        files = student_files(data)
        assert files["model.onnx"] == data
        assert files == student_files(data)
        assert set(files) == bundle.ALLOWED
        bundle.check(files)
    assert b"onnxruntime" in files["requirements.txt"]


def fixed_shape_missing() -> bytes:
    model = onnx.load_model_from_string(toys.onnx_tiny())
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("data", [b"no model", b"", toys.onnx_tiny()[:-30], fixed_shape_missing()])
def test_what_is_no_classifier_is_not_registered(data: bytes) -> None:
    with pytest.raises(ModelError):
        student_files(data)


def test_a_folder_is_read_whole_or_refused(tmp_path: Path) -> None:
    files = {"model.onnx": b"123", "sub/x": b"45"}
    write(files, tmp_path)
    assert read_folder(tmp_path, limit=5) == files
    with pytest.raises(ModelError, match="4 bytes"):
        read_folder(tmp_path, limit=4)
    (tmp_path / "sub" / "out").symlink_to(tmp_path.parent)
    with pytest.raises(UnsafeModelError, match="link"):
        read_folder(tmp_path)


def test_the_file_to_read_is_the_one_there_is() -> None:
    def of(*names: str) -> Bundle:
        return Bundle(uri="models:/x/1", files={name: name.encode() for name in names})

    assert of("MLmodel", "data/model.onnx").onnx == b"data/model.onnx"
    assert of("a.onnx", "weights.safetensors").main == "weights.safetensors"
    assert of("a.onnx", "weights.pt").main == "a.onnx"
    assert of("data/weights.pt", "MLmodel").main == "data/weights.pt"
    for names in (("a.onnx", "b.onnx"), ("MLmodel", "model.pkl")):
        with pytest.raises(ModelError, match="models:/x/1"):
            _ = of(*names).main
    assert of("a").digests == {"a": sha256(b"a")}
    assert of("a").certificate() is None


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:pw@host:5000/x?token=1", "http://host:5000/x"),
        ("postgresql+psycopg2://u:p@h/db", "postgresql+psycopg2://h/db"),
        ("sqlite:////tmp/m.db", "sqlite:////tmp/m.db"),
        ("http://host", "http://host"),
    ],
)
def test_no_secret_of_an_address_is_shown(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


def test_only_the_clients_own_note_is_left_out() -> None:
    """Loading from a local store leaves a note in the stored folder; its bytes are determined."""
    model = {"model.onnx": b"x"}
    note = b"model_name: kd\nmodel_version: 1\n"
    assert stored.without_mark({**model, "registered_model_meta": note}, "kd", "1") == model
    for other in (note + b"#", note.replace(b"1", b"2"), b"code: evil\n", b""):
        files = {**model, "registered_model_meta": other}
        assert stored.without_mark(files, "kd", "1") == files
