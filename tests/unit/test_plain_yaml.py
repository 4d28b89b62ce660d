"""YAML that is read strictly: one reading, no more than is written, errors of one kind."""

from pathlib import Path

import pytest

from mlflow_kdguard import config, plain_yaml
from mlflow_kdguard.errors import ConfigError


def test_plain_documents_are_read() -> None:
    assert plain_yaml.parse("a: {b: [1, 2.5, x, null, true]}\nc: ''") == {
        "a": {"b": [1, 2.5, "x", None, True]},
        "c": "",
    }
    assert plain_yaml.parse(b"") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "key 'a' twice"),
        ("x: {a: {b: 1, b: 2}}", "key 'b' twice"),
        ("a: &x [1]\nb: *x", "alias"),
        ("a: &x [*x]", "alias"),
        ("<<: {a: 1}\nb: 2", "merge"),
        ("a: 2026-13-45", "malformed"),
        ("a: !!bool x", "malformed"),
        ('a: !!int ""', "malformed"),
        ('a: !!float ""', "malformed"),
        ("a: !!timestamp x", "malformed"),
        (f"a: {'9' * 5000}", "malformed"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [true]", "constructor"),
        ("? [a]\n: b", "constructing a mapping"),
        ("? {a: b}\n: c", "constructing a mapping"),
        ("a: [", "parsing"),
        ("a: \x00", "unacceptable character"),
        (b"\xff", "invalid start byte"),
        ("a: 1\n---\na: 2", "single document"),
    ],
)
def test_everything_else_is_a_value_error_of_one_line(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        plain_yaml.parse(text)
    assert "\n" not in str(refused.value)


def test_a_few_lines_do_not_become_gigabytes() -> None:
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 12))]
    with pytest.raises(ValueError, match="alias"):
        plain_yaml.parse("\n".join(lines))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("distill: {epochs: 1}\ndistill: {lr: 0.1}", "twice"),
        ("run: {seed: 2026-13-45}", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("audit: {detectors: []}", r"audit\.detectors"),
    ],
)
def test_configurations_are_read_so_too(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "guard.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        config.load(file)


def test_so_are_single_values() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(None, ["run.seed=2026-13-45"])
