"""Attempts with the certificate: none, forged, another's, out of date, by the wrong people."""

import base64
import json
from typing import Any

from flows.attacks import papers
from flows.attacks.settled import IDENTITY, write_yaml
from flows.attacks.table import Scene, attack, promotion
from flows.attacks.world import World
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.records import format_time


@attack(1)
def no_certificate(w: World) -> Scene:
    yield promotion(w, w.version(certified=False), "certificate")


def _altered(envelope: bytes, change: Any) -> bytes:
    body = json.loads(envelope)
    change(body)
    return canonical_json(body)


FORGED: dict[str, Any] = {
    "empty": lambda e: b"",
    "blank": lambda e: b" ",
    "text": lambda e: b"certified, honestly",
    "null": lambda e: b"null",
    "list": lambda e: b"[]",
    "empty-object": lambda e: b"{}",
    "half": lambda e: e[: len(e) // 2],
    "newline": lambda e: e + b"\n",
    "spaces": lambda e: json.dumps(json.loads(e), indent=1).encode(),
    "twice": lambda e: e + e,
    "unsigned": lambda e: _altered(e, lambda b: b.update(signatures=[])),
    "zero-signature": lambda e: _altered(
        e, lambda b: b["signatures"][0].update(sig=base64.b64encode(bytes(64)).decode())
    ),
    "short-signature": lambda e: _altered(e, lambda b: b["signatures"][0].update(sig="AA==")),
    "payload-type": lambda e: _altered(e, lambda b: b.update(payloadType="text/plain")),
    "extra-key": lambda e: _altered(e, lambda b: b.update(trusted=True)),
    "repeated-key": lambda e: e[:-1] + b',"payloadType":"text/plain"}',
    "other-base64": lambda e: _altered(
        e, lambda b: b.update(payload=b["payload"].replace("=", "") + "\n")
    ),
    "key-of-another": lambda e: _altered(
        e, lambda b: b["signatures"][0].update(keyid=sha256(b"somebody"))
    ),
    "key-no-text": lambda e: _altered(e, lambda b: b["signatures"][0].update(keyid=7)),
    "deep": lambda e: b"[" * 40_000 + b"]" * 40_000,
    "long-number": lambda e: b'{"payload":' + b"9" * 20_000 + b"}",
    "nan": lambda e: b'{"payload":NaN,"payloadType":"","signatures":[]}',
    "surrogate": lambda e: b'{"payload":"\\ud800","payloadType":"","signatures":[]}',
    "as-long-as-a-tag": lambda e: b'{"payload":"' + b"A" * 99_950 + b'"}',
    "utf-16": lambda e: e.decode().encode("utf-16").decode("latin-1").replace("\x00", " ").encode(),
}


@attack(1, variants=FORGED)
def forged_envelope(w: World, forge: Any) -> Scene:
    version = w.blank()
    w.certify(version, forge(w.certificate(version)))
    yield promotion(w, version, "certificate")


@attack(1, variants={"own-id": None, "id-of-the-verifier": "verifier"})
def signed_by_a_stranger(w: World, claimed: str | None) -> Scene:
    version = w.blank()
    made = papers.certificate(version.files, model_name=version.name, registry=IDENTITY)
    keyid = w.keys[claimed].key_id if claimed else None
    w.certify(version, papers.enveloped(papers.payload(made), w.keys["stranger"], keyid=keyid))
    yield promotion(w, version, "signature|unknown key|another key")


@attack(1)
def stranger_beside_the_verifier(w: World) -> Scene:
    """Every signature in an envelope must be by a trusted key."""
    version = w.blank()
    made = papers.certificate(version.files, model_name=version.name, registry=IDENTITY)
    w.certify(
        version, papers.enveloped(papers.payload(made), w.keys["verifier"], w.keys["stranger"])
    )
    yield promotion(w, version, "unknown key")


EDITED: dict[str, Any] = {
    "accuracy": lambda p: p["figures"]["accuracy"].update(k=1000),
    "asr": lambda p: p["figures"]["asr"][0].update(k=0),
    "attempt": lambda p: p.update(attempt=2),
    "expires": lambda p: p.update(expires="2099-01-01T00:00:00Z"),
    "name": lambda p: p.update(model_name="other"),
    "role": lambda p: p.update(figures_from="imported"),
}


@attack(1, variants=EDITED)
def edited_after_signing(w: World, edit: Any) -> Scene:
    version = w.blank()

    def change(body: Any) -> None:
        statement = json.loads(base64.b64decode(body["payload"]))
        edit(statement["predicate"])
        body["payload"] = base64.b64encode(canonical_json(statement)).decode()

    w.certify(version, _altered(w.certificate(version), change))
    yield promotion(w, version, "signature")


# ── Somebody else's certificate ─────────────────────────────────────────────────────────────────


@attack(1)
def replayed_to_another_model(w: World) -> Scene:
    other, version = w.version(), w.version(certified=False)
    w.certify(version, w.certificate(other))
    yield promotion(w, version, other.name)


@attack(1)
def replayed_on_other_bytes(w: World) -> Scene:
    good = w.champion()
    bad = w.version(good.name, seed=1, certified=False)
    w.certify(bad, w.certificate(good))
    yield promotion(w, bad, "model.onnx", serves=(good,))


@attack(15)
def copied_to_another_model(w: World) -> Scene:
    """What `copy_model_version` of MLflow's client does: the tags travel along."""
    good = w.champion()
    name, tag = w.name(), {"kdguard.certificate": w.certificate(good).decode()}
    made = w.created(name, f"models:/{good.name}/{good.number}", None, tag)
    assert made.ok, made.text
    copy = type(good)(name, "1", "", good.files, good.folder, "")
    yield promotion(w, copy, good.name, serves=(good,))


@attack(15)
def copied_over_a_holder(w: World) -> Scene:
    """A copy of another model's certified version as the next version of a guarded one."""
    good, other = w.champion(), w.champion(seed=1)
    tag = {"kdguard.certificate": w.certificate(other).decode()}
    made = w.created(good.name, f"models:/{other.name}/{other.number}", None, tag)
    assert made.ok, made.text
    number = str(made.json()["model_version"]["version"])
    copy = type(good)(good.name, number, "", other.files, other.folder, "")
    yield promotion(w, copy, other.name, serves=(good, other))


@attack(15)
def renamed_to_another_name(w: World) -> Scene:
    """Certified under one name, asked for under another."""
    version = w.version()
    new = w.name()
    w.made("registered-models/rename", name=version.name, new_name=new)
    renamed = type(version)(new, "1", version.run_id, version.files, version.folder, "")
    yield promotion(w, renamed, version.name)


NAMES: dict[str, Any] = {
    "upper": str.upper,
    "prefix": lambda n: n[:-1],
    "suffix": lambda n: n + "0",
    "empty": lambda n: "",
    "space": lambda n: f"{n} ",
    "zero-width": lambda n: f"{n}\u200b",
    "uri": lambda n: f"models:/{n}",
    "workspace": lambda n: f"default/{n}",
    "star": lambda n: "*",
}


@attack(1, variants=NAMES)
def certified_under_another_name(w: World, spell: Any) -> Scene:
    version = w.blank()
    w.certify(version, w.certificate(version, model_name=spell(version.name)))
    yield promotion(w, version, "model|name")


REGISTRIES = {
    "other": "https://elsewhere.example",
    "empty": "",
    "longer": f"{IDENTITY}/",
    "prefix": IDENTITY[:-1],
    "upper": IDENTITY.upper(),
    "credentials": "https://me:pw@registry.example",
    "http": "http://registry.example",
}


@attack(10, variants=REGISTRIES)
def certified_for_another_registry(w: World, registry: str) -> Scene:
    version = w.blank()
    w.certify(version, w.certificate(version, registry=registry))
    yield promotion(w, version, "registry")


# ── Out of date, revoked, compromised ───────────────────────────────────────────────────────────


def dated(past: float, until: float) -> dict[str, str]:
    now = papers.now()
    return {
        "issued": format_time(now + papers.days(past)),
        "expires": format_time(now + papers.days(until)),
    }


DATES = {
    "expired": (dated(-30, -0.001), "expired"),
    "expires-this-moment": (dated(-30, 0), "expired"),
    "from-the-future": (dated(1, 30), "not valid before|issued only"),
    "older-than-the-policy-allows": (dated(-91, 300), "ago"),
    "before-the-key": (dated(-400, 30), "valid from|ago"),
}


@attack(10, variants=DATES)
def out_of_date(w: World, limits: Any) -> Scene:
    dates, says = limits
    version = w.blank()
    made = papers.certificate(version.files, model_name=version.name, registry=IDENTITY, **dates)
    w.certify(version, papers.enveloped(papers.payload(made), w.keys["verifier"]))
    yield promotion(w, version, says)


@attack(10)
def revoked_certificate(w: World) -> Scene:
    version = w.version(certified=False)
    certificate = w.certificate(version)
    revoked = {"certificates": [sha256(certificate)], "keys": {}}
    with w.operated() as folder:
        write_yaml(folder / "revoked.yaml", revoked)
        w.restate({})
        w.certify(version, certificate)
        yield promotion(w, version, "revoked")


@attack(10, variants={"dated-after": -1, "back-dated": -60})
def compromised_key(w: World, issued: float) -> Scene:
    """A thief can write any date: after a compromise nothing by that key counts."""
    version = w.version(certified=False)
    w.certify(version, w.certificate(version, **dated(issued, 20)))
    since = format_time(papers.now() - papers.days(10))
    with w.operated() as folder:
        write_yaml(
            folder / "revoked.yaml",
            {"certificates": [], "keys": {w.keys["verifier"].key_id: since}},
        )
        w.restate({})
        yield promotion(w, version, "compromised|revoked")


@attack(10)
def key_record_says_compromised(w: World) -> Scene:
    version = w.version(certified=False)
    w.certify(version, w.certificate(version, **dated(-60, 20)))
    with w.operated() as folder:
        record = json.loads((folder / "keys" / "verifier.pub").read_bytes())
        record["compromised"] = format_time(papers.now() - papers.days(10))
        (folder / "keys" / "verifier.pub").write_bytes(canonical_json(record) + b"\n")
        w.restate({})
        yield promotion(w, version, "compromised")


@attack(10)
def key_no_longer_valid(w: World) -> Scene:
    version = w.version()
    with w.operated() as folder:
        record = json.loads((folder / "keys" / "verifier.pub").read_bytes())
        record["valid_until"] = format_time(papers.now() - papers.days(10))
        (folder / "keys" / "verifier.pub").write_bytes(canonical_json(record) + b"\n")
        w.restate({})
        yield promotion(w, version, "valid until")


@attack(10)
def key_no_longer_trusted(w: World) -> Scene:
    version = w.version()
    with w.operated() as folder:
        (folder / "keys" / "verifier.pub").unlink()
        w.restate({})
        yield promotion(w, version, "unknown key")
