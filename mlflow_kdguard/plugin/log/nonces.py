"""Nonces: every measurement of a model counts as an attempt, whether or not its result is shown.

A borderline model passes sooner or later if it may be measured anew until it does. So a verifier
asks the server for a nonce first; the server counts, and the gate divides its error level among
the attempts. They are counted a model name, over all files, since another file is as cheap as
another draw; nothing sets the count back.
"""

import secrets
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, insert, select, update

from mlflow_kdguard.attest.signing import Signer, Verifier
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.files import digest_json
from mlflow_kdguard.plugin.log import tables
from mlflow_kdguard.plugin.log.chain import Entry, Event, append, lock
from mlflow_kdguard.plugin.log.heads import stamp
from mlflow_kdguard.plugin.log.tables import Database


@dataclass(frozen=True, slots=True)
class Nonce:
    """A nonce as it was handed out: for which file of which model, and the how-manieth attempt.

    `subject` is the SHA-256 that was named, `used_by` that of the certificate that was accepted
    with it. `entry` is the log's, where the nonce was just made.
    """

    nonce: str
    attempt: int
    workspace: str
    model: str
    subject: str
    issued: str
    used_by: str | None = None
    entry: Entry | None = None


def issue(
    session: Database,
    model: str,
    workspace: str,
    subject: str,
    now: datetime,
    *,
    actor: str = "system",
    signer: Signer | None = None,
    verifiers: tuple[Verifier, ...] = (),
) -> Nonce:
    """Hand out a nonce, and log it: 32 hex digits that were never used before.

    Takes the log's lock (see lock()). Every call is an attempt. Raises as append() does.
    """
    lock(session)
    asked = Event(
        actor=actor,
        action="nonce",
        workspace=workspace,
        model=model,
        certificate=subject,
        decision="issued",
    )
    series = series_of(asked.workspace, asked.model)
    count = select(func.max(tables.nonces.c.attempt)).where(tables.nonces.c.series == series)
    attempt = (session.execute(count).scalar() or 0) + 1
    nonce = secrets.token_hex(16)
    event = asked.model_copy(update={"reasons": (nonce, str(attempt))})
    entry = append(session, event, now=now, signer=signer, verifiers=verifiers)
    made = Nonce(nonce, attempt, event.workspace, event.model, event.certificate, stamp(now))
    row = {key: getattr(made, key) for key in ("nonce", "attempt", *_STATED)}
    session.execute(insert(tables.nonces), [row | {"series": series}])
    return Nonce(**row, entry=entry)


def find(session: Database, nonce: str) -> Nonce | None:
    """The nonce as it was handed out, or None; it takes no lock."""
    found = session.execute(select(tables.nonces).where(tables.nonces.c.nonce == nonce)).mappings()
    row = found.one_or_none()
    if row is None or row["nonce"] != nonce:  # MySQL compares without regard to case
        return None
    return Nonce(**{key: row[key] for key in ("nonce", "attempt", *_STATED, "used_by")})


def use(session: Database, nonce: str, certificate: str) -> Nonce:
    """Spend a nonce on the certificate with that SHA-256; once more for the same one is fine.

    Call it inside of the promotion's transaction, after lock(). The caller compares `model`,
    `workspace` and `subject` with what is promoted. Raises CertificateError for a nonce that was
    never handed out, or that another certificate has spent.
    """
    mine = (tables.nonces.c.nonce == nonce) & tables.nonces.c.used_by.is_(None)
    session.execute(update(tables.nonces).where(mine).values(used_by=certificate))
    found = find(session, nonce)
    if found is None:
        raise CertificateError(
            f"the nonce {nonce[:64]!r} was not handed out by this server.",
            remedy="Ask the server for one: `kdguard verify`.",
        )
    if found.used_by != certificate:
        raise CertificateError(
            f"the nonce {nonce} was spent on another certificate ({found.used_by}).",
            remedy="Measure again with a new nonce: `kdguard verify`.",
        )
    return found


def series_of(workspace: str, model: str) -> str:
    """What attempts are counted under: the digest of a workspace and a model's name."""
    return digest_json([workspace, model])


_STATED = ("workspace", "model", "subject", "issued")
