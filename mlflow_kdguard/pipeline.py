"""Guarded distillation, stage by stage. Read this first.

    teacher ─► audit ─► detox ─► distill ─► export ─► register ─► audit-student ─► measure
                         reference  student   *.onnx    version,                     │
                                                        no alias     certify ◄───────┤
                                                                        │         verify
                                           promote ◄─ gate ◄─ attest ◄──┘            │
                                                       ▲─────────────────────────────┘

A builder bounds and states its own figures, which the packaged policy does not believe. Where a
verifier's key is at hand, `verify` measures the stored version again in their place, as
`kdguard verify` does elsewhere.

From `export` on, everything reads the ONNX bytes that ship. Each stage is a nested MLflow run and
a folder on disk; a stage whose inputs did not change is not run again.
"""

from dataclasses import dataclass
from pathlib import Path

from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.flow import given, judging, making, patching, smoothing, verifying
from mlflow_kdguard.flow.work import Grant, Work, opened
from mlflow_kdguard.records import Decision, Figures, Progress, silent
from mlflow_kdguard.registry import Run

__all__ = ["Grant", "Outcome", "guard", "staged"]

BUILDERS_OWN = ("certify", "certify-smooth", "certify-patch", "attest")
"""Stages that a verifier's work takes the place of."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a guarded distillation came to."""

    run_id: str
    folder: Path
    uri: str
    """models:/name/version of the student."""
    alias: str | None
    """The alias that it was given, None if it was refused."""
    figures: Figures
    decision: Decision


def guard(
    config: GuardConfig,
    grant: Grant,
    *,
    folder: Path | None = None,
    name: str = "guard",
    parent: Run | None = None,
    baseline: Path | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Audit the teacher, detoxify it, distil, export, certify, decide, and promote on a pass.

    `folder` (default: `config.run.work_dir`) keeps every stage's files; called again with the
    same folder, the work goes on where it stopped. `baseline` is the ONNX file of a declared
    comparator for the lift. A refusal is an outcome, not an error.
    Raises the errors of `errors.py`.
    """
    place = folder if folder is not None else Path(config.run.work_dir)
    with opened(
        config, grant, name=name, folder=place, progress=progress, parent=parent, baseline=baseline
    ) as work:
        return staged(work)


def staged(work: Work) -> Outcome:
    """The stages in their order; Reached where the work stops at one before the gate.

    Raises UsageError where it shall stop at `verify`, and there is no verifier's key.
    """
    if work.until == "verify" and work.grant.verifier is None:
        raise UsageError("the stage verify needs a verifier's key.", remedy="Name verifier_key.")
    shown = given.images(work)
    made = _made(work, shown)
    version = judging.version_of(judging.registered(work, made))
    student_audit = making.audit(work, "audit-student", made.exported, making.STUDENT, shown)
    measured = judging.measured(work, made, (made.audit, student_audit), shown)
    if work.grant.verifier is None or work.until in BUILDERS_OWN:
        nonce, bounds = work.nonce, judging.certified(work, made, shown)
        smooth = smoothing.smoothed(work, made, shown)
        patches = patching.patched(work, made, shown)
        figures = judging.figures(
            made, measured, bounds, student_audit, patches=patches, smooth=smooth
        )
        judging.attested(work, made, figures, version, shown, bounds=bounds)
    else:
        seen = verifying.verified(work, made, version, shown)
        nonce, figures = seen.recorded["nonce"], verifying.figures(seen)
    decision = judging.decided(work, version, nonce=nonce)
    acts = decision.passed and work.until in (None, "promote")
    alias = judging.promoted(work, version) if acts else None
    return Outcome(work.run.id, work.folder, version.uri, alias, figures, decision)


def _made(work: Work, shown: given.Images) -> judging.Made:
    teacher = given.teacher(work, shown)
    audit = making.audit(work, "audit", teacher, given.TEACHER, shown)
    reference = making.reference(work, teacher, audit, shown)
    student = making.student(work, reference, shown)
    exported = making.exported(work, student, shown)
    return judging.Made(teacher, audit, reference, student, exported)
