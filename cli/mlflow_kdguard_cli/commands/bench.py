"""`kdguard bench`: the benchmarks of a source checkout."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click

from mlflow_kdguard.errors import UsageError
from mlflow_kdguard_cli import options


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@options.as_json
@click.argument("name")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...], as_json: bool) -> int:
    """Run a benchmark of the source checkout that you are in.

    Benchmarks and their recorded results are not installed with the package: clone the sources
    and go there. NAME is a folder of benchmarks/, and ARGUMENTS are its own; for example

        kdguard bench guard --help

        kdguard bench guard --config benchmarks/guard/quick.yaml --jobs 2

    Exit code 0 if it ran through, 1 if it failed, 2 for a name that is not there.
    """
    from mlflow_kdguard_cli import render

    root = _checkout(name)
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    code = _ran(command, {**os.environ, "PYTHONPATH": path}, quiet=as_json)
    body = {"schema": "kdguard.bench/1", "name": name, "arguments": list(arguments)}
    render.document({**body, "ran": code == 0}, as_json)
    return code


def _checkout(name: str) -> Path:
    """The nearest folder above that has such a benchmark."""
    here = Path.cwd()
    known: set[str] = set()
    for folder in (here, *here.parents):
        if name.isidentifier() and (folder / "benchmarks" / name / "__main__.py").is_file():
            return folder
        known |= {each.parent.name for each in folder.glob("benchmarks/*/__main__.py")}
    there = f"; there are {', '.join(sorted(known))}" if known else ", nor any other, above here"
    raise UsageError(
        f"there is no benchmark {name!r}{there}.",
        remedy="Benchmarks come with the sources: clone them, go there, and name one.",
    )


def _ran(command: list[str], environment: dict[str, str], *, quiet: bool) -> int:
    """Run it; its exit code as one of ours. With `quiet`, what it prints goes to stderr."""
    process = subprocess.Popen(  # noqa: S603 - words, not a shell's line
        command, env=environment, stdout=sys.stderr.fileno() if quiet else None
    )
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            continue  # the benchmark got it too, and ends as it sees fit
    if code in (130, -signal.SIGINT):
        return 130
    return code if code in (0, 2) else 1
