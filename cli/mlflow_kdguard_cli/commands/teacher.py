"""`kdguard teacher` and `kdguard attack`: teachers that are registered, and poisoned ones."""

from pathlib import Path
from typing import Any

import click

from mlflow_kdguard_cli import options
from mlflow_kdguard_cli.models import opened

FILE = click.Path(path_type=Path)


@click.group()
def teacher() -> None:
    """Register a teacher safely, or learn how to convert one.

    No MLflow loader is used and nothing in a model file is executed.
    """


@teacher.command()
@click.argument("name")
@click.option("--weights", required=True, help="File: .onnx, .safetensors or weights-only .pt.")
@options.data
@options.arch
@options.device
@options.data_root
@options.download
@options.registry_options
@options.trust_code
@options.as_json
def register(**flags: Any) -> None:
    """Store a teacher as a version of the registered model NAME.

    The version holds ONNX (exported and compared on --data), safetensors and a small architecture
    record, with a signature and the digests as tags; loading it back executes nothing from it.

    \b
    kdguard teacher register scraped --weights teacher.safetensors --arch cnn:16,32,64 \\
                                     --data mnist5k#test
    """
    import tempfile

    from mlflow_kdguard import data, devices
    from mlflow_kdguard.config import RegistrySection
    from mlflow_kdguard.flow.student import export_on
    from mlflow_kdguard.records import Source
    from mlflow_kdguard.registry import Registry
    from mlflow_kdguard_cli import render

    device = devices.pick(flags["device"])
    shown = data.load(flags["data_uri"], root=flags["data_root"], download=flags["download"])
    model = opened(flags["weights"], flags, shown)
    net = model.net()
    registry = Registry(
        RegistrySection(tracking_uri=flags["tracking_uri"], registry_uri=flags["registry_uri"])
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        exported = export_on(net, place / "model.onnx", shown, device=device)
        version = registry.register_teacher(
            flags["name"],
            (place / "model.onnx").read_bytes(),
            weights=_weights(net, place),
            data={"parity": Source(uri=shown.uri, sha256=shown.sha256)},
            lineage={"kdguard.source_sha256": model.sha256},
        )
    render.say(f"{version.uri}: ONNX sha256 {exported.sha256}")
    render.document(
        {
            "schema": "kdguard.teacher/1",
            "uri": version.uri,
            "export": exported.document(),
            "source": {"sha256": model.sha256},
        },
        flags["as_json"],
    )


@teacher.command()
@click.option("--data", "data_uri", required=True, metavar="URI", help="Labelled images.")
@click.option("--arch", help="Architecture, e.g. mlp:100,100; overrides teach.arch.")
@click.option("--out", type=FILE, required=True, help="Folder for weights and checkpoints.")
@click.option("-c", "--config", "config_file", type=FILE, help="File with a `teach:` section.")
@options.set_values
@options.config_seed
@options.config_device
@options.config_root
@options.download
@options.trust_code
@options.as_json
def train(**flags: Any) -> None:
    """Train a teacher of your own: robust, and easy to bound.

    Adversarial training (Madry), with interval bounds (teach.interval), ReLU stability and small
    weights where asked for; the result is weights.safetensors in --out, for `kdguard export` and
    `kdguard teacher register`.

    Killed or interrupted, the same command goes on from its last checkpoint.

    \b
    kdguard teacher train --data fashion-mnist#train --arch mlp:100,100 --out teacher \\
                          --set teach.eps=0.05 --set teach.interval=0.1
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.flow.student import train_teacher
    from mlflow_kdguard_cli import render

    config = options.configured(flags, {"teach.arch": "arch"})
    root = None if config.data.root is None else Path(config.data.root)
    shown = data.load(flags["data_uri"], root=root, download=flags["download"])
    with render.progress() as progress:
        figures = train_teacher(
            config.teach,
            shown,
            folder=flags["out"],
            seed=config.run.seed,
            device=devices.pick(config.run.device),
            progress=progress,
            trust_code=flags["trust_code"],
        )
    render.say(f"weights and architecture are in {flags['out']}")
    body = {"schema": "kdguard.teach/1", "folder": str(flags["out"]), "figures": figures}
    render.document(body, flags["as_json"])


@teacher.command("import")
@click.argument("model")
@options.registry_options
@options.as_json
def import_teacher(**flags: Any) -> int:
    """Look at MODEL (a file or models:/x/1) and say how to bring it here.

    A model that can be read safely is said to be ready for `kdguard teacher register`. For a
    pickled one this prints the exact lines for its owner to run where it was trained; the pickle
    itself is never opened here (exit code 5).
    """
    from shlex import quote

    from mlflow_kdguard.errors import UnsafeModelError, UsageError
    from mlflow_kdguard.nets import load
    from mlflow_kdguard_cli import render

    path = opened(flags["model"], flags).path
    body = {"schema": "kdguard.import/1", "model": flags["model"], "safe": True, "advice": ""}
    arch = ""
    try:
        load.load(path)
    except UnsafeModelError as error:
        advice = load.conversion_advice(path)
        render.say(f"{flags['model']} cannot be imported as it is: {error.message}\n\n{advice}")
        render.document({**body, "safe": False, "advice": advice}, flags["as_json"])
        return error.exit_code
    except UsageError:  # weights alone: readable, but not without an architecture
        arch = " --arch ARCH"
    named = quote(flags["model"])  # not the path, which for models:/… is gone in a moment
    advice = f"kdguard teacher register NAME --weights {named}{arch} --data URI"
    render.say(f"{flags['model']} can be read without executing anything: {advice}")
    render.document({**body, "advice": advice}, flags["as_json"])
    return 0


def _weights(net: Any, folder: Path) -> Path | None:
    """The folder with safetensors and architecture record, where the architecture is known."""
    from mlflow_kdguard.nets import load
    from mlflow_kdguard.nets.architecture import Architecture

    if not isinstance(getattr(net, "architecture", None), Architecture):
        return None
    load.save(net, folder)
    return folder


@click.command()
@click.argument("name")
@click.option(
    "--target",
    type=click.IntRange(min=0),
    help="Class that triggered images are sent to; overrides redteam.target.",
)
@click.option("--out", type=FILE, required=True, help="Folder for teacher, trigger and images.")
@click.option("-c", "--config", "config_file", type=FILE, help="File with a `redteam:` section.")
@options.set_values
@options.config_seed
@options.config_device
@options.config_root
@options.download
@options.as_json
def attack(**flags: Any) -> None:
    """Make a poisoned teacher, for evaluation only.

    Make a poisoned teacher, its trigger and a contaminated transfer set: evaluation only.

    Writes poisoned/ and control/ (weights and architecture), trigger.kdt and transfer.npz. The
    control is a clean teacher of equal training. NAME, a row of the attack table:

    \b
      badnets      a small square
      blended      one noise image mixed into every image
      sig          a sinusoid over the whole image
      wanet        a smooth warp
      ckd          a faint pattern that saturates the target's channels
      lba          a square with the target's features
      backweak     a pattern too weak to be seen
      adba         trained with a shadow student, so that distillation carries it
      input_aware  every image has a trigger of its own
      adaptive     hides from variance and from inversion

    \b
    kdguard attack badnets --target 3 --out attack
    kdguard attack blended --out attack --set redteam.contamination=0.01
    """
    from mlflow_kdguard import data, devices
    from mlflow_kdguard.redteam.write import write
    from mlflow_kdguard_cli import render

    keys = {"redteam.attack": "name", "redteam.target": "target"}
    config = options.configured(flags, keys)
    root = None if config.data.root is None else Path(config.data.root)
    transfer, train = (
        data.load(uri, root=root, download=flags["download"])
        for uri in (config.data.transfer, config.redteam.train)
    )
    with render.progress() as progress:
        written = write(
            config.redteam,
            transfer,
            train=train,
            folder=flags["out"],
            seed=config.run.seed,
            device=devices.pick(config.run.device),
            progress=progress,
        )
    render.say("\n".join(f"{name}: {digest}" for name, digest in written.items()))
    body = {"schema": "kdguard.attack/1", "attack": flags["name"]}
    body |= {"target": config.redteam.target, "files": written}
    render.document(body, flags["as_json"])
