"""What is taken back stays taken back: keys that end, keys that leak, certificates, owners."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import certificates as c
from mlflow_kdguard import attest
from mlflow_kdguard.attest.envelope import Envelope
from mlflow_kdguard.attest.signing import Role, Signer, Verifier, public_path
from mlflow_kdguard.errors import CertificateError, ConfigError, UsageError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.policy import merged, parse
from mlflow_kdguard.records import Certificate, format_time, parse_time
from mlflow_kdguard_cli.main import answer

EARLY = datetime(2026, 1, 1, tzinfo=UTC)
TURN = c.NOW - timedelta(days=10)
"""When the old key ends and the new one begins."""


def key(seed: int, owner: str, role: Role, **validity: Any) -> Signer:
    private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    return attest.signer_of(private, owner=owner, role=role, **{"valid_from": EARLY} | validity)


BEA, VIC = key(1, "Bea", "builder"), key(2, "Vic", "verifier")
OLD, NEW = key(3, "Vic", "verifier", valid_until=TURN), key(4, "Vic", "verifier", valid_from=TURN)
ENVELOPE = attest.cosign(attest.issue(c.imported(), BEA), VIC)


def changed(signer: Signer, **changes: Any) -> Verifier:
    verifier = signer.verifier
    return Verifier(verifier.record.model_copy(update=changes), verifier.public)


def dated(moment: datetime) -> Certificate:
    made: Certificate = c.imported(issued=format_time(moment))
    return made


def check(envelope: bytes, *trusted: Verifier, **more: Any) -> attest.Checked:
    return attest.check(envelope, files=c.FILES, verifiers=trusted, now=c.NOW, **more)


# ── m of n distinct owners ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("second", ["Bea", "BEA", "Béa", " bea"])
def test_one_owner_with_two_keys_is_one_signer(second: str) -> None:
    """However the checker's own records spell the owner."""
    twin = key(5, second, "verifier")
    both = attest.cosign(attest.issue(c.imported(), BEA), twin)
    checked = check(both, BEA.verifier, twin.verifier)
    assert len(checked.signers) == 2
    assert _two_owners(checked) == ("certificate.signers",)


def test_two_owners_are_two_and_one_key_that_signs_twice_is_one() -> None:
    assert _two_owners(check(ENVELOPE, BEA.verifier, VIC.verifier)) == ()
    opened = Envelope.from_bytes(attest.issue(c.imported(), BEA))
    twice = Envelope(opened.payload, opened.signatures * 2).to_bytes()
    assert _two_owners(check(twice, BEA.verifier)) == ("certificate.signers",)


def _two_owners(checked: attest.Checked) -> tuple[str, ...]:
    policy = parse(
        merged(c.packaged().model_dump(mode="json"), {"certificate": {"signers_at_least": 2}}),
        where="test",
    )
    failed = c.decided(checked.certificate, policy, signers=checked.signers).failed
    return tuple(rule for rule in failed if rule == "certificate.signers")


# ── Keys that end, and keys that leak ───────────────────────────────────────────────────────────


def test_rotation_keeps_what_the_old_key_signed_in_its_time() -> None:
    trusted = (OLD.verifier, NEW.verifier)
    before = attest.issue(dated(TURN - timedelta(days=1)), OLD)
    after = attest.issue(dated(TURN + timedelta(days=1)), NEW)
    assert check(before, *trusted).signers[0].key == OLD.key_id
    assert check(after, *trusted).signers[0].key == NEW.key_id


def test_neither_key_signs_outside_its_time() -> None:
    for signer, moment in ((OLD, TURN + timedelta(days=1)), (NEW, TURN - timedelta(days=1))):
        unbound = key(3 if signer is OLD else 4, "Vic", "verifier")
        with pytest.raises(CertificateError, match="valid"):
            attest.issue(dated(moment), signer)
        with pytest.raises(CertificateError, match="valid"):
            check(attest.issue(dated(moment), unbound), signer.verifier)


def test_a_thief_cannot_date_a_certificate_back_before_the_compromise() -> None:
    """Also not into the validity of a key that had been retired long before."""
    stolen = attest.issue(dated(TURN - timedelta(days=5)), key(3, "Vic", "verifier"))
    check(stolen, OLD.verifier)  # nothing tells it from an honest one, until the record says so
    leaked = changed(OLD, compromised=format_time(c.NOW - timedelta(hours=1)))
    with pytest.raises(CertificateError, match="is compromised since"):
        check(stolen, leaked)
    with pytest.raises(CertificateError, match="is compromised since"):
        check(attest.cosign(stolen, BEA), leaked, BEA.verifier)


# ── Revocations ─────────────────────────────────────────────────────────────────────────────────


def test_a_revoked_certificate_stays_revoked_whoever_signs_beside_or_is_cut_away() -> None:
    revoked = attest.Revocations(certificates=(attest.certificate_digest(ENVELOPE),))
    opened = Envelope.from_bytes(ENVELOPE)
    variants = [
        ENVELOPE,
        *(Envelope(opened.payload, (one,)).to_bytes() for one in opened.signatures),
        Envelope(opened.payload, opened.signatures[::-1]).to_bytes(),
        attest.cosign(ENVELOPE, key(6, "Eve", "builder")),
    ]
    trusted = (BEA.verifier, VIC.verifier, key(6, "Eve", "builder").verifier)
    assert len({sha256(variant) for variant in variants}) == len(variants)
    for variant in variants:
        check(variant, *trusted)
        with pytest.raises(CertificateError, match="certificate is revoked"):
            check(variant, *trusted, revoked=revoked)
    other = attest.issue(c.imported(seed=8), BEA)
    assert check(other, *trusted, revoked=revoked)


def test_the_digest_of_one_envelope_revokes_it_too() -> None:
    revoked = attest.Revocations(certificates=(sha256(ENVELOPE),))
    with pytest.raises(CertificateError, match="certificate is revoked"):
        check(ENVELOPE, BEA.verifier, VIC.verifier, revoked=revoked)


@pytest.mark.parametrize("waive", [False, True])
def test_a_revoked_key_counts_for_nothing_it_ever_signed(waive: bool) -> None:
    old = attest.issue(dated(EARLY + timedelta(days=1)), VIC)
    for key_id, refused in ((VIC.key_id, True), (BEA.key_id, False)):
        revoked = attest.Revocations(keys={key_id: format_time(c.NOW)})
        if refused:
            with pytest.raises(CertificateError, match="revoked as compromised since"):
                check(old, VIC.verifier, revoked=revoked, waive_expiry=waive)
        else:
            check(old, VIC.verifier, revoked=revoked, waive_expiry=waive)
    later = attest.Revocations(keys={VIC.key_id: format_time(c.NOW + timedelta(seconds=1))})
    check(old, VIC.verifier, revoked=later)


def test_a_list_of_revocations_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "revoked.yaml"
    path.write_text(f"certificates: [{'a' * 64}]\nkeys: {{{'b' * 64}: 2026-03-01T12:00:00Z}}\n")
    found = attest.Revocations.load(path)
    assert found.certificates == ("a" * 64,)
    assert found.keys == {"b" * 64: format_time(c.NOW)}
    path.write_text(f"keys: {{{'b' * 64}: '2026-03-01T14:00:00+02:00'}}\n")
    assert attest.Revocations.load(path).keys == found.keys
    path.write_text("# nothing is revoked\n")
    assert attest.Revocations.load(path) == attest.Revocations()


@pytest.mark.parametrize(
    "text",
    [
        "certificates: [abc]",
        "certificates: abc",
        f"keys: {{{'b' * 64}: 2026-03-01}}",
        f"keys: {{{'b' * 64}: 2026-03-01T12:00:00}}",
        f"keys: {{{'b' * 64}: }}",
        "revoked: []",
        "[]",
        "certificates: []\ncertificates: []",
        "{",
    ],
)
def test_a_list_that_cannot_be_understood_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "revoked.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"revoked\.yaml"):
        attest.Revocations.load(path)


# ── Records on disk ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def record(tmp_path: Path) -> Path:
    attest.keygen(tmp_path / "key.pem", owner="Bea", role="builder", now=EARLY)
    return public_path(tmp_path / "key.pem")


def test_a_key_is_retired_and_its_signer_knows(record: Path) -> None:
    at = ["--at", format_time(TURN)]
    assert answer(["key", "retire", str(record), *at]) == 0
    signer = Signer.load(record.with_suffix(""))
    assert signer.verifier.record.valid_until == format_time(TURN)
    attest.issue(dated(TURN), signer)
    with pytest.raises(CertificateError, match="was valid until"):
        attest.issue(dated(TURN + timedelta(seconds=1)), signer)


def test_a_compromise_is_written_down(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["key", "compromise", str(record), "--at", "now", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written == json.loads(record.read_bytes())
    assert parse_time(written["compromised"]) <= datetime.now(UTC)
    signer = Signer.load(record.with_suffix(""))
    issued = datetime.now(UTC) + timedelta(seconds=1)
    made = c.imported(issued=format_time(issued), expires=format_time(issued + timedelta(days=1)))
    with pytest.raises(CertificateError, match="compromised"):
        attest.issue(made, signer)


@pytest.mark.parametrize("end", [attest.retire, attest.compromise])
def test_a_record_is_only_ever_tightened(record: Path, end: Any) -> None:
    end(record, at=TURN)
    tightened = record.read_bytes()
    with pytest.raises(UsageError, match="already"):
        end(record, at=TURN + timedelta(seconds=1))
    assert record.read_bytes() == tightened
    end(record, at=TURN - timedelta(days=1))
    assert record.read_bytes() != tightened


def test_a_key_does_not_end_before_it_begins(record: Path) -> None:
    with pytest.raises(UsageError, match="valid from"):
        attest.retire(record, at=EARLY - timedelta(seconds=1))


@pytest.mark.parametrize("at", ["2026-03-01", "2026-03-01T12:00:00", "soon", ""])
def test_a_moment_has_a_time_zone(record: Path, at: str) -> None:
    before = record.read_bytes()
    assert answer(["key", "retire", str(record), "--at", at]) == 2
    assert record.read_bytes() == before


def test_what_is_no_record_is_left_alone(record: Path) -> None:
    private = record.with_suffix("")
    before = private.read_bytes()
    with pytest.raises(UsageError, match="bare PEM"):
        attest.retire(private, at=TURN)
    assert private.read_bytes() == before
    assert sorted(path.name for path in record.parent.iterdir()) == ["key.pem", "key.pem.pub"]
