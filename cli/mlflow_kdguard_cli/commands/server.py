"""`kdguard server`: what the operator of a gated registry asks, and does."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.commands.glass import override
from mlflow_kdguard_cli.commands.keys import moment

if TYPE_CHECKING:
    from sqlalchemy import RowMapping

    from mlflow_kdguard.attest import Verifier
    from mlflow_kdguard.plugin.log import LogReport
    from mlflow_kdguard.plugin.server.settings import Settings

FILE = click.Path(path_type=Path)
SETTINGS = click.option(
    "--settings", type=FILE, envvar="KDGUARD_SERVER", help="Settings file of the gated server."
)
DATABASE = click.option(
    "--database",
    metavar="URI",
    envvar=["MLFLOW_REGISTRY_STORE_URI", "MLFLOW_BACKEND_STORE_URI"],
    help="The registry's database, with or without `kdguard+`.",
)


@click.group()
def server() -> None:
    """Operate a gated registry: check its settings, read its log, revoke, override.

    These commands read the settings file and the database where the server reads them; the server
    may be running or not. --settings and --database may come from the variables that start it
    (KDGUARD_SERVER, MLFLOW_REGISTRY_STORE_URI, MLFLOW_BACKEND_STORE_URI).
    """


server.add_command(override)


@server.command()
@SETTINGS
@DATABASE
@options.as_json
def check(settings: Path | None, database: str | None, as_json: bool) -> int:
    """Would a gated server start with these settings? Exit code 3 says no.

    Asks for the settings, the policy, the keys, the log's key, the roots, the content root, the
    published heads and, with --database, the version of the tables, of the settings that were in
    force, and the log's end. Changes nothing.
    """
    from mlflow_kdguard.errors import REFUSED
    from mlflow_kdguard.plugin.server.startup import examine
    from mlflow_kdguard_cli import render

    path = _named(settings, "--settings", "KDGUARD_SERVER")
    found = examine(path, database, now=datetime.now(UTC))
    words = {True: "ok", False: "NO"}
    rows = [(f.what, "look" if f.ok and f.warning else words[f.ok], f.why) for f in found]
    ok = all(finding.ok for finding in found)
    render.table(f"Server settings {path}", ("", "", ""), rows, left=True)
    render.say("a server would start" if ok else "REFUSED: a server would not start")
    listed = [{"what": f.what, "ok": f.ok, "warning": f.warning, "why": f.why} for f in found]
    render.document({"schema": "kdguard.server/1", "ok": ok, "findings": listed}, as_json)
    return 0 if ok else REFUSED


@server.group()
def log() -> None:
    """Check, read and resume the log of guarded changes.

    The log is kept in the registry's database. Its entries are chained, its head is signed, and
    every head is published to a file outside of the database.
    """


@log.command()
@SETTINGS
@DATABASE
@click.option("--heads", type=FILE, help="The published heads; default: the settings' log.head.")
@click.option(
    "--key",
    "keys",
    type=FILE,
    multiple=True,
    help="Public record (.pub) of a key that signed heads; default: the settings' keys.",
)
@options.as_json
def verify(
    settings: Path | None,
    database: str | None,
    heads: Path | None,
    keys: tuple[Path, ...],
    as_json: bool,
) -> int:
    """Does the whole log hold? Exit code 3 says no, and lists what does not.

    \b
    kdguard server log verify --database postgresql+psycopg2://… --settings server.yaml
    kdguard server log verify --database sqlite:///copy.db --heads log-head.jsonl --key log.pem.pub
    """
    from mlflow_kdguard.attest import Verifier
    from mlflow_kdguard.errors import REFUSED
    from mlflow_kdguard.plugin.log import database as databases
    from mlflow_kdguard.plugin.log import verify as verified
    from mlflow_kdguard_cli import render

    stated = None if settings is None or (keys and heads) else _loaded(settings)
    trusted: Sequence[Verifier] = [Verifier.load(key) for key in keys] or _signers(stated)
    file = heads or (None if stated is None else stated.head)
    uri = _named(database, "--database", "MLFLOW_REGISTRY_STORE_URI")
    with databases.opened(uri) as engine, engine.connect() as connection:
        report = verified(connection, verifiers=trusted, heads=file)
    _say(report)
    render.document(report.document(), as_json)
    return 0 if report.ok else REFUSED


@log.command()
@DATABASE
@click.option("--model", help="Entries about this registered model only.")
@click.option("--last", type=click.IntRange(1), default=20, show_default=True, help="How many.")
@options.as_json
def show(database: str | None, model: str | None, last: int, as_json: bool) -> None:
    """The last entries, oldest first. Nothing is checked here.

    Who did what to which guarded name, when, with which certificate, and why it was refused.
    """
    from mlflow_kdguard.plugin.log import database as databases
    from mlflow_kdguard.plugin.log import latest
    from mlflow_kdguard_cli import render

    uri = _named(database, "--database", "MLFLOW_REGISTRY_STORE_URI")
    with databases.opened(uri) as engine, engine.connect() as connection:
        rows = latest(connection, last, model=model)
    columns = ("entry", "time", "actor", "action", "model", "version", "alias", "decision")
    render.table("Log", columns, map(_cells, rows), left=True)
    listed = [dict(row) for row in rows]
    render.document({"schema": "kdguard.entries/1", "entries": listed}, as_json)


@log.command()
@SETTINGS
@DATABASE
@click.option("--reason", required=True, help="Why the log goes on from here; it is logged.")
@options.as_json
def resume(settings: Path | None, database: str | None, reason: str, as_json: bool) -> int:
    """Go on after the database was restored, or the log's key was lost.

    The chain itself must hold (exit code 3 otherwise); what it lacks against the published heads
    is logged together with the reason. The file of published heads is kept under another name, and
    a new one begins. Run it once you know why `kdguard server log verify` fails.
    """
    from mlflow_kdguard.errors import REFUSED
    from mlflow_kdguard.plugin.log import database as databases
    from mlflow_kdguard.plugin.log.resuming import go_on
    from mlflow_kdguard_cli import render

    stated = _loaded(_named(settings, "--settings", "KDGUARD_SERVER"))
    uri = _named(database, "--database", "MLFLOW_REGISTRY_STORE_URI")
    with databases.opened(uri) as engine:
        done = go_on(
            engine, heads=stated.head, signer=stated.signer, reason=reason, now=datetime.now(UTC)
        )
    if done.entry is None:
        _say(done.report)
        render.document(done.report.document(), as_json)
        return REFUSED
    render.say(f"entry {done.entry.seq} goes on; the former heads are in {done.kept or '(none)'}")
    body = {"entry": done.entry.seq, "kept": None if done.kept is None else str(done.kept)}
    render.document({"schema": "kdguard.resume/1", **body}, as_json)
    return 0


@server.command()
@click.argument("targets", nargs=-1, required=True, metavar="CERTIFICATE|KEY...")
@SETTINGS
@click.option(
    "--since",
    metavar="TIME|now",
    callback=moment,
    default="now",
    show_default=True,
    help="For keys: since when others may have known it.",
)
@options.as_json
def revoke(targets: tuple[str, ...], settings: Path | None, since: datetime, as_json: bool) -> None:
    """Take certificates and keys back, at once, on a running server.

    Each is a file (a certificate, or a .pub record) or 64 hex digits. Adds them to the list of
    revocations that the settings name, and raises the settings' version. What serves already stays
    where it is: `kdguard sweep` names it.
    """
    from mlflow_kdguard.plugin.server import revoking
    from mlflow_kdguard_cli import render

    path = _named(settings, "--settings", "KDGUARD_SERVER")
    found = [revoking.target(text, _loaded(path)) for text in targets]
    named = {kind: tuple(name for k, name in found if k == kind) for kind in _KINDS}
    listed, version = revoking.revoke(path, named["certificate"], named["key"], since=since)
    for kind, name in found:
        render.say(f"revoked: {kind} {name}")
    render.say(f"{path} has version {version} now")
    body = {"schema": "kdguard.revoke/1", "version": version, "revoked": listed.document()}
    render.document(body, as_json)


_KINDS = ("certificate", "key")


def _named(value: Any, option: str, variable: str) -> Any:
    from mlflow_kdguard.errors import UsageError

    if value is None:
        raise UsageError(f"{option} is missing.", remedy=f"Name it, or set {variable}.")
    return value


def _loaded(path: Path) -> "Settings":
    from mlflow_kdguard.plugin.server.settings import Settings

    return Settings.load(path)


def _signers(settings: "Settings | None") -> "Sequence[Verifier]":
    return () if settings is None else (settings.signer.verifier, *settings.verifiers)


def _say(report: "LogReport") -> None:
    from mlflow_kdguard_cli import render

    for problem in report.problems:
        render.say(f"  {problem}")
    for note in report.notes:
        render.say(f"  note: {note}")
    verdict = "holds" if report.ok else "DOES NOT HOLD"
    render.say(
        f"the log {verdict}: {report.entries} entries, {report.published} published heads compared"
    )


def _cells(row: "RowMapping") -> Sequence[str]:
    names = ("seq", "time", "actor", "action", "model", "version", "alias", "decision")
    return [str(row[name]) for name in names]
