"""`kdguard cosign`: a second owner signs beside the first."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from mlflow_kdguard_cli import options

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", metavar="models:/NAME/VERSION")
@click.option("--key", type=FILE, required=True, help="Your signing key (kdguard keygen).")
@click.option(
    "--trust",
    "trusted",
    type=FILE,
    multiple=True,
    required=True,
    help="Public record (.pub) of a key that has signed already; repeat for more.",
)
@options.registry_options
@options.as_json
def cosign(**flags: Any) -> None:
    """Sign a version's certificate beside those who signed it.

    The version's bytes are downloaded, and its certificate must hold for them under the keys that
    you trust: you sign what is said there, not what somebody sends you. A policy that asks for
    `signers_at_least: 2` counts owners; two keys of one owner are one.

    \b
    kdguard cosign models:/student/3 --key second.pem --trust verifier.pem.pub
    """
    from mlflow_kdguard import attest, bundle
    from mlflow_kdguard.config import RegistrySection
    from mlflow_kdguard.errors import CertificateError
    from mlflow_kdguard.registry import Registry
    from mlflow_kdguard_cli import render

    named = {name: flags[name] for name in ("tracking_uri", "registry_uri")}
    registry = Registry(RegistrySection(**named))
    stored = registry.download(flags["model"])
    bundle.check(stored.files)
    envelope = stored.certificate()
    if envelope is None:
        raise CertificateError(f"{stored.uri} carries no certificate.")
    checked = attest.check(
        envelope,
        files=stored.files,
        verifiers=[attest.Verifier.load(path) for path in flags["trusted"]],
        now=datetime.now(UTC),
        model_name=stored.name,
        registry=registry.identity,
    )
    signer = attest.Signer.load(flags["key"])
    registry.store_certificate(stored.uri, attest.cosign(envelope, signer))
    signers = (*checked.signers, signer.verifier.signatory)
    owners = sorted({f"{signatory.owner} ({signatory.role})" for signatory in signers})
    render.say(f"{stored.uri} is signed by {', '.join(owners)}")
    body = {"schema": "kdguard.cosign/1", "uri": stored.uri, "signed_by": owners}
    render.document(body, flags["as_json"])
