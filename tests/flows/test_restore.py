"""The drill of docs/operations/backup.md, followed to the letter, and removal by one switch.

A registry with a promoted version is backed up while it runs, lost, and restored; then only its
database is lost. At the end the gated server is replaced by a plain one.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mlflow_kdguard
from flows import gates
from flows.operators import Operator, toy_bundle
from flows.pages import ROOT, Block, Shell, blocks
from flows.servers import free_port, serving
from requirements import postgres_program

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "operations" / "backup.md"


@dataclass
class Site:
    """A registry in one folder, as the page describes it."""

    folder: Path
    operator: Operator
    database: str
    port: int
    shell: Shell

    @contextlib.contextmanager
    def running(self, *, gated: bool = True) -> Iterator[gates.Gate]:
        """Its server, gated or plain."""
        options = ["--registry-store-uri", f"{'kdguard+' if gated else ''}{self.database}"]
        with serving(
            self.folder,
            backend=self.database,
            port=self.port,
            options=options,
            environment={"KDGUARD_SERVER": str(self.operator.settings)} if gated else {},
        ) as server:
            client = MlflowClient(server.uri, server.uri)
            yield gates.Gate(server, self.operator, client, self.database)

    def follow(self, heading: str, mark: str = "", *, code: int = 0) -> str:
        """Type what the page says below a heading: what everybody does, or what `mark` says."""
        kind = "postgresql" if self.database.startswith("postgresql") else "sqlite"
        wanted = (f"bash {mark}",) if mark else ("bash", f"bash {kind}")
        typed = [block for block in blocks(PAGE, heading) if block.language in wanted]
        assert typed
        return "".join(self._type(block, code) for block in typed)

    def _type(self, block: Block, code: int) -> str:
        found, printed = self.shell.type(block.text)
        assert found == code, f"{block.text}\n{printed}"
        return printed


@pytest.fixture(
    params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)], scope="module"
)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    names = {"DATABASE": "", "MAINTENANCE": ""}
    database = "sqlite:///mlflow.db"
    if request.param == "postgresql":
        maintenance = str(request.getfixturevalue("postgres_uri")).replace("+psycopg2", "")
        names = {
            "DATABASE": f"{maintenance.rpartition('/')[0]}/site",
            "MAINTENANCE": maintenance,
        }
        database = names["DATABASE"].replace("://", "+psycopg2://")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    operator = Operator.install(
        folder / "server",
        uri,
        log={"key": "log.pem", "head": "../heads/log-head.jsonl"},
        content={"root": f"file://{folder / 'content'}"},
    )
    (folder / "heads").mkdir()
    programs = [str(Path(sys.executable).parent), *_postgres_programs(), os.environ["PATH"]]
    environment = os.environ | names | {
        "PATH": os.pathsep.join(programs),
        "REGISTRY": database,
        "SERVER": uri,
    }  # fmt: skip
    with Shell(folder, environment) as shell:
        if request.param == "postgresql":
            assert shell.type('createdb --maintenance-db="$MAINTENANCE" site')[0] == 0
        yield Site(folder, operator, database, port, shell)


def _postgres_programs() -> list[str]:
    """Where the server's own programs are, so that pg_dump is not older than the server."""
    found = postgres_program("postgres")
    return [] if found is None else [str(found.parent)]


def test_the_drill(site: Site) -> None:
    with site.running() as gate:
        first = gate.certified("digits")
        gate.promote("digits", first)
        site.follow("Back up")
        second = gate.certified("digits")
        gate.promote("digits", second)
        with pytest.raises(MlflowException, match="PERMISSION_DENIED"):
            gate.promote("digits", gate.registered("digits", toy_bundle())[0])
    newer = site.folder.with_name("newer.jsonl")
    shutil.copy(site.folder / "heads" / "log-head.jsonl", newer)
    shutil.rmtree(site.folder / "content")

    site.follow("Restore")
    with site.running() as gate:
        assert gate.alias("digits") == first
        site.follow("Restore", "started")
        loaded = mlflow_kdguard.load_verified(
            "models:/digits@champion", keys=site.operator.folder / "keys", tracking_uri=gate.uri
        )
        assert loaded.uri == f"models:/digits/{first}"

    _only_the_database_was_lost(site, newer)
    _removed_by_one_switch(site, first)


def _only_the_database_was_lost(site: Site, newer: Path) -> None:
    shutil.copy(newer, site.folder / "heads" / "log-head.jsonl")
    heading = "What was lost since the backup"
    told = site.follow(heading, "lost", code=3)
    assert "the tail is cut" in told
    site.follow(heading, "resume")
    site.follow(heading, "lost")
    with site.running() as gate:
        version = gate.certified("digits")
        gate.promote("digits", version)
        assert gate.alias("digits") == version
        site.follow("Restore", "started")
        gate.client.delete_registered_model_alias("digits", "champion")
        gate.promote("digits", version)


def _removed_by_one_switch(site: Site, first: str) -> None:
    """docs/operations/removal.md: what was promoted stays where it is, and nothing is refused."""
    import mlflow

    with site.running(gated=False) as plain:
        served = plain.alias("digits")
        assert served is not None
        assert served != first
        mlflow.set_tracking_uri(plain.uri)
        mlflow.set_registry_uri(plain.uri)
        assert mlflow.onnx.load_model("models:/digits@champion") is not None
        plain.promote("digits", first)
        assert plain.alias("digits") == first
    assert (
        site.shell.type(
            'kdguard server log verify --settings server/server.yaml --database "$REGISTRY"'
        )[0]
        == 0
    )
