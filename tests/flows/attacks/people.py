"""Attempts with certificates by the wrong people: builders alone, one owner where two must sign."""

import json

from flows.attacks import papers
from flows.attacks.settled import IDENTITY, POLICY
from flows.attacks.table import Scene, attack, promotion
from flows.attacks.world import World
from mlflow_kdguard.files import canonical_json


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
