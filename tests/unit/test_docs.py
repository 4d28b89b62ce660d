"""The documents speak of what there is: commands, options, pages and links."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from mlflow_kdguard_cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "CONTRIBUTING.md"]


def _commands(page: Path) -> list[str]:
    text = page.read_text().replace("\\\n", " ")
    return [
        re.split(r"\s#", line)[0].strip()
        for line in re.findall(r"^\$ (kdguard .*)$", text, flags=re.MULTILINE)
    ]


CASES = [(page.name, line) for page in PAGES for line in _commands(page)]


@pytest.mark.parametrize(("page", "line"), CASES)
def test_every_documented_command_can_be_parsed(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command | None = cli
    while isinstance(command, click.Group):
        word, words = words[0], words[1:]
        command = command.get_command(click.Context(command), word)
    assert command is not None, line
    command.make_context(line, words)


def test_there_are_documented_commands() -> None:
    assert len(CASES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_the_configuration_page_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "configuration.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text() == tool.page(), "run: python tools/configuration.py"
