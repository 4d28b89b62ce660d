"""`kdguard attest`: who states what about which bytes."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.commands.keys import LONGEST

if TYPE_CHECKING:
    from mlflow_kdguard.records import Certificate, Figures

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=FILE)
@click.option("--teacher", type=FILE, required=True, help="ONNX file of the original teacher.")
@click.option("--reference", type=FILE, required=True, help="ONNX file of the reference.")
@click.option("--measure", "measure_file", type=FILE, help="Document of `kdguard measure`.")
@click.option("--certify", "certify_file", type=FILE, help="Document of `kdguard certify`.")
@click.option("--certify-smooth", "smooth_file", type=FILE, help="Of `kdguard certify-smooth`.")
@click.option(
    "--certify-patch",
    "patch_files",
    type=FILE,
    multiple=True,
    help="Documents of `kdguard certify-patch`; repeat for more.",
)
@click.option(
    "--audit",
    "audit_files",
    type=FILE,
    multiple=True,
    help="Documents of `kdguard audit`, of the teacher and of the student.",
)
@click.option("--export", "export_file", type=FILE, help="Document of `kdguard export`.")
@click.option("--model-name", required=True, help="Registered model that it is issued for.")
@click.option("--registry", default="", help="Registry that it is issued for.")
@click.option("--key", type=FILE, required=True, envvar="KDGUARD_KEY", help="Signing key.")
@click.option(
    "--days",
    type=float,
    default=90.0,
    show_default=True,
    help="Validity; at most 36500.",
)
@click.option(
    "--out",
    type=FILE,
    default=Path("certificate.dsse.json"),
    show_default=True,
    help="Certificate to write.",
)
@options.as_json
def attest(**flags: Any) -> None:
    """Sign a certificate for a model file.

    Sign a certificate for the student MODEL (model.onnx, or the folder of its bundle).

    Figures come from the documents of the other commands; what is left out is absent from the
    certificate, and the gate refuses what its policy asks for and does not find. A document about
    another model than MODEL, --teacher and --reference is not signed (exit code 8).
    """
    from mlflow_kdguard import attest as attesting
    from mlflow_kdguard.attest.signing import Signer
    from mlflow_kdguard.files import write_bytes
    from mlflow_kdguard_cli import render

    certificate = _certificate(flags)
    write_bytes(flags["out"], attesting.issue(certificate, Signer.load(flags["key"])))
    render.say(f"signed {flags['out']} for {flags['model']}, valid until {certificate.expires}")
    render.document(certificate.document(), flags["as_json"])


def _certificate(flags: dict[str, Any]) -> "Certificate":
    from mlflow_kdguard import attest as attesting
    from mlflow_kdguard import records
    from mlflow_kdguard.files import digest_json, sha256

    files = _bundle(flags["model"])
    named = {name: digest_of(flags[name], name) for name in ("teacher", "reference")}
    named["student"] = sha256(files["model.onnx"])
    figures = _figures(flags, named)
    bounds = _read(flags["certify_file"], records.CertifyReport)
    now = datetime.now(UTC).replace(microsecond=0)
    sources = [figure.data for figure in figures.faithful]
    if figures.measured_on is not None:
        sources.append(figures.measured_on)
    return records.Certificate(
        subjects=attesting.subjects_of(files),
        model_name=_filled(flags["model_name"], "--model-name"),
        registry=flags["registry"],
        reference=records.Model(sha256=named["reference"]),
        teacher=records.Model(sha256=named["teacher"]),
        data=tuple({source.sha256: source for source in sources}.values()),
        triggers=tuple(figure.trigger for figure in figures.asr),
        figures=figures,
        figures_from="imported",
        config=digest_json({}),
        seed=0,
        tools={},
        proofs=None if bounds is None else bounds.proofs,
        issued=records.format_time(now),
        expires=records.format_time(now + _validity(flags["days"])),
    )


def _figures(flags: dict[str, Any], named: dict[str, str]) -> "Figures":
    """The documents' figures, if all of them are about the models that `named` has by digest."""
    from mlflow_kdguard.errors import CertificateError
    from mlflow_kdguard.records import (
        AuditReport,
        CertifyReport,
        Exported,
        Measurement,
        PatchReport,
        SmoothReport,
    )
    from mlflow_kdguard.records.gather import Side, figures_of, mixed_up

    patches = [_read(path, PatchReport) for path in flags["patch_files"]]
    audits: dict[Side, AuditReport] = {}
    for path in flags["audit_files"]:
        report = _read(path, AuditReport)
        side: Side = "teacher" if report.model.sha256 == named["teacher"] else "student"
        if side in audits:
            raise CertificateError(
                f"{path} is a second audit of the {side}, or the audit of another model.",
                remedy="Name one audit of the original teacher's ONNX file, one of the student's.",
            )
        audits[side] = report
    exported = _read(flags["export_file"], Exported)
    figures = figures_of(
        measurement=_read(flags["measure_file"], Measurement),
        bounds=_read(flags["certify_file"], CertifyReport),
        smooth=_read(flags["smooth_file"], SmoothReport),
        patches=patches,
        audits=audits,
        parity=None if exported is None else exported.parity,
    )
    if wrong := "; ".join(mixed_up(figures, **named)):
        raise CertificateError(
            f"the documents and the models do not belong together: {wrong}.",
            remedy="Take every figure on the files that are named here.",
        )
    return figures


def _bundle(model: Path) -> dict[str, bytes]:
    """The files that are signed for; a folder must be a bundle that serves its model.onnx."""
    from mlflow_kdguard import bundle
    from mlflow_kdguard.files import read_bytes

    if not model.is_dir():
        return {bundle.MODEL: read_bytes(model, what="the model")}
    files = bundle.read(model)
    bundle.check(files)
    return files


def digest_of(path: Path, name: str) -> str:
    """SHA-256 of the file that the user named as `name`."""
    from mlflow_kdguard.files import read_bytes, sha256

    return sha256(read_bytes(path, what=f"the {name}"))


def _filled(text: str, option: str) -> str:
    if not text.strip():
        raise click.BadParameter("it is empty.", param_hint=option)
    return text


def _validity(days: float) -> timedelta:
    if not 0 < days <= LONGEST:  # NaN, too
        raise click.BadParameter(f"not between 0 and {LONGEST} days.", param_hint="--days")
    return timedelta(days=days)


def _read(path: Path | None, record: Any) -> Any:
    from pydantic import ValidationError

    from mlflow_kdguard.config import explain
    from mlflow_kdguard.errors import UsageError
    from mlflow_kdguard.files import read_bytes

    if path is None:
        return None
    try:
        return record.model_validate_json(read_bytes(path, what="the document"))
    except ValidationError as error:
        raise UsageError(
            f"{path} is not the document that is meant: {explain(error)}",
            remedy="Make it with --json of the command in question.",
        ) from error
