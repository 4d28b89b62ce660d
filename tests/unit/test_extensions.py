"""Named tables: lazy, and never silently replaced."""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint

import pytest

from mlflow_kdguard import extensions
from mlflow_kdguard.errors import ConfigError


@pytest.fixture(autouse=True)
def _fresh_tables() -> Iterator[None]:
    extensions.table.cache_clear()
    yield
    extensions.table.cache_clear()


def _installed(*points: EntryPoint) -> Callable[..., tuple[EntryPoint, ...]]:
    return lambda *, group: tuple(point for point in points if point.group == group)


def test_names_are_the_built_in_rows() -> None:
    for kind, rows in extensions.BUILT_IN.items():
        assert set(rows) <= set(extensions.names(kind))
        assert list(extensions.names(kind)) == sorted(extensions.names(kind))


@pytest.mark.parametrize("kind", sorted(extensions.BUILT_IN))
def test_rows_name_a_module_of_this_package_and_an_attribute(kind: str) -> None:
    for target in extensions.BUILT_IN[kind].values():
        module, colon, attribute = target.partition(":")
        assert colon
        assert attribute.isidentifier()
        assert module.startswith("mlflow_kdguard.")


def test_reading_a_table_imports_nothing() -> None:
    before = set(sys.modules)
    for kind in extensions.BUILT_IN:
        extensions.names(kind)
    new = set(sys.modules) - before
    assert not {name for name in new if name.startswith(("mlflow_kdguard.", "torch"))}


def test_an_installed_row_is_found_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "json:dumps", "mlflow_kdguard.loss")
    other = EntryPoint("else", "json:loads", "mlflow_kdguard.attack")
    monkeypatch.setattr(extensions, "entry_points", _installed(point, other))
    assert "mine" in extensions.names("loss")
    assert "else" not in extensions.names("loss")
    assert extensions.load("loss", "mine")({"a": 1}) == '{"a": 1}'


def test_two_claims_to_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    thief = EntryPoint("fd", "json:dumps", "mlflow_kdguard.loss")
    monkeypatch.setattr(extensions, "entry_points", _installed(thief))
    with pytest.raises(ConfigError, match=r"two packages provide the loss 'fd'.*json:dumps"):
        extensions.load("loss", "fd")
    first = EntryPoint("mine", "json:dumps", "mlflow_kdguard.loss")
    second = EntryPoint("mine", "json:loads", "mlflow_kdguard.loss")
    monkeypatch.setattr(extensions, "entry_points", _installed(first, second))
    with pytest.raises(ConfigError, match="'mine'"):
        extensions.names("loss")


def test_the_same_claim_twice_is_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install beside a wheel lists one entry point twice."""
    point = EntryPoint("mine", "json:dumps", "mlflow_kdguard.loss")
    monkeypatch.setattr(extensions, "entry_points", _installed(point, point))
    assert "mine" in extensions.names("loss")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no detox called 'typo'") as caught:
        extensions.load("detox", "typo")
    assert "variance_mask" in caught.value.remedy
