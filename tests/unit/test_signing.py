"""Keys on disk: who may read them, whose they are, and what is not a key."""

import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from mlflow_kdguard.attest import signing
from mlflow_kdguard.attest.signing import Signer, Verifier, keygen
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.files import canonical_json, sha256

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "builder.pem"
    keygen(path, owner="Bea", role="builder", now=NOW)
    return path


def _pem(private: Any, encryption: Any = None) -> bytes:
    return bytes(
        private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption or s.NoEncryption())
    )


def _changed(path: Path, **changes: Any) -> bytes:
    return canonical_json(json.loads(path.read_bytes()) | changes)


def test_a_signer_and_its_verifier_come_back_from_disk(key: Path) -> None:
    signer = Signer.load(key)
    verifier = Verifier.load(signing.public_path(key))
    assert verifier == signer.verifier
    assert signer.key_id == verifier.key_id
    signature = signer.sign(b"message")
    assert verifier.verify(b"message", signature)
    assert not verifier.verify(b"massage", signature)
    assert not verifier.verify(b"message", signature[::-1])
    assert not verifier.verify(b"message", b"")


def test_the_key_id_is_the_digest_of_the_public_key_in_der(key: Path) -> None:
    private = s.load_pem_private_key(key.read_bytes(), None)
    der = private.public_key().public_bytes(s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo)
    assert Signer.load(key).key_id == sha256(der)


def test_the_record_says_whose_key_it_is(key: Path) -> None:
    record = json.loads(signing.public_path(key).read_bytes())
    assert record["schema"] == "kdguard.key/1"
    assert (record["owner"], record["role"]) == ("Bea", "builder")
    assert (record["valid_from"], record["valid_until"]) == ("2026-03-01T00:00:00Z", None)


def test_only_the_owner_may_read_the_private_key(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keygen(tmp_path / "key.pem", owner="Bea", role="builder", now=NOW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


@pytest.mark.parametrize("existing", ["key.pem", "key.pem.pub"])
def test_keys_are_never_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        keygen(tmp_path / "key.pem", owner="Bea", role="builder")
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_bytes() == b"precious"


@pytest.mark.parametrize("owner", ["", " ", "\u200b", "Bea\n", "Bea\x1b[31m", "\udcff"])
def test_an_owner_is_a_name_that_can_be_read(tmp_path: Path, owner: str) -> None:
    with pytest.raises(UsageError, match="owner"):
        keygen(tmp_path / "key", owner=owner, role="builder")
    assert not list(tmp_path.iterdir())


def test_a_key_without_its_record_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UsageError("No space left on device")

    monkeypatch.setattr(signing, "write_bytes", full)
    with pytest.raises(UsageError, match="space"):
        keygen(tmp_path / "key", owner="Bea", role="builder")
    assert not list(tmp_path.iterdir())


def test_a_key_needs_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="names no file"):
        keygen(Path(), owner="Bea", role="builder")


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "key.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists already"):
        keygen(tmp_path / "key.pem", owner="Bea", role="builder")
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_needs_an_owner_and_a_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="owner"):
        keygen(tmp_path / "key.pem", owner="", role="builder")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UsageError, match="cannot write"):
        keygen(tmp_path / "file" / "key.pem", owner="Bea", role="builder")
    assert not (tmp_path / "key.pem").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"not a key",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        _pem(ec.generate_private_key(ec.SECP256R1())),
        _pem(rsa.generate_private_key(65537, 2048)),
        _pem(ed25519.Ed25519PrivateKey.generate(), s.BestAvailableEncryption(b"secret")),
    ],
    ids=["text", "empty PEM", "EC", "RSA", "encrypted"],
)
def test_what_is_no_private_key_of_ours(key: Path, data: bytes) -> None:
    key.write_bytes(data)
    with pytest.raises(UsageError, match=str(key)):
        Signer.load(key)


def test_a_private_key_without_its_record(key: Path) -> None:
    signing.public_path(key).unlink()
    with pytest.raises(UsageError, match="cannot read the public key"):
        Signer.load(key)


def test_a_record_of_another_key(key: Path, tmp_path: Path) -> None:
    other = keygen(tmp_path / "other.pem", owner="Eve", role="verifier")
    signing.public_path(key).write_bytes(other.verifier.to_bytes())
    with pytest.raises(UsageError, match="is not the record of the key"):
        Signer.load(key)


def test_a_bare_public_pem_has_no_owner_and_no_role(key: Path) -> None:
    record = json.loads(signing.public_path(key).read_bytes())
    with pytest.raises(UsageError, match="neither owner nor role"):
        Verifier.from_bytes(record["public"].encode(), where="key.pub")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"role": "admin"}, "role"),
        ({"owner": ""}, "owner"),
        ({"key": sha256(b"other")}, "not the digest"),
        ({"public": "-----BEGIN PUBLIC KEY-----"}, "no PEM public key"),
        ({"valid_from": "soon"}, "soon"),
        ({"valid_until": "2026-03-01T00:00:00"}, "no time zone"),
        ({"compromised": "?"}, "key record"),
        ({"algorithm": "none"}, "unknown key"),
        ({"schema": "kdguard.key/2"}, "schema"),
    ],
)
def test_what_is_no_key_record(key: Path, changes: dict[str, Any], says: str) -> None:
    data = _changed(signing.public_path(key), **changes)
    with pytest.raises(UsageError, match=says):
        Verifier.from_bytes(data, where="key.pub")


def test_a_record_of_another_algorithm(key: Path) -> None:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(UsageError, match="not an Ed25519 key"):
        Verifier.from_bytes(_changed(signing.public_path(key), public=pem), where="key.pub")


@pytest.mark.parametrize("data", [b"{", b'{"owner":"a","owner":"b"}', b"[]", b"\xff"])
def test_a_record_is_read_strictly(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"key\.pub"):
        Verifier.from_bytes(data, where="key.pub")
