"""`kdguard gate` and `kdguard promote`: the decision, and the alias if it passes."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options

if TYPE_CHECKING:
    from mlflow_kdguard.records import Decision

KEYS = click.option(
    "--key",
    "keys",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Public record of a trusted key (.pub); repeat for more.",
)

NONCE = click.option(
    "--nonce", default="", help="Nonce that was handed out for the certificate's draw of images."
)
REVOKED = click.option(
    "--revoked",
    type=click.Path(path_type=Path),
    help="List of certificates and keys that are taken back (YAML).",
)


@click.command()
@click.argument("model")
@KEYS
@options.gate_options
@NONCE
@REVOKED
@options.data_root
@options.registry_options
@options.as_json
def gate(**flags: Any) -> int:
    """The promotion decision, without acting on it.

    The bundle of MODEL (models:/name/version) is downloaded and hashed, the certificate's
    signatures are checked against the trusted keys, and every rule of the operator's policy is
    held against the signed figures. Exit code 0 passes and 3 refuses, also where the certificate
    itself does not hold; the reasons are listed.

    \b
    kdguard gate models:/student/3 --key builder.pem.pub --pin mnist5k#test
    """
    decision = _decide(_registry(flags), flags["model"], flags)
    return _answer(decision, flags)


@click.command()
@click.argument("model")
@click.option("--alias", default="champion", show_default=True, help="Alias to set on a pass.")
@KEYS
@options.gate_options
@NONCE
@REVOKED
@options.data_root
@options.registry_options
@options.as_json
def promote(**flags: Any) -> int:
    """The decision, then the alias if it passes.

    A refusal (exit code 3) leaves every alias where it was and writes the reasons to the model
    version's tags. Where MODEL is an alias, the version that it stands for at the start is judged
    and promoted, whatever the alias names by then.

    \b
    kdguard promote models:/student/3 --alias champion --key builder.pem.pub --pin mnist5k#test
    """
    registry = _registry(flags)
    uri = registry.resolve(flags["model"])
    decision = _decide(registry, uri, flags)
    registry.record_decision(uri, decision)
    if decision.passed:
        from mlflow_kdguard_cli import render

        registry.promote(uri, flags["alias"])
        render.say(f"{uri} is @{flags['alias']} now")
    return _answer(decision, flags)


def _decide(registry: Any, uri: str, flags: dict[str, Any]) -> "Decision":
    from mlflow_kdguard.attest import Revocations, Verifier
    from mlflow_kdguard.flow.decision import judge

    if flags["policy_file"] == "":  # an unset variable must not choose another policy
        raise click.BadParameter("it is empty.", param_hint="--policy")
    return judge(
        registry,
        uri,
        policy=options.chosen_policy(flags["policy_file"]),
        verifiers=tuple(Verifier.load(key) for key in flags["keys"]),
        now=datetime.now(UTC),
        pins=options.pinned(flags["pins"], flags["data_root"]),
        panel=options.panel_digests(flags["panel"]),
        allow_unpinned=flags["allow_unpinned"],
        nonce=flags["nonce"],
        revoked=None if flags["revoked"] is None else Revocations.load(flags["revoked"]),
    )


def _registry(flags: dict[str, Any]) -> Any:
    from mlflow_kdguard.config import RegistrySection
    from mlflow_kdguard.registry import Registry

    return Registry(
        RegistrySection(tracking_uri=flags["tracking_uri"], registry_uri=flags["registry_uri"])
    )


def _answer(decision: "Decision", flags: dict[str, Any]) -> int:
    from mlflow_kdguard_cli import render

    render.decision(decision, flags["model"])
    render.document(decision.document(), flags["as_json"])
    return 0 if decision.passed else 3
