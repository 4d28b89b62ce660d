"""The draw of judged images: repeatable by anybody, chosen by nobody."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mlflow_kdguard.draw import draw


@given(st.integers(0, 40), st.integers(0, 50), st.lists(st.text(max_size=8), max_size=4))
def test_a_draw_is_a_set_of_valid_indices_in_order(n: int, k: int, parts: list[str]) -> None:
    drawn = draw(n, k, *parts)
    assert list(drawn) == sorted(set(drawn))
    assert len(drawn) == min(n, k)
    assert all(0 <= index < n for index in drawn)
    assert drawn == draw(n, k, *parts)


@given(st.integers(1, 100), st.integers(1, 99))
def test_a_smaller_draw_is_part_of_a_larger_one(population: int, n: int) -> None:
    """So nobody gains by asking for fewer samples first."""
    assert set(draw(population, n, "x")) <= set(draw(population, n + 1, "x"))


@pytest.mark.parametrize("changed", range(5))
def test_every_part_matters(changed: int) -> None:
    parts = ["reference", "student", "data", "nonce", "rule"]
    other = [part + "!" if i == changed else part for i, part in enumerate(parts)]
    assert draw(1000, 100, *parts) != draw(1000, 100, *other)


def test_parts_cannot_be_moved_across_their_borders() -> None:
    assert draw(1000, 50, "ab", "c") != draw(1000, 50, "a", "bc")
    assert draw(1000, 50, "ab") != draw(1000, 50, "ab", "")


def test_the_published_rule_is_the_rule() -> None:
    """Recomputed here from its description, so that another implementation can agree."""
    seed = hashlib.sha256(b"r\x1fs\x1fd\x1fn").hexdigest()
    keys = {i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest() for i in range(300)}
    expected = sorted(sorted(keys, key=lambda i: keys[i])[:20])
    assert draw(300, 20, "r", "s", "d", "n") == tuple(expected)


def test_every_index_is_equally_likely() -> None:
    counts = Counter(i for nonce in range(600) for i in draw(50, 10, str(nonce)))
    assert chisquare([counts[i] for i in range(50)]).pvalue > 1e-3


@pytest.mark.parametrize(("population", "n"), [(-1, 3), (3, -1)])
def test_impossible_draws_are_refused(population: int, n: int) -> None:
    with pytest.raises(ValueError, match="cannot draw"):
        draw(population, n, "x")
