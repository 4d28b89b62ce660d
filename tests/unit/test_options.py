"""Flags, --set, files and environment: which wins, and that text stays text."""

import json
from pathlib import Path
from typing import Any

import click
import pytest

from mlflow_kdguard.config import GuardConfig
from mlflow_kdguard_cli.commands import making, run, teacher
from mlflow_kdguard_cli.main import answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[GuardConfig]:
    """What `kdguard run` would have begun with."""
    seen: list[GuardConfig] = []
    whole = run._config

    def keep(flags: dict[str, Any]) -> GuardConfig:
        seen.append(whole(flags))
        raise click.Abort

    monkeypatch.setattr(run, "_config", keep)
    return seen


def test_flags_beat_set_which_beats_the_file(tmp_path: Path, asked: list[GuardConfig]) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("teacher: {model: a}\nrun: {seed: 4, device: cuda}\ndata: {root: sets}\n")
    words = ["--set", "teacher.model=b; run.seed=5", "--set", "", "--teacher", "no #1: t.onnx"]
    answer(["run", "-c", str(file), *words, "--device", "cpu", "--data-root", "other sets"])
    (config,) = asked
    assert config.teacher.model == "no #1: t.onnx"
    assert (config.run.seed, config.run.device) == (5, "cpu")
    assert config.data.root == "other sets"


def test_empty_flags_of_a_project_say_nothing(asked: list[GuardConfig]) -> None:
    empty = ["--set", "", "--teacher", "", "--test", "", "--alias", "", "--out", ""]
    answer(["run", *empty])
    assert asked == [GuardConfig()]


def test_the_environment_is_a_default(
    tmp_path: Path, asked: list[GuardConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///environment.db")
    file = tmp_path / "g.yaml"
    file.write_text("registry: {tracking_uri: 'sqlite:///file.db'}\n")
    answer(["run", "-c", str(file)])
    answer(["run", "-c", str(file), "--tracking-uri", "sqlite:///flag.db"])
    answer(["run"])
    found = [config.registry.tracking_uri for config in asked]
    assert found == ["sqlite:///file.db", "sqlite:///flag.db", None]


@pytest.mark.parametrize("command", [making.distill, teacher.attack, run.run, run.demo])
def test_set_takes_nothing_and_several(command: click.Command) -> None:
    option = next(each for each in command.params if each.name == "overrides")
    context = click.Context(command)
    assert option.process_value(context, ("",)) == []
    assert option.process_value(context, ("a.b=1; c.d=2", "e.f=3")) == ["a.b=1", "c.d=2", "e.f=3"]


def test_an_attack_keeps_the_target_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow_kdguard.redteam import write

    seen: dict[str, Any] = {}

    def record(section: Any, transfer: Any, **options: Any) -> dict[str, str]:
        seen.update(options, section=section)
        return {}

    monkeypatch.setattr(write, "write", record)
    file = tmp_path / "g.yaml"
    file.write_text(
        "run: {seed: 7}\ndata: {transfer: 'digits#train[:50]'}\n"
        "redteam: {target: 3, train: 'digits#train[:60]'}\n"
    )
    argv = ["attack", "blended", "--out", str(tmp_path / "out"), "-c", str(file), "--set", ""]
    assert answer([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == 3
    assert (seen["section"].attack, seen["seed"], len(seen["train"])) == ("blended", 7, 60)
    assert answer([*argv, "--target", "5", "--seed", "1"]) == 0
    assert (seen["section"].target, seen["seed"]) == (5, 1)


@pytest.mark.parametrize("text", ["0.5,x", ","])
def test_a_mean_is_numbers(text: str) -> None:
    argv = ["export", "w.pt", "--data", "digits", "--out", "x.onnx", "--arch", "mlp:8"]
    assert answer([*argv, "--mean", text]) == 2
