"""What speaks against a version, and whom to believe: no registry is needed to say so."""

import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import toys
from flows.promoted import envelope, now, signer
from mlflow_kdguard.attest import Signer
from mlflow_kdguard.attest.envelope import Envelope
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.promoted.evidence import Evidence, examine
from mlflow_kdguard.promoted.trust import KEYS, REVOKED, Revoked, Trust, trusted
from mlflow_kdguard.records import format_time
from mlflow_kdguard.registry.bundle import ADDED_BY_CLIENT, Bundle, student_files

HERE = "http://registry"
BY, BUILDER = signer(), signer("Bea", "builder")
TRUST = Trust.of([BY.verifier, BUILDER.verifier])
FILES = student_files(toys.onnx_tiny())


def version(
    files: Mapping[str, bytes] = FILES, made: bytes | None = None, **changes: Any
) -> Bundle:
    stated = {"model_name": "x", "registry": HERE, "by": BY} | changes
    name, registry, by = (stated.pop(key) for key in ("model_name", "registry", "by"))
    certificate = made or envelope(FILES, name, registry, by, **stated)
    tags = {"kdguard.certificate": certificate.decode()}
    return Bundle(uri="models:/x/1", files=files, name="x", version="1", tags=tags)


def found(stored: Bundle, trust: Trust = TRUST, **options: Any) -> Evidence:
    return examine(stored, trust, now=now(), **({"registries": {HERE}} | options))


def kinds(evidence: Evidence) -> list[str]:
    return [fault.kind for fault in evidence.faults]


def test_what_is_certified_has_nothing_against_it() -> None:
    evidence = found(version())
    assert evidence.faults == ()
    assert evidence.checked is not None
    assert evidence.checked.signers == (BY.verifier.signatory,)


def test_one_byte_of_any_file_is_drift() -> None:
    for path, data in FILES.items():
        spoiled = {**FILES, path: data[:-1] + bytes([data[-1] ^ 1])}
        assert "drifted" in kinds(found(version(spoiled))), path


@pytest.mark.parametrize("path", [ADDED_BY_CLIENT, "code/evil.py", "model.onnx.data"])
def test_a_file_more_is_drift_and_shape(path: str) -> None:
    assert kinds(found(version({**FILES, path: b"x"}))) == ["shape", "drifted"]


def test_a_note_of_mlflows_client_says_a_name_and_a_version_or_is_drift() -> None:
    """Versions with the same bytes share a folder in a content root, and so the note of either."""
    for note in (b"model_name: other\nmodel_version: '7'\n", b"model_name: x\nmodel_version: 1\n"):
        assert kinds(found(version({**FILES, ADDED_BY_CLIENT: note}))) == [], note
        for odd in (note + b"# evil\n", note + b"code: evil\n", b" " + note, note * 2, note[:-3]):
            spoiled = found(version({**FILES, ADDED_BY_CLIENT: odd}))
            assert kinds(spoiled) == ["shape", "drifted"], odd


def test_a_file_less_is_drift() -> None:
    less = {path: data for path, data in FILES.items() if path != "requirements.txt"}
    assert kinds(found(version(less)))[-1] == "drifted"


def test_a_certified_bundle_of_a_wrong_shape_is_named() -> None:
    odd = {**FILES, "MLmodel": FILES["MLmodel"].replace(b"data: model.onnx", b"data: other.onnx")}
    assert kinds(found(version(odd, envelope(odd, "x", HERE, BY)))) == ["shape"]


def test_without_a_certificate() -> None:
    bare = Bundle(uri="models:/x/1", files=FILES, name="x", version="1")
    assert kinds(found(bare)) == ["uncertified"]


def _cut(made: bytes) -> bytes:
    return made[:-1]


def _unsigned(made: bytes) -> bytes:
    return Envelope(Envelope.from_bytes(made).payload, ()).to_bytes()


@pytest.mark.parametrize("spoil", [_cut, _unsigned, lambda _: b"{}", lambda _: b"\xc3\xa9"])
def test_what_is_no_certificate_is_not_believed(spoil: Callable[[bytes], bytes]) -> None:
    evidence = found(version(made=spoil(envelope(FILES, "x", HERE, BY))))
    assert kinds(evidence) == ["untrusted"]
    assert evidence.checked is None


def test_another_key_model_or_registry_is_not_believed() -> None:
    stranger = signer("Stan")
    assert kinds(found(version(by=stranger))) == ["untrusted"]
    assert kinds(found(version(model_name="y"))) == ["untrusted"]
    assert kinds(found(version(registry="http://elsewhere"))) == ["untrusted"]
    assert kinds(found(version(), registries={"http://a", HERE})) == []


@pytest.mark.parametrize("days", [30, 31])
def test_an_end_that_is_near_is_named_and_still_believed(days: int) -> None:
    evidence = found(version(), within=timedelta(days=days))
    assert kinds(evidence) == ["expiring"]
    assert kinds(found(version(), within=timedelta(days=29))) == []


def test_an_expired_certificate_is_named_and_its_bytes_are_compared_all_the_same() -> None:
    over = {"expires": format_time(now() - timedelta(seconds=1))}
    assert kinds(found(version(**over))) == ["expired"]
    assert found(version(**over)).checked is not None
    assert kinds(found(version({**FILES, "x": b""}, **over))) == ["shape", "drifted", "expired"]


def test_a_certificate_of_the_future_is_not_believed() -> None:
    assert kinds(found(version(issued=format_time(now() + timedelta(hours=1))))) == ["untrusted"]


@pytest.mark.parametrize("digest", ["envelope", "payload"])
def test_a_revoked_certificate_is_named_by_either_digest(digest: str) -> None:
    made = envelope(FILES, "x", HERE, BY)
    taken = sha256(made if digest == "envelope" else Envelope.from_bytes(made).payload)
    trust = Trust.of([BY.verifier], Revoked(certificates=(taken,)))
    assert kinds(found(version(made=made), trust)) == ["revoked"]
    assert kinds(found(version(by=BY, seed=8), trust)) == []


def test_a_compromised_key_revokes_what_it_signed_at_any_date() -> None:
    for since in (now() - 10 * timedelta(days=365), now() - timedelta(seconds=2)):
        trust = Trust.of([BY.verifier], Revoked(keys={BY.key_id: format_time(since)}))
        assert kinds(found(version(), trust)) == ["revoked"]
    later = Revoked(keys={BY.key_id: format_time(now() + timedelta(days=1))})
    assert kinds(found(version(), Trust.of([BY.verifier], later))) == []


def test_the_earlier_word_about_a_compromise_counts() -> None:
    past, future = (format_time(now() + sign * timedelta(days=9)) for sign in (-1, 1))
    known = Trust.of([BY.verifier], Revoked(keys={BY.key_id: past})).verifiers[0]
    trust = Trust.of([known], Revoked(keys={BY.key_id: future}))
    assert trust.compromised == {BY.key_id: past}


# ── Whom to believe ─────────────────────────────────────────────────────────────────────────────


def written(folder: Path, *keys: Signer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        (folder / f"{key.verifier.record.owner}.pub").write_bytes(key.verifier.to_bytes())
    return folder


def test_keys_are_files_folders_and_verifiers_each_counted_once(tmp_path: Path) -> None:
    folder = written(tmp_path, BY, BUILDER)
    trust = trusted([folder, str(folder / "Vic.pub"), BY.verifier])
    assert {v.key_id for v in trust.verifiers} == {BY.key_id, BUILDER.key_id}
    assert len(trust.verifiers) == 2


def test_keys_and_revocations_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a", BY)
    written(tmp_path / "b", BUILDER)
    file = tmp_path / "revoked.yaml"
    file.write_text(f"keys: {{{BY.key_id}: 2026-01-02T03:04:05Z}}\ncertificates: [{'ab' * 32}]\n")
    monkeypatch.setenv(
        KEYS, os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b" / "Bea.pub")])
    )
    monkeypatch.setenv(REVOKED, str(file))
    trust = trusted()
    assert {v.key_id for v in trust.verifiers} == {BY.key_id, BUILDER.key_id}
    assert trust.certificates == {"ab" * 32}
    assert trust.compromised == {BY.key_id: "2026-01-02T03:04:05Z"}
    assert len(trusted(BUILDER.verifier).verifiers) == 1


@pytest.mark.parametrize("keys", [None, [], "", [""]])
def test_without_a_key_nothing_is_loaded(keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS, raising=False)
    with pytest.raises(UsageError):
        trusted(keys)


def test_an_empty_folder_is_no_trust(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no key record"):
        trusted(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "certificates: [abc]", "keys: {abc: 2026-01-01T00:00:00Z}", "certificate: []", "- x",
     f"keys: {{{'ab' * 32}: 2026-01-01}}", f"keys: {{{'ab' * 32}: soon}}", "a: [", "a: 1\na: 2"],
)  # fmt: skip
def test_a_list_of_revocations_that_cannot_be_read_stops_everything(
    text: str, tmp_path: Path
) -> None:
    file = tmp_path / "revoked.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=re.escape(str(file))):
        trusted(BY.verifier, file)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "absent"))):
        trusted(BY.verifier, tmp_path / "absent")
