"""`kdguard keygen` and `key`: signing keys, from their making to their end."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options

if TYPE_CHECKING:
    from mlflow_kdguard.attest import Verifier

FILE = click.Path(path_type=Path)
LONGEST = 36_500  # days; a policy asks for no more


def moment(_context: click.Context, option: click.Parameter, given: str | None) -> datetime | None:
    """An option's moment: ISO 8601 with a time zone, or `now`."""
    if given is None or given == "now":
        return None if given is None else datetime.now(UTC)
    from mlflow_kdguard.records import parse_time

    try:
        return parse_time(given)
    except ValueError as error:
        raise click.BadParameter(
            f"{given!r} is no moment with a time zone (2026-03-01T12:00:00Z).", param=option
        ) from error


@click.command()
@click.argument("path", type=FILE)
@click.option("--owner", required=True, help="Whose key this is.")
@click.option(
    "--role",
    type=click.Choice(["builder", "verifier"]),
    default="builder",
    show_default=True,
    help="Only a verifier may sign `recomputed` figures.",
)
@click.option("--days", type=click.IntRange(min=1, max=LONGEST), help="Validity; default: no end.")
@click.option(
    "--from", "start", metavar="TIME", callback=moment, help="Start of its validity; default: now."
)
@options.as_json
def keygen(path: Path, days: int | None, start: datetime | None, **flags: Any) -> None:
    """Make a signing key with an owner and a role.

    Make a signing key PATH (private, mode 0600) and its public record PATH.pub.

    Hand the .pub file to whoever checks. Nothing is ever overwritten.
    """
    from mlflow_kdguard.attest import signing
    from mlflow_kdguard_cli import render

    begun = start or datetime.now(UTC)
    until = None if days is None else begun + timedelta(days=days)
    signer = signing.keygen(
        path, owner=flags["owner"], role=flags["role"], now=begun, valid_until=until
    )
    render.say(f"private key {path}, public record {signing.public_path(path)}")
    render.document(signer.verifier.record.document(), flags["as_json"])


@click.group()
def key() -> None:
    """End a key: retire it, or declare it compromised.

    Each writes a new record in the place of FILE.pub, whole or not at all; hand it to whoever
    checks. A record is only ever tightened: an earlier end, an earlier compromise.

    To rotate, make the new key first, let the old one end when the new one begins, and trust both
    until the last certificate of the old one has expired.
    """


AT = click.option(
    "--at", required=True, metavar="TIME|now", callback=moment, help="ISO 8601 with a time zone."
)
RECORD = click.argument("record", metavar="FILE.pub", type=FILE)


@key.command()
@RECORD
@AT
@options.as_json
def retire(record: Path, at: datetime, as_json: bool) -> None:
    """Nothing that the key signs after --at counts.

    What it signed until then stays valid. This is for a key that nobody else has known: whoever
    has its private part can still date a certificate back (`kdguard key compromise`).

    \b
    kdguard key retire builder.pem.pub --at 2026-03-01T00:00:00Z
    """
    from mlflow_kdguard import attest

    _end(record, at, as_json, attest.retire, "ends at")


@key.command()
@RECORD
@AT
@options.as_json
def compromise(record: Path, at: datetime, as_json: bool) -> None:
    """Others may have known the private key since --at.

    From that moment on nothing that it ever signed counts, since whoever has it can write any
    date. Have what it signed measured and signed again.

    \b
    kdguard key compromise builder.pem.pub --at now
    """
    from mlflow_kdguard import attest

    _end(record, at, as_json, attest.compromise, "is compromised since")


def _end(
    record: Path, at: datetime, as_json: bool, change: Callable[..., "Verifier"], what: str
) -> None:
    from mlflow_kdguard.records import format_time
    from mlflow_kdguard_cli import render

    changed = change(record, at=at).record
    render.say(
        f"{record}: the key {changed.key[:16]}… of {changed.owner} {what} {format_time(at)}; "
        "replace every copy of this record"
    )
    render.document(changed.document(), as_json)
