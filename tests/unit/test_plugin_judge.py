"""A judgement collects everything that speaks against a version, and raises for none of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.operators import Operator, toy_bundle
from mlflow_kdguard.artifacts import CERTIFICATE
from mlflow_kdguard.errors import RegistryError
from mlflow_kdguard.gate import RULES
from mlflow_kdguard.plugin.server.judge import Judgement, VersionFacts, judge
from mlflow_kdguard.plugin.server.places import Place
from mlflow_kdguard.plugin.server.settings import Settings

URI = "http://registry"
FILES = toy_bundle(0)


@dataclass
class Memory:
    """Reads from memory, and remembers what it was asked."""

    files: Mapping[str, bytes] = field(default_factory=lambda: FILES)
    trouble: Exception | None = None
    asked: list[Place] = field(default_factory=list)

    def step(self, uri: str) -> str:
        raise RegistryError(f"{uri} is not there")

    def read(self, place: Place) -> Mapping[str, bytes]:
        self.asked.append(place)
        if self.trouble is not None:
            raise self.trouble
        return self.files


@dataclass
class World:
    operator: Operator
    settings: Settings

    def facts(self, **changes: Any) -> VersionFacts:
        envelope = self.operator.sign(self.operator.certificate(FILES, "digits"))
        made = VersionFacts(
            name="digits", version="1", workspace="default", source="mlflow-artifacts:/1/model",
            storage_location=None, tags={CERTIFICATE: envelope.decode()},
        )  # fmt: skip
        return replace(made, **changes)

    def judged(self, facts: VersionFacts, fetch: Any = None, **more: Any) -> Judgement:
        now = more.pop("now", datetime.now(UTC))
        return judge(facts, "champion", self.settings, now=now, fetch=fetch or Memory(), **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    operator = Operator.install(tmp_path_factory.mktemp("judge") / "operator", URI)
    return World(operator, Settings.load(operator.settings))


def test_a_pass_rests_on_the_bytes_that_were_read_once(world: World) -> None:
    fetch = Memory()
    judged = world.judged(world.facts(), fetch)
    assert judged.passed, judged.reasons
    assert judged.files == FILES
    assert len(fetch.asked) == 1
    assert judged.decision.schema_ == "kdguard.gate/1"
    assert {rule.name for rule in RULES} < {result.rule for result in judged.decision.rules}
    assert judged.policy_digest == world.settings.policy.digest
    assert not judged.reasons


@pytest.mark.parametrize(
    "trouble", [OSError("no route"), KeyError("x"), RegistryError("down"), MemoryError()]
)
def test_trouble_with_the_store_is_a_reason(world: World, trouble: Exception) -> None:
    judged = world.judged(world.facts(), Memory(trouble=trouble))
    assert judged.decision.failed == ("bytes",)
    assert judged.files is None


@pytest.mark.parametrize("source", ["s3://elsewhere/x", "", "x", "/etc", "models:/a/1", "runs:/r"])
def test_what_lies_elsewhere_is_never_read(world: World, source: str) -> None:
    fetch = Memory()
    assert "bytes" in world.judged(world.facts(source=source), fetch).decision.failed
    assert not fetch.asked


@settings(max_examples=40)
@given(path=st.sampled_from(sorted(FILES)), data=st.data())
def test_no_byte_may_differ(world: World, path: str, data: st.DataObject) -> None:
    where = data.draw(st.integers(0, len(FILES[path]) - 1))
    changed = bytearray(FILES[path])
    changed[where] ^= 1 << data.draw(st.integers(0, 7))
    judged = world.judged(world.facts(), Memory(FILES | {path: bytes(changed)}))
    assert "certificate.bytes" in judged.decision.failed


@settings(max_examples=40)
@given(envelope=st.one_of(st.text(max_size=200), st.binary(max_size=80).map(repr)))
def test_nothing_that_stands_in_a_tag_raises(world: World, envelope: str) -> None:
    judged = world.judged(world.facts(tags={CERTIFICATE: envelope}))
    assert not judged.passed
    assert judged.reasons


def test_a_certificate_with_one_letter_changed_is_not_believed(world: World) -> None:
    text = world.facts().tags[CERTIFICATE]
    for where in range(0, len(text), max(1, len(text) // 60)):
        other = "A" if text[where] != "A" else "B"
        changed = text[:where] + other + text[where + 1 :]
        assert not world.judged(world.facts(tags={CERTIFICATE: changed})).passed


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"name": "letters"}, "certificate.model"),
        ({"workspace": "team"}, "certificate.registry"),
        ({"tags": {}}, "certificate"),
    ],
)
def test_what_the_certificate_is_not_about(
    world: World, changes: dict[str, Any], rule: str
) -> None:
    assert rule in world.judged(world.facts(**changes)).decision.failed


def test_a_workspace_is_part_of_the_registrys_name(world: World) -> None:
    stated = world.operator.certificate(FILES, "digits", registry=f"{URI}#workspace=team")
    tags = {CERTIFICATE: world.operator.sign(stated).decode()}
    assert world.judged(world.facts(workspace="team", tags=tags)).passed
    assert not world.judged(world.facts(tags=tags)).passed


def test_time_passes(world: World) -> None:
    facts = world.facts()
    for days, passes in ((-1, False), (0, True), (29, True), (31, False)):
        now = datetime.now(UTC) + timedelta(days=days)
        assert world.judged(facts, now=now).passed is passes, days


def test_rules_that_fail_for_one_reason_stand_together(world: World) -> None:
    reasons = world.judged(world.facts(tags={})).reasons
    assert len(reasons) == 1
    assert all(rule.name in reasons[0] for rule in RULES)
