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
    figures,
    life,
    names,
    operator_side,
    people,
    races,
    routes,
    sources,
    writes,
)
from flows.attacks.opened import SLOWEST, gated, parsed, timed
from flows.attacks.table import ATTACKS, Attack, Attempt
from flows.attacks.world import World

SERVERS: dict[str, dict[str, bool]] = {
    "sqlite": {},
    "postgres-auth-app": {"app": True, "auth": True},
    "sqlite-auth": {"auth": True},
    "sqlite-auth-app": {"app": True, "auth": True},
    "postgres": {},
    "postgres-app": {"app": True},
}
WHOLE, SAMPLED = "sqlite", "postgres-auth-app"


def _servers() -> Iterator[object]:
    for name in SERVERS:
        marks = [] if name == WHOLE else [pytest.mark.slow]
        if name.startswith("postgres"):
            marks.append(pytest.mark.postgres)
        yield pytest.param(name, marks=marks)


def _sample() -> Iterator[Attack]:
    """One variant of every row, and everything that is about our app."""
    seen: set[str] = set()
    for attack in ATTACKS.values():
        base = attack.name.partition(":")[0]
        if attack.needs or base not in seen:
            yield attack
        seen.add(base)


@contextlib.contextmanager
def _running(name: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[World]:
    database = f"sqlite:///{folder / 'mlflow.db'}"
    if name.startswith("postgres"):
        database = new_database(request.getfixturevalue("postgres_uri"), folder.name)
    with gated(folder, database, **SERVERS[name]) as made:
        yield made


@pytest.fixture(params=_servers(), scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with _running(request.param, request, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture(scope="module")
def sampled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with _running(SAMPLED, request, tmp_path_factory.mktemp("sampled")) as made:
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


@pytest.mark.parametrize(
    "attack", [a for a in ATTACKS.values() if not a.needs], ids=lambda attack: attack.name
)
def test_nothing_is_promoted_by(attack: Attack, world: World) -> None:
    _play(attack, world)


@pytest.mark.postgres
@pytest.mark.parametrize("attack", list(_sample()), ids=lambda attack: attack.name)
def test_nothing_is_promoted_behind_basic_auth_and_our_app_by(
    attack: Attack, sampled: World
) -> None:
    _play(attack, sampled)


def _play(attack: Attack, world: World) -> None:
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
