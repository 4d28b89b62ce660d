"""Laws of gate, policy and certificate: what no certificate, policy or byte may break."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import certificates as c
from mlflow_kdguard import attest
from mlflow_kdguard.attest.envelope import Envelope
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.policy import Policy, merged, parse, tighten
from mlflow_kdguard.records import (
    Asr,
    AuditFigure,
    Certificate,
    Control,
    FaithfulFigure,
    Figures,
    Flips,
    Model,
    Paired,
    Parity,
    PatchFigure,
    Rate,
    ReferenceGap,
    Source,
    Subject,
)

# ── Certificates of every kind ──────────────────────────────────────────────────────────────────

DIGESTS = st.sampled_from([c.STUDENT, c.REFERENCE, c.TEACHER, c.TRIGGER, c.TEST.sha256, "", "x"])
MODELS = DIGESTS.map(lambda digest: Model(sha256=digest))
SOURCES = st.sampled_from([c.TEST, Source(uri="npz:other", sha256=sha256(b"other"))])
COUNTS = st.integers(0, 2000) | st.sampled_from([10**9, 10**9 - 1])
GAPS = st.floats(0, 1.5) | st.sampled_from([0.0, 1e-6, 1e300])
TEXTS = st.text(max_size=8)
TIMES = TEXTS | st.sampled_from(
    ["2026-02-28T12:00:00Z", "2026-05-01T00:00:00+02:00", "2026-02-28", "9999-12-31T23:59:59-14:00",
     "0001-01-01T00:00:00+14:00", c.certificate().issued, c.certificate().expires]
)  # fmt: skip


@st.composite
def rates(draw: Any, of: Any = COUNTS) -> Rate:
    n = draw(of)
    return Rate(k=draw(st.integers(0, n)), n=n)


@st.composite
def asrs(draw: Any) -> Asr:
    rate = draw(rates())
    return Asr(
        trigger=draw(DIGESTS), name=draw(TEXTS), target=draw(st.integers(0, 10**30)),
        source=draw(st.sampled_from(["supplied", "recovered"])), k=rate.k, n=rate.n,
        changed=draw(rates()), confidence=draw(st.floats(1e-9, 1 - 1e-9)),
        baseline=draw(st.none() | rates()),
    )  # fmt: skip


@st.composite
def faithfuls(draw: Any) -> FaithfulFigure:
    positive = st.floats(1e-300, 1e300)
    drawn = st.just(c.indices()) | st.lists(st.integers(), max_size=4).map(tuple)
    return FaithfulFigure(
        reference=draw(MODELS), student=draw(MODELS),
        method=draw(st.sampled_from(["certified", "smoothed"])),
        norm=draw(st.sampled_from(["linf", "l2"])), eps=draw(positive), delta=draw(positive),
        classes=draw(st.sampled_from(["all", "top"])), within=draw(rates()), lower_mean=draw(GAPS),
        upper_mean=draw(GAPS), selection=draw(st.just("uniform-seeded") | TEXTS),
        population=draw(st.integers(0, 3000) | st.just(10**9)), nonce=draw(st.just("") | TEXTS),
        indices=draw(drawn), data=draw(SOURCES), sigma=draw(st.none() | positive),
        control=Control(gap_mean=draw(st.floats(-1, 2)), within=draw(rates())),
        error=draw(st.none() | st.sampled_from([1e-300, 0.001, 0.5, 1 - 1e-16])),
    )  # fmt: skip


@st.composite
def flips(draw: Any) -> Flips:
    attack, certified, n = sorted(draw(st.lists(COUNTS, min_size=3, max_size=3)))
    return Flips(attack=attack, certified=certified, n=n)


CORNERS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@st.composite
def patches(draw: Any) -> PatchFigure:
    drawn = st.just(c.patch().ranks) | st.lists(st.integers(), max_size=4).map(tuple)
    return PatchFigure(
        student=draw(MODELS), target=draw(st.integers(0, 2)), size=draw(st.integers(1, 4)),
        positions=draw(st.lists(CORNERS, max_size=3).map(tuple)), margin=draw(GAPS),
        each=draw(flips()), universal=draw(flips()),
        selection=draw(st.just("uniform-seeded") | TEXTS),
        population=draw(st.integers(0, 3000) | st.just(10**9)), nonce=draw(st.just("") | TEXTS),
        ranks=draw(drawn), data=draw(SOURCES),
    )  # fmt: skip


GOOD_PATCHES = st.builds(
    lambda target, size, at, most: c.patch(
        target=target, size=size, positions=(at,), each=Flips(attack=0, certified=most, n=100)
    ),
    st.integers(0, 1), st.integers(2, 4), CORNERS, st.integers(0, 9),
)  # fmt: skip


@st.composite
def audits(draw: Any) -> dict[Any, AuditFigure]:
    figures = st.builds(
        AuditFigure, model=MODELS, verdict=st.sampled_from(["clean", "suspect", "undecided"])
    )
    return dict(draw(st.dictionaries(st.sampled_from(["teacher", "student"]), figures)))


CELLS = dict.fromkeys(("both", "only_teacher", "only_student", "neither"), COUNTS)
FIGURES = st.builds(
    Figures,
    student=st.none() | MODELS,
    accuracy=st.none() | rates(),
    teacher=st.none() | MODELS,
    baseline=st.none() | MODELS,
    paired=st.none() | st.builds(Paired, **CELLS),
    measured_on=st.none() | SOURCES,
    asr=st.lists(asrs(), max_size=3).map(tuple),
    reference=st.none()
    | st.builds(ReferenceGap, model=MODELS, gap_mean=GAPS, student_gap_max=GAPS, n=COUNTS),
    faithful=st.lists(faithfuls(), max_size=2).map(tuple),
    patch=st.lists(patches(), max_size=2).map(tuple),
    audit=audits(),
    export=st.none()
    | st.builds(Parity, model=MODELS, softmax_max=GAPS, argmax=rates(), provider=TEXTS),
)
PATHS = st.sampled_from(["model.onnx", "MLmodel", "", "../x"])
CERTIFICATES = st.builds(
    Certificate,
    subjects=st.lists(st.builds(Subject, path=PATHS, sha256=DIGESTS), max_size=3).map(tuple),
    model_name=TEXTS,
    registry=TEXTS,
    reference=MODELS,
    teacher=MODELS,
    data=st.just((c.TEST,)),
    triggers=st.lists(DIGESTS, max_size=2).map(tuple),
    figures=FIGURES,
    figures_from=st.sampled_from(["recomputed", "imported"]),
    attempt=st.integers(1, 10_000),
    config=st.just(""),
    seed=st.integers(),
    tools=st.just({}),
    issued=TIMES,
    expires=TIMES,
)
GRANTS = st.fixed_dictionaries(
    {
        "signers": st.lists(st.sampled_from([c.BUILDER, c.VERIFIER]), max_size=2),
        "pins": st.sampled_from([(), (c.TEST.sha256,)]),
        "panel": st.lists(DIGESTS, max_size=1),
        "allow_unpinned": st.booleans(),
    }
)

# ── Policies of every kind ──────────────────────────────────────────────────────────────────────

SHARES = st.sampled_from([0.001, 0.05, 0.5, 0.8, 0.9, 1.0])
LIMITS = st.none() | SHARES
KINDS = st.sampled_from(
    [{"method": "certified", "norm": "linf", "eps": eps} for eps in (0.005, 0.01, 0.02)]
    + [{"method": "certified", "norm": "l2", "eps": 0.5}]
    + [{"method": "smoothed", "norm": "l2", "sigma": sigma, "radius": 0.2} for sigma in (0.25, 0.5)]
)
DEMANDS = st.fixed_dictionaries(
    {
        "delta": st.sampled_from([0.1, 0.2, 0.3, 1.0]),
        "share_lower_at_least": st.sampled_from([0.001, 0.5, 0.8, 0.9]),
        "samples_at_least": st.sampled_from([1, 50, 100, 200]),
        "classes": st.sampled_from(["all", "top"]),
        "below_constant_control": st.booleans(),
    }
)
OPTIONS = st.builds(lambda kind, demands: kind | demands, KINDS, DEMANDS)


def block(**fields: Any) -> Any:
    return st.fixed_dictionaries(fields)


POLICIES = st.fixed_dictionaries(
    {
        "guarded": block(aliases=st.just(["champion"]), stages=st.just([])),
        "data": block(
            sha256=st.lists(st.sampled_from([c.TEST.sha256, "a" * 64]), max_size=2),
            allow_unpinned=st.booleans(),
        ),
        "accuracy": st.none() | block(drop_upper_at_most=st.none() | st.floats(-1, 1)),
        "asr": st.none()
        | block(
            triggers=st.sampled_from(
                ["recovered-or-supplied", "recovered", "supplied", "recovered-and-supplied"]
            ),
            panel=st.lists(st.sampled_from([c.TRIGGER, "b" * 64]), max_size=2),
            upper_at_most=LIMITS,
            lift_at_most=LIMITS,
            changed_at_least=LIMITS,
        ),
        "reference": st.none()
        | block(gap_mean_at_most=LIMITS, distinct_from_student=st.booleans()),
        "faithful": st.none() | block(any_of=st.lists(OPTIONS, max_size=3)),
        "patch": st.none()
        | block(
            targets=st.lists(st.integers(0, 2), min_size=1, max_size=2),
            size=st.integers(1, 3),
            positions=st.lists(CORNERS, min_size=1, max_size=2),
            upper_at_most=LIMITS,
            universal_upper_at_most=LIMITS,
            samples_at_least=st.sampled_from([1, 100, 200]),
            margin_at_least=st.sampled_from([0.0, 1e-4, 1.0]),
        ),
        "audit": st.none()
        | block(
            teacher=st.sampled_from([None, "ran", "clean"]),
            student=st.sampled_from([None, "ran", "clean"]),
        ),
        "export": st.none() | block(parity_at_most=LIMITS),
        "certificate": block(
            figures_from=st.sampled_from(["any", "recomputed"]),
            signers_at_least=st.integers(1, 2),
            expires_after_days=st.sampled_from([None, 0.5, 90]),
        ),
    }
).map(lambda values: parse(values, where="law"))

# Mostly passing certificates: one part at a time is replaced by an arbitrary one.
NEARLY = st.one_of(
    st.just(c.certificate()),
    st.builds(lambda v: c.certificate(asr=tuple(v)), st.lists(asrs(), max_size=2)),
    st.builds(lambda v: c.certificate(faithful=tuple(v)), st.lists(faithfuls(), max_size=2)),
    st.builds(lambda v: c.certificate(patch=tuple(v)), st.lists(GOOD_PATCHES, max_size=4)),
    st.builds(lambda v: c.certificate(audit=v), audits()),
    st.builds(
        lambda k, eps, delta: c.certificate(
            faithful=(c.faithful(within=Rate(k=k, n=100), eps=eps, delta=delta),)
        ),
        st.integers(70, 100),
        st.sampled_from([0.005, 0.01, 0.02]),
        st.sampled_from([0.1, 0.2, 0.3]),
    ),
    CERTIFICATES,
)  # fmt: skip


# ── The laws ────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=80)
@given(CERTIFICATES, POLICIES, GRANTS)
def test_the_gate_answers_every_certificate(
    made: Certificate, policy: Policy, grants: dict[str, Any]
) -> None:
    decision = c.decided(made, policy, **grants)
    assert all(rule.why for rule in decision.rules)
    assert decision.passed == all(rule.ok for rule in decision.rules)
    json.dumps(decision.document(), allow_nan=False)


@settings(max_examples=120)
@given(NEARLY, POLICIES, POLICIES, GRANTS)
def test_tightening_never_lets_pass_what_either_refuses(
    made: Certificate, floor: Policy, other: Policy, grants: dict[str, Any]
) -> None:
    """Rule by rule, which is more than the decision as a whole."""
    joint = {r.rule for r in c.decided(made, tighten(floor, other), **grants).rules if r.ok}
    for policy in (floor, other):
        assert joint <= {r.rule for r in c.decided(made, policy, **grants).rules if r.ok}


@settings(max_examples=60)
@given(POLICIES, POLICIES, POLICIES)
def test_tightening_can_be_repeated_in_any_grouping(a: Policy, b: Policy, d: Policy) -> None:
    assert tighten(a, a).digest == tighten(tighten(a, a), a).digest
    left, right = tighten(tighten(a, b), d), tighten(a, tighten(b, d))
    assert _unordered(left) == _unordered(right)


def _unordered(policy: Policy) -> Any:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items()}
        return sorted(json.dumps(strip(v), sort_keys=True) for v in value) if isinstance(
            value, list
        ) else value  # fmt: skip

    body = strip(policy.model_dump(mode="json"))
    return body | {"data": None if policy.data.allow_unpinned else body["data"]}


# ── Monotone: better figures never turn a pass into a refusal ───────────────────────────────────


def _paired(made: Certificate, both: int, only_student: int) -> Certificate:
    """The student is right on more images that the teacher got right, or wrong."""
    paired = made.figures.paired
    assert paired is not None
    moved, won = min(both, paired.only_teacher), min(only_student, paired.neither)
    better = Paired(
        both=paired.both + moved,
        only_teacher=paired.only_teacher - moved,
        only_student=paired.only_student + won,
        neither=paired.neither - won,
    )
    right = better.both + better.only_student
    return _with(made, paired=better, accuracy=Rate(k=right, n=better.n))


def _with(made: Certificate, **figures: Any) -> Certificate:
    return made.model_copy(update={"figures": made.figures.model_copy(update=figures)})


def _asr(made: Certificate, **better: Any) -> Certificate:
    return _with(made, asr=(made.figures.asr[0].model_copy(update=better), *made.figures.asr[1:]))


def _faithful(made: Certificate, **better: Any) -> Certificate:
    return _with(made, faithful=(made.figures.faithful[0].model_copy(update=better),))


@st.composite
def middling(draw: Any) -> Certificate:
    """Figures around the limits of the packaged policy."""
    lost, won = draw(st.integers(0, 60)), draw(st.integers(0, 40))
    return c.certificate(
        paired=Paired(both=900, only_teacher=lost, only_student=won, neither=100 - lost - won),
        accuracy=Rate(k=900 + won, n=1000),
        asr=(
            c.asr(k=draw(st.integers(0, 60)), changed=Rate(k=draw(st.integers(840, 900)), n=900),
                  baseline=Rate(k=20, n=900)),
        ),
        reference=c.gap(
            gap_mean=draw(st.floats(0, 0.3)), student_gap_max=draw(st.floats(0, 1e-5)), n=1000
        ),
        faithful=(
            c.faithful(
                eps=draw(st.sampled_from([0.009, 0.01, 0.02])),
                delta=draw(st.sampled_from([0.1, 0.15, 0.2, 0.21])),
                within=Rate(k=draw(st.integers(82, 98)), n=100),
                control=Control(gap_mean=draw(st.sampled_from([0.15, 0.3, 0.9])),
                                within=Rate(k=draw(st.integers(5, 17)), n=100)),
            ),
        ),
        export=c.parity(softmax_max=draw(st.floats(0, 2e-4)),
                        argmax=Rate(k=draw(st.integers(999, 1000)), n=1000)),
    )  # fmt: skip


@st.composite
def improved(draw: Any, made: Certificate) -> Certificate:
    """The same certificate with one figure better."""
    figures = made.figures
    asr, faithful, reference = figures.asr[0], figures.faithful[0], figures.reference
    assert reference is not None
    share, more = draw(st.floats(0, 1)), draw(st.integers(0, 30))
    control = faithful.control
    return draw(
        st.sampled_from(
            [
                _paired(made, more, 0),
                _paired(made, 0, more),
                _asr(made, k=int(asr.k * share)),
                _asr(made, changed=Rate(k=min(900, asr.changed.k + more), n=900)),
                _asr(made, baseline=Rate(k=20 + more, n=900)),
                _with(made, reference=reference.model_copy(
                    update={"gap_mean": reference.gap_mean * share})),
                _with(made, reference=reference.model_copy(
                    update={"student_gap_max": reference.student_gap_max + share})),
                _faithful(made, eps=faithful.eps * (1 + share)),
                _faithful(made, delta=faithful.delta * max(share, 1e-9)),
                _faithful(made, within=Rate(k=min(100, faithful.within.k + more), n=100)),
                _faithful(made, control=Control(gap_mean=control.gap_mean + share,
                                                within=control.within)),
                _faithful(made, control=Control(gap_mean=control.gap_mean, within=Rate(
                    k=int(control.within.k * share), n=100))),
                _with(made, export=c.parity(softmax_max=figures.export.softmax_max * share,
                                          argmax=figures.export.argmax)
                      if figures.export else None),
                _with(made, export=c.parity(softmax_max=figures.export.softmax_max,
                                          argmax=Rate(k=1000, n=1000))
                      if figures.export else None),
            ]
        )
    )  # fmt: skip


LIFTING = parse(
    merged(c.packaged().model_dump(mode="json"), {"asr": {"lift_at_most": 0.02}}), where="law"
)


@settings(max_examples=150)
@given(st.data(), st.sampled_from([c.packaged(), LIFTING]))
def test_better_figures_never_turn_a_pass_into_a_refusal(data: Any, policy: Policy) -> None:
    """Rule by rule; read backwards, worse figures never turn a refusal into a pass."""
    made = data.draw(middling())
    better = data.draw(improved(made))
    before = {rule.rule: rule.ok for rule in c.decided(made, policy).rules}
    after = {rule.rule: rule.ok for rule in c.decided(better, policy).rules}
    assert [rule for rule, ok in before.items() if ok and not after[rule]] == []


# ── Trying again does not pay ───────────────────────────────────────────────────────────────────


def _faithful_on(k: int, attempt: int) -> Certificate:
    figure = c.faithful(within=Rate(k=k, n=100))
    return c.certificate(faithful=(figure,), attempt=attempt)


def _attacked_on(k: int, attempt: int) -> Certificate:
    return c.certificate(asr=(c.asr(k=k),), attempt=attempt)


@pytest.mark.parametrize(
    ("certified", "share", "n"),
    [(_faithful_on, 0.80, 100), (_attacked_on, 0.05, 900)],
    ids=["faithful", "asr"],
)
def test_twenty_retries_pass_a_borderline_model_one_time_in_twenty_at_most(
    certified: Any, share: float, n: int
) -> None:
    """1,000 models whose true share is the packaged limit, each tried on 20 × n new images."""
    drawn = np.random.default_rng(7).random((1000, 20, n)) < share
    tries = drawn.sum(axis=2)
    answer = cache(lambda k, attempt: c.decided(certified(k, attempt)).passed)
    counted = [any(answer(int(k), m) for m, k in enumerate(row, 1)) for row in tries]
    careless = [any(answer(int(k), 1) for k in row) for row in tries]
    assert 0 < sum(counted) <= 50
    assert sum(careless) > 250, "without counting, trying again would pay"


# ── Every figure is needed ──────────────────────────────────────────────────────────────────────

ABSENT = {
    name: field.get_default(call_default_factory=True)
    for name, field in Figures.model_fields.items()
    if name not in ("baseline", "patch")  # of rules that the packaged policy waives
}


@pytest.mark.parametrize("name", ABSENT)
def test_without_any_one_figure_a_passing_certificate_is_refused(name: str) -> None:
    made = c.certificate()
    assert c.decided(made).passed
    assert not c.decided(_with(made, **{name: ABSENT[name]})).passed


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_without_one_audit_a_passing_certificate_is_refused(side: Any) -> None:
    rest = {key: figure for key, figure in c.figures().audit.items() if key != side}
    assert c.decided(c.certificate(audit=rest)).failed == (f"audit.{side}",)


# ── Any byte ────────────────────────────────────────────────────────────────────────────────────

BEA, VIC = (
    attest.signer_of(
        Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32),
        owner=owner,
        role="verifier",
        valid_from=c.NOW.replace(month=1),
    )
    for seed, owner in ((1, "Bea"), (2, "Vic"))
)
ENVELOPE = attest.cosign(attest.issue(c.certificate(), BEA), VIC)
KEYS = (BEA.verifier, VIC.verifier)


def _refused(envelope: bytes, files: dict[str, bytes] = c.FILES) -> bool:
    try:
        attest.check(envelope, files=files, verifiers=KEYS, now=c.NOW)
    except CertificateError as error:
        return bool(error.message)
    return False


def test_the_envelope_itself_holds() -> None:
    assert not _refused(ENVELOPE)


@settings(max_examples=150)
@given(st.integers(0, len(ENVELOPE) - 1), st.integers(1, 255))
def test_no_byte_of_the_envelope_can_be_altered(position: int, flip: int) -> None:
    altered = bytearray(ENVELOPE)
    altered[position] ^= flip
    assert _refused(bytes(altered))


@pytest.mark.parametrize("bit", range(8))
def test_no_bit_of_the_signatures_and_key_ids_can_be_altered(bit: int) -> None:
    """Exhaustively: this is the part that base64 and JSON might read leniently."""
    for position in range(ENVELOPE.index(b'"signatures"'), len(ENVELOPE)):
        altered = bytearray(ENVELOPE)
        altered[position] ^= 1 << bit
        assert _refused(bytes(altered)), position


@given(st.integers(0, len(ENVELOPE) - 1), st.binary(max_size=2))
def test_nothing_can_be_inserted_or_cut(position: int, inserted: bytes) -> None:
    assert _refused(ENVELOPE[:position])
    assume(inserted)
    assert _refused(ENVELOPE[:position] + inserted + ENVELOPE[position:])


@given(st.sampled_from(sorted(c.FILES)), st.data(), st.integers(1, 255))
def test_no_byte_of_a_file_can_be_altered(name: str, data: Any, flip: int) -> None:
    altered = bytearray(c.FILES[name])
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= flip
    assert _refused(ENVELOPE, c.FILES | {name: bytes(altered)})


@settings(max_examples=80)
@given(CERTIFICATES)
def test_what_is_issued_can_be_checked_and_reads_back(made: Certificate) -> None:
    """issue() and check() agree on what a certificate is; nothing else escapes either."""
    try:
        envelope = attest.issue(made, VIC)
    except CertificateError:
        return
    payload = Envelope.from_bytes(envelope).payload
    assert attest.issue(made, VIC) == envelope
    assert Certificate.model_validate(json.loads(payload)["predicate"]) == made
