"""`kdguard server override`: break-glass, signed by two owners."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.commands.keys import moment

if TYPE_CHECKING:
    from mlflow_kdguard.attest.overrides import Override

FILE = click.Path(path_type=Path)
KEY = click.option("--key", type=FILE, required=True, envvar="KDGUARD_KEY", help="Signing key.")
FILES = "All files of the version: its folder, or its model file where there is only one."


@click.group()
def override() -> None:
    """Break-glass: promote a version that the policy refuses.

    Two different owners sign a document that names the version by its bytes, the alias, a reason
    and an end at most seven days away; the server takes it as the version's tag `kdguard.override`
    where its settings say `overrides: true`, and logs each use.

    \b
    kdguard server override sign --model m --version 3 --alias champion --files bundle/ \\
        --registry http://registry --reason "the champion is down" --hours 12 --key ann.pem \\
        --out override.json
    kdguard server override cosign override.json --key bob.pem --files bundle/
    """


@override.command()
@click.option("--model", required=True, help="Registered model.")
@click.option("--version", required=True, help="Version that shall be promoted.")
@click.option("--alias", required=True, help="Alias or stage that it shall have.")
@click.option("--files", type=FILE, required=True, help=FILES)
@click.option("--reason", required=True, help="Why; it is logged.")
@click.option(
    "--until", metavar="TIME", callback=moment, help="Its end: ISO 8601 with a time zone."
)
@click.option("--hours", type=click.FloatRange(0, 168, min_open=True), help="Its end, from now.")
@click.option("--registry", required=True, help="The registry, as the server's settings name it.")
@click.option("--workspace", default="default", show_default=True, help="Workspace of the model.")
@KEY
@click.option("--out", type=FILE, default=Path("override.json"), show_default=True, help="File.")
@options.as_json
def sign(**flags: Any) -> None:
    """Write and sign an override as its first owner.

    It does not count before another owner has signed it, too (`override cosign`).
    """
    from mlflow_kdguard.attest import Signer, overrides
    from mlflow_kdguard.files import write_bytes
    from mlflow_kdguard_cli import render

    now = datetime.now(UTC)
    stated = _drafted(flags, now)
    write_bytes(flags["out"], overrides.issue(stated, Signer.load(flags["key"]), now=now))
    _say(stated)
    render.say(f"signed {flags['out']}; another owner must sign it: kdguard server override cosign")
    render.document(stated.document(), flags["as_json"])


@override.command()
@click.argument("document", type=FILE)
@KEY
@click.option("--files", type=FILE, help=f"{FILES} With it, their digests are compared.")
@click.option("--yes", is_flag=True, help="Sign without being asked.")
@options.as_json
def cosign(document: Path, key: Path, files: Path | None, yes: bool, as_json: bool) -> None:
    """Read an override, and sign it as its second owner.

    DOCUMENT is replaced by the one with both signatures. Then the version gets it as a tag, and the
    alias is set:

    \b
    client.set_model_version_tag("m", "3", "kdguard.override", Path("override.json").read_text())
    client.set_registered_model_alias("m", "champion", "3")
    """
    from mlflow_kdguard.attest import Signer, overrides
    from mlflow_kdguard.files import read_bytes, write_bytes
    from mlflow_kdguard_cli import render

    envelope = read_bytes(document, what="the override")
    stated = overrides.read(envelope)
    _say(stated)
    if files is not None:
        _compare(stated, files)
    if not yes:
        click.confirm("Sign this?", abort=True, err=True)
    now = datetime.now(UTC)
    write_bytes(document, overrides.cosign(envelope, Signer.load(key), now=now))
    render.say(f"signed {document}")
    render.document(stated.document(), as_json)


@override.command()
@click.argument("document", type=FILE)
@click.option(
    "--key",
    "keys",
    type=FILE,
    multiple=True,
    help="Public record (.pub) of an owner; repeat. With any, the signatures are checked.",
)
@options.as_json
def show(document: Path, keys: tuple[Path, ...], as_json: bool) -> None:
    """What an override says, and whether it would count now.

    Without --key nothing is believed. With the owners' keys, exit code 8 says what does not hold:
    a signature, one owner twice, a key that is not valid, an end that is past. The files are
    compared by the server.
    """
    from mlflow_kdguard.attest import Verifier, overrides
    from mlflow_kdguard.files import read_bytes
    from mlflow_kdguard_cli import render

    envelope = read_bytes(document, what="the override")
    stated = overrides.read(envelope)
    _say(stated)
    body: dict[str, Any] = stated.document()
    if keys:
        trusted = [Verifier.load(key) for key in keys]
        owners = overrides.signed_by(envelope, verifiers=trusted, now=datetime.now(UTC))
        render.say(f"holds: signed by {', '.join(owners)}")
        body["owners"] = list(owners)
    render.document(body, as_json)


def _drafted(flags: dict[str, Any], now: datetime) -> "Override":
    from pydantic import ValidationError

    from mlflow_kdguard.attest import subjects_of
    from mlflow_kdguard.attest.overrides import Override
    from mlflow_kdguard.config import explain
    from mlflow_kdguard.errors import UsageError
    from mlflow_kdguard.records import format_time

    until, hours = flags["until"], flags["hours"]
    if (until is None) == (hours is None):
        raise UsageError("the override has no end, or two.", remedy="Name --until or --hours.")
    now = now.replace(microsecond=0)
    end = until or now + timedelta(hours=hours)
    same = ("model", "version", "alias", "reason", "registry", "workspace")
    try:
        return Override(
            **{key: flags[key] for key in same},
            issued=format_time(now),
            until=format_time(end),
            subjects=subjects_of(_read(flags["files"])),
        )
    except ValidationError as error:
        raise UsageError(f"this is no override: {explain(error)}") from error


def _read(path: Path) -> dict[str, bytes]:
    from mlflow_kdguard import bundle
    from mlflow_kdguard.files import read_bytes

    if path.is_dir():
        return bundle.read(path)
    return {path.name: read_bytes(path, what="the model")}


def _compare(stated: "Override", files: Path) -> None:
    from mlflow_kdguard.attest import subjects_of
    from mlflow_kdguard.errors import CertificateError

    if set(subjects_of(_read(files))) != set(stated.subjects):
        raise CertificateError(
            f"the override names other files than those in {files}.",
            remedy="Ask its first owner which bytes he meant.",
        )


def _say(stated: "Override") -> None:
    from mlflow_kdguard_cli import render

    render.say(f"{stated.model} version {stated.version} as {stated.alias}, in {stated.registry}")
    render.say(f"  workspace {stated.workspace}; from {stated.issued} until {stated.until}")
    render.say(f"  reason: {stated.reason}")
    for subject in stated.subjects:
        render.say(f"  {subject.path}  {subject.sha256}")
