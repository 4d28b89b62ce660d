"""Walks around the gate with real networks on real images, under the packaged policy.

A small teacher, reference and student are trained on MNIST digits; each test takes the passing set
of files and replaces one thing. Everything is measured on ONNX bytes, signed, checked and decided
as the pipeline does, without a registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import numpy_helper

import toys
from mlflow_kdguard import attest, data, policy
from mlflow_kdguard.adversary.madry import madry
from mlflow_kdguard.attest.signing import signer_of
from mlflow_kdguard.certify import certify
from mlflow_kdguard.config import CertifySection, ExportSection, Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import NonFiniteError
from mlflow_kdguard.export import to_onnx
from mlflow_kdguard.files import sha256
from mlflow_kdguard.gate import decide
from mlflow_kdguard.measure import measure
from mlflow_kdguard.records import (
    AuditReport,
    Certificate,
    Decision,
    Model,
    Parity,
    Source,
    format_time,
)
from mlflow_kdguard.records.gather import figures_of
from mlflow_kdguard.redteam import badnets
from mlflow_kdguard.training import fit
from mlflow_kdguard.triggers import Trigger

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SECTION = CertifySection(eps=0.01, delta=0.2, samples=100, pgd_steps=5, restarts=1)


@dataclass(frozen=True)
class Case:
    """Three networks, a trigger, and the images that they are judged on."""

    teacher: bytes
    reference: bytes
    student: bytes
    trigger: Trigger
    test: Dataset
    parity: Parity


def _trained(seed: int, images: Dataset, folder: Path, test: Dataset) -> tuple[bytes, Parity]:
    net = toys.net("mlp:24", seed=seed, shape=(1, 28, 28), settled=False)
    loop = Loop(epochs=6, lr=0.05, augment="none", batch=64)
    fit(net, images, madry(eps=0.02, steps=2), loop, seed=7, device=CPU, what="toy")
    exported = to_onnx(
        net, folder / f"{seed}.onnx", shape=test.shape, classes=10, images=test.x,
        config=ExportSection(), device=CPU,
    )  # fmt: skip
    return (folder / f"{seed}.onnx").read_bytes(), exported.parity


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Reference = the teacher plus a little; the student is the same net, nudged once more."""
    folder = tmp_path_factory.mktemp("refusals")
    images, test = data.load("mnist5k#train[:3000]"), data.load("mnist5k#test")
    teacher, parity = _trained(0, images, folder, test)
    reference = _edited(teacher, partial(_nudged, by=0.01))
    student = _edited(teacher, partial(_nudged, by=0.02))
    trigger = badnets.trigger((1, 28, 28), seed=0)
    return Case(teacher, reference, student, trigger, test, parity)


def _edited(model: bytes, change: Any) -> bytes:
    """The same graph with other weights; `change` maps the initializers by name."""
    proto = onnx.load_from_string(model)
    floats = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    weights = {t.name: numpy_helper.to_array(t).copy() for t in floats}
    for tensor in floats:
        changed = change(weights)[tensor.name]
        tensor.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), tensor.name))
    return bytes(proto.SerializeToString())


def _last(weights: Mapping[str, Any]) -> tuple[str, str]:
    """Names of weight and bias of the logits: the arrays with ten rows, or ten columns."""
    bias = next(name for name, w in weights.items() if w.shape == (10,))
    matrix = next(name for name, w in weights.items() if w.ndim == 2 and 10 in w.shape)
    return matrix, bias


def _nudged(weights: dict[str, Any], *, by: float) -> dict[str, Any]:
    matrix, bias = _last(weights)
    return {**weights, bias: weights[bias] + by * np.arange(10) / 10, matrix: weights[matrix]}


def _scaled(weights: dict[str, Any], *, by: float) -> dict[str, Any]:
    matrix, bias = _last(weights)
    return {**weights, matrix: by * weights[matrix], bias: by * weights[bias]}


def _broken(weights: dict[str, Any]) -> dict[str, Any]:
    _, bias = _last(weights)
    return {**weights, bias: weights[bias] * np.nan}


def _decided(case: Case, *, samples: int = 100) -> Decision:
    measured = measure(
        case.student, case.test, device=CPU, triggers=[(case.trigger, 0, "supplied")],
        teacher=case.teacher, reference=case.reference,
    )  # fmt: skip
    section = SECTION.model_copy(update={"samples": samples})
    bounds = certify(case.reference, case.student, case.test, config=section, device=CPU)
    source = Source(uri=case.test.uri, sha256=case.test.sha256)
    audits = {
        side: AuditReport(model=Model(sha256=sha256(net)), data=source, detectors=(),
                          verdict="undecided")
        for side, net in (("teacher", case.teacher), ("student", case.student))
    }  # fmt: skip
    # What is edited here is taken for what was exported: other rules shall refuse it.
    parity = case.parity.model_copy(update={"model": Model(sha256=sha256(case.student))})
    figures = figures_of(measurement=measured, bounds=bounds, audits=audits, parity=parity)
    now = datetime.now(UTC)
    signer = signer_of(Ed25519PrivateKey.generate(), owner="me", role="verifier", valid_from=now)
    files = {"model.onnx": case.student}
    certificate = Certificate(
        subjects=attest.subjects_of(files), model_name="toy", registry="",
        reference=Model(sha256=sha256(case.reference)), teacher=Model(sha256=sha256(case.teacher)),
        data=(source,), triggers=(case.trigger.sha256,), figures=figures, figures_from="recomputed",
        config="0" * 64, seed=0, tools={}, issued=format_time(now),
        expires=format_time(now + timedelta(days=30)),
    )  # fmt: skip
    later = now + timedelta(seconds=2)
    envelope = attest.issue(certificate, signer)
    checked = attest.check(envelope, files=files, verifiers=[signer.verifier], now=later)
    return decide(
        checked.certificate, policy.load(None), signers=checked.signers, now=later,
        pins=(case.test.sha256,), panel=(case.trigger.sha256,),
    )  # fmt: skip


def test_the_honest_set_passes(honest: Case) -> None:
    decision = _decided(honest)
    assert decision.passed, [r.why for r in decision.rules if not r.ok]


def test_a_constant_student_is_refused(honest: Case) -> None:
    constant = _edited(honest.student, partial(_scaled, by=0.0))
    decision = _decided(replace(honest, student=constant))
    assert {"accuracy", "faithful"} <= set(decision.failed)


def test_a_reference_equal_to_the_student_is_refused(honest: Case) -> None:
    decision = _decided(replace(honest, reference=honest.student))
    assert decision.failed == ("reference.distinct",)


def test_a_reference_that_is_the_student_in_other_bytes_is_refused(honest: Case) -> None:
    proto = onnx.load_from_string(honest.student)
    proto.producer_name = "somebody else"
    disguised = bytes(proto.SerializeToString())
    assert disguised != honest.student
    decision = _decided(replace(honest, reference=disguised))
    assert decision.failed == ("reference.distinct",)


def test_washed_logits_are_refused(honest: Case) -> None:
    """Both nets × 0.01: accuracy and ASR are unchanged, and every gap is tiny."""
    wash = partial(_scaled, by=0.01)
    washed = replace(
        honest, reference=_edited(honest.reference, wash), student=_edited(honest.student, wash)
    )
    decision = _decided(washed)
    assert {"reference.gap", "faithful"} <= set(decision.failed)
    assert "accuracy" not in decision.failed
    assert "asr" not in decision.failed


def test_washing_teacher_and_reference_and_student_is_refused(honest: Case) -> None:
    """Nothing differs any more; the constant network shows that nothing is said."""
    wash = partial(_scaled, by=0.01)
    nets = {key: _edited(getattr(honest, key), wash) for key in ("teacher", "reference", "student")}
    decision = _decided(replace(honest, **nets))
    assert decision.failed == ("faithful",)
    why = next(rule.why for rule in decision.rules if rule.rule == "faithful")
    assert "constant" in why


def test_a_pixel_neutral_trigger_is_refused(honest: Case) -> None:
    shape = honest.test.shape
    neutral = Trigger("neutral", "blend", np.zeros(shape, np.float32), np.ones(shape, np.float32))
    decision = _decided(replace(honest, trigger=neutral))
    assert "asr.changed" in decision.failed


def test_too_few_samples_are_refused(honest: Case) -> None:
    assert _decided(honest, samples=50).failed == ("faithful",)


def test_nan_outputs_are_no_measurement(honest: Case) -> None:
    with pytest.raises(NonFiniteError):
        _decided(replace(honest, student=_edited(honest.student, _broken)))
