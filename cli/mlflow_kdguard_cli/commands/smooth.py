"""`kdguard certify-smooth`: bounds on the gap of two smoothed networks, of any size."""

from pathlib import Path
from typing import Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.models import opened
from mlflow_kdguard_cli.sections import section


@click.command("certify-smooth")
@click.option(
    "--teacher", required=True, help="The network to be faithful to (ONNX): the reference."
)
@click.option("--student", required=True, help="The student (ONNX).")
@options.data
@click.option("--sigma", type=float, required=True, help="Deviation of the noise, in pixel units.")
@click.option("--radius", type=float, default=0.25, show_default=True, help="Of the l2 ball.")
@click.option(
    "--delta",
    type=float,
    default=0.3,
    show_default=True,
    help="Largest gap that counts as faithful.",
)
@click.option(
    "--samples",
    type=int,
    default=100,
    show_default=True,
    help="Images drawn from --data; the draw follows from the models' digests.",
)
@click.option(
    "--draws", type=int, default=1000, show_default=True, help="Noisy copies of each image."
)
@click.option(
    "--error",
    type=float,
    default=0.001,
    show_default=True,
    help="Probability that one image is PROVED and should not be.",
)
@click.option("--classes", type=click.Choice(["all", "top"]), default="all", show_default=True)
@click.option("--batch", type=int, default=256, show_default=True, help="Noisy copies a step.")
@click.option("--nonce", default="", help="Makes the draws of images and noise unpredictable.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a PNG: the bound and the share within delta against the radius.",
)
@options.device
@options.data_root
@options.download
@options.registry_options
@options.as_json
def certify_smooth(**flags: Any) -> int:
    """Bounds on the gap of two smoothed networks, of any size.

    A smoothed network answers the mean of its softmax over Gaussian noise on the image. For every
    drawn image: an upper bound, by sampling, on how far the smoothed reference and the smoothed
    student can be apart anywhere within --radius (l2). It says nothing about answers to an image
    without noise: rely on it only where the smoothed student is what is served.

    Ctrl-C ends the work early (exit code 130): what was finished is shown, the rest is undecided.

    \b
    kdguard certify-smooth --teacher r.onnx --student s.onnx --data mnist5k#test --sigma 0.25
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.certify.smooth import certify_smooth as bound
    from mlflow_kdguard.measure import opened as session
    from mlflow_kdguard_cli import render

    config = _section(flags)
    shown = data.load(flags["data_uri"], root=flags["data_root"], download=flags["download"])
    reference, student = (
        session(
            opened(flags[name], flags, onnx=True).onnx(),
            shown,
            where=f"the {what}'s ONNX file",
            device=devices.pick(flags["device"]),
        )
        for name, what in (("teacher", "reference"), ("student", "student"))
    )
    with render.progress() as progress:
        report = bound(
            reference, student, shown, config=config, nonce=flags["nonce"], progress=progress
        )
    if flags["picture"] is not None:
        from mlflow_kdguard.certify.curve import draw

        draw([report], flags["picture"])
    render.smoothed(report)
    render.document(report.document(), flags["as_json"])
    return 0 if report.complete else 130


def _section(flags: dict[str, Any]) -> Any:
    from mlflow_kdguard.config import SmoothSection

    given = {key: flags[key] for key in SmoothSection.model_fields}
    return section(SmoothSection, given, "certify-smooth")
