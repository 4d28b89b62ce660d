"""`kdguard run` and `kdguard demo`: the pipeline, and the story around it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlflow_kdguard_cli import options

if TYPE_CHECKING:
    from mlflow_kdguard.attest import Signer
    from mlflow_kdguard.attest.signing import Role
    from mlflow_kdguard.config import GuardConfig
    from mlflow_kdguard.pipeline import Grant


@click.command()
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Configuration file; see examples/ and docs/reference/configuration.md.",
)
@options.set_values
@click.option("--teacher", help="Teacher: a file, or models:/name/version.")
@click.option("--transfer", help="Data URI of the images to distil on.")
@click.option("--clean", help="Data URI of the small, trusted, labelled set.")
@click.option("--test", help="Data URI of the held-out images.")
@click.option("--model-name", help="Registered model of the student.")
@click.option("--alias", help="Alias that a passing student is given.")
@click.option("--out", help="Folder for checkpoints and results.")
@options.config_device
@options.config_root
@click.option("--resume", metavar="RUN_ID", help="Go on with an interrupted MLflow run.")
@click.option(
    "--key",
    envvar="KDGUARD_KEY",
    help="Signing key (kdguard keygen); default: one is made in the output folder.",
)
@click.option(
    "--verifier-key",
    envvar="KDGUARD_VERIFIER_KEY",
    help="Verifier's key: measure the registered student again and sign, as `kdguard verify` does.",
)
@options.registry_options
@options.gate_options
@options.trust_code
@options.download
@options.as_json
def run(**flags: Any) -> int:
    """The pipeline: audit, detox, distil, certify, gate, promote.

    \b
    kdguard run -c guard.yaml
    kdguard run --teacher models:/scraped/1 --transfer imagefolder:photos --clean npz:clean.npz \\
                --test npz:test.npz --pin npz:test.npz

    A configuration with a `redteam` section tells the whole story instead: it makes a poisoned
    teacher first and trains a naive student beside the guarded one, for evaluation.

    Ctrl-C loses nothing that was finished: run the same command again, or --resume RUN_ID.
    Exit code 3 means that the student was refused.
    """
    from mlflow_kdguard.pipeline import guard
    from mlflow_kdguard_cli import outcomes, render

    as_json = bool(flags["as_json"])
    config = _config(flags)
    with render.progress() as progress:
        if config.redteam is not None:
            from mlflow_kdguard.story import tell

            story = tell(config, _grant(flags, config), progress=progress)
            return outcomes.finish(story, as_json)
        outcome = guard(config, _grant(flags, config), progress=progress)
    render.decision(outcome.decision, outcome.uri)
    if outcome.alias is not None:
        render.say(f"promoted: {outcome.uri} is @{outcome.alias} now")
    if hint := outcomes.unverified(outcome, config):
        render.say(hint)
    render.say(f"every file is in {outcome.folder}; MLflow run {outcome.run_id}")
    render.document(outcomes.outcome_document(outcome), as_json)
    return 0 if outcome.decision.passed else 3


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("kdguard-demo"),
    show_default=True,
    help="Folder for the MLflow database, models and results.",
)
@options.set_values
@options.as_json
def demo(out: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """The whole story on embedded data, in a few minutes.

    Real handwritten digits, MLflow on sqlite. A teacher with a backdoor is made; a student
    distilled naively from it is refused by the gate, a guarded one is promoted, and both are held
    against the students of a clean teacher and of no teacher. `mlflow ui` shows every run.
    """
    from importlib.resources import files

    from mlflow_kdguard.config import load
    from mlflow_kdguard.story import tell
    from mlflow_kdguard_cli import outcomes, render

    place = out.resolve()
    store = f"sqlite:///{place / 'mlflow.db'}"
    own = {f"registry.{name}": store for name in ("tracking_uri", "registry_uri")}
    packaged = Path(str(files("mlflow_kdguard") / "demo.yaml"))
    config = load(packaged, overrides, {**own, "run.work_dir": str(place)})
    grant = replace(_grant({}, config), verifier=_own_key(place, "verifier"))
    with render.progress() as progress:
        story = tell(config, grant, progress=progress)
    code = outcomes.finish(story, as_json)
    render.say(outcomes.serves(story, config, grant))
    render.say(outcomes.afterwards(story, config, place))
    return code


KEYS = {
    "teacher.model": "teacher",
    "data.transfer": "transfer",
    "data.clean": "clean",
    "data.test": "test",
    "registry.model_name": "model_name",
    "registry.alias": "alias",
    "registry.tracking_uri": "tracking_uri",
    "registry.registry_uri": "registry_uri",
    "run.work_dir": "out",
}
"""What a flag of `kdguard run` overrides."""


def _config(flags: dict[str, Any]) -> "GuardConfig":
    source = click.get_current_context().get_parameter_source("tracking_uri")
    if source is ParameterSource.ENVIRONMENT:  # MLflow's own default, which a file overrides
        flags = {**flags, "tracking_uri": None}
    if flags["resume"]:
        flags = _resumed(flags["resume"], flags)
    config: GuardConfig = options.configured(flags, KEYS)
    return config


def _resumed(run_id: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that go on with an interrupted run: its own configuration, in its own folder."""
    from mlflow_kdguard.config import RegistrySection
    from mlflow_kdguard.errors import UsageError
    from mlflow_kdguard.flow.work import CONFIG_FILE
    from mlflow_kdguard.registry import Registry

    section = RegistrySection(
        tracking_uri=flags["tracking_uri"], registry_uri=flags["registry_uri"]
    )
    folder = Registry(section).work_dir(run_id)
    _refuse_another(folder, run_id)
    if not folder.is_dir():
        raise UsageError(
            f"the folder {folder} of run {run_id} is not on this machine.",
            remedy="Resume where the run was started.",
        )
    return {
        **flags,
        "config_file": flags["config_file"] or folder / CONFIG_FILE,
        "out": str(folder),
    }


def _refuse_another(folder: Path, run_id: str) -> None:
    """UsageError where the folder holds the work of another run by now."""
    from mlflow_kdguard.errors import UsageError
    from mlflow_kdguard.flow.work import begun

    other = begun(folder)
    if other not in (None, run_id):
        raise UsageError(
            f"{folder} holds the work of run {other} by now, not of {run_id}.",
            remedy=f"Resume {other}, or start the command again without --resume.",
        )


def _grant(flags: dict[str, Any], config: "GuardConfig") -> "Grant":
    from mlflow_kdguard.pipeline import Grant

    return Grant(
        policy=options.chosen_policy(flags.get("policy_file")),
        signer=_signer(flags.get("key") or None, Path(config.run.work_dir)),
        verifier=_verifier(flags),
        pins=options.pinned(
            flags.get("pins", ()),
            None if config.data.root is None else Path(config.data.root),
            download=bool(flags.get("download")),
        ),
        panel=options.panel_digests(flags.get("panel", ())),
        allow_unpinned=bool(flags.get("allow_unpinned")),
        trust_code=bool(flags.get("trust_code")),
        download=bool(flags.get("download")),
    )


def _signer(named: str | None, folder: Path) -> "Signer":
    """The caller's key, or one made for this folder, which says so."""
    from mlflow_kdguard.attest import Signer

    return Signer.load(Path(named)) if named else _own_key(folder, "builder")


def _verifier(flags: dict[str, Any]) -> "Signer | None":
    from mlflow_kdguard.attest import Signer

    named = flags.get("verifier_key")
    return Signer.load(Path(named)) if named else None


def _own_key(folder: Path, role: "Role") -> "Signer":
    """A key that only this folder's checks know."""
    from mlflow_kdguard.attest import Signer, keygen
    from mlflow_kdguard_cli import render

    key = folder / "keys" / f"{role}.pem"
    if not key.exists():
        keygen(key, owner=role, role=role)
        render.say(f"no {role}'s key was given: made {key}, which only this folder's checks know")
    return Signer.load(key)
