"""The command line itself: help, exit codes, and one clear line for every error."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlflow_kdguard import errors
from mlflow_kdguard_cli.main import COMMANDS, answer, cli


def _command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    summary = (_command(name).help or "").partition("\n\n")[0].replace("\n", " ")
    ours = COMMANDS[name][1]
    assert summary == ours


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_with_help(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 200


def _leaves() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name in COMMANDS:
        found += _below(name, _command(name))
    return found


def _below(name: str, command: click.Command) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(name, command)]
    groups = (_below(f"{name} {inner}", command.commands[inner]) for inner in command.commands)
    return [leaf for group in groups for leaf in group]


@pytest.mark.parametrize(("name", "command"), _leaves())
def test_every_command_takes_json_and_explains_its_options(
    name: str, command: click.Command
) -> None:
    names = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in names
    silent = [
        parameter.name
        for parameter in command.params
        if isinstance(parameter, click.Option)
        and not parameter.help
        and parameter.name not in {"seed", "norm", "classes", "batch"}
    ]
    assert silent == []


def test_an_unknown_command_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["promot"]) == 2
    assert "No such command" in capsys.readouterr().err


def _walk(root: type[errors.KDGuardError]) -> list[type[errors.KDGuardError]]:
    return [root, *(found for child in root.__subclasses__() for found in _walk(child))]


@pytest.mark.parametrize("kind", _walk(errors.KDGuardError))
def test_every_error_becomes_its_exit_code_and_one_line(
    kind: type[errors.KDGuardError],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("file x is broken.", remedy="Mend it.")

    monkeypatch.setattr("mlflow_kdguard_cli.commands.doctor.doctor.callback", fail)
    assert answer(["doctor", "--json"]) == kind.exit_code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == "error: file x is broken."
    assert "Traceback" not in captured.err
    document = json.loads(captured.out)
    assert document["exit"] == kind.exit_code
    assert document["remedy"] == "Mend it."


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlflow_kdguard_cli.commands.doctor.doctor.callback", interrupted)
    assert answer(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_is_exit_1_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("mlflow_kdguard_cli.commands.doctor.doctor.callback", broken)
    assert answer(["doctor"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(**_: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("mlflow_kdguard_cli.commands.doctor.doctor.callback", missing)
    assert answer(["doctor"]) == 2
    assert "mlflow-kdguard[all]" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mlflow_kdguard_cli.main import answer; answer(['--help']); "
        "heavy = {'torch', 'mlflow', 'numpy', 'pydantic', 'onnx', 'rich', 'scipy'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("days", ["0", "99999999", "9" * 30])
def test_a_validity_that_no_calendar_holds_is_usage(tmp_path: Path, days: str) -> None:
    assert answer(["keygen", str(tmp_path / "key"), "--owner", "Bea", "--days", days]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("radius", ["nan", "inf", "0"])
def test_a_radius_that_is_none_is_usage(radius: str) -> None:
    assert answer(["audit", "model.onnx", "--data", "digits#test[:9]", "--radius", radius]) == 2
