"""`kdguard adopt`: what a registry holds, and what a gate in front of it would need."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options

if TYPE_CHECKING:
    from mlflow_kdguard.promoted.adopt import Found, Inventory

_SHOWN = 40
"""Rows of a table for people; the document has all."""


@click.command()
@options.policy
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the drafted server settings to this file, which must not exist.",
)
@options.registry_options
@options.as_json
def adopt(**flags: Any) -> int:
    """Take stock of a registry that a gate is to guard.

    Lists every model and version: the guarded names that it holds, whether it carries a
    certificate, where its bytes lie, what they are by the names of the files, and what to do next.
    A settings file for the gated server is drafted from that. Nothing is changed, and nothing of
    a model is downloaded or loaded.

    \b
    kdguard adopt --tracking-uri http://127.0.0.1:5000 --out server.yaml
    """
    from mlflow_kdguard.promoted.adopt import adopt as adopted
    from mlflow_kdguard_cli import render

    _refuse_existing(flags["out"])
    policy = options.named_policy(flags["policy_file"])
    connection = options.connected(flags)
    with render.progress() as progress:
        found = adopted(connection, policy, now=datetime.now(UTC), progress=progress)
    _show(found)
    if flags["out"] is not None:
        _write(flags["out"], found.settings)
    render.document(found.document(), flags["as_json"])
    return 0


def _refuse_existing(path: Path | None) -> None:
    from mlflow_kdguard.errors import UsageError

    if path is not None and path.exists():
        raise UsageError(f"{path} exists already.", remedy="Name a new file, or take it away.")


def _write(path: Path, settings: str) -> None:
    from mlflow_kdguard.files import write_bytes
    from mlflow_kdguard_cli import render

    write_bytes(path, settings.encode())
    render.say(f"drafted the settings of a gated server in {path}; read them before you use them")


def _show(found: "Inventory") -> None:
    from mlflow_kdguard_cli import render

    guarded = found.guarded
    if guarded:
        render.listed(
            f"Guarded names of {found.registry}",
            ("version", "names", "formats", "what a gate needs"),
            [_row(version) for version in guarded[:_SHOWN]],
        )
        _more(len(guarded))
    if found.versions:
        render.listed(
            "Where the bytes lie",
            ("root", "versions", "allow-list"),
            [
                (root.uri, str(root.versions), "proposed" if root.proposed else "judge it yourself")
                for root in found.roots[:_SHOWN]
            ],
        )
        _more(len(found.roots))
    for line in found.attention:
        render.say(f"attention: {_printable(line)}")
    kinds = Counter(version.verdict for version in found.versions)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    models = render.counted(found.models, "model")
    versions = render.counted(len(found.versions), "version")
    render.say(f"{models}, {versions} ({told or 'none'})")
    certified = sum(version.certificate is not None for version in guarded)
    holders = render.counted(len(guarded), "version")
    render.say(f"guarded names are on {holders}, {certified} of them certified")


def _more(count: int) -> None:
    from mlflow_kdguard_cli import render

    if count > _SHOWN:
        render.say(f"… and {count - _SHOWN} more (--json lists all)")


def _row(version: "Found") -> tuple[str, ...]:
    place = "" if version.workspace == "default" else f"{version.workspace}: "
    return (
        f"{place}{version.model}/{version.version}",
        " ".join(version.guarded),
        ", ".join(version.formats) or "-",
        f"{version.verdict}: {version.next}",
    )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
