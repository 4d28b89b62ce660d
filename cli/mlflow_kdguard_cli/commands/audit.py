"""`kdguard audit`: findings and a verdict for one model."""

from pathlib import Path
from typing import Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.models import opened
from mlflow_kdguard_cli.sections import section


@click.command()
@click.argument("model")
@options.data
@options.triggers
@click.option(
    "--require",
    type=click.Choice(["ran", "clean"]),
    default="ran",
    show_default=True,
    help="What exit code 0 means; suspect is always 3.",
)
@click.option(
    "--detector",
    "detectors",
    multiple=True,
    help="Detector to ask; repeat for more (default: variance, inversion). profile compares each "
    "class with itself in clean networks.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Calibration file; without one, the verdict of inversion is undecided.",
)
@click.option(
    "--shadows",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Train this many clean shadow networks to calibrate (19 allow p = 0.05).",
)
@click.option(
    "--shadow-eps",
    type=click.FloatRange(min=0),
    help="l_inf radius of the shadows' adversarial training (default: 0.02); 0 trains plainly.",
)
@click.option(
    "--radius",
    type=click.FloatRange(min=0, min_open=True),
    help="L2 radius of the universal perturbation, in pixels.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for recovered triggers.")
@options.arch
@options.seed
@options.device
@options.data_root
@options.download
@options.registry_options
@options.trust_code
@options.as_json
def audit(**flags: Any) -> int:
    """Look for a backdoor in a teacher or a student.

    Look for a backdoor in MODEL: a file, models:/name/version or models:/name@alias.

    --data is a small, trusted, labelled set. Feature variances are reported; the verdict comes
    from a universal perturbation inverted for each class, held against clean networks. Known
    triggers get their attack success rate.

    \b
    kdguard audit teacher.onnx --data mnist5k#train[3500:]
    kdguard audit models:/teacher/1 --data npz:clean.npz --trigger patch.kdt:0 --require clean
    kdguard audit teacher/ --data mnist5k#train[3500:] --detector profile --shadows 12
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.audit import examine
    from mlflow_kdguard_cli import render

    shown = data.load(flags["data_uri"], root=flags["data_root"], download=flags["download"])
    model = opened(flags["model"], flags, shown)
    with render.progress() as progress:
        audited = examine(
            model.net(),
            model_sha256=model.sha256,
            data=shown,
            config=_section(flags),
            seed=flags["seed"],
            device=devices.pick(flags["device"]),
            progress=progress,
            triggers=options.trigger_list(flags["trigger_files"]),
        )
    _keep(flags["out"], audited.recovered)
    render.audit(audited.report, flags["model"])
    render.document(audited.report.document(), flags["as_json"])
    return _exit_code(audited.report.verdict, flags["require"])


def _section(flags: dict[str, Any]) -> Any:
    from mlflow_kdguard.config import AuditSection

    calibration = flags["calibration"]
    given = {
        "detectors": flags["detectors"] or None,
        "radius": flags["radius"],
        "shadow_eps": flags["shadow_eps"],
        "shadows": flags["shadows"] or None,
        "calibration": None if calibration is None else str(calibration),
    }
    given = {key: value for key, value in given.items() if value is not None}
    return section(AuditSection, given, "audit")


def _keep(folder: Path | None, recovered: Any) -> None:
    if folder is not None:
        for trigger, target in recovered:
            trigger.save(folder / f"recovered-{target}.kdt")


def _exit_code(verdict: str, require: str) -> int:
    refused = verdict == "suspect" or (require == "clean" and verdict != "clean")
    return 3 if refused else 0
