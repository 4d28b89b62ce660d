"""`kdguard verify`: measure a registered version again from its bytes, and sign as verifier."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options

if TYPE_CHECKING:
    from mlflow_kdguard.config import GuardConfig
    from mlflow_kdguard.data import Dataset
    from mlflow_kdguard.flow.verification import Own, Verified

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", metavar="models:/NAME/VERSION")
@click.option(
    "--key",
    type=FILE,
    required=True,
    envvar="KDGUARD_VERIFIER_KEY",
    help="Signing key with the role `verifier` (kdguard keygen --role verifier).",
)
@click.option(
    "--test", required=True, metavar="URI", help="Held-out labelled images for every figure."
)
@click.option(
    "--clean", required=True, metavar="URI", help="Labelled images on which both nets are audited."
)
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="SHA256",
    help="What the images of --test must be, where others can write to their place.",
)
@options.triggers
@click.option("--teacher", metavar="MODEL", help="Original teacher (ONNX), where you know it.")
@click.option("--reference", metavar="MODEL", help="Reference (ONNX), where you have it.")
@click.option("--baseline", metavar="MODEL", help="Declared comparator (ONNX) for the lift.")
@click.option("--nonce", help="Nonce of the draw; default: the server's own, where it has one.")
@click.option(
    "--attempt",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="With --nonce: the how-manieth measurement of this model it stands for.",
)
@click.option(
    "-c",
    "--config",
    "config_file",
    type=FILE,
    help="File with sections audit, export, measure, certify, smooth, patch, attest.",
)
@options.set_values
@options.config_seed
@options.config_device
@options.data_root
@options.download
@options.registry_options
@click.option("--out", type=FILE, help="File to keep the certificate in, too.")
@options.as_json
def verify(**flags: Any) -> None:
    """Measure a version again from its bytes, and sign as verifier.

    The version's raw bytes are downloaded, with the reference and the original teacher that they
    are held against and the triggers that the builder supplied. Accuracy, attack success (of those
    triggers, of a --trigger panel, and of triggers that your own audit inverts), reference gap,
    parity and certified bounds are measured again from these bytes, on images that you name; the
    images for the bounds are drawn anew, and so is the noise of a smoothed pair. Nothing of the
    builder's figures is taken over. The certificate, figures_from: recomputed, is stored with the
    version.

    Exit code 0 says that it was measured and signed, not that it passes: ask `kdguard gate`.

    \b
    kdguard keygen verifier.pem --owner "model risk" --role verifier
    kdguard verify models:/student/3 --key verifier.pem --test npz:test.npz --clean npz:clean.npz
    kdguard promote models:/student/3 --key verifier.pem.pub --pin npz:test.npz
    """
    from mlflow_kdguard import devices
    from mlflow_kdguard.flow import verification
    from mlflow_kdguard.registry import Registry
    from mlflow_kdguard_cli import render

    config: GuardConfig = options.configured(
        flags, {"registry.tracking_uri": "tracking_uri", "registry.registry_uri": "registry_uri"}
    )
    own = _own(flags)
    with render.progress() as progress:
        verified = verification.verify(
            Registry(config.registry),
            flags["model"],
            own,
            config=config,
            device=devices.pick(config.run.device),
            progress=progress,
        )
    _keep(flags["out"], verified)
    render.measurement(verified.measurement, verified.uri)
    render.certified(verified.bounds)
    if verified.smooth is not None:
        render.smoothed(verified.smooth)
    for report in verified.patches:
        render.patched(report)
    render.say(_signed(verified, own))
    render.document(_document(verified), flags["as_json"])


def _own(flags: dict[str, Any]) -> "Own":
    from mlflow_kdguard.attest import Signer
    from mlflow_kdguard.flow.verification import Own
    from mlflow_kdguard.registry import Nonce

    known = {name: _onnx(flags[name], flags) for name in ("teacher", "reference") if flags[name]}
    nonce = flags["nonce"]
    return Own(
        test=_pinned(flags),
        clean=_images("clean", flags),
        signer=Signer.load(flags["key"]),
        panel=tuple(options.trigger_list(flags["trigger_files"])),
        baseline=_onnx(flags["baseline"], flags) if flags["baseline"] else None,
        known=known,
        nonce=Nonce(nonce=nonce, attempt=flags["attempt"]) if nonce else None,
    )


def _images(name: str, flags: dict[str, Any]) -> "Dataset":
    from mlflow_kdguard import data

    return data.load(flags[name], root=flags["data_root"], download=flags["download"])


def _pinned(flags: dict[str, Any]) -> "Dataset":
    from mlflow_kdguard.errors import DataError

    test = _images("test", flags)
    if flags["pins"] and test.sha256 not in flags["pins"]:
        raise DataError(
            f"{test.uri} has the SHA-256 {test.sha256}, which is not pinned.",
            remedy="Somebody changed the images, or the pin is that of others.",
        )
    return test


def _onnx(text: str, flags: dict[str, Any]) -> bytes:
    from mlflow_kdguard_cli.models import opened

    return opened(text, flags, onnx=True).onnx()


def _keep(path: Path | None, verified: "Verified") -> None:
    from mlflow_kdguard.files import write_bytes

    if path is not None:
        write_bytes(path, verified.envelope)


def _signed(verified: "Verified", own: "Own") -> str:
    certificate, record = verified.certificate, own.signer.verifier.record
    nonce, drawn, asked = verified.bounds.nonce, "", ""
    if nonce:
        drawn, asked = f", attempt {certificate.attempt}", f" --nonce {nonce}"
    return (
        f"{verified.uri} was measured again and signed by {record.owner}{drawn}; teacher "
        f"{certificate.teacher.sha256[:16]}…, reference {certificate.reference.sha256[:16]}…, "
        f"valid until {certificate.expires}. Is it enough? kdguard gate {verified.uri}{asked}"
    )


def _document(verified: "Verified") -> dict[str, Any]:
    from mlflow_kdguard.attest import certificate_digest

    return {
        "schema": "kdguard.verify/1",
        "uri": verified.uri,
        "nonce": verified.bounds.nonce,
        "certificate_sha256": certificate_digest(verified.envelope),
        "certificate": verified.certificate.document(),
    }
