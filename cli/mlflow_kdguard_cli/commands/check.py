"""`kdguard check`: whether a certificate holds, and whether its bounds follow from their proofs."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.commands.attest import digest_of

if TYPE_CHECKING:
    from mlflow_kdguard.attest import Checked
    from mlflow_kdguard.records import Certificate

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("certificate", type=FILE)
@click.option(
    "--model",
    "model",
    type=FILE,
    required=True,
    help="The model file, or the folder of the whole bundle.",
)
@click.option(
    "--key",
    "keys",
    type=FILE,
    multiple=True,
    required=True,
    help="Public record of a trusted key (.pub); repeat for more.",
)
@click.option("--name", help="Registered model name that it must have been issued for.")
@click.option(
    "--recompute", is_flag=True, help="Derive every certified bound anew from its proof, in NumPy."
)
@click.option(
    "--proofs",
    type=FILE,
    help="With --recompute: folder of the proofs; default: `proofs` beside CERTIFICATE.",
)
@click.option("--reference", type=FILE, help="With --recompute: ONNX file of the reference.")
@click.option(
    "--data", "data_uri", metavar="URI", help="With --recompute; default: what CERTIFICATE names."
)
@options.data_root
@options.as_json
def check(
    certificate: Path,
    model: Path,
    keys: tuple[Path, ...],
    name: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Check a certificate against a file; needs neither torch nor mlflow.

    Checks that CERTIFICATE is signed by a trusted key, still valid, and about these bytes. Exit
    code 8 says what does not hold. With --recompute, every certified bound is derived anew from the
    networks' bytes and the proofs that the certificate names.

    \b
    kdguard check certificate.dsse.json --model model.onnx --key builder.pem.pub
    kdguard check certificate.dsse.json --model model.onnx --key builder.pem.pub \\
        --recompute --reference reference.onnx --proofs proofs
    """
    from mlflow_kdguard import attest, bundle
    from mlflow_kdguard.attest.signing import Verifier
    from mlflow_kdguard.files import read_bytes
    from mlflow_kdguard_cli import render

    files = bundle.read(model) if model.is_dir() else None
    checked = attest.check(
        read_bytes(certificate, what="the certificate"),
        files=files,
        verifiers=[Verifier.load(key) for key in keys],
        now=datetime.now(UTC),
        model_name=name,
    )
    if files is None:
        _about(checked.certificate, model)
    else:
        bundle.check(files)
    body = _checked_document(checked)
    if flags["recompute"]:
        flags["proofs"] = flags["proofs"] or certificate.parent / "proofs"
        body["recomputed"] = _recomputed(checked.certificate, model, flags)
    render.say(
        f"{certificate} holds: {', '.join(body['signed_by'])}; issued "
        f"{body['issued']}, expires {body['expires']}; figures {body['figures_from']}"
    )
    render.document(body, as_json)


def _about(certificate: "Certificate", model: Path) -> None:
    from mlflow_kdguard.bundle import MODEL
    from mlflow_kdguard.errors import CertificateError

    digest = digest_of(model, "model")
    if digest not in {s.sha256 for s in certificate.subjects if s.path == MODEL}:
        listed = ", ".join(f"{s.path} {s.sha256[:16]}…" for s in certificate.subjects)
        raise CertificateError(
            f"{model} has the SHA-256 {digest}, and the certificate speaks of {listed}.",
            remedy="It is another file than the one that was certified.",
        )


def _recomputed(certificate: "Certificate", model: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Every bound that the certificate rests on, derived from its proofs."""
    from mlflow_kdguard import data
    from mlflow_kdguard.bundle import MODEL
    from mlflow_kdguard.files import read_bytes
    from mlflow_kdguard.proof import recompute
    from mlflow_kdguard_cli import render

    if flags["reference"] is None:
        raise click.UsageError("--recompute needs --reference, the network to be faithful to.")
    figure = recompute.certified_figure(certificate)
    shown = data.load(flags["data_uri"] or figure.data.uri, root=flags["data_root"], download=False)
    networks = (
        read_bytes(flags["reference"], what="the reference"),
        read_bytes(model / MODEL if model.is_dir() else model, what="the model"),
    )
    with render.progress() as progress:
        found = recompute.recompute(
            certificate, networks, shown, flags["proofs"], progress=progress
        )
    render.say(
        f"{found.images} bounds follow from their proofs: {found.proved} within {figure.delta:g}, "
        f"mean {found.upper_mean:.4g}"
    )
    return {
        "images": found.images,
        "proved": found.proved,
        "upper_mean": found.upper_mean,
        "delta": figure.delta,
    }


def _checked_document(checked: "Checked") -> dict[str, Any]:
    certificate = checked.certificate
    return {
        "schema": "kdguard.check/1",
        "signed_by": [f"{s.owner} ({s.role})" for s in checked.signers],
        "model_name": certificate.model_name,
        "subjects": [subject.document() for subject in certificate.subjects],
        "figures": json.loads(certificate.figures.model_dump_json(by_alias=True)),
        "figures_from": certificate.figures_from,
        "issued": certificate.issued,
        "expires": certificate.expires,
    }
