"""Attempts on what is already promoted: renaming, deleting, tags, prompts."""

import contextlib
from typing import Any

from flows.attacks.table import Attempt, Scene, attack, promotion
from flows.attacks.world import Version, World


def _staged(w: World) -> Version:
    version = w.version()
    answer = w.stage(version)
    assert answer.ok, answer.text
    return version


HOLDERS: dict[str, Any] = {"alias": World.champion, "stage": _staged}


@attack(15, variants=HOLDERS)
def rename_a_holder(w: World, hold: Any) -> Scene:
    good = hold(w)
    body = {"name": good.name, "new_name": w.name()}
    yield Attempt(lambda: w.call("registered-models/rename", body), serves=(good,))


@attack(15)
def rename_with_both_spellings(w: World) -> Scene:
    good = w.champion()
    body = {"name": good.name, "new_name": good.name, "newName": w.name()}
    yield Attempt(lambda: w.call("registered-models/rename", body),
                  status=(400, 403), logged=None, serves=(good,))  # fmt: skip


@attack(15, variants={"ajax": "/ajax-api/2.0/mlflow/", "api": "/api/2.0/mlflow/"})
def rename_onto_a_holder(w: World, api: str) -> Scene:
    good, other = w.champion(), w.version(seed=1)
    body = {"name": other.name, "new_name": good.name}
    yield Attempt(lambda: w.call("registered-models/rename", body, api=api),
                  status=(400, 403), logged=None, serves=(good,))  # fmt: skip


@attack(15, variants=HOLDERS)
def delete_a_held_version(w: World, hold: Any) -> Scene:
    good = hold(w)
    body = {"name": good.name, "version": good.number}
    yield Attempt(lambda: w.call("model-versions/delete", body, method="DELETE"), serves=(good,))


@attack(15, variants=HOLDERS)
def delete_a_holder(w: World, hold: Any) -> Scene:
    good = hold(w)
    yield Attempt(
        lambda: w.call("registered-models/delete", {"name": good.name}, method="DELETE"),
        serves=(good,),
    )


@attack(15, variants=HOLDERS)
def delete_the_certificate(w: World, hold: Any) -> Scene:
    good = hold(w)
    body = {"name": good.name, "version": good.number, "key": "kdguard.certificate"}
    yield Attempt(lambda: w.call("model-versions/delete-tag", body, method="DELETE"),
                  serves=(good,))  # fmt: skip


SPOILED: dict[str, Any] = {
    "garbage": lambda w, v: "no certificate",
    "of-another": lambda w, v: w.certificate(w.version(certified=False)).decode(),
    "of-the-builder": lambda w, v: w.certificate(v, "builder", figures_from="imported").decode(),
    "empty": lambda w, v: "",
}


@attack(15, variants=SPOILED)
def replace_the_certificate(w: World, spoil: Any) -> Scene:
    good = w.standing()
    value = spoil(w, good)
    yield Attempt(lambda: w.tag(good, value), status=(400, 403), serves=(good,))


SPOOFED = {
    "decision": "kdguard.decision",
    "reason": "kdguard.reason",
    "server": "kdguard.server",
    "server-log": "kdguard.server.log",
    "upper": "KDGUARD.decision",
    "accent": "kdgu\u00e1rd.decision",
    "zero-width": "kdguard\u200b.decision",
    "full-width": "\uff4bdguard.decision",
    "digest": "kdguard.sha256",
    "bundle": "kdguard.bundle_sha256",
    "kind": "kdguard.kind",
    "owner": "kdguard.owner",
}


@attack(15, variants=SPOOFED)
def spoofed_tag(w: World, key: str) -> Scene:
    """Clients write the certificate and nothing else of ours, however it is spelled."""
    version = w.blank()
    yield Attempt(lambda: w.tag(version, "pass", key), status=(400, 403), logged=None)


@attack(15, variants={k: SPOOFED[k] for k in ("decision", "reason", "server")})
def spoofed_tag_at_creation(w: World, key: str) -> Scene:
    """Refused when the version is made, or without any effect."""
    base = w.version(certified=False)
    made = w.created(base.name, base.source, base.run_id, {key: "pass"})
    assert made.status_code in (200, 403), made.text
    if not made.ok:
        yield Attempt(lambda: made, logged=None)
        return
    number = str(made.json()["model_version"]["version"])
    yield promotion(w, Version(base.name, number, "", base.files, base.folder, ""), "certificate")


@attack(15, variants={"decision": "kdguard.decision", "policy": "kdguard.policy"})
def spoofed_tag_of_a_model(w: World, key: str) -> Scene:
    version = w.version(certified=False)
    body = {"name": version.name, "key": key, "value": "{data: {allow_unpinned: true}}"}
    w.call("registered-models/set-tag", body)
    yield promotion(w, version, "certificate")


# ── Removing the alias and setting it anew ──────────────────────────────────────────────────────


@attack(15)
def take_the_alias_away_and_set_it_anew(w: World) -> Scene:
    """Taking an alias away is anyone's right; setting it is judged like the first time."""
    good = w.champion()
    bad = w.version(good.name, seed=1, certified=False)
    body = {"name": good.name, "alias": "champion"}
    assert w.call("registered-models/alias", body, method="DELETE").ok
    yield promotion(w, bad, "certificate")


@attack(14)
def promoted_before_is_not_promoted_for_ever(w: World) -> Scene:
    """What was promoted once and then revoked does not come back as a rollback."""
    from flows.attacks.settled import write_yaml
    from mlflow_kdguard.files import sha256

    good = w.champion()
    envelope = w.rows(
        "SELECT value FROM model_version_tags WHERE name=:n AND key='kdguard.certificate'",
        n=good.name,
    )[0][0]
    assert w.alias(w.version(good.name, seed=1)).ok
    with w.operated(rollback_days=3650) as folder:
        write_yaml(
            folder / "revoked.yaml", {"certificates": [sha256(envelope.encode())], "keys": {}}
        )
        w.restate({})
        yield promotion(w, good, "revoked")


# ── Prompts ─────────────────────────────────────────────────────────────────────────────────────

PROMPT = {"mlflow.prompt.is_prompt": "true", "mlflow.prompt.text": "hello"}


def _prompt_model(w: World, name: str, flag: str = "true") -> None:
    tags = [{"key": "mlflow.prompt.is_prompt", "value": flag}]
    w.made("registered-models/create", name=name, tags=tags)


@attack(15, variants={"true": "true", "upper": "TRUE"})
def model_that_calls_itself_a_prompt(w: World, flag: str) -> Scene:
    name = w.name()
    _prompt_model(w, name, flag)
    yield promotion(w, w.version(name, certified=False), "certificate")


@attack(15, variants={"true": "true", "upper": "TRUE"})
def version_that_calls_itself_a_prompt(w: World, flag: str) -> Scene:
    version = w.version(certified=False)
    w.tag(version, flag, "mlflow.prompt.is_prompt")
    yield promotion(w, version, "certificate")


@attack(15)
def model_and_version_that_call_themselves_a_prompt(w: World) -> Scene:
    name = w.name()
    _prompt_model(w, name)
    base = w.version(name, certified=False)
    made = w.created(name, base.source, base.run_id, PROMPT)
    if made.ok:
        number = str(made.json()["model_version"]["version"])
        base = Version(name, number, "", base.files, base.folder, "")
    w.tag(base, "true", "mlflow.prompt.is_prompt")
    yield promotion(w, base, "certificate")


@attack(15)
def holder_that_becomes_a_prompt(w: World) -> Scene:
    good = w.champion()
    body = {"name": good.name, "key": "mlflow.prompt.is_prompt", "value": "true"}
    yield Attempt(lambda: w.call("registered-models/set-tag", body), serves=(good,))
    yield Attempt(lambda: w.tag(good, "true", "mlflow.prompt.is_prompt"), serves=(good,))


@attack(15)
def prompt_that_becomes_a_model(w: World) -> Scene:
    """A prompt may hold `champion`; then it must stay one."""
    name = w.name()
    _prompt_model(w, name)
    made = w.created(name, "dummy-source", None, PROMPT)
    assert made.ok, made.text
    prompt = Version(name, "1", "", {}, w.server.artifacts, "dummy-source")
    if not w.alias(prompt).ok:  # a store that gives prompts no guarded alias is stricter
        yield promotion(w, prompt)
        return
    body = {"name": name, "key": "mlflow.prompt.is_prompt"}
    yield Attempt(lambda: w.call("registered-models/delete-tag", body, method="DELETE"))
    tag = body | {"value": "false"}
    yield Attempt(lambda: w.call("registered-models/set-tag", tag))
    body |= {"version": "1"}
    yield Attempt(lambda: w.call("model-versions/delete-tag", body, method="DELETE"))
    yield promotion(w, w.version(name, certified=False), "certificate")


@attack(15)
def prompt_renamed_to_a_model(w: World) -> Scene:
    name = w.name()
    _prompt_model(w, name)
    assert w.created(name, "dummy-source", None, PROMPT).ok
    prompt = Version(name, "1", "", {}, w.server.artifacts, "dummy-source")
    w.alias(prompt)
    new = w.name()
    if w.call("registered-models/rename", {"name": name, "new_name": new}).ok:
        name = new
    yield promotion(w, w.version(name, certified=False), "certificate")


@attack(16)
def alias_moved_by_sql_is_seen(w: World) -> Scene:
    """A database administrator cannot be stopped; the next guarded change must not hide it."""
    good = w.champion()
    bad = w.version(good.name, seed=1, certified=False)
    w.execute(
        "UPDATE registered_model_aliases SET version=:v WHERE name=:n AND alias='champion'",
        v=int(bad.number), n=good.name,
    )  # fmt: skip
    with contextlib.suppress(AssertionError):
        yield Attempt(lambda: w.tag(bad, "no certificate"), status=(400, 403), logged=None)
    from flows.attacks.sweeping import swept

    found = swept(w)
    assert good.name in found, found
    w.execute(
        "UPDATE registered_model_aliases SET version=:v WHERE name=:n AND alias='champion'",
        v=int(good.number), n=good.name,
    )  # fmt: skip


ODD = {"plus": "+{n}", "space": " {n}", "leading-zero": "0{n}", "underscore": "0_{n}",
       "newline": "{n}\n", "full-width": "{wide}"}  # fmt: skip


@attack(15, variants=ODD)
def delete_a_held_version_by_an_odd_number(w: World, template: str) -> Scene:
    """MLflow reads `+1` as 1: so must whoever asks whether version 1 is held."""
    good = w.standing()
    number = template.format(n=good.number, wide=chr(0xFF10 + int(good.number)))
    body = {"name": good.name, "version": number}
    for route, more in (
        ("model-versions/delete", {}),
        ("model-versions/delete-tag", {"key": "kdguard.certificate"}),
    ):
        call = lambda route=route, more=more: w.call(route, body | more, method="DELETE")  # noqa: E731
        yield Attempt(call, status=(400, 403, 404), logged=None, serves=(good,))
        assert w.rows(
            "SELECT value FROM model_version_tags WHERE name=:n AND version=:v AND key=:k",
            n=good.name, v=int(good.number), k="kdguard.certificate",
        ), "the certificate of a holder is gone"  # fmt: skip
        assert w.rows(
            "SELECT name FROM model_versions WHERE name=:n AND version=:v "
            "AND current_stage != 'Deleted_Internal'",
            n=good.name, v=int(good.number),
        ), "the version of a holder is gone"  # fmt: skip
