"""The attack suite: every row of the table against real gated servers.

For each attempt: nothing guarded moved (read from the tables), what promoted versions serve is
unchanged (read from the disk), the answer is no 5xx and came within seconds, and a refusal is a
403 that says why and left exactly one record in the log.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from flows.attacks import (  # noqa: F401  (importing fills the table)
    bundles,
    documents,
    emergencies,
    life,
    names,
    operator_side,
    races,
    routes,
    sources,
    writes,
)
from flows.attacks.table import ATTACKS, Attack, Attempt
from flows.attacks.world import SLOWEST, World, gated, parsed, timed

SERVERS: dict[str, dict[str, bool]] = {
    "sqlite": {},
    "postgres-auth-app": {"app": True, "auth": True},
    "sqlite-auth": {"auth": True},
    "sqlite-auth-app": {"app": True, "auth": True},
    "postgres": {},
    "postgres-app": {"app": True},
}
WHOLE, SAMPLED = "sqlite", "postgres-auth-app"


def _rows() -> Iterator[object]:
    """Every row on every server. The whole table runs on one by default, one variant of every row
    on another, and the rest is slow."""
    for server, options in SERVERS.items():
        seen: set[str] = set()
        for attack in ATTACKS.values():
            if attack.needs and not options.get(attack.needs):
                continue
            base = attack.name.partition(":")[0]
            default = server == WHOLE or (server == SAMPLED and base not in seen)
            seen.add(base)
            marks = [] if default else [pytest.mark.slow]
            if server.startswith("postgres"):
                marks.append(pytest.mark.postgres)
            yield pytest.param(server, attack, marks=marks, id=f"{server}-{attack.name}")


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp(request.param)
    database = f"sqlite:///{folder / 'mlflow.db'}"
    if request.param.startswith("postgres"):
        database = new_database(request.getfixturevalue("postgres_uri"), request.param)
    with gated(folder, database, **SERVERS[request.param]) as made:
        yield made


def new_database(uri: str, name: str) -> str:
    """A database of its own in a PostgreSQL that is running."""
    name = re.sub(r"\W", "_", name)
    engine = sqlalchemy.create_engine(uri, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f'CREATE DATABASE "{name}"'))
    engine.dispose()
    return uri.rpartition("/")[0] + f"/{name}"


def test_at_least_fifty_attempts_are_made() -> None:
    assert len(ATTACKS) >= 50


def test_the_threat_model_names_what_there_is() -> None:
    """Every threat has a row or a test, and what the document names exists."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "threat-model.md").read_text().partition("one by one")[2]
    rows = {name.partition(":")[0] for name in ATTACKS}
    tests = {
        name
        for path in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    numbers = [int(n) for n in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)]
    assert numbers == list(range(1, 17))
    for line in re.findall(r"^\| \d+ \|.*$", page, flags=re.MULTILINE):
        named = re.findall(r"`([^`]+)`", line.rpartition(" | ")[2])
        assert named
        assert set(named) <= rows | tests, set(named) - rows - tests
    assert set(re.findall(r"`(test_\w+)`", page)) <= tests


@pytest.mark.parametrize(("world", "attack"), list(_rows()), indirect=["world"])
def test_nothing_is_promoted_by(attack: Attack, world: World) -> None:
    tried = 0
    with contextlib.closing(attack.play(world)) as scene:
        for attempt in scene:
            _try(attempt, world)
            tried += 1
    assert tried


def _try(attempt: Attempt, w: World) -> None:
    before, count = w.state(), len(w.log())
    served = [w.bytes_of(version) for version in attempt.serves]
    answer, seconds = timed(attempt.call)
    said = f"{answer.status_code} {answer.text[:2000]}"
    assert w.state() == before, said
    assert [w.bytes_of(version) for version in attempt.serves] == served, said
    assert answer.status_code in attempt.status, said
    assert seconds < (attempt.slowest or SLOWEST), seconds
    if answer.status_code == 403 and attempt.logged is not None:
        _refused(attempt, answer, w.log()[count:])


def _refused(attempt: Attempt, answer: object, records: list[dict[str, object]]) -> None:
    body = parsed(answer)  # type: ignore[arg-type]
    assert body.get("error_code") == "PERMISSION_DENIED", body
    for words in attempt.says:
        assert re.search(words, body["message"]), f"{words!r} is not in: {body['message']}"
    if attempt.logged:
        assert len(records) == 1, records
        assert records[0]["decision"] != "pass", records
        assert str(records[0]["reasons"]) not in ("", "[]", "null"), records
