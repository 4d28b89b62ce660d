"""Break-glass: what two owners signed counts for exactly that, and for no longer."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import certificates as c
from mlflow_kdguard import attest
from mlflow_kdguard.attest import overrides
from mlflow_kdguard.attest.overrides import Granted, Override
from mlflow_kdguard.attest.signing import Signer, Verifier, signer_of
from mlflow_kdguard.errors import CertificateError, KDGuardError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.records import Subject, format_time

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
FILES = {"model.onnx": b"the student", "MLmodel": b"flavors: {}\n"}


def signer(owner: str, number: int, until: datetime | None = None) -> Signer:
    private = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    start = NOW - timedelta(days=1)
    return signer_of(private, owner=owner, role="builder", valid_from=start, valid_until=until)


ANN, BOB, EVE = signer("Ann", 1), signer("Bob", 2), signer("Eve", 3)


def stated(**changes: Any) -> Override:
    values: dict[str, Any] = {
        "registry": "http://registry", "workspace": "default", "model": "student", "version": "3",
        "alias": "champion", "reason": "the champion is down", "issued": format_time(NOW),
        "until": format_time(NOW + timedelta(days=7)),
        "subjects": [Subject(path=path, sha256=sha256(data)) for path, data in FILES.items()],
    }  # fmt: skip
    return Override(**(values | changes))


def signed(override: Override, *signers: Signer) -> bytes:
    envelope = overrides.issue(override, signers[0], now=NOW)
    for other in signers[1:]:
        envelope = overrides.cosign(envelope, other, now=NOW)
    return envelope


GOOD = signed(stated(), ANN, BOB)


def check(envelope: bytes = GOOD, **changes: Any) -> Granted:
    values: dict[str, Any] = {
        "verifiers": (ANN.verifier, BOB.verifier), "now": LATER, "files": FILES, "model": "student",
        "version": "3", "alias": "champion", "workspace": "default",
        "registries": ("http://other", "http://registry"),
    }  # fmt: skip
    return overrides.check(envelope, **(values | changes))


def test_two_owners_grant_it() -> None:
    granted = check()
    assert granted.owners == ("Ann", "Bob")
    assert granted.override == stated()
    assert granted.sha256 == sha256(GOOD)
    assert overrides.read(GOOD) == stated()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "other"}, "for the model"),
        ({"version": "4"}, "for the version"),
        ({"alias": "Champion"}, "for the alias"),
        ({"workspace": "team"}, "for the workspace"),
        ({"registries": ("http://other",)}, "for the registry"),
        ({"files": FILES | {"model.onnx": b"another"}}, "other files"),
        ({"files": FILES | {"code.py": b""}}, "other files"),
        ({"files": {"model.onnx": FILES["model.onnx"]}}, "other files"),
        ({"verifiers": (ANN.verifier,)}, "unknown key"),
        ({"verifiers": ()}, "unknown key"),
        ({"now": NOW - timedelta(seconds=1)}, "not valid before"),
        ({"now": NOW + timedelta(days=7)}, "ended"),
    ],
)
def test_it_counts_for_what_was_signed_only(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CertificateError, match=reason):
        check(**changes)


@pytest.mark.parametrize("second", ["Ann", "ann", " ANN ", "A\u0301nn", "Ann\u200b"])
def test_two_keys_of_one_owner_are_one_owner(second: str) -> None:
    try:
        other = signer(second, 9)
    except KDGuardError:
        return  # such a name cannot be written into a key record at all
    trusted = (ANN.verifier, other.verifier)
    with pytest.raises(CertificateError, match="different owners"):
        check(signed(stated(), ANN, other), verifiers=trusted)


def test_one_owner_does_not_suffice() -> None:
    with pytest.raises(CertificateError, match="different owners"):
        check(signed(stated(), ANN))
    with pytest.raises(CertificateError, match="has signed already"):
        overrides.cosign(GOOD, ANN, now=NOW)


def test_nobody_s_signature_is_left_out_of_account() -> None:
    """A third, unknown one may be a sign that the document was tampered with."""
    with pytest.raises(CertificateError, match="unknown key"):
        check(overrides.cosign(GOOD, EVE, now=NOW))


@pytest.mark.parametrize(
    "change", [{"compromised": format_time(NOW)}, {"valid_until": "2026-02-28T00:00:00Z"}]
)
def test_a_key_that_is_not_valid_does_not_count(change: dict[str, str]) -> None:
    record = BOB.verifier.record.model_copy(update=change)
    with pytest.raises(CertificateError, match="Bob"):
        check(verifiers=(ANN.verifier, Verifier(record, BOB.verifier.public)))
    with pytest.raises(CertificateError, match="disagree"):
        check(verifiers=(ANN.verifier, BOB.verifier, Verifier(record, BOB.verifier.public)))


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": ""}, {"reason": "  \n"}, {"reason": "!?"}, {"reason": "x" * 2_001},
        {"subjects": ()}, {"version": "latest"}, {"version": "0"}, {"model": ""}, {"alias": ""},
        {"until": "tomorrow"}, {"until": "2026-03-02T00:00:00"}, {"registry": ""}, {"more": "x"},
        {"subjects": [Subject(path="a", sha256="1"), Subject(path="a", sha256="2")]},
    ],
)  # fmt: skip
def test_what_says_too_little_is_no_override(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        stated(**changes)


@settings(max_examples=60)
@given(st.timedeltas(timedelta(days=-30), timedelta(days=60)))
def test_it_lasts_seven_days_at_most(after: timedelta) -> None:
    override = stated(until=format_time(NOW + after))
    seconds = after // timedelta(seconds=1)
    if 0 < seconds <= 7 * 86_400:
        overrides.issue(override, ANN, now=NOW)
        return
    with pytest.raises(CertificateError, match=r"7 days|ended"):
        overrides.issue(override, ANN, now=NOW)


def test_an_end_far_away_is_refused_by_the_server_too() -> None:
    """Whoever has two keys can sign without our command."""
    long = stated(until=format_time(NOW + timedelta(days=8)))
    bare = overrides.Envelope(overrides.canonical_json(overrides._statement(long)), ())
    for key in (ANN, BOB):
        bare = overrides._signed(bare, key)
    with pytest.raises(CertificateError, match="more than 7 days"):
        check(bare.to_bytes())


@settings(max_examples=120)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_no_byte_can_be_changed(at: int, byte: int) -> None:
    assume(GOOD[at] != byte)
    with pytest.raises(KDGuardError):
        check(GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])


def test_a_certificate_is_no_override_and_the_other_way_round() -> None:
    verifier = signer_of(
        ANN.private, owner="Ann", role="verifier", valid_from=NOW - timedelta(days=1)
    )
    certificate = attest.issue(c.certificate(), verifier)
    with pytest.raises(CertificateError, match="not an override"):
        check(certificate, verifiers=(verifier.verifier,))
    with pytest.raises(CertificateError, match="predicate"):
        attest.check(GOOD, files=None, verifiers=(ANN.verifier, BOB.verifier), now=LATER)


@pytest.mark.parametrize("junk", [b"", b"{}", b"\xff", b"[" * 10_000])
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(CertificateError):
        check(junk)
