"""Attempts that profit from an operator's mistake: everything that cannot be read refuses."""

import shutil
from pathlib import Path
from typing import Any

import yaml

import certificates as c
from flows.attacks.settled import POLICY, write_yaml
from flows.attacks.table import Attempt, Scene, attack, promotion
from flows.attacks.world import World
from mlflow_kdguard.files import canonical_json


def _break_keys(folder: Path) -> None:
    shutil.rmtree(folder / "keys")


def _no_keys(folder: Path) -> None:
    for path in (folder / "keys").iterdir():
        path.unlink()


def _keys_are_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "keys")
    (folder / "keys").write_text("nothing")


def _one_bad_key(folder: Path) -> None:
    (folder / "keys" / "another.pub").write_bytes(b"\xff not a key")


def _unreadable_key(folder: Path) -> None:
    (folder / "keys" / "verifier.pub").unlink()
    (folder / "keys" / "verifier.pub").mkdir()


def _dangling_key(folder: Path) -> None:
    (folder / "keys" / "verifier.pub").unlink()
    (folder / "keys" / "verifier.pub").symlink_to("/nowhere/verifier.pub")


def _two_records_of_one_key(folder: Path) -> None:
    import json

    record = json.loads((folder / "keys" / "builder.pub").read_bytes()) | {"role": "verifier"}
    (folder / "keys" / "builder-2.pub").write_bytes(canonical_json(record) + b"\n")


BROKEN: dict[str, Any] = {
    "keys-missing": _break_keys,
    "keys-empty": _no_keys,
    "keys-a-file": _keys_are_a_file,
    "key-malformed": _one_bad_key,
    "key-unreadable": _unreadable_key,
    "key-dangling": _dangling_key,
    "key-twice": _two_records_of_one_key,
    "policy-missing": lambda f: (f / "policy.yaml").unlink(),
    "policy-no-yaml": lambda f: write_yaml(f / "policy.yaml", "{{{"),
    "policy-empty": lambda f: write_yaml(f / "policy.yaml", ""),
    "policy-unknown-key": lambda f: write_yaml(f / "policy.yaml", {"allow_all": True}),
    "policy-true-for-a-limit": lambda f: write_yaml(
        f / "policy.yaml", POLICY | {"asr": {"upper_at_most": True}}
    ),
    "policy-nan": lambda f: write_yaml(f / "policy.yaml", "accuracy: {drop_upper_at_most: .nan}"),
    "policy-a-folder": lambda f: ((f / "policy.yaml").unlink(), (f / "policy.yaml").mkdir()),
    "revoked-missing": lambda f: (f / "revoked.yaml").unlink(),
    "revoked-malformed": lambda f: write_yaml(f / "revoked.yaml", "certificates: 7"),
    "settings-missing": lambda f: (f / "server.yaml").unlink(),
    "settings-no-yaml": lambda f: write_yaml(f / "server.yaml", "version: ["),
    "settings-empty": lambda f: write_yaml(f / "server.yaml", ""),
    "settings-no-text": lambda f: (f / "server.yaml").write_bytes(b"\xff\xfe\x00"),
    "log-key-missing": lambda f: (f / "log.pem").unlink(),
    "log-key-malformed": lambda f: (f / "log.pem").write_text("no key"),
}


@attack(10, variants=BROKEN)
def broken(w: World, spoil: Any) -> Scene:
    """A version that would pass, and an operator's file that cannot be read."""
    good = w.standing()
    version = w.version(good.name, seed=1)
    with w.operated() as folder:
        spoil(folder)
        # Where the log itself cannot be written, the refusal stands without a record.
        yield promotion(w, version, logged=None, serves=(good,))
    answer = w.alias(version, "production")
    assert answer.ok, f"the control did not pass afterwards: {answer.text}"


UNKNOWN: dict[str, Any] = {
    "unknown-key": {"trust_everyone": True},
    "mode": {"mode": "off"},
    "no-registry": {"registry": []},
    "content-missing": {"content": {"root": "file:///nowhere/at/all"}},
    "content-a-file": {"content": {"root": "file:///etc/passwd"}},
    "head-a-folder": {"log": {"key": "log.pem", "head": "/tmp"}},
    "head-nowhere": {"log": {"key": "log.pem", "head": "/nowhere/at/all/head.jsonl"}},
    "allow-nothing": {"allow": []},
    "policy-elsewhere": {"policy": "/nowhere/policy.yaml"},
}


@attack(10, variants=UNKNOWN)
def odd_settings(w: World, changes: dict[str, Any]) -> Scene:
    good = w.standing()
    version = w.version(good.name, seed=1)
    with w.operated(**changes):
        yield promotion(w, version, logged=None, serves=(good,))


@attack(10)
def settings_rolled_back(w: World) -> Scene:
    """An older file is refused: its policy or its keys may be looser."""
    version = w.version()
    number = yaml.safe_load(w.settings.read_text())["version"]
    assert w.alias(w.version(seed=1)).ok  # the database has seen this number
    with w.operated():
        w.restate({}, number=number - 1 if number > 1 else 1)
        if number > 1:
            yield promotion(w, version, logged=None)
        w.restate({"rollback_days": 1}, number=number)
        yield promotion(w, version, logged=None)


@attack(10)
def policy_changed_under_the_same_number(w: World) -> Scene:
    """The digest covers what the settings name, not only the file itself."""
    version = w.version(certified=False)
    w.certify(version, w.certificate(version, asr=(c.asr(k=100),)))
    assert w.alias(w.version(seed=1)).ok
    with w.operated() as folder:
        assert w.alias(w.version(seed=2)).ok
        number = yaml.safe_load(w.settings.read_text())["version"]
        write_yaml(folder / "policy.yaml", POLICY | {"asr": None})
        w.restate({}, number=number)
        yield promotion(w, version, logged=None)


@attack(9, variants={"loose": {"asr": None, "accuracy": None, "faithful": None},
                     "unpinned": {"data": {"sha256": [], "allow_unpinned": True}},
                     "unguarded": {"guarded": {"aliases": [], "stages": []}},
                     "imported": {"certificate": {"figures_from": "any"}}})  # fmt: skip
def loosened_project_policy(w: World, loose: dict[str, Any]) -> Scene:
    """A model's own policy tightens the server's, and never loosens it."""
    version = w.version(certified=False)
    w.certify(version, w.certificate(version, "builder", figures_from="imported",
                                     asr=(c.asr(k=300),)))  # fmt: skip
    with w.operated(models={version.name: "loose.yaml"}) as folder:
        write_yaml(folder / "loose.yaml", loose)
        w.restate({})
        yield promotion(w, version, "asr")


@attack(9)
def tight_policy_of_one_model(w: World) -> Scene:
    """The control of the row above: a tighter policy of one model is followed."""
    version = w.version()
    with w.operated(models={version.name: "tight.yaml"}) as folder:
        write_yaml(folder / "tight.yaml", {"certificate": {"signers_at_least": 2}})
        w.restate({})
        yield promotion(w, version, "owner")


@attack(16)
def audit_mode_is_not_a_clients_choice(w: World) -> Scene:
    version = w.version(certified=False)
    yield Attempt(lambda: w.alias(version, mode="audit", dry_run=True), status=(400, 403),
                  logged=None)  # fmt: skip
