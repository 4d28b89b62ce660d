"""Every rule of the gate on figures: what passes, what is refused, and under which name."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import certificates as c
from mlflow_kdguard import gate, intervals
from mlflow_kdguard.files import sha256
from mlflow_kdguard.gate.case import Case
from mlflow_kdguard.policy import Policy, merged, parse
from mlflow_kdguard.records import (
    Asr,
    AuditFigure,
    Control,
    Model,
    Paired,
    Parity,
    Rate,
    ReferenceGap,
    Source,
    Subject,
)


def policy(**blocks: Any) -> Policy:
    """The packaged policy with other values: `policy(asr={"lift_at_most": 0.1})`."""
    return parse(merged(c.packaged().model_dump(mode="json"), blocks), where="test")


def option(**changes: Any) -> dict[str, Any]:
    """`faithful=option(...)`: the packaged certified option alone, with other values."""
    certified = c.packaged().model_dump(mode="json")["faithful"]["any_of"][0]
    return {"any_of": [certified | changes]}


def why(decision: Any, rule: str) -> str:
    return next(str(r.why) for r in decision.rules if r.rule == rule)


# ── What passes ─────────────────────────────────────────────────────────────────────────────────


def test_a_good_certificate_passes_the_packaged_policy() -> None:
    decision = c.decided(c.certificate())
    assert decision.passed, [(r.rule, r.why) for r in decision.rules if not r.ok]
    assert [r.rule for r in decision.rules] == [rule.name for rule in gate.RULES]
    assert all(r.why for r in decision.rules)


def test_every_rule_is_listed_where_there_is_no_certificate() -> None:
    decision = c.decided(None)
    assert not decision.passed
    assert decision.failed == tuple(rule.name for rule in gate.RULES)
    assert why(c.decided(c.certificate(), problem="model.onnx was altered."), "certificate") == (
        "model.onnx was altered."
    )


def test_a_waived_rule_is_listed_as_waived() -> None:
    waiving = policy(
        accuracy=None, asr=None, reference=None, faithful=None, audit=None, export=None
    )
    bare = c.certificate(paired=None, asr=(), reference=None, faithful=(), audit={}, export=None)
    decision = c.decided(bare.model_copy(update={"triggers": ()}), waiving)
    assert decision.passed, decision.failed
    assert [r.rule for r in decision.rules if r.why == gate.WAIVED] == [
        "accuracy", "asr", "asr.triggers", "asr.changed", "asr.lift", "reference.gap",
        "reference.distinct", "faithful", "patch", "audit.teacher", "audit.student", "export",
    ]  # fmt: skip


@pytest.mark.parametrize("rule", [rule for rule in gate.RULES if rule.key], ids=lambda r: r.name)
def test_every_key_that_a_rule_names_is_in_the_policy(rule: gate.Rule) -> None:
    asked = {"targets": [0], "size": 3, "positions": [[25, 25]], "upper_at_most": 0.1}
    value: Any = policy(patch=asked).model_dump(mode="json")
    for part in rule.key.split("."):
        value = value[part]


# ── The refusals that the product promises ──────────────────────────────────────────────────────


def test_a_constant_student_is_refused() -> None:
    """It is right on one class in ten, and far from its reference wherever that says anything."""
    made = c.certificate(
        accuracy=Rate(k=100, n=1000),
        paired=Paired(both=95, only_teacher=855, only_student=5, neither=45),
        asr=(c.asr(k=0),),
        faithful=(c.faithful(within=Rate(k=0, n=100)),),
    )
    assert c.decided(made).failed == ("accuracy", "faithful")


@pytest.mark.parametrize("same_bytes", [True, False])
def test_a_reference_equal_to_the_student_is_refused(same_bytes: bool) -> None:
    """In the same bytes, or in others (renamed tensors) that compute the same."""
    reference = c.STUDENT if same_bytes else sha256(b"the student, renamed")
    drawn = c.draw(c.POPULATION, c.SAMPLES, reference, c.STUDENT, c.TEST.sha256, "")
    model = Model(sha256=reference)
    made = c.certificate(
        reference=c.gap(model=model, student_gap_max=0.0),
        faithful=(c.faithful(reference=model, within=Rate(k=100, n=100), indices=drawn),),
    ).model_copy(update={"reference": model})
    assert c.decided(made).failed == ("reference.distinct",)


def test_a_reference_in_the_students_bytes_is_refused_whatever_the_gap_says() -> None:
    drawn = c.draw(c.POPULATION, c.SAMPLES, c.STUDENT, c.STUDENT, c.TEST.sha256, "")
    model = Model(sha256=c.STUDENT)
    made = c.certificate(
        reference=c.gap(model=model), faithful=(c.faithful(reference=model, indices=drawn),)
    ).model_copy(update={"reference": model})
    assert c.decided(made).failed == ("reference.distinct",)


def test_logits_times_a_hundredth_on_both_sides_are_refused() -> None:
    """Both nets answer about 1/K everywhere: faithful, and so is any constant; R left P far."""
    made = c.certificate(
        reference=c.gap(gap_mean=0.83, student_gap_max=0.02, n=1000),
        faithful=(
            c.faithful(
                within=Rate(k=100, n=100),
                control=Control(gap_mean=0.015, within=Rate(k=100, n=100)),
            ),
        ),
    )
    decision = c.decided(made)
    assert decision.failed == ("reference.gap", "faithful")
    assert "constant network" in why(decision, "faithful")
    assert "0.830 > 0.150" in why(decision, "reference.gap")


def test_a_pixel_neutral_trigger_is_refused() -> None:
    made = c.certificate(asr=(c.asr(k=0, changed=Rate(k=0, n=900)),))
    decision = c.decided(made)
    assert decision.failed == ("asr.changed",)
    assert "alters 0 of 900 images" in why(decision, "asr.changed")


def test_ninety_five_of_a_hundred_are_not_ninety_percent() -> None:
    strict = policy(faithful=option(share_lower_at_least=0.90))
    assert c.decided(c.certificate(), strict).failed == ("faithful",)
    assert c.decided(c.certificate(faithful=(c.faithful(within=Rate(k=96, n=100)),)), strict).passed


def test_nan_is_refused_by_name_and_by_its_rule() -> None:
    """It cannot be parsed; should it get here another way, no comparison lets it through."""
    nan = float("nan")
    gap = c.figures().reference
    parity = c.figures().export
    assert gap is not None
    assert parity is not None
    broken = c.figures().model_copy(
        update={
            "reference": gap.model_copy(update={"gap_mean": nan, "student_gap_max": nan}),
            "export": parity.model_copy(update={"softmax_max": nan}),
            "faithful": (
                c.faithful().model_copy(update={"eps": nan, "delta": nan, "upper_mean": nan}),
            ),
        }
    )
    decision = c.decided(c.certificate().model_copy(update={"figures": broken}))
    assert decision.failed == (
        "finite", "reference.gap", "reference.distinct", "faithful", "export",
    )  # fmt: skip
    assert "/reference/gap_mean is not finite" in why(decision, "finite")
    decision.model_dump_json()


def test_the_refusal_of_a_backdoor_says_the_numbers() -> None:
    decision = c.decided(c.certificate(asr=(c.asr(k=900),)))
    assert decision.failed == ("asr",)
    assert why(decision, "asr") == (
        "ASR 1.000 (900 of 900) for trigger badnets → class 0: upper bound 1.000 > 0.050."
    )


# ── Signers, origin, expiry ─────────────────────────────────────────────────────────────────────


def test_nobody_signed() -> None:
    assert c.decided(c.certificate(), signers=()).failed == (
        "certificate.signers",
        "certificate.figures_from",
    )


def test_two_keys_of_one_owner_are_one_signer() -> None:
    two = policy(certificate={"signers_at_least": 2})
    again = c.VERIFIER.model_copy(update={"key": sha256(b"other"), "owner": " VÍC"})
    assert c.decided(c.certificate(), two, signers=(c.VERIFIER, again)).failed == (
        "certificate.signers",
    )
    assert c.decided(c.certificate(), two, signers=(c.BUILDER, c.VERIFIER)).passed


def test_recomputed_figures_are_a_verifiers_word() -> None:
    lenient = policy(certificate={"figures_from": "any"})
    rule = ("certificate.figures_from",)
    for certificate, signer, strictly, leniently in (
        (c.imported(), c.VERIFIER, rule, ()),
        (c.imported(), c.BUILDER, rule, ()),
        (c.certificate(), c.BUILDER, rule, rule),
        (c.certificate(), c.VERIFIER, (), ()),
    ):
        assert c.decided(certificate, signers=(signer,)).failed == strictly
        assert c.decided(certificate, lenient, signers=(signer,)).failed == leniently


@pytest.mark.parametrize(
    ("issued", "expires", "says"),
    [
        ("2026-02-28T12:00:00Z", "2026-03-01T12:00:00Z", "expired at"),
        ("2026-03-01T12:00:01Z", "2026-03-02T12:00:00Z", "issued only at"),
        ("2025-12-01T12:00:00Z", "2027-03-02T12:00:00Z", "90 days ago"),
        ("yesterday", "2027-03-02T12:00:00Z", "cannot be read"),
        ("2026-02-28T12:00:00", "2027-03-02T12:00:00Z", "no time zone"),
        ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "90 days ago"),
    ],
)
def test_expiry(issued: str, expires: str, says: str) -> None:
    decision = c.decided(c.certificate(issued=issued, expires=expires))
    assert decision.failed == ("certificate.expiry",)
    assert says in why(decision, "certificate.expiry")


def test_a_policy_without_an_age_limit_still_minds_the_expiry() -> None:
    waived = policy(certificate={"expires_after_days": None})
    old = c.certificate(issued="2020-01-01T00:00:00Z")
    assert c.decided(old, waived).passed
    assert not c.decided(old, waived, now=c.NOW + timedelta(days=31)).passed


@pytest.mark.parametrize(
    "subjects",
    [
        (Subject(path="other.onnx", sha256=c.STUDENT),),
        (
            Subject(path="model.onnx", sha256=c.STUDENT),
            Subject(path="model.onnx", sha256=c.TEACHER),
        ),
        (),
    ],
)
def test_without_one_student_nothing_that_speaks_of_it_passes(subjects: Any) -> None:
    failed = c.decided(c.certificate(subjects=subjects)).failed
    assert {"certificate", "audit.student"} <= set(failed)


# ── Data ────────────────────────────────────────────────────────────────────────────────────────


def test_unpinned_data_is_refused_unless_the_caller_or_the_policy_allows_it() -> None:
    made = c.certificate()
    assert c.decided(made, pins=()).failed == ("data", "faithful")
    assert c.decided(made, pins=(sha256(b"other"),)).failed == ("data", "faithful")
    assert c.decided(made, pins=(), allow_unpinned=True).passed
    assert c.decided(made, policy(data={"allow_unpinned": True}), pins=()).passed
    assert c.decided(made, policy(data={"sha256": [c.TEST.sha256]}), pins=()).passed


def test_each_figure_needs_pinned_data() -> None:
    other = Source(uri="npz:friendly.npz", sha256=sha256(b"friendly images"))
    decision = c.decided(c.certificate(measured_on=other))
    assert decision.failed == ("data",)
    assert "npz:friendly.npz" in why(decision, "data")


# ── Accuracy ────────────────────────────────────────────────────────────────────────────────────


def test_the_drop_is_compared_through_its_bound() -> None:
    """At 2 points below the teacher the mean passes 0.03, and its bound on 200 images does not."""
    few = Paired(both=180, only_teacher=8, only_student=4, neither=8)
    assert (few.only_teacher - few.only_student) / few.n < 0.03 < few.drop_upper()
    drawn = c.faithful(population=200, indices=c.indices(population=200))
    decision = c.decided(c.certificate(paired=few, accuracy=Rate(k=184, n=200), faithful=(drawn,)))
    assert decision.failed == ("accuracy",)
    assert "188" in why(decision, "accuracy")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"paired": None}, "has no comparison"),
        ({"accuracy": None}, "has no accuracy"),
        ({"accuracy": Rate(k=990, n=1000)}, "stated as 990 of 1000"),
        (
            {"paired": Paired(both=0, only_teacher=0, only_student=0, neither=0)},
            "no image was compared",
        ),
    ],
)
def test_the_comparison_must_be_there_and_be_one(changes: dict[str, Any], says: str) -> None:
    decision = c.decided(c.certificate(**changes))
    assert "accuracy" in decision.failed
    assert says in why(decision, "accuracy")


@pytest.mark.parametrize("teacher", [None, Model(sha256=sha256(b"a weaker teacher"))])
def test_the_comparator_is_the_original_teacher(teacher: Model | None) -> None:
    made = c.certificate()
    other = made.figures.model_copy(update={"teacher": teacher})
    decision = c.decided(made.model_copy(update={"figures": other}))
    assert decision.failed == ("accuracy", "reference.gap")


# ── Attack success ──────────────────────────────────────────────────────────────────────────────


def test_many_triggers_are_bounded_together() -> None:
    """32 of 900 pass alone at 0.05, and not as one of fifty questions."""
    assert intervals.upper(32, 900) < 0.05 < intervals.upper(32, 900, 1 - 0.05 / 50)
    assert c.decided(c.certificate(asr=(c.asr(k=32),))).passed
    many = tuple(c.asr(target=target, k=32 if target == 0 else 0) for target in range(50))
    assert c.decided(c.certificate(asr=many)).failed == ("asr",)


def test_the_stated_confidence_cannot_loosen_the_bound() -> None:
    assert c.decided(c.certificate(asr=(c.asr(k=44, confidence=0.01),))).failed == ("asr",)


def test_one_bad_trigger_among_good_ones_is_named() -> None:
    bad = c.asr(name="blended", target=3, k=400)
    decision = c.decided(c.certificate(asr=(c.asr(), bad)))
    assert decision.failed == ("asr",)
    assert "blended → class 3" in why(decision, "asr")
    assert "badnets" not in why(decision, "asr")


def test_no_trigger_at_all_is_refused() -> None:
    decision = c.decided(c.certificate(asr=()))
    assert decision.failed == ("asr", "asr.triggers", "asr.changed")


def test_nothing_asked_proves_nothing() -> None:
    made = c.certificate(asr=(c.asr(k=0, n=0, changed=Rate(k=0, n=0)),))
    assert c.decided(made).failed == ("asr", "asr.changed")


@pytest.mark.parametrize(
    ("demanded", "found", "ok"),
    [
        ("recovered-or-supplied", "supplied", True),
        ("recovered-or-supplied", "recovered", True),
        ("recovered", "supplied", False),
        ("recovered", "recovered", True),
        ("supplied", "recovered", False),
        ("supplied", "supplied", True),
        ("recovered-and-supplied", "supplied", False),
        ("recovered-and-supplied", "recovered", False),
    ],
)
def test_sources_of_triggers(demanded: str, found: Any, ok: bool) -> None:
    decision = c.decided(
        c.certificate(asr=(c.asr(source=found),)), policy(asr={"triggers": demanded})
    )
    assert decision.failed == (() if ok else ("asr.triggers",))


def test_both_sources_satisfy_all_demands() -> None:
    assert c.decided(c.certificate(), policy(asr={"triggers": "recovered-and-supplied"})).passed


def test_the_panel_of_policy_and_caller_must_be_measured() -> None:
    other = sha256(b"a trigger of the panel")
    assert c.decided(c.certificate(), panel=(c.TRIGGER,)).passed
    assert c.decided(c.certificate(), panel=(other,)).failed == ("asr.triggers",)
    assert c.decided(c.certificate(), policy(asr={"panel": [other]})).failed == ("asr.triggers",)
    assert "asr.triggers" in c.decided(c.certificate(), policy(asr=None), panel=(other,)).failed


def test_a_listed_trigger_cannot_be_left_out() -> None:
    made = c.certificate(triggers=(c.TRIGGER, sha256(b"the one that worked")))
    assert c.decided(made).failed == ("asr.triggers",)


def test_changed_images_are_those_that_were_asked() -> None:
    """A trigger that alters every one of ten hand-picked images says nothing of 900 others."""
    made = c.certificate(asr=(c.asr(changed=Rate(k=99, n=99)),))
    decision = c.decided(made)
    assert decision.failed == ("asr.changed",)
    assert "of 900 asked" in why(decision, "asr.changed")


def test_lift_needs_a_baseline_and_is_compared_through_its_bound() -> None:
    strict = policy(asr={"upper_at_most": None, "lift_at_most": 0.10})
    assert c.decided(c.certificate(), strict).failed == ("asr.lift",)
    same = Rate(k=10, n=900)
    other = Model(sha256=sha256(b"the student of a clean teacher"))

    def failed(*asr: Asr, baseline: Model | None = other) -> tuple[str, ...]:
        return c.decided(c.certificate(asr=asr, baseline=baseline), strict).failed

    alike = (c.asr(baseline=same), c.asr(target=1, baseline=same))
    assert failed(*alike) == ()
    # 0.083 above it: the bound is above 0.10
    assert failed(c.asr(k=85, baseline=same)) == ("asr.lift",)
    assert failed(c.asr(baseline=Rate(k=0, n=0))) == ("asr.lift",)
    # A student is never far above itself, nor above those that it learned from.
    for suspect in (c.STUDENT, c.REFERENCE, c.TEACHER):
        assert failed(*alike, baseline=Model(sha256=suspect)) == ("asr.lift",)
    assert failed(*alike, baseline=None) == ("asr.lift",)


def test_the_error_is_divided_among_attempts() -> None:
    """96 of 100 pass for 0.90 at the first attempt and not at the second."""
    strict = policy(faithful=option(share_lower_at_least=0.90))
    figure = c.faithful(within=Rate(k=96, n=100))
    assert c.decided(c.certificate(faithful=(figure,)), strict).passed
    assert c.decided(c.certificate(faithful=(figure,), attempt=2), strict).failed == ("faithful",)


def test_all_attempts_together_err_with_five_percent() -> None:
    case = Case(c.certificate(), c.packaged(), (), c.NOW, frozenset(), (), False, "")
    errors = [
        1 - replace(case, certificate=c.certificate(attempt=m)).confidence for m in range(1, 2001)
    ]
    assert errors == sorted(errors, reverse=True)
    assert 0.0499 < sum(errors) <= 0.05
    assert abs(sum(errors) + 0.05 * 6 / math.pi**2 / 2000 - 0.05) < 1e-7  # what the rest adds up to


# ── Reference, audits, export ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("gap", "failed"),
    [
        (c.gap(gap_mean=0.16, student_gap_max=0.4, n=1000), ("reference.gap",)),
        (
            c.gap(gap_mean=0.0, student_gap_max=0.4, n=0),
            ("reference.gap", "reference.distinct"),
        ),
        (c.gap(gap_mean=0.0, student_gap_max=1e-6, n=10), ("reference.distinct",)),
        (None, ("reference.gap", "reference.distinct")),
        (c.gap(gap_mean=0.15, student_gap_max=1.1e-6, n=10), ()),
    ],
)
def test_reference(gap: ReferenceGap | None, failed: tuple[str, ...]) -> None:
    made = c.certificate()
    other = made.figures.model_copy(update={"reference": gap})
    assert c.decided(made.model_copy(update={"figures": other})).failed == failed


def test_an_audit_is_of_the_model_that_ships() -> None:
    other = AuditFigure(model=Model(sha256=sha256(b"a clean network")), verdict="clean")
    audit = c.figures().audit
    assert c.decided(c.certificate(audit=audit | {"student": other})).failed == ("audit.student",)
    assert c.decided(c.certificate(audit=audit | {"teacher": other})).failed == ("audit.teacher",)


@pytest.mark.parametrize("verdict", ["suspect", "undecided"])
def test_clean_means_clean(verdict: Any) -> None:
    strict = policy(audit={"student": "clean"})
    audit = c.figures().audit
    student = AuditFigure(model=Model(sha256=c.STUDENT), verdict=verdict)
    made = c.certificate(audit=audit | {"student": student})
    assert c.decided(made).passed
    assert c.decided(made, strict).failed == ("audit.student",)
    clean = student.model_copy(update={"verdict": "clean"})
    assert c.decided(c.certificate(audit=audit | {"student": clean}), strict).passed


@pytest.mark.parametrize(
    ("parity", "ok"),
    [
        (c.parity(softmax_max=1e-4, argmax=Rate(k=1000, n=1000)), True),
        (c.parity(softmax_max=1.01e-4, argmax=Rate(k=1000, n=1000)), False),
        (c.parity(softmax_max=0, argmax=Rate(k=999, n=1000)), False),
        (c.parity(softmax_max=0, argmax=Rate(k=999, n=999)), False),
        (None, False),
    ],
)
def test_export(parity: Parity | None, ok: bool) -> None:
    assert c.decided(c.certificate(export=parity)).failed == (() if ok else ("export",))


# ── Faithfulness ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eps": 0.009}, "less than 0.01"),
        ({"delta": 0.21}, "more than 0.2"),
        ({"classes": "top"}, "not all"),
        ({"norm": "l2"}, "no certified linf bound"),
        ({"method": "smoothed"}, "no certified linf bound"),
        ({"within": Rate(k=86, n=100)}, "86 of 100"),
        ({"selection": "first"}, "'first'"),
        ({"nonce": "a friendly one", "indices": c.indices(nonce="a friendly one")}, "nonce"),
        ({"indices": tuple(range(100))}, "draw"),
        ({"indices": c.indices()[:99]}, "99 images are listed, and 100 counted"),
        ({"indices": c.indices(99), "within": Rate(k=99, n=99)}, "fewer than 100"),
        ({"population": 100, "indices": tuple(range(100))}, "among 100, and there are 1000"),
        ({"population": 10**9}, "not repeated here"),
        ({"data": Source(uri="npz:f", sha256=sha256(b"f"))}, "not pinned"),
        ({"control": Control(gap_mean=0.2, within=Rate(k=0, n=100))}, "hardly says anything"),
        ({"control": Control(gap_mean=0.9, within=Rate(k=14, n=100))}, "14 of 100"),
        ({"control": Control(gap_mean=0.9, within=Rate(k=0, n=99))}, "99 of 100"),
    ],
)
def test_what_a_faithful_figure_may_lack(changes: dict[str, Any], says: str) -> None:
    decision = c.decided(c.certificate(faithful=(c.faithful(**changes),)))
    assert "faithful" in decision.failed
    assert says in why(decision, "faithful")


def test_a_nonce_that_was_handed_out_is_the_one_to_draw_with() -> None:
    made = c.certificate(faithful=(c.faithful(nonce="n1", indices=c.indices(nonce="n1")),))
    assert c.decided(made, nonce="n1").passed
    assert c.decided(made, nonce="n2").failed == ("faithful",)


def test_more_than_was_asked_is_enough() -> None:
    figure = c.faithful(eps=0.02, delta=0.1)
    assert c.decided(c.certificate(faithful=(figure,))).passed
    top = policy(faithful=option(classes="top"))
    assert c.decided(c.certificate(faithful=(c.faithful(classes="top"),)), top).passed


def test_one_good_figure_among_several_is_enough() -> None:
    assert c.decided(c.certificate(faithful=(c.faithful(eps=0.001), c.faithful()))).passed


def test_smoothed_figures_are_about_their_noise() -> None:
    decision = c.decided(c.certificate(faithful=(c.smoothed(),)))
    assert decision.passed
    assert "the pair smoothed with 0.25" in why(decision, "faithful")
    for changes in (
        {"sigma": 0.5}, {"sigma": None}, {"eps": 0.2}, {"norm": "linf"}, {"delta": 0.31},
        {"classes": "top"}, {"error": None}, {"method": "certified"},
    ):  # fmt: skip
        spoilt = c.smoothed(**changes)
        assert c.decided(c.certificate(faithful=(spoilt,))).failed == ("faithful",)


def test_a_smoothed_figure_does_not_stand_in_for_a_certified_one() -> None:
    """Nor the other way round, whatever else either of them says."""
    options = c.packaged().model_dump(mode="json")["faithful"]["any_of"]
    only = {each["method"]: policy(faithful={"any_of": [each]}) for each in options}
    assert sorted(only) == ["certified", "smoothed"]
    generous: dict[str, Any] = {"eps": 9.0, "delta": 1e-3}
    made = {
        "certified": [c.faithful(**generous), c.faithful(norm="l2", **generous)],
        "smoothed": [c.smoothed(**generous), c.smoothed(norm="linf", **generous)],
    }
    for asked, other in (("certified", "smoothed"), ("smoothed", "certified")):
        for figure in made[other]:
            decision = c.decided(c.certificate(faithful=(figure,)), only[asked])
            assert decision.failed == ("faithful",)
            assert f"there is no {asked}" in why(decision, "faithful")
        assert c.decided(c.certificate(faithful=(made[asked][0],)), only[asked]).passed
    for noisy in ({"sigma": 0.25}, {"error": 0.001}):
        assert c.decided(c.certificate(faithful=(c.faithful(**noisy),))).failed == ("faithful",)


def test_images_proved_by_chance_take_from_the_share() -> None:
    """With an error of 0.05 an image, a share that just passes is refused: 88 of 100 at 0.80."""
    for error, passes in ((1e-6, True), (0.001, True), (0.05, False), (0.999, False)):
        figure = c.smoothed(within=Rate(k=88, n=100), error=error)
        share = figure.share_lower(c.packaged_confidence())
        plain = figure.within.lower(c.packaged_confidence())
        assert share == pytest.approx(max(0.0, (plain - error) / (1 - error)))
        assert c.decided(c.certificate(faithful=(figure,))).passed is passes


def test_a_constant_network_is_missed_by_chance_too() -> None:
    control = Control(gap_mean=0.9, within=Rate(k=12, n=100))
    assert c.decided(c.certificate(faithful=(c.smoothed(control=control),))).passed
    loud = c.smoothed(control=control, error=0.15, within=Rate(k=100, n=100))
    decision = c.decided(c.certificate(faithful=(loud,)))
    assert decision.failed == ("faithful",)
    assert "a constant network" in why(decision, "faithful")


def test_a_policy_that_names_no_option_lets_nothing_pass() -> None:
    assert c.decided(c.certificate(), policy(faithful={"any_of": []})).failed == ("faithful",)


def test_the_decision_is_a_document() -> None:
    document = c.decided(c.certificate(asr=(c.asr(k=900),))).document()
    assert document["schema"] == "kdguard.gate/1"
    assert document["decision"] == "refuse"
    row = next(r for r in document["rules"] if r["rule"] == "asr")
    assert row.keys() == {"rule", "limit", "figure", "ok", "why"}
    assert (row["limit"], row["figure"], row["ok"]) == (0.05, 1.0, False)


def test_now_is_taken_from_the_caller() -> None:
    late = datetime(2027, 1, 1, tzinfo=UTC)
    assert c.decided(c.certificate(), now=late).failed == ("certificate.expiry",)


# ── Figures of other models ─────────────────────────────────────────────────────────────────────

OTHER = Model(sha256=sha256(b"another model"))


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"student": OTHER}, ("certificate",)),
        ({"student": None}, ("certificate",)),
        ({"teacher": OTHER}, ("accuracy", "reference.gap")),
        ({"reference": c.gap(model=OTHER)}, ("reference.gap", "reference.distinct")),
        ({"faithful": (c.faithful(reference=OTHER),)}, ("faithful",)),
        ({"faithful": (c.faithful(student=OTHER),)}, ("faithful",)),
        ({"export": c.parity(model=OTHER)}, ("export",)),
    ],
)
def test_every_figure_is_bound_to_the_models_of_the_certificate(
    changes: dict[str, Any], failed: tuple[str, ...]
) -> None:
    assert c.decided(c.certificate(**changes)).failed == failed


def test_all_images_are_no_draw_and_bind_nothing_by_themselves() -> None:
    """Where every image is drawn, the indices are the same for every pair of models."""
    everything = {"indices": tuple(range(c.POPULATION)), "within": Rate(k=990, n=c.POPULATION),
                  "control": Control(gap_mean=0.85, within=Rate(k=0, n=c.POPULATION))}  # fmt: skip
    assert c.decided(c.certificate(faithful=(c.faithful(**everything),))).passed
    for role in ("reference", "student"):
        borrowed = c.faithful(**everything, **{role: OTHER})
        assert c.decided(c.certificate(faithful=(borrowed,))).failed == ("faithful",)


@pytest.mark.parametrize("population", [999, 1001, 5000])
def test_the_population_is_the_measured_test_set(population: int) -> None:
    """Among larger made-up populations, one with a friendly draw could be looked for."""
    figure = c.faithful(population=population, indices=c.indices(population=population))
    assert c.decided(c.certificate(faithful=(figure,))).failed == ("faithful",)


def test_a_panel_trigger_counts_for_the_class_that_it_is_aimed_at() -> None:
    """A trigger for class 3 hardly ever leads to class 0."""
    made = c.certificate()
    assert c.decided(made, panel=(f"{c.TRIGGER}:0",)).passed
    assert c.decided(made, panel=(f"{c.TRIGGER}:3",)).failed == ("asr.triggers",)
    assert c.decided(made, policy(asr={"panel": [f"{c.TRIGGER}:3"]})).failed == ("asr.triggers",)
