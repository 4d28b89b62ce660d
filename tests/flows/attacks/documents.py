"""Attempts with the certificate: none, forged, another's, out of date, by the wrong people."""

import base64
import json
from typing import Any

import certificates as c
from flows.attacks import papers
from flows.attacks.table import Attempt, Scene, attack, promotion
from flows.attacks.world import IDENTITY, POLICY, World, files, write_yaml
from mlflow_kdguard.files import canonical_json, sha256
from mlflow_kdguard.records import AuditFigure, Model, Rate, Source, Subject, format_time


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


def _at(past: float, until: float) -> dict[str, str]:
    now = papers.now()
    return {
        "issued": format_time(now + papers.days(past)),
        "expires": format_time(now + papers.days(until)),
    }


DATES = {
    "expired": (_at(-30, -0.001), "expired"),
    "expires-this-moment": (_at(-30, 0), "expired"),
    "from-the-future": (_at(1, 30), "not valid before|issued only"),
    "older-than-the-policy-allows": (_at(-91, 300), "ago"),
    "before-the-key": (_at(-400, 30), "valid from|ago"),
}


@attack(10, variants=DATES)
def out_of_date(w: World, dated: Any) -> Scene:
    dates, says = dated
    version = w.blank()
    made = papers.certificate(version.files, model_name=version.name, registry=IDENTITY, **dates)
    w.certify(version, papers.enveloped(papers.payload(made), w.keys["verifier"]))
    yield promotion(w, version, says)


@attack(10)
def revoked_certificate(w: World) -> Scene:
    version = w.version()
    revoked = {"certificates": [sha256(w.certificate(version))], "keys": {}}
    with w.operated() as folder:
        write_yaml(folder / "revoked.yaml", revoked)
        w.restate({})
        w.certify(version)
        yield promotion(w, version, "revoked")


@attack(10, variants={"dated-after": -1, "back-dated": -60})
def compromised_key(w: World, issued: float) -> Scene:
    """A thief can write any date: after a compromise nothing by that key counts."""
    version = w.version(certified=False)
    w.certify(version, w.certificate(version, **_at(issued, 20)))
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
    w.certify(version, w.certificate(version, **_at(-60, 20)))
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


# ── The wrong people ────────────────────────────────────────────────────────────────────────────


@attack(1)
def builder_only(w: World) -> Scene:
    version = w.blank()
    w.certify(version, w.certificate(version, "builder", figures_from="imported"))
    yield promotion(w, version, "builder|recomputed")


@attack(1)
def verifier_who_only_passes_on(w: World) -> Scene:
    version = w.blank()
    w.certify(version, w.certificate(version, "verifier", figures_from="imported"))
    yield promotion(w, version, "recomputed")


@attack(1)
def builder_who_claims_to_have_measured(w: World) -> Scene:
    version = w.blank()
    made = papers.certificate(version.files, model_name=version.name, registry=IDENTITY)
    w.certify(version, papers.enveloped(papers.payload(made), w.keys["builder"]))
    yield promotion(w, version, "verifier")


@attack(1)
def builder_who_edits_their_own_record(w: World) -> Scene:
    """What a signer believes about their role is no matter: the operator's record decides."""
    version = w.blank()
    made = papers.certificate(
        version.files, model_name=version.name, registry=IDENTITY, tools={"role": "verifier"}
    )
    w.certify(version, papers.enveloped(papers.payload(made), w.keys["builder"]))
    yield promotion(w, version, "verifier")


TWO = POLICY | {"certificate": {"figures_from": "recomputed", "signers_at_least": 2}}
PAIRS = {
    "alone": ("verifier",),
    "two-keys-of-one-owner": ("verifier", "vic-again"),
    "one-key-twice": ("verifier", "verifier"),
}


@attack(1, variants=PAIRS)
def one_owner_where_two_must_sign(w: World, signers: tuple[str, ...]) -> Scene:
    version = w.version(certified=False)
    made = papers.certificate(version.files, model_name=version.name, registry=IDENTITY)
    envelope = papers.enveloped(papers.payload(made), *(w.keys[s] for s in signers))
    with w.operated(policy=TWO):
        w.certify(version, envelope)
        yield promotion(w, version, "owner")


@attack(1, variants={"case": "VIC", "accent": "Víc", "zero-width": "V\u00adic", "space": " Vic "})
def one_owner_under_two_spellings(w: World, owner: str) -> Scene:
    version = w.version(certified=False)
    envelope = w.certificate(version, "verifier", "vic-again")
    with w.operated(policy=TWO) as folder:
        record = json.loads((folder / "keys" / "vic-again.pub").read_bytes()) | {"owner": owner}
        (folder / "keys" / "vic-again.pub").write_bytes(canonical_json(record) + b"\n")
        w.restate({})
        w.certify(version, envelope)
        yield promotion(w, version, "owner|record")


# ── A trusted key, and figures that must not pass ───────────────────────────────────────────────


def _student(files_: Any) -> str:
    return sha256(files_["model.onnx"])


UNFIT: dict[str, Any] = {
    "washed-logits": (lambda s: {"reference": c.gap(gap_mean=0.9)}, "reference"),
    "reference-is-the-student": (
        lambda s: {"reference": c.gap(model=Model(sha256=s), student_gap_max=0.0)},
        "reference",
    ),
    "no-trigger": (lambda s: {"asr": ()}, "asr"),
    "pixel-neutral-trigger": (lambda s: {"asr": (c.asr(changed=Rate(k=0, n=900)),)}, "asr.changed"),
    "backdoor": (lambda s: {"asr": (c.asr(k=800),)}, "asr"),
    "one-bad-trigger": (lambda s: {"asr": (c.asr(), c.asr(trigger=s, k=300))}, "asr"),
    "drop": (lambda s: {"accuracy": Rate(k=600, n=1000),
                        "paired": c.figures().paired.model_copy(  # type: ignore[union-attr]
                            update={"both": 580, "only_teacher": 370, "only_student": 20,
                                    "neither": 30})}, "accuracy"),
    "no-figures-at-all": (
        lambda s: {"accuracy": None, "paired": None, "faithful": (), "export": None, "audit": {},
                   "reference": None, "asr": ()},
        "faithful",
    ),
    "figures-of-another": (lambda s: {"student": Model(sha256=sha256(b"other"))}, "student"),
    "unpinned-data": (
        lambda s: {"measured_on": Source(uri="digits#easy", sha256=sha256(b"easy"))}, "pinned"
    ),
    "friendly-images": (
        lambda s: {"faithful": (papers.faithful(s, indices=tuple(range(c.SAMPLES))),)}, "faithful"
    ),
    "few-images": (
        lambda s: {"faithful": (papers.faithful(s, within=Rate(k=10, n=10),
                                                indices=tuple(range(10))),)}, "faithful"
    ),
    "lucky-images": (
        lambda s: {"faithful": (papers.faithful(s, within=Rate(k=82, n=c.SAMPLES)),)}, "faithful"
    ),
    "tiny-ball": (lambda s: {"faithful": (papers.faithful(s, eps=1e-9),)}, "faithful"),
    "another-pair": (
        lambda s: {"faithful": (papers.faithful(s, student=Model(sha256=sha256(b"x"))),)},
        "faithful",
    ),
    "no-audit": (lambda s: {"audit": {}}, "audit"),
    "audit-of-another": (
        lambda s: {"audit": {"teacher": AuditFigure(model=Model(sha256=s), verdict="clean"),
                             "student": AuditFigure(model=Model(sha256=s), verdict="clean")}},
        "audit",
    ),
    "export-of-another": (
        lambda s: {"export": c.parity(model=Model(sha256=sha256(b"other")))}, "export"
    ),
    "imprecise-export": (
        lambda s: {"export": c.parity(model=Model(sha256=s), softmax_max=0.5)}, "export"
    ),
}  # fmt: skip


@attack(2, variants=UNFIT)
def unfit_figures_by_a_trusted_key(w: World, unfit: Any) -> Scene:
    change, says = unfit
    version = w.blank()
    w.certify(version, w.certificate(version, **change(_student(version.files))))
    yield promotion(w, version, says)


@attack(5)
def tried_again_until_it_passed(w: World) -> Scene:
    """At the hundredth attempt the bound is far wider: 96 of 100 no longer do."""
    version = w.blank()
    borderline = (papers.faithful(_student(version.files), within=Rate(k=88, n=c.SAMPLES)),)
    w.certify(version, w.certificate(version, attempt=100, faithful=borderline))
    yield promotion(w, version, "faithful")


def _payload(version: Any, edit: Any) -> bytes:
    """A payload that our own issuer would refuse, before it is signed by a trusted key."""
    made = papers.certificate(version.files, model_name=version.name, registry=IDENTITY)
    statement = json.loads(papers.payload(made))
    edited = edit(statement)
    return canonical_json(statement) if edited is None else bytes(edited)


MALFORMED: dict[str, Any] = {
    "nan": lambda s: canonical_json(s).replace(b'"gap_mean":0.05', b'"gap_mean":NaN'),
    "infinity": lambda s: canonical_json(s).replace(b'"gap_mean":0.05', b'"gap_mean":-Infinity'),
    "overflow": lambda s: canonical_json(s).replace(b'"gap_mean":0.05', b'"gap_mean":1e999'),
    "minus": lambda s: s["predicate"]["figures"]["reference"].update(gap_mean=-1.0),
    "null": lambda s: s["predicate"]["figures"]["reference"].update(gap_mean=None),
    "text": lambda s: s["predicate"]["figures"]["reference"].update(gap_mean="0.05"),
    "true": lambda s: s["predicate"]["figures"]["reference"].update(gap_mean=True),
    "more-than-all": lambda s: s["predicate"]["figures"]["accuracy"].update(k=2000, n=1000),
    "of-none": lambda s: s["predicate"]["figures"]["accuracy"].update(k=0, n=0),
    "attempt-zero": lambda s: s["predicate"].update(attempt=0),
    "attempt-minus": lambda s: s["predicate"].update(attempt=-1),
    "schema": lambda s: s["predicate"].update(schema="kdguard.certificate/99"),
    "unknown-key": lambda s: s["predicate"].update(approved=True),
    "no-subject": lambda s: s.update(subject=[]),
    "subjects-differ": lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
    "predicate-type": lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"),
    "no-predicate": lambda s: s.pop("predicate") and None,
    "repeated-key": lambda s: canonical_json(s)[:-1] + b',"predicate":{}}',
    "spaces": lambda s: json.dumps(s, indent=1, sort_keys=True).encode(),
    "camel": lambda s: s["predicate"].update(modelName="other"),
    "date": lambda s: s["predicate"].update(expires="never"),
    "date-without-zone": lambda s: s["predicate"].update(expires="2099-01-01T00:00:00"),
    "huge-number": lambda s: s["predicate"]["figures"]["accuracy"].update(k=1, n=10**4000),
    "not-json": lambda s: b"\xff\xfe",
}


@attack(9, variants=MALFORMED)
def malformed_payload_by_a_trusted_key(w: World, edit: Any) -> Scene:
    version = w.blank()
    w.certify(version, papers.enveloped(_payload(version, edit), w.keys["verifier"]))
    yield promotion(w, version, "certificate|accuracy")


SUBJECTS: dict[str, Any] = {
    "one-file-left-out": lambda s: s[1:],
    "one-file-more": lambda s: (*s, Subject(path="extra.bin", sha256=sha256(b""))),
    "only-the-model": lambda s: tuple(x for x in s if x.path == "model.onnx"),
    "one-of-another-file": lambda s: (Subject(path=s[0].path, sha256=sha256(b"?")), *s[1:]),
    "named-twice": lambda s: (*s, s[-1]),
}


@attack(11, variants=SUBJECTS)
def certified_other_files(w: World, choose: Any) -> Scene:
    version = w.blank()
    honest = papers.certificate(version.files)
    made = papers.certificate(
        version.files, model_name=version.name, registry=IDENTITY, subjects=choose(honest.subjects)
    )
    try:
        data = papers.payload(made)
    except Exception:  # our own writer refuses some; a stranger's would not
        statement = json.loads(papers.payload(honest))
        statement["subject"] = [
            {"name": s.path, "digest": {"sha256": s.sha256}} for s in made.subjects
        ]
        statement["predicate"] = made.document()
        data = canonical_json(statement)
    w.certify(version, papers.enveloped(data, w.keys["verifier"]))
    yield promotion(w, version, "certif")


@attack(15)
def everything_wrong_at_once(w: World) -> Scene:
    """Every reason is named, not only the first."""
    version = w.version(seed=2, certified=False)
    made = papers.certificate(
        files(3), model_name="other", registry="https://elsewhere.example",
        asr=(c.asr(k=800),), **_at(-200, -100),
    )  # fmt: skip
    w.certify(version, papers.enveloped(papers.payload(made), w.keys["verifier"]))
    yield promotion(w, version, "expired", "other", "elsewhere", "model.onnx", "asr")


@attack(15)
def certificate_of_a_deleted_version(w: World) -> Scene:
    """The number of a deleted version is not free for another file."""
    good = w.version()
    envelope = w.certificate(good)
    body = {"name": good.name, "version": good.number}
    assert w.call("model-versions/delete", body, method="DELETE").ok
    bad = w.version(good.name, seed=4, certified=False)
    w.certify(bad, envelope)
    yield Attempt(lambda: w.alias(good), status=(404,), logged=None)
    yield promotion(w, bad, "model.onnx")
