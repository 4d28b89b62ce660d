"""Attempts with what is made for emergencies and repeats: overrides, nonces, log and copies."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from flows.attacks import papers
from flows.attacks.settled import IDENTITY
from flows.attacks.table import Attempt, Scene, attack, promotion
from flows.attacks.world import Version, World
from mlflow_kdguard import attest
from mlflow_kdguard.attest import overrides
from mlflow_kdguard.files import sha256
from mlflow_kdguard.plugin import log
from mlflow_kdguard.records import format_time


def _override(w: World, about: Version, *signers: str, **changes: Any) -> bytes:
    """Break-glass as our own program writes it."""
    now = papers.now()
    stated = {
        "registry": IDENTITY, "workspace": "default", "model": about.name,
        "version": about.number, "alias": "champion", "reason": "the old one is on fire",
        "issued": format_time(now - papers.days(0.01)), "until": format_time(now + papers.days(1)),
        "subjects": attest.subjects_of(about.files),
    } | changes  # fmt: skip
    first, *others = signers or ("verifier", "builder")
    made = overrides.Override(**stated)
    envelope = overrides.issue(made, w.keys[first], now=now)
    for name in others:
        envelope = overrides.cosign(envelope, w.keys[name], now=now)
    return envelope


ALONE: dict[str, Any] = {
    "one-owner": lambda w, v: _override(w, v, "verifier"),
    "one-owner-with-two-keys": lambda w, v: _override(w, v, "verifier", "vic-again"),
    "a-stranger": lambda w, v: _override(w, v, "verifier", "stranger"),
    "two-strangers": lambda w, v: _override(w, v, "stranger"),
    "another-model": lambda w, v: _override(w, v, model="other"),
    "another-version": lambda w, v: _override(w, v, version="99"),
    "another-alias": lambda w, v: _override(w, v, alias="production"),
    "another-alias-by-case": lambda w, v: _override(w, v, alias="Champion"),
    "another-registry": lambda w, v: _override(w, v, registry="https://elsewhere.example"),
    "another-workspace": lambda w, v: _override(w, v, workspace="other"),
    "other-files": lambda w, v: _override(
        w, v, subjects=attest.subjects_of({**v.files, "model.onnx": b"x"})
    ),
    "fewer-files": lambda w, v: _override(
        w, v, subjects=attest.subjects_of({"model.onnx": v.files["model.onnx"]})
    ),
    "a-certificate": lambda w, v: w.certificate(v, "builder", figures_from="imported"),
    "garbage": lambda w, v: b"by order of the management",
    "empty": lambda w, v: b"",
    "cut": lambda w, v: _override(w, v)[:-9],
    "edited": lambda w, v: _override(w, v).replace(b'"payload":"ey', b'"payload":"fy'),
}


@attack(16, variants=ALONE)
def override_that_does_not_hold(w: World, forge: Any) -> Scene:
    version = w.version(certified=False)
    with w.operated(overrides=True):
        answer = w.tag(version, forge(w, version).decode(), "kdguard.override")
        assert answer.status_code < 500, answer.text
        yield promotion(w, version)


@attack(16)
def override_where_none_is_allowed(w: World) -> Scene:
    version = w.version(certified=False)
    w.tag(version, _override(w, version).decode(), "kdguard.override")
    yield promotion(w, version)


@attack(16)
def override_after_its_end(w: World) -> Scene:
    version = w.version(certified=False)
    now = papers.now()
    long_ago = {"issued": now - papers.days(3), "until": now - papers.days(2)}
    made = overrides.Override(
        registry=IDENTITY, workspace="default", model=version.name, version=version.number,
        alias="champion", reason="it was on fire", subjects=attest.subjects_of(version.files),
        **{key: format_time(value) for key, value in long_ago.items()},
    )  # fmt: skip
    then = now - papers.days(2.5)
    envelope = overrides.issue(made, w.keys["verifier"], now=then)
    envelope = overrides.cosign(envelope, w.keys["builder"], now=then)
    with w.operated(overrides=True):
        w.tag(version, envelope.decode(), "kdguard.override")
        yield promotion(w, version)


@attack(16)
def override_for_a_bundle_that_serves_another_file(w: World) -> Scene:
    """Owners may waive a limit; where the alias lies and what is logged they may not."""
    version = w.version(certified=False)
    envelope = _override(w, version)
    (version.folder / "model.onnx").write_bytes(version.files["model.onnx"] + b"\x00")
    with w.operated(overrides=True):
        w.tag(version, envelope.decode(), "kdguard.override")
        yield promotion(w, version)


# ── Nonces: trying again until it passes ────────────────────────────────────────────────────────


@contextlib.contextmanager
def _required(w: World) -> Iterator[None]:
    with w.operated(nonces="required"):
        yield


def _nonce(w: World, name: str, subject: str) -> log.Nonce:
    """As the server hands one out."""
    signer = attest.Signer.load(w.settings.parent / "log.pem")
    with w.engine.begin() as connection:
        return log.nonces.issue(
            connection, name, "default", subject, papers.now(), signer=signer,
            verifiers=(signer.verifier,),
        )  # fmt: skip


def _drawn(w: World, version: Version, nonce: str, attempt: int, **changes: Any) -> bytes:
    figure = papers.faithful(sha256(version.files["model.onnx"]), nonce=nonce)
    return w.certificate(version, attempt=attempt, faithful=(figure,), **changes)


def _student(version: Version) -> str:
    return sha256(version.files["model.onnx"])


NONCES: dict[str, Any] = {
    "none": lambda w, v: w.certificate(v),
    "made-up": lambda w, v: _drawn(w, v, "0" * 32, 1),
    "of-another-model": lambda w, v: _drawn(w, v, _nonce(w, w.name(), _student(v)).nonce, 1),
    "of-another-file": lambda w, v: _drawn(w, v, _nonce(w, v.name, "0" * 64).nonce, 1),
    "upper-case": lambda w, v: _drawn(w, v, _nonce(w, v.name, _student(v)).nonce.upper(), 1),
    "long": lambda w, v: _drawn(w, v, "a" * 5000, 1),
    "like": lambda w, v: _drawn(w, v, "%", 1),
}


@attack(5, variants=NONCES)
def nonce_that_is_not_ours(w: World, draw: Any) -> Scene:
    version = w.version(certified=False)
    with _required(w):
        w.certify(version, draw(w, version))
        yield promotion(w, version, "nonce")


@attack(5)
def hidden_attempts(w: World) -> Scene:
    """The third attempt that calls itself the first: the server has counted."""
    version = w.version(certified=False)
    for _ in range(2):
        _nonce(w, version.name, _student(version))
    third = _nonce(w, version.name, _student(version))
    assert third.attempt == 3
    with _required(w):
        w.certify(version, _drawn(w, version, third.nonce, 1))
        yield promotion(w, version, "attempt 3")


@attack(5)
def one_nonce_for_two_certificates(w: World) -> Scene:
    version = w.version(certified=False)
    nonce = _nonce(w, version.name, _student(version))
    with _required(w):
        w.certify(version, _drawn(w, version, nonce.nonce, 1))
        assert w.alias(version).ok, "the control did not pass"
        again = w.version(version.name, certified=False)
        w.certify(again, _drawn(w, again, nonce.nonce, 1, seed=8))
        yield promotion(w, again, "spent", serves=(version,))


# ── Administrators who reach under the server ───────────────────────────────────────────────────


@attack(16)
def copy_that_somebody_changed(w: World) -> Scene:
    """Bytes that differ in the content root are neither trusted nor repaired."""
    good = w.champion(seed=11)
    path = w.on_disk(w.location(good)) / "model.onnx"
    honest = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))
    try:
        again = w.version(seed=11)
        yield promotion(w, again, "content")
    finally:
        path.write_bytes(honest)
    assert w.alias(again).ok, "the control did not pass"


HEADS = {
    "digest": "UPDATE kdguard_head SET digest = '0000'",
    "signature": "UPDATE kdguard_head SET signature = 'AAAA'",
    "back": "UPDATE kdguard_head SET seq = seq - 1",
    "beyond": "UPDATE kdguard_head SET seq = seq + 7",
}


@attack(16, variants=HEADS)
def head_that_somebody_changed(w: World, statement: str) -> Scene:
    """A chain whose end is not the server's is not carried on."""
    version = w.version()
    assert w.alias(w.version(seed=1)).ok
    before = w.rows("SELECT id, seq, digest, signature FROM kdguard_head")
    w.execute(statement)
    try:
        yield promotion(w, version, logged=None)
    finally:
        number, seq, digest, signature = before[0]
        w.execute(
            "UPDATE kdguard_head SET seq = :s, digest = :d, signature = :g WHERE id = :i",
            s=seq, d=digest, g=signature, i=number,
        )  # fmt: skip
    assert w.alias(version).ok, "the control did not pass"


# ── Our own API ─────────────────────────────────────────────────────────────────────────────────

ASKED: dict[str, Any] = {
    "empty": {},
    "list": [],
    "no-name": {"version": "1"},
    "numbers": {"name": 1, "version": 1},
    "version-text": {"name": "{n}", "version": "one"},
    "version-null": {"name": "{n}", "version": "1\x00"},
    "version-large": {"name": "{n}", "version": "9" * 40},
    "name-path": {"name": "../../etc/passwd", "version": "1"},
    "name-long": {"name": "x" * 100_000, "version": "1"},
    "name-null": {"name": "{n}\x00", "version": "1"},
    "alias-odd": {"name": "{n}", "version": "{v}", "alias": "\ud7ff\u202e"},
    "act": {"name": "{n}", "version": "{v}", "act": True, "promote": True, "mode": "audit"},
}


@attack(16, variants=ASKED, needs="app")
def asking_for_a_verdict_oddly(w: World, body: Any) -> Scene:
    good, bad = w.standing(), w.rival()
    text = json.dumps(body).replace("{n}", bad.name).replace("{v}", bad.number)
    for route in ("verify", "nonces"):
        yield Attempt(
            lambda route=route: w.call(route, json.loads(text), api="/api/2.0/kdguard/"),  # type: ignore[misc]
            status=(200, 400, 403, 404, 422),
            logged=None,
            serves=(good,),
        )


@attack(16, variants={m: m for m in ("PUT", "POST", "DELETE", "PATCH")}, needs="app")
def writing_to_the_log_by_our_api(w: World, method: str) -> Scene:
    good, count = w.standing(), len(w.log())
    yield Attempt(
        lambda: w.call("log", {"seq": 1}, method=method, api="/api/2.0/kdguard/"),
        status=(400, 403, 404, 405, 415),
        logged=None,
        serves=(good,),
    )
    assert len(w.log()) == count
