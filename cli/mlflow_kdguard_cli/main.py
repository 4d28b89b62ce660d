"""The `kdguard` command: a table of commands, loaded one at a time, and the exit codes.

Nothing but click is imported before a command is chosen, so that `--help` answers at once.
"""

import json
import os
import sys
from importlib import import_module

import click

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("run:demo", "The whole story on embedded data, in a few minutes."),
    "run": ("run:run", "The pipeline: audit, detox, distil, certify, gate, promote."),
    "teacher": ("teacher:teacher", "Register a teacher safely, or learn how to convert one."),
    "attack": ("teacher:attack", "Make a poisoned teacher, for evaluation only."),
    "audit": ("audit:audit", "Look for a backdoor in a teacher or a student."),
    "distill": ("making:distill", "Distil a student from a reference network."),
    "export": ("making:export", "Export a network to ONNX and compare before believing it."),
    "measure": ("judging:measure", "Accuracy and attack success rates on the ONNX bytes."),
    "certify": ("judging:certify", "Bounds on the confidence gap between reference and student."),
    "export-query": (
        "queries:export_query",
        "The question behind `certify` as ONNX and VNN-LIB files for other solvers.",
    ),
    "certify-smooth": (
        "smooth:certify_smooth",
        "Bounds on the gap of two smoothed networks, of any size.",
    ),
    "certify-patch": ("patch:certify_patch", "Attack success of any patch, proved from above."),
    "keygen": ("keys:keygen", "Make a signing key with an owner and a role."),
    "key": ("keys:key", "End a key: retire it, or declare it compromised."),
    "attest": ("attest:attest", "Sign a certificate for a model file."),
    "check": (
        "check:check",
        "Check a certificate against a file; needs neither torch nor mlflow.",
    ),
    "verify": (
        "verify:verify",
        "Measure a version again from its bytes, and sign as verifier.",
    ),
    "cosign": ("cosign:cosign", "Sign a version's certificate beside those who signed it."),
    "gate": ("promote:gate", "The promotion decision, without acting on it."),
    "promote": ("promote:promote", "The decision, then the alias if it passes."),
    "adopt": ("adopt:adopt", "Take stock of a registry that a gate is to guard."),
    "sweep": ("sweep:sweep", "Every guarded alias, and what is wrong with one."),
    "server": (
        "server:server",
        "Operate a gated registry: check its settings, read its log, revoke, override.",
    ),
    "bench": ("bench:bench", "Run a benchmark of the source checkout that you are in."),
    "doctor": ("doctor:doctor", "What is installed, what is missing, what each command needs."),
}
"""Command -> (module:attribute, help in one line); a test holds it against the command's own."""

EPILOG = (
    "Exit codes: 0 yes · 1 our failure · 2 usage or configuration · 3 refused (the answer is no) "
    "· 4 registry · 5 unsafe or malformed model · 6 solver · 7 export mismatch · 8 certificate "
    "· 130 Ctrl-C"
)


class LazyGroup(click.Group):
    """A group that imports a command only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        loaded = import_module(f"mlflow_kdguard_cli.commands.{module}")
        command: click.Command = getattr(loaded, attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlflow-kdguard", prog_name="kdguard")
@click.option("--verbose", "-v", count=True, help="Say more on stderr; twice for debugging.")
def cli(verbose: int) -> None:
    """Guarded knowledge distillation: no backdoor from the teacher, no unfounded confidence in
    the student, and a promotion only for the very bytes that passed.

    Start with `kdguard demo`. Every command takes --json (one document on stdout; people's text
    and progress go to stderr).
    """
    import logging

    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("mlflow_kdguard").setLevel(level)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with the documented exit code."""
    argv = sys.argv[1:] if arguments is None else arguments
    sys.exit(answer(argv))


def answer(argv: list[str]) -> int:
    """Run one command line; the exit code (errors become one clear line on stderr)."""
    try:
        code = cli.main(argv, prog_name="kdguard", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _say(
            argv,
            "interrupted; files are whole or absent, none is half-written.",
            "",
            130,
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last frame: everything becomes an exit code
        return _explain(argv, error)
    return code if isinstance(code, int) else 0


def _explain(argv: list[str], error: Exception) -> int:
    from mlflow_kdguard.errors import KDGuardError

    if isinstance(error, KDGuardError):
        return _say(argv, error.message, error.remedy, error.exit_code)
    if "-vv" in argv or "KDGUARD_DEBUG" in os.environ:
        raise error
    missing = _missing_package(error)
    if missing:
        remedy = "Install the full set: pip install 'mlflow-kdguard[all]'."
        return _say(argv, f"this command needs the package {missing}.", remedy, 2)
    text = f"an error that should not happen: {type(error).__name__}: {error}"
    return _say(argv, text, "Set KDGUARD_DEBUG=1 for the traceback, and please report it.", 1)


def _missing_package(error: Exception) -> str | None:
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    top = error.name.partition(".")[0]
    return None if top.startswith("mlflow_kdguard") else top


def _say(argv: list[str], message: str, remedy: str, code: int) -> int:
    click.echo(click.style("error: ", fg="red", bold=True, reset=True) + message, err=True)
    if remedy:
        click.echo(f"  {remedy}", err=True)
    if "--json" in argv:
        document = {"schema": "kdguard.error/1", "error": message, "remedy": remedy, "exit": code}
        click.echo(json.dumps(document))
    return code
