"""The gated store's rules: what may carry a guarded name, what may not, and what the log says."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities.model_registry import ModelVersionTag, RegisteredModelTag
from mlflow.exceptions import MlflowException
from sqlalchemy import text

import certificates as c
from flows.operators import PINNED, toy_bundle
from flows.stores import URI, Registry, refusal, registry, write
from mlflow_kdguard.artifacts import CERTIFICATE, OVERRIDE, bundle_digest, read_folder
from mlflow_kdguard.attest import overrides, subjects_of
from mlflow_kdguard.files import sha256
from mlflow_kdguard.plugin import log
from mlflow_kdguard.plugin.server import content
from mlflow_kdguard.plugin.store.refusal import Refused
from mlflow_kdguard.records import Model, format_time


@pytest.fixture
def reg(tmp_path: Path) -> Iterator[Registry]:
    with registry(tmp_path) as made:
        yield made


# ── Promotion ───────────────────────────────────────────────────────────────────────────────────


def test_a_certified_version_is_promoted_and_its_bytes_are_kept(reg: Registry) -> None:
    files = toy_bundle()
    version = reg.certified("digits", files)
    reg.promote("digits", version)
    assert reg.aliases("digits") == {"champion": version}
    kept = reg.location("digits", version)
    assert kept == reg.operator.content / bundle_digest(files)
    assert read_folder(kept) == files
    assert reg.tags("digits", version)["kdguard.decision"] == "pass"
    [entry] = [e for e in reg.entries() if e["action"] == "promote"]
    assert (entry["actor"], entry["model"], entry["version"], entry["alias"]) == (
        "system", "digits", version, "champion",
    )  # fmt: skip
    assert entry["certificate"] == sha256(reg.tags("digits", version)[CERTIFICATE].encode())


def test_what_serves_does_not_follow_its_folder(reg: Registry) -> None:
    files = toy_bundle()
    version = reg.certified("digits", files)
    place = reg.location("digits", version)
    reg.promote("digits", version)
    write(place, {"model.onnx": b"another"})
    assert read_folder(reg.location("digits", version)) == files
    reg.promote("digits", version, "production")  # judged again, from the content root
    assert reg.aliases("digits") == {"champion": version, "production": version}


def test_a_version_without_a_certificate_is_refused_and_the_refusal_logged(reg: Registry) -> None:
    version = reg.version("digits")
    assert "carries no certificate" in reg.refused("digits", version)
    assert reg.actions() == ["refuse"]
    assert reg.tags("digits", version)["kdguard.decision"] == "refuse"


def test_every_reason_is_told_at_once(reg: Registry) -> None:
    files = toy_bundle()
    student = Model(sha256=sha256(files["model.onnx"]))
    version = reg.certified(
        "digits",
        files | {"extra.txt": b"x"},
        model_name="another",
        registry="http://elsewhere",
        reference=c.gap(gap_mean=0.9),
        student=student,
        days=1,
        now=datetime.now(UTC) - timedelta(days=2),
    )
    said = reg.refused("digits", version)
    for rule in ("bundle", "certificate.model", "certificate.registry", "certificate.expiry"):
        assert f"{rule}:" in said, said
    assert "reference.gap" in said


@pytest.mark.parametrize("name", ["champion", "production"])
def test_unguarded_names_stay_free(reg: Registry, name: str) -> None:
    version = reg.version("digits")
    reg.promote("digits", version, "candidate")
    reg.promote("digits", version, "größe")
    assert reg.aliases("digits") == {"candidate": version, "größe": version}
    reg.refused("digits", version, name)
    reg.store.delete_registered_model_alias("digits", "candidate")
    assert reg.actions() == ["refuse"]


@pytest.mark.parametrize(
    "alias", ["Champion", "CHAMPION", "châmpion", "champion\u200b", "ｃhampion", "PRODUCTION"]
)
def test_another_spelling_of_a_guarded_alias_is_refused(reg: Registry, alias: str) -> None:
    version = reg.certified("digits")
    with pytest.raises(MlflowException) as caught:
        reg.promote("digits", version, alias)
    assert caught.value.get_http_status_code() in (400, 403)  # MLflow refuses some itself
    assert not reg.aliases("digits")


def test_a_model_with_a_guarded_alias_takes_ascii_aliases_only(reg: Registry) -> None:
    version = reg.certified("digits")
    reg.promote("digits", version)
    assert "ASCII" in reg.refused("digits", version, "größe")
    reg.promote("digits", version, "candidate")


# ── Whose certificate, about what ───────────────────────────────────────────────────────────────


def test_a_certificate_does_not_travel(reg: Registry) -> None:
    files = toy_bundle()
    good = reg.certified("digits", files)
    reg.promote("digits", good)
    copy = reg.version("letters", source=f"models:/digits/{good}", tags=reg.tags("digits", good))
    assert "kdguard.decision" not in reg.tags("letters", copy)  # a copy's decision is its own
    assert "certificate.model" in reg.refused("letters", copy)
    reg.certify("letters", copy, reg.operator.sign(reg.operator.certificate(files, "letters")))
    reg.promote("letters", copy)
    assert reg.location("letters", copy) == reg.location("digits", good)


def test_other_bytes_are_refused(reg: Registry) -> None:
    version = reg.certified("digits")
    write(reg.location("digits", version), {"model.onnx": b"another"})
    said = reg.refused("digits", version)
    assert "certificate.bytes" in said
    assert "model.onnx" in said


def test_a_builder_alone_does_not_pass_as_verifier(reg: Registry) -> None:
    files = toy_bundle()
    certificate = reg.operator.certificate(files, "digits", figures_from="imported")
    reg.operator.write(rules=PINNED | {"certificate": {"figures_from": "recomputed"}})
    version = reg.version("digits", files)
    reg.certify("digits", version, reg.operator.sign(certificate, "bea"))
    assert "certificate.figures_from" in reg.refused("digits", version)


def test_the_servers_own_keys_decide(reg: Registry, tmp_path: Path) -> None:
    from mlflow_kdguard import attest

    stranger = attest.keygen(
        tmp_path / "eve", owner="Vic", role="verifier", now=datetime(2020, 1, 1, tzinfo=UTC)
    )
    files = toy_bundle()
    version = reg.version("digits", files)
    reg.certify(
        "digits", version, attest.issue(reg.operator.certificate(files, "digits"), stranger)
    )
    assert "unknown key" in reg.refused("digits", version)


def test_revoked_certificates_and_keys_are_refused_at_once(reg: Registry) -> None:
    version = reg.certified("digits")
    envelope = reg.tags("digits", version)[CERTIFICATE].encode()
    revoked = reg.operator.folder / "revoked.yaml"
    revoked.write_text(yaml.safe_dump({"certificates": [sha256(envelope)]}))
    reg.operator.write(revoked="revoked.yaml")
    assert "revoked" in reg.refused("digits", version)
    key = reg.operator.signer("vic").key_id
    revoked.write_text(yaml.safe_dump({"keys": {key: "2021-01-01T00:00:00Z"}}))
    reg.operator.write()
    assert "compromised" in reg.refused("digits", version)


def test_a_promoted_version_may_come_back_for_a_while_after_its_expiry(reg: Registry) -> None:
    reg.operator.write(rollback_days=7)
    files = toy_bundle()
    version = reg.version("digits", files)
    soon = datetime.now(UTC) + timedelta(seconds=2)
    short = reg.operator.certificate(files, "digits", now=soon - timedelta(days=30), days=30)
    reg.certify("digits", version, reg.operator.sign(short))
    other = reg.version("digits", files)
    reg.certify("digits", other, reg.operator.sign(short))
    reg.promote("digits", version)
    while datetime.now(UTC) <= soon + timedelta(seconds=1):
        threading.Event().wait(0.1)
    reg.store.delete_registered_model_alias("digits", "champion")
    assert "certificate.expiry" in reg.refused("digits", other)  # it was never promoted
    reg.promote("digits", version)
    reg.operator.write(rollback_days=0)
    assert "certificate.expiry" in reg.refused("digits", version)


# ── Places ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "source",
    [
        "s3://somebody-else/x", "http://169.254.169.254/latest", "/etc", "file:///etc",
        "file:///{root}/artifacts/../operator", "file:///{root}/artifacts/%2e%2e/operator",
        "file://elsewhere/{root}/artifacts/1", "file:{root}", "ftp://x/y", "runs:/nowhere/model",
        "models:/absent/1", "mlflow-artifacts://elsewhere:5000/1",
    ],
)  # fmt: skip
def test_foreign_places_are_refused_before_any_connection(
    reg: Registry, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    version = reg.version("digits", source="file:///nowhere")
    with reg.store.engine.begin() as connection:  # REST validates sources; the database need not
        location = source.format(root=str(reg.folder).strip("/"))
        connection.execute(text("UPDATE model_versions SET storage_location = :s"), {"s": location})

    def connected(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connected)
    assert "bytes:" in reg.refused("digits", version)


def test_a_link_leads_out_of_no_root(reg: Registry) -> None:
    files = toy_bundle()
    outside = reg.folder / "outside"
    write(outside, files)
    (reg.folder / "artifacts").mkdir(exist_ok=True)
    (reg.folder / "artifacts" / "link").symlink_to(outside)
    version = reg.version("digits", source=f"file://{reg.folder}/artifacts/link")
    reg.certify("digits", version, reg.operator.sign(reg.operator.certificate(files, "digits")))
    assert "outside of every allowed root" in reg.refused("digits", version)


def test_the_note_of_mlflows_client_is_refused_where_it_is_stored(reg: Registry) -> None:
    version = reg.certified("digits")
    write(reg.location("digits", version), {"registered_model_meta": b"model_name: digits\n"})
    said = reg.refused("digits", version)
    assert "registered_model_meta" in said


def test_a_changed_content_root_is_told(reg: Registry) -> None:
    version = reg.certified("digits")
    reg.promote("digits", version)
    kept = reg.location("digits", version) / "model.onnx"
    kept.chmod(0o644)
    kept.write_bytes(b"another")
    assert "somebody has changed the content root" in reg.refused("digits", version, "production")


def test_what_loading_leaves_in_the_content_root_is_no_change(reg: Registry) -> None:
    version = reg.certified("digits")
    reg.promote("digits", version)
    write(reg.location("digits", version), {"registered_model_meta": b"model_name: digits\n"})
    reg.promote("digits", version, "production")


def test_an_unserved_content_root_promotes_nothing(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = "mlflow-artifacts:/kdguard-content"
    reg.operator.write(content=reg.operator.stated["content"] | {"clients": clients})
    files = toy_bundle()
    version = reg.certified("digits", files)
    assert "--app-name kdguard" in reg.refused("digits", version)
    monkeypatch.setattr(content, "_served", True)
    reg.promote("digits", version)
    uri = reg.store.get_model_version_download_uri("digits", version)
    assert uri == f"{clients}/{bundle_digest(files)}"
    reg.promote("digits", version, "production")  # read from the root, not through the proxy


# ── Stages ──────────────────────────────────────────────────────────────────────────────────────


def _stage(reg: Registry, version: str, stage: str, archive: bool = False) -> None:
    reg.store.transition_model_version_stage("digits", version, stage, archive)


@pytest.mark.parametrize("stage", ["Production", "production", "PRODUCTION"])
def test_stages_are_gated_like_aliases(reg: Registry, stage: str) -> None:
    bad, good = reg.version("digits"), reg.certified("digits")
    assert "no certificate" in refusal(lambda: _stage(reg, bad, stage))
    _stage(reg, good, stage)
    assert reg.location("digits", good).parent == reg.operator.content
    _stage(reg, bad, "Staging")
    assert "Production" in refusal(lambda: reg.store.delete_model_version("digits", good))
    _stage(reg, good, "Archived")
    reg.store.delete_model_version("digits", good)
    assert reg.actions() == ["refuse", "stage", "delete-refused", "demote"]


# ── What would take the ground from under a guarded name ────────────────────────────────────────


def test_a_model_under_a_guarded_alias_is_neither_renamed_nor_deleted(reg: Registry) -> None:
    version, other = reg.certified("digits"), reg.version("digits")
    reg.promote("digits", version)
    assert "champion" in refusal(lambda: reg.store.rename_registered_model("digits", "letters"))
    assert "champion" in refusal(lambda: reg.store.delete_registered_model("digits"))
    assert "champion" in refusal(lambda: reg.store.delete_model_version("digits", version))
    assert "champion" in refusal(lambda: reg.store.delete_model_version("digits", "0" + version))
    reg.store.delete_model_version("digits", other)
    reg.store.delete_registered_model_alias("digits", "champion")
    reg.store.rename_registered_model("digits", "letters")
    reg.store.delete_registered_model("letters")
    assert reg.actions() == ["promote", "rename-refused", *["delete-refused"] * 3, "demote"]


def test_only_certificates_and_overrides_are_clients_tags(reg: Registry) -> None:
    version = reg.version("digits", tags={"kdguard.kind": "student", "mine": "1"})
    keys = ("kdguard.decision", "kdguard.reason", "kdguard.kind", "kdguard.x", "KDGUARD.decision",
            "kdguard.certificate ", "kdguard.Certificate")  # fmt: skip
    for key in keys:
        refusal(lambda key=key: reg.tag("digits", version, key, "x"))
        refusal(lambda key=key: reg.store.delete_model_version_tag("digits", version, key))
    refusal(lambda: reg.version("digits", tags={"kdguard.decision": "pass"}))
    refusal(lambda: reg.model("other", **{"kdguard.policy": "x"}))
    refusal(
        lambda: reg.store.set_registered_model_tag("digits", RegisteredModelTag("kdguard.x", "y"))
    )
    reg.tag("digits", version, "mine", "2")
    reg.tag("digits", version, CERTIFICATE, "anything")
    reg.store.delete_model_version_tag("digits", version, CERTIFICATE)
    assert reg.tags("digits", version) == {"kdguard.kind": "student", "mine": "2"}


def test_under_a_guarded_alias_only_a_passing_certificate_takes_the_place(reg: Registry) -> None:
    files = toy_bundle()
    version = reg.certified("digits", files)
    reg.promote("digits", version)
    refusal(lambda: reg.tag("digits", version, CERTIFICATE, "anything"))
    refusal(lambda: reg.store.delete_model_version_tag("digits", version, CERTIFICATE))
    renewed = reg.operator.sign(reg.operator.certificate(files, "digits", days=60))
    reg.certify("digits", version, renewed)
    assert reg.tags("digits", version)[CERTIFICATE] == renewed.decode()


def test_prompts_keep_their_aliases(reg: Registry) -> None:
    reg.model("greeting", **{"mlflow.prompt.is_prompt": "true"})
    prompt = reg.version("greeting", source="dummy-source", tags={"mlflow.prompt.text": "Hello"})
    reg.promote("greeting", prompt, "production")
    reg.tag("greeting", prompt, "mlflow.prompt.text", "Hi")
    # A prompt never becomes a model under its alias, and a model never a prompt.
    refusal(lambda: reg.store.delete_registered_model_tag("greeting", "mlflow.prompt.is_prompt"))
    disguised = reg.version("greeting", toy_bundle())
    reg.refused("greeting", disguised, "champion")
    model = reg.certified("digits")
    reg.promote("digits", model)
    mark = RegisteredModelTag("mlflow.prompt.is_prompt", "true")
    refusal(lambda: reg.store.set_registered_model_tag("digits", mark))
    reg.store.delete_registered_model("greeting")


# ── Settings ────────────────────────────────────────────────────────────────────────────────────


def test_settings_that_cannot_be_read_refuse_guarded_changes_only(reg: Registry) -> None:
    version = reg.certified("digits")
    good = reg.operator.settings.read_text()
    reg.operator.settings.write_text("version: [")
    assert "settings" in reg.refused("digits", version)
    reg.promote("digits", version, "candidate")
    reg.operator.settings.write_text(good)
    reg.promote("digits", version)
    (reg.operator.folder / "keys" / "vic.pub").write_text("no key")
    assert "vic.pub" in reg.refused("digits", version, "production")


def test_settings_only_grow(reg: Registry) -> None:
    version = reg.certified("digits")
    reg.operator.write(version=5)
    reg.promote("digits", version)
    reg.operator.write(version=4)
    assert "version 5 was in force" in reg.refused("digits", version, "production")
    reg.operator.write(version=5, rollback_days=1)
    assert "Raise `version`" in reg.refused("digits", version, "production")


def test_a_models_own_policy_only_tightens(reg: Registry) -> None:
    tight = reg.operator.folder / "tight.yaml"
    tight.write_text(yaml.safe_dump({"accuracy": {"drop_upper_at_most": -0.5}}))
    reg.operator.write(models={"digits": "tight.yaml"})
    assert "accuracy" in reg.refused("digits", reg.certified("digits"))
    reg.promote("letters", reg.certified("letters"))
    tight.write_text(yaml.safe_dump({"guarded": {"aliases": []}, "accuracy": None}))
    reg.operator.write()
    reg.refused("digits", reg.version("digits"))


def test_audit_mode_writes_down_and_blocks_nothing(reg: Registry) -> None:
    version = reg.version("digits")
    reg.operator.write(mode="audit")
    reg.promote("digits", version)
    reg.store.rename_registered_model("digits", "letters")
    assert reg.actions() == ["would-refuse", "would-rename-refused"]
    assert reg.aliases("letters") == {"champion": version}


# ── Nonces ──────────────────────────────────────────────────────────────────────────────────────


def _nonce(reg: Registry, files: dict[str, bytes], name: str = "digits") -> log.Nonce:
    with reg.store.engine.begin() as connection:
        signer = reg.operator.log_signer
        return log.nonces.issue(
            connection, name, "default", sha256(files["model.onnx"]), datetime.now(UTC),
            signer=signer,
        )  # fmt: skip


def test_a_nonce_is_this_servers_for_this_file_and_spent_once(reg: Registry) -> None:
    reg.operator.write(nonces="required")
    files = toy_bundle()
    assert "nonce" in reg.refused("digits", reg.certified("digits", files))
    assert "not handed out" in reg.refused("digits", reg.certified("digits", files, nonce="a" * 32))
    given = _nonce(reg, files)
    assert given.attempt == 1
    version = reg.certified("digits", files, nonce=given.nonce)
    reg.promote("digits", version)
    again = reg.certified("digits", files, nonce=given.nonce, seed=8)
    assert "spent on another certificate" in reg.refused("digits", again, "production")
    reg.promote("digits", version, "production")
    second = _nonce(reg, files)
    lies = reg.certified("digits", files, nonce=second.nonce, attempt=1)
    assert "attempt 2" in reg.refused("digits", lies)
    reg.promote("digits", reg.certified("digits", files, nonce=second.nonce, attempt=2))


# ── Break-glass ─────────────────────────────────────────────────────────────────────────────────


def _override(reg: Registry, version: str, files: dict[str, bytes], *names: str) -> str:
    now = datetime.now(UTC)
    stated = overrides.Override(
        registry=URI, workspace="default", model="digits", version=version, alias="champion",
        reason="the certifier is down", issued=format_time(now - timedelta(minutes=1)),
        until=format_time(now + timedelta(hours=1)), subjects=subjects_of(files),
    )  # fmt: skip
    first, *others = names
    envelope = overrides.issue(stated, reg.operator.signer(first), now=now)
    for name in others:
        envelope = overrides.cosign(envelope, reg.operator.signer(name), now=now)
    return envelope.decode()


def test_break_glass_needs_two_owners_and_the_settings_leave(reg: Registry) -> None:
    files = toy_bundle()
    version = reg.version("digits", files)
    reg.tag("digits", version, OVERRIDE, _override(reg, version, files, "bea", "vic"))
    assert "do not allow overrides" in reg.refused("digits", version)
    reg.operator.write(overrides=True)
    reg.tag("digits", version, OVERRIDE, _override(reg, version, files, "bea"))
    assert "2 different owners" in reg.refused("digits", version)
    reg.tag("digits", version, OVERRIDE, _override(reg, version, files, "bea", "vic"))
    reg.refused("digits", version, "production")  # it names the other alias
    reg.promote("digits", version)
    assert reg.actions()[-1] == "override"
    assert reg.tags("digits", version)["kdguard.decision"] == "override"
    odd = files | {"code.py": b"x"}
    unsafe = reg.version("digits", odd)
    reg.tag("digits", unsafe, OVERRIDE, _override(reg, unsafe, odd, "bea", "vic"))
    assert "bundle" in reg.refused("digits", unsafe)


# ── Races ───────────────────────────────────────────────────────────────────────────────────────


def test_concurrent_promotions_are_logged_once_each(reg: Registry) -> None:
    versions = [reg.certified("digits") for _ in range(4)]
    bad = reg.version("digits")

    def ask(number: int) -> None:
        if number % 5 == 4:
            refusal(lambda: reg.promote("digits", bad))
        else:
            reg.promote("digits", versions[number % 5])

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(ask, range(25)))
    promoted = [e["version"] for e in reg.entries() if e["action"] == "promote"]
    assert sorted(promoted) == sorted(versions * 5)
    assert reg.actions().count("refuse") == 5
    assert reg.aliases("digits")["champion"] == promoted[-1]


def test_a_version_that_changes_while_it_is_judged_is_refused(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = reg.certified("digits")
    gate = reg.store.gate
    judged = gate.judged

    def meanwhile(*arguments: Any) -> Any:
        found = judged(*arguments)
        with reg.store.engine.begin() as connection:
            connection.execute(
                text("UPDATE model_version_tags SET value = 'x' WHERE key = :k"),
                {"k": CERTIFICATE},
            )
        return found

    monkeypatch.setattr(gate, "judged", meanwhile)
    assert "changed while it was judged" in reg.refused("digits", version)


def test_bytes_that_are_swapped_all_the_time_never_serve(reg: Registry) -> None:
    """Either the certified bytes are promoted, or nothing: what was hashed is what is kept."""
    files = toy_bundle()
    other = toy_bundle()
    version = reg.certified("digits", files)
    place = reg.location("digits", version) / "model.onnx"
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for data in (other["model.onnx"], files["model.onnx"]):
                draft = place.with_name(".draft")
                draft.write_bytes(data)
                draft.replace(place)

    swapping = threading.Thread(target=swap)
    swapping.start()
    outcomes = set()
    try:
        for _ in range(40):
            outcomes.add(_tried(reg, version, files))
    finally:
        over.set()
        swapping.join()
    assert outcomes <= {"promoted", "refused"}


def _tried(reg: Registry, version: str, files: dict[str, bytes]) -> str:
    with reg.store.engine.begin() as connection:  # back to the folder that is written to
        connection.execute(text("DELETE FROM registered_model_aliases"))
        connection.execute(text("UPDATE model_versions SET storage_location = source"))
    try:
        reg.promote("digits", version)
    except Refused:
        assert not reg.aliases("digits")
        return "refused"
    assert read_folder(reg.location("digits", version)) == files
    return "promoted"


# ── Trouble ─────────────────────────────────────────────────────────────────────────────────────


def test_trouble_of_ours_is_a_refusal_that_nobody_tries_again(
    reg: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = reg.certified("digits")
    with monkeypatch.context() as patch:
        patch.setattr(content, "keep", lambda *_, **__: 1 / 0)
        assert "ZeroDivisionError" in reg.refused("digits", version)
    with monkeypatch.context() as patch:
        patch.setattr("mlflow_kdguard.plugin.server.case.decide", lambda *_, **__: 1 / 0)
        assert "ZeroDivisionError" in reg.refused("digits", version)
    with reg.store.engine.begin() as connection:
        connection.execute(text("DROP TABLE kdguard_log"))
    assert "log" in reg.refused("digits", version)


def test_what_is_not_there_is_told_as_mlflow_tells_it(reg: Registry) -> None:
    reg.model("digits")
    for name, version in (("digits", "7"), ("absent", "1")):
        with pytest.raises(MlflowException, match="not found") as caught:
            reg.promote(name, version)
        assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"
    with pytest.raises(MlflowException) as caught:
        reg.promote("digits", "x")
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    with pytest.raises(MlflowException) as caught:
        reg.store.set_model_version_tag("digits", "7", ModelVersionTag(CERTIFICATE, "x"))
    assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"
