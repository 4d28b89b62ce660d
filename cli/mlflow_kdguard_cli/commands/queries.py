"""`kdguard export-query`: what `certify` is asked, as files that other solvers read."""

from pathlib import Path
from typing import Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.models import opened
from mlflow_kdguard_cli.sections import section


@click.command("export-query")
@click.option(
    "--teacher", required=True, help="The network to be faithful to (ONNX): the reference."
)
@click.option("--student", required=True, help="The student (ONNX).")
@options.data
@click.option(
    "--index",
    "indices",
    type=click.IntRange(min=0),
    multiple=True,
    required=True,
    help="Image of --data, as `certify` numbers it in its report; repeat for more.",
)
@click.option("--eps", type=float, required=True, help="Radius of the l_inf ball, in pixel units.")
@click.option(
    "--delta",
    type=float,
    default=0.2,
    show_default=True,
    help="Difference of confidence that is asked for.",
)
@click.option(
    "--classes",
    default="all",
    show_default=True,
    metavar="all|top|K",
    help="All classes, the one that the reference gives the image, or class K.",
)
@click.option(
    "--sign",
    type=click.Choice(["both", "plus", "minus"]),
    default="both",
    show_default=True,
    help="Student more confident than the reference (plus), less (minus), or both.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the files.",
)
@options.data_root
@options.download
@options.registry_options
@options.as_json
def export_query(**flags: Any) -> None:
    """The question behind `certify` as ONNX and VNN-LIB files for other solvers.

    Is there an image within eps of a given one at which the confidences of reference and student
    differ by delta or more? Written as a product network with VNN-LIB 1.0 and as two networks with
    VNN-LIB 2.0. `unsat` proves that the gap stays below delta, `sat` is a counterexample.

    \b
    kdguard export-query --teacher reference.onnx --student student.onnx --data mnist5k#test \\
      --index 17 --eps 0.01 --out queries/
    """
    from mlflow_kdguard import data
    from mlflow_kdguard.certify.exchange import Asked, export
    from mlflow_kdguard.config import CertifySection
    from mlflow_kdguard_cli import render

    shown = data.load(flags["data_uri"], root=flags["data_root"], download=flags["download"])
    document = export(
        opened(flags["teacher"], flags, onnx=True).onnx(),
        opened(flags["student"], flags, onnx=True).onnx(),
        shown,
        tuple(dict.fromkeys(flags["indices"])),
        flags["out"],
        config=section(
            CertifySection, {key: flags[key] for key in ("eps", "delta")}, "export-query"
        ),
        asked=Asked(
            flags["classes"],
            ("plus", "minus") if flags["sign"] == "both" else (flags["sign"],),
        ),
    )
    render.say(f"{render.counted(len(document['queries']), 'query image')} in {flags['out']}")
    render.document(document, flags["as_json"])
