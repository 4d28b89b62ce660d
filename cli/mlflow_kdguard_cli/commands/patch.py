"""`kdguard certify-patch`: bounds on what patches of any content can do."""

from pathlib import Path
from typing import Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.models import opened
from mlflow_kdguard_cli.sections import section


@click.command("certify-patch")
@click.argument("model")
@options.data
@click.option("--target", type=int, required=True, help="Class that the patch is to bring about.")
@click.option("--size", type=int, default=3, show_default=True, help="Side of the square, pixels.")
@click.option(
    "--position",
    "positions",
    multiple=True,
    default=("bottom-right",),
    show_default=True,
    metavar="CORNER|ROW,COLUMN",
    help="Where it lies: a corner (top-left, …), or its top left pixel; repeat for more.",
)
@click.option(
    "--samples",
    type=int,
    default=100,
    show_default=True,
    help="Images of other classes drawn from --data; the draw follows from the model's digest.",
)
@click.option(
    "--nodes",
    type=int,
    default=2000,
    show_default=True,
    help="Parts of the contents that are bounded, an image and position.",
)
@click.option(
    "--margin",
    type=float,
    default=1e-4,
    show_default=True,
    help="By how much another logit must lead: more than the runtime's rounding.",
)
@click.option("--restarts", type=int, default=5, show_default=True, help="Witness search.")
@click.option("--steps", type=int, default=40, show_default=True, help="Witness search.")
@click.option("--nonce", default="", help="Makes the draw of images unpredictable.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a PNG: the bounds at each position, and patches that flip images.",
)
@options.device
@options.data_root
@options.download
@options.registry_options
@options.as_json
def certify_patch(**flags: Any) -> int:
    """Attack success of any patch, proved from above.

    How many images of other classes can a square patch send to the target class, whatever its
    content? For each drawn image either a proof that no content does, or a content that does, or
    neither; unproved images count as flipped. A second bound holds for one content on all images.

    Ctrl-C ends the work early (exit code 130): what was finished is shown, the rest is unproved.

    \b
    kdguard certify-patch student.onnx --data fashion-mnist#test --target 0 --size 3
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.certify.patch import certify_patch as bound
    from mlflow_kdguard_cli import render

    config = _section(flags)
    shown = data.load(flags["data_uri"], root=flags["data_root"], download=flags["download"])
    student = opened(flags["model"], flags, onnx=True).onnx()
    with render.progress() as progress:
        report = bound(
            student,
            shown,
            target=flags["target"],
            config=config,
            nonce=flags["nonce"],
            device=devices.pick(flags["device"]),
            progress=progress,
        )
    if flags["picture"] is not None:
        from mlflow_kdguard.certify.picture import draw

        draw(report, shown, flags["picture"])
    render.patched(report)
    render.document(report.document(), flags["as_json"])
    return 0 if report.complete else 130


def _section(flags: dict[str, Any]) -> Any:
    from mlflow_kdguard.config import PatchSection

    keys = ("size", "positions", "samples", "nodes", "margin", "restarts")
    given = {key: flags[key] for key in keys} | {"pgd_steps": flags["steps"]}
    return section(PatchSection, given, "certify-patch")
