"""benchmarks/guard: lift, validity and value kept by hand; what is drawn, and what is asked for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.guard import cells, flags, instances, specification
from benchmarks.guard.rows import HELD_OUT, chosen, guards, rows
from benchmarks.guard.scores import lift_bounds, score, valid
from mlflow_kdguard import redteam
from mlflow_kdguard.config import RedteamSection
from mlflow_kdguard.errors import UsageError

SPEC = specification.read(Path(cells.__file__).parent / "spec.yaml")


def judged(accuracy: float, asr: float, *, n: int = 1000, seconds: float = 1.0) -> cells.Judged:
    right, sent = (np.arange(n) < round(share * n) for share in (accuracy, asr))
    return cells.Judged(right, sent, {"seconds": {"student": seconds, "audit": 2 * seconds}})


def test_a_score_is_that_of_its_formulas() -> None:
    undefended = [judged(0.9, 0.8), judged(0.88, 0.6)]
    clean = [judged(0.9, 0.02), judged(0.9, 0.04)]
    alone = [judged(0.8, 0.0), judged(0.82, 0.0)]
    found = score([judged(0.88, 0.03), judged(0.86, 0.05)], undefended, clean, alone)
    assert found.accuracy == pytest.approx(0.87)
    assert found.drop == pytest.approx(0.02)
    assert found.asr == pytest.approx(0.04)
    assert found.baseline == pytest.approx(0.03)
    assert found.lift == pytest.approx(0.01)
    assert found.kept == pytest.approx((0.87 - 0.81) / (0.89 - 0.81))
    assert found.gained == pytest.approx(0.06)
    assert found.seconds == pytest.approx(3.0)
    assert found.lift_lower < 0.01 < found.lift_upper
    assert valid(undefended, clean)


def test_value_is_told_as_a_difference_where_a_teacher_is_worth_little() -> None:
    little = [judged(0.829, 0.8)], [judged(0.9, 0.0)], [judged(0.8, 0.0)]
    found = score([judged(0.81, 0.0)], *little)
    assert found.kept is None
    assert found.gained == pytest.approx(0.01)


@pytest.mark.parametrize(("undefended", "counts"), [(0.34, True), (0.33, False)])
def test_a_row_counts_from_three_tenths_above_the_clean_teachers_student(
    undefended: float, counts: bool
) -> None:
    assert valid([judged(0.9, undefended)], [judged(0.9, 0.04)]) is counts


def test_bounds_of_the_lift_cover_it_as_often_as_they_say() -> None:
    """Drawn seeds with rates of their own, and images with those rates."""
    draw, covered, times = np.random.default_rng(0), 0, 100
    for _ in range(times):
        pairs = [
            (draw.random(300) < rate, draw.random(300) < 0.1) for rate in draw.normal(0.3, 0.05, 12)
        ]
        low, high = lift_bounds(pairs)
        assert low < high
        covered += high >= 0.2
    assert covered >= 0.88 * times


def test_bounds_pair_the_images_of_one_seed() -> None:
    """The same errors on both sides leave nothing to be uncertain of."""
    sent = np.arange(500) % 3 == 0
    assert lift_bounds([(sent, sent)]) == (0.0, 0.0)


def test_drawn_instances_are_new_and_follow_from_their_seed() -> None:
    found = instances.drawn(seed=5, count=8, classes=10, side=28)
    assert found == instances.drawn(seed=5, count=8, classes=10, side=28)
    assert found != instances.drawn(seed=6, count=8, classes=10, side=28)
    targets = [each["target"] for each in found.values()]
    assert len(set(targets)) == 8
    assert 0 not in targets
    assert len(found) == 8


@pytest.mark.parametrize("seed", range(12))
def test_drawn_instances_fit_their_images(seed: int) -> None:
    for told in instances.drawn(seed=seed, count=4, classes=10, side=28).values():
        section = RedteamSection(**{key: told[key] for key in ("attack", "target", "options")})
        place: Any = SimpleNamespace(data=SimpleNamespace(shape=(1, 28, 28)), seed=1)
        plan = redteam.attack_of(section)(place, **section.options)
        assert plan.trigger.shape == (1, 28, 28)


@pytest.mark.parametrize("seed", range(12))
def test_attacks_that_are_trained_have_the_options_that_are_drawn(seed: int) -> None:
    trained = list(instances.drawn(seed=seed, count=6, classes=10, side=28).values())[4:]
    assert {told["attack"] for told in trained} == {"input_aware", "backweak"}
    for told in trained:
        section = RedteamSection(**{key: told[key] for key in ("attack", "target", "options")})
        redteam.attack_of(section)  # refuses unknown options
        assert all(0 < value <= 32 for value in section.options.values())


@pytest.mark.parametrize(
    ("freeze", "seed", "count", "rows"), [("drawn", 175265402, 4, 5), ("second", 1967338489, 8, 8)]
)
def test_instances_of_earlier_freezes_are_kept_as_they_were_drawn(
    freeze: str, seed: int, count: int, rows: int
) -> None:
    """Rows of the specification say what a seed of then said."""
    drawn = instances.drawn(seed=seed, count=count, classes=10, side=28)
    kept = {name: told for name, told in SPEC["rows"].items() if name.startswith(f"{freeze}-")}
    assert len(kept) == rows
    for name, told in drawn.items():
        assert {**told, "use": "development"} == kept[name.replace("new", freeze)]


def test_development_and_held_out_rows_are_told_apart() -> None:
    spec = {**SPEC, "instances": {"seed": 1, "count": 2, "classes": 10, "side": 28}}
    made = list(rows(spec))
    uses = {row.name: row.use for row in made}
    assert uses["badnets"] == "development"
    assert {uses[name] for name in uses if name not in SPEC["rows"]} == {HELD_OUT}
    assert len(uses) == len(SPEC["rows"]) + 2
    held_out = [row.name for row in chosen(made, None, ["cnn"], HELD_OUT)]
    assert [name.split("-")[1] for name in held_out] == ["patch", "blend"]
    assert [row.name for row in chosen(made, ["sig"], ["cnn"], None)] == ["sig"]
    for asked in ((["sgi"], None, None), (None, ["rnn"], None), (None, None, "test")):
        with pytest.raises(UsageError, match="Known:"):
            chosen(made, *asked)


def test_a_rate_of_false_flags_has_an_exact_bound() -> None:
    """No flag among n: the rate p for which (1 - p)^n is .05."""
    assert flags.upper(0, 60) == pytest.approx(1 - 0.05 ** (1 / 60))
    assert flags.upper(60, 60) == 1.0
    assert flags.upper(1, 60) > flags.upper(0, 60)


def test_every_guard_of_the_specification_is_read_and_told_apart() -> None:
    read = guards(SPEC)
    documents: list[Any] = [guard.document() for guard in read.values()]
    assert all(documents.count(each) == 1 for each in documents)
    assert read["guard of a clean teacher"].of_clean
    assert read["none"].detox.chain == ()
