"""`kdguard distill` and `export`: single stages that make something."""

from pathlib import Path
from typing import Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.models import opened

FILE = click.Path(path_type=Path)


@click.command()
@click.option("--reference", required=True, help="Network to imitate (ONNX, as exported).")
@click.option("--data", "transfer", required=True, metavar="URI", help="Images to distil on.")
@click.option("--clean", required=True, metavar="URI", help="Small, trusted, labelled set.")
@click.option("--labelled", is_flag=True, help="The labels of --data may be used.")
@click.option("--student", "arch", help="Architecture of the student, e.g. cnn:8,16,32.")
@click.option("--out", type=FILE, required=True, help="Folder for weights and checkpoints.")
@click.option("-c", "--config", "config_file", type=FILE, help="File with a `distill:` section.")
@options.set_values
@options.config_seed
@options.config_device
@options.config_root
@options.download
@options.registry_options
@options.trust_code
@options.as_json
def distill(**flags: Any) -> None:
    """Distil a student from a reference network.

    Distil a student from a reference network; the result is weights.safetensors in --out.

    Killed or interrupted, the same command goes on from its last checkpoint.

    \b
    kdguard distill --reference reference.onnx --data npz:transfer.npz --clean npz:clean.npz \\
                    --out student --set distill.epochs=20
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.flow.student import from_onnx, train_student
    from mlflow_kdguard_cli import render

    config = options.configured(flags, {"distill.arch": "arch"})
    root = None if config.data.root is None else Path(config.data.root)
    labelled = flags["labelled"] or config.data.labelled
    transfer, clean = (
        data.load(flags[key], root=root, download=flags["download"])
        for key in ("transfer", "clean")
    )
    with render.progress() as progress:
        figures = train_student(
            config.distill,
            from_onnx(opened(flags["reference"], flags, onnx=True).path),
            transfer if labelled else transfer.unlabelled(),
            clean,
            folder=flags["out"],
            seed=config.run.seed,
            device=devices.pick(config.run.device),
            progress=progress,
            trust_code=flags["trust_code"],
        )
    render.say(f"weights and architecture are in {flags['out']}")
    body = {"schema": "kdguard.distill/1", "folder": str(flags["out"]), "figures": figures}
    render.document(body, flags["as_json"])


@click.command()
@click.argument("model")
@options.data
@click.option("--out", type=FILE, required=True, help="ONNX file to write.")
@options.arch
@options.device
@options.data_root
@options.download
@options.registry_options
@options.trust_code
@options.as_json
def export(**flags: Any) -> None:
    """Export a network to ONNX and compare before believing it.

    Export MODEL (.safetensors, weights-only .pt, .onnx) to one canonical ONNX file.

    The file is run through onnxruntime on --data and compared with the network before it is
    believed; a difference ends with exit code 7 and leaves no file.
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.flow.student import export_on
    from mlflow_kdguard_cli import render

    device = devices.pick(flags["device"])
    shown = data.load(flags["data_uri"], root=flags["data_root"], download=flags["download"])
    net = opened(flags["model"], flags, shown).net()
    exported = export_on(net, flags["out"], shown, device=device)
    render.say(
        f"{exported.path}: sha256 {exported.sha256}; largest softmax difference "
        f"{exported.parity.softmax_max:.2g} on {exported.parity.argmax.n} images"
    )
    render.document(exported.document(), flags["as_json"])
