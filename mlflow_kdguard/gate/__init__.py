"""decide(): whether a certificate is enough for a policy, rule by rule.

Every rule is evaluated and listed, also after one has failed, so that a refusal says everything
that is missing. A figure that is absent or not a number fails its rule; nothing here raises on
any certificate that can be read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from mlflow_kdguard.gate import attack, figures, patches, provenance
from mlflow_kdguard.gate.case import STUDENT, WAIVED, Case, Verdict
from mlflow_kdguard.gate.faithful import faithful
from mlflow_kdguard.policy import Policy
from mlflow_kdguard.records import Certificate, Decision, RuleResult, Signatory

__all__ = ["RULES", "STUDENT", "WAIVED", "Rule", "decide"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its name, the policy's key that sets its limit (none: always), its judgement."""

    name: str
    key: str
    judge: Callable[[Case], Verdict]


RULES: tuple[Rule, ...] = (
    Rule("certificate", "certificate", provenance.subjects),
    Rule("certificate.signers", "certificate.signers_at_least", provenance.signers),
    Rule("certificate.figures_from", "certificate.figures_from", provenance.figures_from),
    Rule("certificate.expiry", "certificate.expires_after_days", provenance.expiry),
    Rule("finite", "", provenance.finite),
    Rule("data", "data.sha256", provenance.data),
    Rule("accuracy", "accuracy.drop_upper_at_most", figures.accuracy),
    Rule("asr", "asr.upper_at_most", attack.upper),
    Rule("asr.triggers", "asr.triggers", attack.triggers),
    Rule("asr.changed", "asr.changed_at_least", attack.changed),
    Rule("asr.lift", "asr.lift_at_most", attack.lift),
    Rule("reference.gap", "reference.gap_mean_at_most", figures.reference_gap),
    Rule("reference.distinct", "reference.distinct_from_student", figures.reference_distinct),
    Rule("faithful", "faithful.any_of", faithful),
    Rule("patch", "patch.upper_at_most", patches.patch),
    Rule("audit.teacher", "audit.teacher", figures.teacher_audit),
    Rule("audit.student", "audit.student", figures.student_audit),
    Rule("export", "export.parity_at_most", figures.export),
)
"""Every rule, in the order in which a decision lists them."""


def decide(
    certificate: Certificate | None,
    policy: Policy,
    *,
    signers: Sequence[Signatory],
    now: datetime,
    pins: Sequence[str] = (),
    panel: Sequence[str] = (),
    allow_unpinned: bool = False,
    nonce: str = "",
    problem: str = "",
) -> Decision:
    """Judge a checked certificate (`attest.check`) by a policy.

    `signers` are those whose signatures held. `pins` (digests of data sets) and `panel`
    (triggers, as DIGEST or DIGEST:CLASS) are the operator's own, added to the policy's;
    `allow_unpinned` and `nonce` (the one that was handed out for the draw of images) are the
    caller's grant. `now` is aware.
    `problem` is why there is no certificate to judge, where the caller knows it; it refuses.
    """
    if certificate is None or problem:
        why = problem or "There is no certificate."
        return Decision(decision="refuse", rules=tuple(_uncertified(rule, why) for rule in RULES))
    case = Case(
        certificate,
        policy,
        tuple(signers),
        now,
        frozenset(policy.data.sha256) | frozenset(pins),
        tuple(panel),
        allow_unpinned,
        nonce,
    )
    rules = tuple(_judged(rule, case) for rule in RULES)
    return Decision(decision="pass" if all(r.ok for r in rules) else "refuse", rules=rules)


def _judged(rule: Rule, case: Case) -> RuleResult:
    answer = rule.judge(case)
    return RuleResult(
        rule=rule.name,
        limit=answer.limit,
        figure=answer.figure,
        ok=not answer.problems,
        why=answer.why,
    )


def _uncertified(rule: Rule, why: str) -> RuleResult:
    return RuleResult(rule=rule.name, limit=None, figure=None, ok=False, why=why)
