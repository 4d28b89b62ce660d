"""What an operator does from the command line, and what a gated store makes of it at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.operators import toy_bundle
from flows.stores import URI, Registry, registry, write
from mlflow_kdguard.artifacts import CERTIFICATE, OVERRIDE
from mlflow_kdguard.plugin import log
from mlflow_kdguard_cli.main import answer


@pytest.fixture
def reg(tmp_path: Path) -> Iterator[Registry]:
    with registry(tmp_path, overrides=True, revoked="revoked.yaml") as made:
        yield made


@pytest.fixture(autouse=True)
def _revoked_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator" / "revoked.yaml").write_text("{}\n")


def server(reg: Registry, *arguments: Any) -> int:
    """`kdguard server …` where the store reads its settings and its tables."""
    both = ("--settings", str(reg.operator.settings), "--database", str(reg.store.engine.url))
    about = {"check": both, "log": both, "revoke": both[:2], "override": ()}[arguments[0]]
    return answer(["server", *map(str, arguments), *about])


def broken_glass(reg: Registry, version: str, files: dict[str, bytes], out: Path) -> None:
    """An override, signed by Bea and Vic, as the version's tag."""
    bundle, private = out.parent / f"bundle-{version}", reg.operator.folder / "private"
    write(bundle, files)
    about = ("--model", "digits", "--version", version, "--alias", "champion", "--registry", URI)
    rest = ("--files", bundle, "--reason", "it is down", "--hours", 1, "--out", out)
    assert server(reg, "override", "sign", *about, *rest, "--key", private / "bea") == 0
    second = ("--key", private / "vic", "--files", bundle, "--yes")
    assert server(reg, "override", "cosign", out, *second) == 0
    reg.tag("digits", version, OVERRIDE, out.read_text())


def test_a_store_that_works_is_one_that_starts_and_whose_log_holds(reg: Registry) -> None:
    reg.promote("digits", reg.certified("digits"))
    assert server(reg, "check") == 0
    assert server(reg, "log", "verify") == 0
    with reg.store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE kdguard_log SET decision = 'refuse'")
    assert server(reg, "log", "verify") == 3


def test_an_override_promotes_until_it_is_revoked(reg: Registry, tmp_path: Path) -> None:
    files, out = toy_bundle(), tmp_path / "override.json"
    version = reg.version("digits", files)
    broken_glass(reg, version, files, out)
    for _ in range(2):
        reg.promote("digits", version)
    with reg.store.engine.connect() as connection:
        (kept,) = log.overrides.accepted(connection)
    assert (kept.owners, kept.document) == (("Bea", "Vic"), out.read_bytes())
    assert reg.actions()[-2:] == ["override", "override"]
    assert server(reg, "log", "verify") == 0
    assert server(reg, "revoke", out) == 0
    assert "revoked" in reg.refused("digits", version)


def test_what_is_revoked_is_refused_by_the_running_store(reg: Registry, tmp_path: Path) -> None:
    good, bad = reg.certified("digits"), reg.certified("digits")
    reg.promote("digits", bad)
    reg.promote("digits", good)
    certificate = tmp_path / "certificate.json"
    certificate.write_text(reg.tags("digits", bad)[CERTIFICATE])
    assert server(reg, "revoke", certificate) == 0
    assert "revoked" in reg.refused("digits", bad)
    reg.promote("digits", good)
    assert server(reg, "revoke", reg.operator.folder / "keys" / "vic.pub") == 0
    assert "compromised" in reg.refused("digits", good)
    assert server(reg, "log", "verify") == 0


def test_an_interrupted_revocation_refuses_until_it_is_repeated(reg: Registry) -> None:
    """The list is written first: a list that the database does not know is not acted upon."""
    version = reg.certified("digits")
    reg.promote("digits", version)
    (reg.operator.folder / "revoked.yaml").write_text(f"certificates: ['{'a' * 64}']\n")
    assert "version" in reg.refused("digits", version)
    assert server(reg, "check") == 3
    assert server(reg, "revoke", "a" * 64) == 0
    reg.promote("digits", version)
    assert server(reg, "check") == 0
