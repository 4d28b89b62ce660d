"""Options that several commands share, and the checks behind them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")

device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto takes CUDA where there is one; cuda without CUDA is an error, never a CPU run.",
)


def _parts(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> list[str]:
    """One --set may hold several values, as an MLflow project passes them."""
    parts = [part.strip() for text in given for part in text.split(";")]
    return [part for part in parts if part]


data_root = click.option(
    "--data-root", type=click.Path(path_type=Path), help="Folder of torchvision data sets."
)
download = click.option("--download", is_flag=True, help="Allow torchvision to download.")
seed = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
config_seed = click.option("--seed", type=click.IntRange(min=0), help="Overrides run.seed.")
config_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Overrides run.device: auto takes CUDA where there is one.",
)
config_root = click.option(
    "--data-root", help="Folder of torchvision data sets; overrides data.root."
)
tracking = click.option(
    "--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server (or sqlite:///FILE)."
)
trust_code = click.option(
    "--trust-code",
    is_flag=True,
    help="Allow an architecture `package.module:factory`, which runs that code.",
)
data = click.option(
    "--data",
    "data_uri",
    required=True,
    metavar="URI",
    help="Images: digits, mnist5k, fashion-mnist, …, idx:DIR, imagefolder:DIR, npz:FILE; "
    "#train or #test picks a split, #test[:200] a slice.",
)
set_values = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    callback=_parts,
    help="Change one configuration value; repeat for more, or separate them by semicolons.",
)
triggers = click.option(
    "--trigger",
    "trigger_files",
    multiple=True,
    metavar="FILE[:CLASS]",
    help="Trigger file, and the class that it aims at (default 0); repeat for more.",
)


def arch(command: Command) -> Command:
    """--arch, --mean and --std: what weights that stand alone do not say."""
    named = click.option(
        "--arch",
        help="Architecture, where the file holds weights only: mlp:100,100, "
        "cnn:16,32,64, resnet8, wrn-16-1, torchvision:resnet18, …",
    )
    mean = click.option(
        "--mean",
        callback=_numbers,
        metavar="M,M,M",
        help="With --arch: what training subtracted from pixels, a channel (default 0.5).",
    )
    std = click.option(
        "--std",
        callback=_numbers,
        metavar="S,S,S",
        help="With --arch: what training divided by, a channel (default 0.5).",
    )
    return named(mean(std(command)))


def _numbers(
    _context: click.Context, option: click.Parameter, given: str | None
) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in given.split(",")) if given else ()
    except ValueError as error:
        raise click.BadParameter(f"{given!r} is not numbers with commas.", param=option) from error


policy = click.option(
    "--policy", "policy_file", help="The operator's policy; default: the packaged one."
)


def registry_options(command: Command) -> Command:
    """--tracking-uri and --registry-uri."""
    registry = click.option("--registry-uri", help="Model registry, if it is another server.")
    return tracking(registry(command))


def connected(flags: dict[str, Any]) -> Any:
    """The connection that --tracking-uri and --registry-uri name; no SQLite file is created."""
    from mlflow_kdguard.config import RegistrySection
    from mlflow_kdguard.errors import RegistryError
    from mlflow_kdguard.registry.client import Connection
    from mlflow_kdguard.registry.database import sqlite_file

    named = {key: flags[key] for key in ("tracking_uri", "registry_uri")}
    for uri in named.values():
        file = sqlite_file(uri.removeprefix("kdguard+")) if uri else None
        if file is not None and not file.exists():
            raise RegistryError(f"there is no registry at {uri}.", remedy="Check the URI.")
    return Connection(RegistrySection(**named))


def gate_options(command: Command) -> Command:
    """What the operator grants at decision time."""
    pin = click.option(
        "--pin",
        "pins",
        multiple=True,
        metavar="SHA256|URI",
        help="Evaluation data that the operator accepts: a digest or a data URI.",
    )
    panel = click.option(
        "--require-trigger",
        "panel",
        multiple=True,
        metavar="FILE[:CLASS]|SHA256[:CLASS]",
        help="Trigger that must have been measured, aimed at that class where one is named.",
    )
    unpinned = click.option(
        "--allow-unpinned", is_flag=True, help="Accept figures on data that nobody pinned."
    )
    return policy(pin(panel(unpinned(command))))


def configured(flags: dict[str, Any], keys: dict[str, str]) -> Any:
    """The configuration in --config, changed by --set, then by the flags that were given.

    `keys` maps configuration keys to flags.
    """
    from mlflow_kdguard.config import load

    keys = {"run.seed": "seed", "run.device": "device", "data.root": "data_root", **keys}
    named = {key: flags[flag] for key, flag in keys.items() if flags.get(flag) not in (None, "")}
    return load(flags["config_file"], flags["overrides"], named)


def chosen_policy(file: str | None) -> Any:
    """The policy in `file`, or the packaged one."""
    from mlflow_kdguard import policy as policies

    return policies.load(Path(file) if file else None)


def named_policy(file: str | None) -> Any:
    """chosen_policy(), where an unset variable must not choose another policy."""
    if file == "":
        raise click.BadParameter("it is empty.", param_hint="--policy")
    return chosen_policy(file)


def trigger_list(files: tuple[str, ...]) -> list[tuple[Any, int]]:
    """Parse FILE[:CLASS] into loaded triggers and target classes."""
    from mlflow_kdguard.triggers import Trigger, aimed

    return [(Trigger.load(path), target) for path, target in map(aimed, files)]


def pinned(
    values: tuple[str, ...], root: Path | None = None, *, download: bool = False
) -> tuple[str, ...]:
    """Digests for --pin: a SHA-256 as it is, a data URI through its content digest."""
    from mlflow_kdguard.data import load

    return tuple(
        value if _is_digest(value) else load(value, root=root, download=download).sha256
        for value in values
        if value
    )


def panel_digests(values: tuple[str, ...]) -> tuple[str, ...]:
    """SHA256 or SHA256:CLASS for --require-trigger; a trigger file goes by its digest."""
    return tuple(map(_panel_entry, values))


def _panel_entry(value: str) -> str:
    from mlflow_kdguard.triggers import Trigger

    name, colon, target = value.rpartition(":")
    if not colon or not (target.isascii() and target.isdigit()):
        name, colon, target = value, "", ""
    if not name:  # an unset variable must not drop a demand
        raise click.BadParameter("it is empty.", param_hint="--require-trigger")
    digest = name if _is_digest(name) else Trigger.load(Path(name)).sha256
    return f"{digest}{colon}{target}"


def _is_digest(value: str) -> bool:
    return len(value) == 64 and set(value) <= set("0123456789abcdef")
