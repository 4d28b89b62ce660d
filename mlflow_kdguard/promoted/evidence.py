"""Everything that speaks against the bytes and the certificate of one model version."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

import yaml

from mlflow_kdguard import attest, bundle, plain_yaml
from mlflow_kdguard.artifacts import ADDED_BY_CLIENT
from mlflow_kdguard.attest import Checked
from mlflow_kdguard.errors import CertificateError, ModelError
from mlflow_kdguard.files import sha256
from mlflow_kdguard.promoted.trust import Trust
from mlflow_kdguard.records import parse_time
from mlflow_kdguard.registry.bundle import Bundle

Kind = Literal[
    "uncertified", "untrusted", "revoked", "expired", "expiring", "drifted", "shape"
]  # fmt: skip
"""uncertified: no certificate · untrusted: one that is not believed · revoked: it, or its key ·
expired, expiring: by its date · drifted: other bytes than certified · shape: the bundle could
serve something else."""

_CERTIFY = "Certify and promote it anew, or take the alias away."
_RESTORE = "Restore the certified files from a backup, or take the alias away; find out who wrote."
_RENEW = "Measure and sign again (`kdguard verify`), and promote the version with it."

_LONGEST_NOTE = 1 << 12

LATE: tuple[Kind, ...] = ("expired", "expiring")
"""What time alone does: a warning for a model that serves already."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that does not hold, and what to do about it."""

    kind: Kind
    why: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was found: the certificate where it is believed, its digest, and every fault."""

    checked: Checked | None
    envelope_sha256: str | None
    faults: tuple[Fault, ...]


def examine(
    stored: Bundle,
    trust: Trust,
    *,
    now: datetime,
    registries: Collection[str],
    within: timedelta = timedelta(0),
) -> Evidence:
    """Hold a version's bytes against its certificate, and list all that is wrong.

    `registries` are the identities that a certificate may name, `within` is how soon an end of
    validity is worth a word. Nothing about the version raises.
    """
    stored = replace(stored, files=_without_notes(stored.files))
    shape = _shape(stored)
    envelope = stored.certificate()
    if envelope is None:
        why = f"{stored.uri} carries no certificate."
        return Evidence(None, None, (*shape, Fault("uncertified", why, _CERTIFY)))
    digest = sha256(envelope)
    try:
        if taken := trust.revocation(envelope, now):
            return Evidence(None, digest, (*shape, Fault("revoked", f"{taken}.", _CERTIFY)))
        checked = _believed(stored, envelope, trust, now, registries)
    except CertificateError as error:
        return Evidence(
            None, digest, (*shape, Fault("untrusted", error.message, error.remedy or _CERTIFY))
        )
    faults = (*shape, *_drift(stored, checked), *_late(checked, now, within))
    return Evidence(checked, digest, faults)


def _without_notes(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The files without the note that MLflow's client leaves where it loads from.

    In a content root two versions with the same bytes share a folder, so the note may name another
    one than ours. Only a note that says no more than a name and a version is left out.
    """
    note = files.get(ADDED_BY_CLIENT)
    if note is None or len(note) > _LONGEST_NOTE:
        return files
    try:
        said = plain_yaml.parse(note)
    except ValueError:
        return files
    if not isinstance(said, dict) or said.keys() != {"model_name", "model_version"}:
        return files
    plain = all(isinstance(value, str | int) for value in said.values())
    if not plain or yaml.safe_dump(said, allow_unicode=True).encode() != note:
        return files
    return {path: data for path, data in files.items() if path != ADDED_BY_CLIENT}


def _believed(
    stored: Bundle, envelope: bytes, trust: Trust, now: datetime, registries: Collection[str]
) -> Checked:
    checked = attest.check(
        envelope,
        files=None,
        verifiers=trust.verifiers,
        now=now,
        model_name=stored.name,
        waive_expiry=True,
    )
    if checked.certificate.registry not in registries:
        raise CertificateError(
            f"the certificate was issued for the registry {checked.certificate.registry!r}, "
            f"not {' or '.join(repr(name) for name in sorted(registries))}.",
            remedy="Where that is another name of this registry, say so (registry=…, --registry).",
        )
    return checked


def _shape(stored: Bundle) -> tuple[Fault, ...]:
    try:
        bundle.check(stored.files)
    except ModelError as error:
        return (Fault("shape", error.message, error.remedy),)
    return ()


def _drift(stored: Bundle, checked: Checked) -> list[Fault]:
    """Every file that is not the certified one."""
    certified = {subject.path: subject.sha256 for subject in checked.certificate.subjects}
    actual = stored.digests
    reasons = [
        *(f"{path} is certified, and missing" for path in sorted(certified.keys() - actual)),
        *(f"{path} is there, and not certified" for path in sorted(actual.keys() - certified)),
        *(
            f"{path} has SHA-256 {actual[path]}, certified is {certified[path]}"
            for path in sorted(certified.keys() & actual)
            if actual[path] != certified[path]
        ),
    ]
    return [Fault("drifted", f"{why}.", _RESTORE) for why in reasons]


def _late(checked: Checked, now: datetime, within: timedelta) -> tuple[Fault, ...]:
    text = checked.certificate.expires
    expires = parse_time(text)
    if now >= expires:
        return (Fault("expired", f"the certificate expired at {text}.", _RENEW),)
    if now + within >= expires:
        return (Fault("expiring", f"the certificate expires at {text}.", _RENEW),)
    return ()
