"""`kdguard measure` and `certify`: figures and bounds on the ONNX bytes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.models import opened
from mlflow_kdguard_cli.sections import section

if TYPE_CHECKING:
    from mlflow_kdguard.measure import Attack

MODEL = click.argument("model")


@click.command()
@MODEL
@options.data
@options.triggers
@click.option("--teacher", help="Original teacher (ONNX): accuracy is compared on the same images.")
@click.option("--reference", help="Reference (ONNX): its distance from the teacher is measured.")
@click.option("--baseline", help="Declared comparator (ONNX) for the lift of each trigger.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True)
@options.device
@options.data_root
@options.download
@options.registry_options
@options.as_json
def measure(**flags: Any) -> None:
    """Accuracy and attack success rates on the ONNX bytes.

    Accuracy and attack success rates of MODEL, on the ONNX bytes through onnxruntime.

    Rates come with k, n and a one-sided 95 % upper bound over all triggers together. An output
    that is not finite fails the measurement.

    \b
    kdguard measure student.onnx --data mnist5k#test --trigger patch.kdt:0
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.measure import measure as take
    from mlflow_kdguard_cli import render

    shown = data.load(flags["data_uri"], root=flags["data_root"], download=flags["download"])
    triggers: list[Attack] = [
        (trigger, target, "supplied")
        for trigger, target in options.trigger_list(flags["trigger_files"])
    ]
    with render.progress() as progress:
        taken = take(
            opened(flags["model"], flags, onnx=True).onnx(),
            shown,
            triggers=triggers,
            teacher=_onnx("teacher", flags),
            reference=_onnx("reference", flags),
            baseline=_onnx("baseline", flags),
            device=devices.pick(flags["device"]),
            batch=flags["batch"],
            progress=progress,
        )
    render.measurement(taken, flags["model"])
    render.document(taken.document(), flags["as_json"])


@click.command()
@click.option(
    "--teacher", required=True, help="The network to be faithful to (ONNX): the reference."
)
@click.option("--student", required=True, help="The student (ONNX).")
@options.data
@click.option("--eps", type=float, required=True, help="Radius of the ball, in pixel units.")
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option(
    "--delta",
    type=float,
    default=0.2,
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
@click.option("--classes", type=click.Choice(["all", "top"]), default="all", show_default=True)
@click.option("--method", default="auto", show_default=True, help="Row of the bound table.")
@click.option(
    "--solver", default="auto", show_default=True, help="highs, scip or gurobi: for lp and milp."
)
@click.option(
    "--nodes", type=int, default=400, show_default=True, help="For branch; programs, for milp."
)
@click.option(
    "--relative-gap",
    type=float,
    default=0.005,
    show_default=True,
    help="Branch ends where its bound is this share above the witness,",
)
@click.option(
    "--absolute-gap",
    type=float,
    default=2e-4,
    show_default=True,
    help="or this much above it, in confidence, if that is more.",
)
@click.option(
    "--budget",
    type=float,
    help="Safety limit in seconds, shared by the images; the search ends with what it has.",
)
@click.option("--memory", type=float, help="The same in GiB that the process may hold, for branch.")
@click.option("--restarts", type=int, default=5, show_default=True, help="Witness search.")
@click.option("--steps", type=int, default=40, show_default=True, help="Witness search.")
@click.option("--nonce", default="", help="Makes the draw of images unpredictable.")
@click.option(
    "--proofs",
    type=click.Path(path_type=Path, file_okay=False),
    help="New folder for a proof of every bound, which `kdguard check --recompute` checks.",
)
@options.device
@options.data_root
@options.download
@options.registry_options
@options.as_json
def certify(**flags: Any) -> int:
    """Bounds on the confidence gap between reference and student.

    Bounds on the confidence gap between a reference and a student, around real images.

    For every drawn image: the largest |softmax difference| that a search finds within eps (a
    witness, so a lower bound) and a certified upper bound for every point of the ball.

    Ctrl-C ends the search with exit code 130: the report has the bounds that are known by then,
    says that it was interrupted, and is not attested. A second Ctrl-C ends everything.

    \b
    kdguard certify --teacher reference.onnx --student student.onnx --data mnist5k#test --eps 0.01
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.certify import certify as bound
    from mlflow_kdguard.config import CertifySection
    from mlflow_kdguard_cli import render

    keys = ("method", "solver", "nodes", "norm", "eps", "delta", "classes", "samples", "restarts",
            "memory", "relative_gap", "absolute_gap")  # fmt: skip
    given = {key: flags[key] for key in keys}
    given |= {"pgd_steps": flags["steps"], "seconds": flags["budget"]}
    config = section(CertifySection, given, "certify")
    shown = data.load(flags["data_uri"], root=flags["data_root"], download=flags["download"])
    with render.progress() as progress:
        report = bound(
            opened(flags["teacher"], flags, onnx=True).onnx(),
            opened(flags["student"], flags, onnx=True).onnx(),
            shown,
            config=config,
            nonce=flags["nonce"],
            device=devices.pick(flags["device"]),
            progress=progress,
            proofs=flags["proofs"],
            partial=True,
        )
    render.certified(report)
    if report.proofs is not None:
        render.say(f"proofs in {flags['proofs']}, index {report.proofs.sha256}")
    render.document(report.document(), flags["as_json"])
    return 130 if report.interrupted else 0


def _onnx(name: str, flags: dict[str, Any]) -> bytes | None:
    return opened(flags[name], flags, onnx=True).onnx() if flags[name] else None
