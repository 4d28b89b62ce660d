"""Certificates: what is signed is what is checked, and every way that it may not hold."""

import base64
import hashlib
import hmac
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import certificates as c
from mlflow_kdguard import attest
from mlflow_kdguard.attest.envelope import PAYLOAD_TYPE, Envelope, Signature, pae
from mlflow_kdguard.attest.signing import Role, Signer, Verifier
from mlflow_kdguard.errors import CertificateError, UsageError
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.records import Certificate, Model, Subject

GOLDEN = Path(__file__).parents[1] / "golden"
EARLY = datetime(2026, 1, 1, tzinfo=UTC)


def key(seed: int, owner: str, role: Role, **validity: Any) -> Signer:
    """A key that is the same in every run."""
    private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    values = {"valid_from": EARLY} | validity
    return attest.signer_of(private, owner=owner, role=role, **values)


BEA, VIC = key(1, "Bea", "builder"), key(2, "Vic", "verifier")
ENVELOPE = attest.issue(c.imported(), BEA)


def check(envelope: bytes = ENVELOPE, **changes: Any) -> attest.Checked:
    values = {"files": c.FILES, "verifiers": (BEA.verifier, VIC.verifier), "now": c.NOW} | changes
    return attest.check(envelope, **values)


def signed(payload: bytes, signer: Signer = BEA) -> bytes:
    """An envelope that is validly signed, whatever it says."""
    signature = Signature(signer.key_id, signer.sign(pae(PAYLOAD_TYPE, payload)))
    return Envelope(payload, (signature,)).to_bytes()


def statement(**changes: Any) -> dict[str, Any]:
    """The statement of ENVELOPE as JSON, with other values in its predicate."""
    value: dict[str, Any] = json.loads(Envelope.from_bytes(ENVELOPE).payload)
    value["predicate"] |= changes
    return value


# ── What holds ──────────────────────────────────────────────────────────────────────────────────


def test_what_was_issued_is_what_is_checked() -> None:
    checked = check(model_name="digits", registry="http://registry")
    assert checked.certificate == c.imported()
    assert checked.signers == (BEA.verifier.signatory,)
    assert check(files=None).certificate == checked.certificate


def test_a_checked_certificate_is_decided_on() -> None:
    checked = check(attest.issue(c.certificate(), VIC))
    assert c.decided(checked.certificate, signers=checked.signers).passed
    builders = check()
    failed = c.decided(builders.certificate, signers=builders.signers).failed
    assert failed == ("certificate.figures_from",)


def test_the_envelope_is_dsse_around_an_in_toto_statement() -> None:
    envelope = json.loads(ENVELOPE)
    payload = base64.b64decode(envelope["payload"])
    value = json.loads(payload)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["predicateType"] == "urn:mlflow-kdguard:certificate:1"
    assert value["predicate"]["schema"] == "kdguard.certificate/1"
    assert {item["name"]: item["digest"]["sha256"] for item in value["subject"]} == {
        path: hashlib.sha256(data).hexdigest() for path, data in c.FILES.items()
    }
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    message = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
    BEA.verifier.public.verify(signature, message)


def test_pae_is_the_published_example() -> None:
    """secure-systems-lab/dsse, protocol.md."""
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_cosigned_certificate_has_two_signers_and_each_key_counts_once() -> None:
    both = attest.cosign(ENVELOPE, VIC)
    assert [s.owner for s in check(both).signers] == ["Bea", "Vic"]
    assert attest.cosign(both, BEA) == both
    opened = Envelope.from_bytes(both)
    twice = Envelope(opened.payload, opened.signatures + opened.signatures).to_bytes()
    assert len(check(twice).signers) == 2


def test_recomputed_figures_need_a_verifier() -> None:
    recomputed = c.certificate()
    with pytest.raises(CertificateError, match="no verifier signed"):
        attest.issue(recomputed, BEA)
    payload = canonical_json(statement(figures_from="recomputed"))
    with pytest.raises(CertificateError, match=r"no verifier signed it \(signed by Bea as builder"):
        check(signed(payload))
    assert check(attest.issue(recomputed, VIC)).certificate == recomputed
    assert len(check(attest.cosign(attest.issue(recomputed, VIC), BEA)).signers) == 2


def test_the_role_is_the_one_in_the_checkers_record() -> None:
    """A builder who calls himself a verifier convinces only himself."""
    vain = key(1, "Bea", "verifier")
    envelope = attest.issue(c.certificate(), vain)
    with pytest.raises(CertificateError, match="no verifier signed"):
        check(envelope)


# ── What does not ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("envelope", "says"),
    [
        (b"", "not JSON"),
        (b"no", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 10_000, "not JSON"),
        (b"[]", "exactly payload"),
        (b'{"payload":"","payload":""}', "'payload' is repeated"),
        (b'{"payload":"","payloadType":NaN,"signatures":[]}', "NaN"),
        (b'{"payload":"","payloadType":1e999,"signatures":[]}', "cannot"),
        (b'{"payload":"\\ud800","payloadType":"","signatures":[]}', "cannot"),
        (b" " + ENVELOPE, "canonical form"),
        (ENVELOPE + b"\n", "canonical form"),
        (b"x" * (9 << 20), "more than"),
        (ENVELOPE.replace(b"vnd.in-toto", b"vnd.other"), "payload type"),
    ],
)  # fmt: skip
def test_what_is_no_envelope(envelope: bytes, says: str) -> None:
    with pytest.raises(CertificateError, match=says):
        check(envelope)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e.update(alg="HS256"), "exactly payload"),
        (lambda e: e.update(signatures=[]), "not signed"),
        (lambda e: e.update(signatures={}), "list of signatures"),
        (lambda e: e["signatures"][0].update(alg="none"), "exactly keyid and sig"),
        (lambda e: e["signatures"][0].update(keyid=None), "keyid is not text"),
        (lambda e: e["signatures"][0].update(keyid=sha256(b"?")), "unknown key"),
        (lambda e: e["signatures"][0].update(keyid=VIC.key_id), "signature of Vic"),
        (lambda e: e["signatures"][0].update(sig=""), "does not hold"),
        (lambda e: e["signatures"][0].update(sig=5), "canonical base64"),
        (lambda e: e["signatures"][0].update(sig="Zm9=v"), "canonical base64"),
        (lambda e: e.update(payload=e["payload"].rstrip("=") + "\u00e4"), "canonical base64"),
        (lambda e: e["signatures"].append({"keyid": sha256(b"?"), "sig": ""}), "unknown key"),
    ],
)
def test_what_is_no_signature(change: Any, says: str) -> None:
    envelope = json.loads(ENVELOPE)
    change(envelope)
    with pytest.raises(CertificateError, match=says):
        check(canonical_json(envelope))


def test_unused_bits_of_base64_are_not_free() -> None:
    """`QQ==` and `QR==` are one byte: a second spelling of one signature is refused."""
    envelope = json.loads(ENVELOPE)
    text = envelope["signatures"][0]["sig"]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = digits[digits.index(text[-3]) + 1]
    envelope["signatures"][0]["sig"] = text[:-3] + last + "=="
    with pytest.raises(CertificateError, match="canonical base64"):
        check(canonical_json(envelope))


def test_a_mac_keyed_with_the_public_key_is_no_signature() -> None:
    """The confusion of JWT: whoever has the public key could have made it."""
    opened = Envelope.from_bytes(ENVELOPE)
    forged = hmac.new(BEA.verifier.record.public.encode(), opened.signed, "sha512").digest()
    with pytest.raises(CertificateError, match="does not hold"):
        check(Envelope(opened.payload, (Signature(BEA.key_id, forged),)).to_bytes())


def test_a_signature_over_the_payload_alone_is_none() -> None:
    payload = Envelope.from_bytes(ENVELOPE).payload
    with pytest.raises(CertificateError, match="does not hold"):
        check(Envelope(payload, (Signature(BEA.key_id, BEA.sign(payload)),)).to_bytes())


def _subject(value: dict[str, Any], **changes: Any) -> None:
    value["subject"][0] |= changes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(_type="https://in-toto.io/Statement/v0.1"), "not an in-toto"),
        (
            lambda v: v.update(predicateType="https://slsa.dev/provenance/v1"),
            "predicate is of type",
        ),
        (lambda v: v["predicate"].update(schema="kdguard.certificate/9"), "unknown schema"),
        (lambda v: v.update(predicate=[]), "unknown schema"),
        (lambda v: v["predicate"].update(extra=1), "unknown key"),
        (lambda v: v["predicate"].pop("seed"), "seed"),
        (lambda v: v["predicate"].update(seed="7"), "canonical form"),
        (lambda v: v["predicate"].update(attempt=True), "canonical form"),
        (lambda v: v["predicate"].pop("attempt"), "canonical form"),
        (lambda v: v.update(extra=1), "canonical form"),
        (lambda v: _subject(v, name="other"), "canonical form"),
        (lambda v: v["subject"].pop(), "canonical form"),
        (lambda v: v["predicate"].update(subjects=[]), "speaks of no file"),
        (lambda v: v["predicate"]["subjects"][0].update(path="../MLmodel"), "outside"),
        (lambda v: v["predicate"]["subjects"][0].update(path="/MLmodel"), "outside"),
        (lambda v: v["predicate"]["subjects"][0].update(path="a//b"), "no plain path"),
        (lambda v: v["predicate"]["subjects"][0].update(path=""), "no plain path"),
        (lambda v: v["predicate"]["subjects"][0].update(path="model.onnx"), "twice"),
        (lambda v: v["predicate"]["subjects"][0].update(sha256="A" * 64), "not a SHA-256"),
        (lambda v: v["predicate"].update(issued="soon"), "validity"),
        (lambda v: v["predicate"].update(expires="2020-01-01T00:00:00Z"), "before it is issued"),
        (lambda v: v["predicate"]["figures"]["accuracy"].update(k=-1), "accuracy.k"),
        (lambda v: v["predicate"]["figures"]["accuracy"].update(k=1001), "exceeds"),
        (lambda v: v["predicate"]["figures"]["accuracy"].update(n=10**400), "accuracy.n"),
    ],
)
def test_what_is_signed_must_also_be_a_certificate(change: Any, says: str) -> None:
    value = statement()
    change(value)
    with pytest.raises(CertificateError, match=says):
        check(signed(canonical_json(value)))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-Infinity"])
def test_a_number_that_is_none_is_refused(number: str) -> None:
    payload = Envelope.from_bytes(ENVELOPE).payload
    broken = payload.replace(b'"gap_mean":0.05', b'"gap_mean":' + number.encode())
    assert broken != payload
    with pytest.raises(CertificateError, match=r"number that can be certified|JSON cannot"):
        check(signed(broken))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"gap_mean":0.05', b'"gap_mean":5e-2'),
        (b'"seed":7', b'"seed": 7'),
        (b'"seed":7', b'"seed":7,"seed":7'),
        (b"}", b"} "),
    ],
)
def test_one_certificate_has_one_spelling(old: bytes, new: bytes) -> None:
    payload = Envelope.from_bytes(ENVELOPE).payload
    assert old in payload
    broken = payload.replace(old, new)
    with pytest.raises(CertificateError, match=r"canonical form|repeated"):
        check(signed(broken))


def test_an_altered_file_is_named_with_both_digests() -> None:
    altered = c.FILES | {"model.onnx": b"another student"}
    with pytest.raises(CertificateError) as refused:
        check(files=altered)
    assert "model.onnx" in str(refused.value)
    assert sha256(b"another student") in str(refused.value)
    assert c.STUDENT in str(refused.value)


def test_missing_and_additional_files_are_named() -> None:
    with pytest.raises(CertificateError, match="MLmodel is certified, and missing"):
        check(files={"model.onnx": c.FILES["model.onnx"]})
    with pytest.raises(
        CertificateError, match=r"code/evil\.py is in the bundle, and not certified"
    ):
        check(files=c.FILES | {"code/evil.py": b""})


def test_time() -> None:
    issued, expires = c.NOW - timedelta(days=1), c.NOW + timedelta(days=30)
    check(now=issued)
    check(now=expires - timedelta(seconds=1))
    with pytest.raises(CertificateError, match="not valid before"):
        check(now=issued - timedelta(seconds=1))
    with pytest.raises(CertificateError, match="expired at"):
        check(now=expires)
    check(now=expires, waive_expiry=True)
    with pytest.raises(CertificateError, match="not valid before"):
        check(now=issued - timedelta(seconds=1), waive_expiry=True)


def test_a_certificate_is_for_one_model_of_one_registry() -> None:
    with pytest.raises(CertificateError, match="for the model 'digits', not 'other'"):
        check(model_name="other")
    with pytest.raises(CertificateError, match="for the registry"):
        check(registry="http://elsewhere")


@pytest.mark.parametrize(
    ("validity", "compromised", "says"),
    [
        ({"valid_from": c.NOW}, None, "valid from"),
        ({"valid_until": EARLY + timedelta(days=1)}, None, "was valid until"),
        ({}, "2026-02-20T00:00:00Z", "compromised"),
    ],
)
def test_a_key_outside_its_validity(validity: Any, compromised: str | None, says: str) -> None:
    """Compromise counts for certificates of an earlier date too: a thief writes any date."""
    verifier = key(1, "Bea", "builder", **validity).verifier
    record = verifier.record.model_copy(update={"compromised": compromised})
    with pytest.raises(CertificateError, match=says):
        check(verifiers=(Verifier(record, verifier.public),))
    with pytest.raises(CertificateError, match=says):
        attest.issue(c.imported(), Signer(BEA.private, Verifier(record, verifier.public)))


def test_a_compromise_in_the_future_is_none_yet() -> None:
    record = BEA.verifier.record.model_copy(update={"compromised": "2026-03-02T00:00:00Z"})
    check(verifiers=(Verifier(record, BEA.verifier.public),))


def test_what_cannot_be_checked_is_not_issued() -> None:
    gap = c.figures().reference
    assert gap is not None
    broken = c.figures().model_copy(
        update={"reference": gap.model_copy(update={"gap_mean": float("nan")})}
    )
    bad: list[tuple[Certificate, str]] = [
        (c.imported().model_copy(update={"figures": broken}), "not finite"),
        (c.imported(subjects=()), "no file"),
        (c.imported(subjects=(Subject(path="model.onnx", sha256="abc"),)), "not a SHA-256"),
        (c.imported(expires="2020-01-01T00:00:00Z"), "before it is issued"),
        (c.imported(issued="2026-02-28"), "no time zone"),
        (c.imported(model_name="\ud800"), "not text"),
    ]
    for certificate, says in bad:
        with pytest.raises(CertificateError, match=says):
            attest.issue(certificate, BEA)


def test_subjects_of_a_bundle() -> None:
    assert attest.subjects_of(c.FILES) == c.imported().subjects


def test_proofs_and_odd_text_survive_the_round_trip() -> None:
    odd = c.imported(
        model_name='ünï "quoted"\n\u2028',
        tools={"": "é"},
        proofs=Model(sha256=sha256(b"p")),
        seed=-5,
    )
    assert check(attest.issue(odd, BEA)).certificate == odd


# ── Bytes that must not change between versions ─────────────────────────────────────────────────


def test_golden_bytes(request: pytest.FixtureRequest) -> None:
    """A certificate, its statement and its envelope, under a fixed key, byte for byte."""
    envelope = attest.cosign(attest.issue(c.imported(), BEA), VIC)
    made = {
        "certificate.json": canonical_json(c.imported().document()),
        "statement.json": Envelope.from_bytes(envelope).payload,
        "envelope.json": envelope,
        "builder.pub": BEA.verifier.to_bytes(),
        "decision.json": canonical_json(c.decided(c.certificate()).document()),
    }
    if request.config.getoption("--update-goldens"):
        for name, data in made.items():
            (GOLDEN / name).write_bytes(data)
    assert {name: (GOLDEN / name).read_bytes() for name in made} == made


def test_golden_certificates_stay_checkable() -> None:
    """Whatever a new version writes, it still believes what an old one signed."""
    builder = Verifier.from_bytes((GOLDEN / "builder.pub").read_bytes(), where="builder.pub")
    checked = check((GOLDEN / "envelope.json").read_bytes(), verifiers=(builder, VIC.verifier))
    assert [s.owner for s in checked.signers] == ["Bea", "Vic"]


def test_checking_needs_neither_torch_nor_mlflow_and_loads_no_key_library_early() -> None:
    """Importing is cheap; the cryptography is loaded with the first key."""
    code = (
        "import sys; from mlflow_kdguard import attest, gate, policy, bundle;"
        "heavy = {'torch', 'mlflow', 'onnxruntime', 'onnx', 'cryptography'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_two_records_of_one_key_that_differ_are_refused_in_either_order() -> None:
    """Otherwise the order of --key would decide whether a compromised key is believed."""
    record = BEA.verifier.record.model_copy(update={"compromised": "2026-01-01T00:00:00Z"})
    revoked = attest.Verifier(record, BEA.verifier.public)
    for verifiers in ([revoked, BEA.verifier], [BEA.verifier, revoked]):
        with pytest.raises(UsageError, match="two records"):
            check(verifiers=verifiers)
    assert check(verifiers=[BEA.verifier, BEA.verifier])
