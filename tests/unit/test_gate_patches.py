"""The rule about patches: what meets it, and every way to fall short of it."""

from typing import Any

import pytest

import certificates as c
from mlflow_kdguard import intervals
from mlflow_kdguard.gate import WAIVED
from mlflow_kdguard.policy import Policy, merged, parse
from mlflow_kdguard.records import Flips, Model, RuleResult, Source

ASKED = {"targets": [0], "size": 3, "positions": [[25, 25]], "upper_at_most": 0.1}


def policy(**changes: Any) -> Policy:
    values = merged(c.packaged().model_dump(mode="json"), {"patch": ASKED | changes})
    return parse(values, where="test")


def judged(made: Any, asked: Policy | None = None, **grants: Any) -> RuleResult:
    decision = c.decided(made, policy() if asked is None else asked, **grants)
    return next(rule for rule in decision.rules if rule.rule == "patch")


def test_the_packaged_policy_waives_it() -> None:
    rule = judged(c.certificate(patch=(c.patch(),)), c.packaged())
    assert (rule.ok, rule.why) == (True, WAIVED)
    assert rule.figure == pytest.approx(intervals.upper(2, 100, 1 - 0.05 * 6 / 3.14159265**2))


def test_few_flipped_images_pass() -> None:
    rule = judged(c.certificate(patch=(c.patch(),)))
    assert rule.ok, rule.why
    assert c.decided(c.certificate(patch=(c.patch(),)), policy()).passed


def test_an_absent_figure_is_a_refusal() -> None:
    rule = judged(c.certificate())
    assert not rule.ok
    assert "has no bound on what patches" in rule.why


SHORT = [
    ({"each": Flips(attack=0, certified=5, n=100)}, "may flip 5 of 100: upper bound 0.1"),
    ({"each": Flips(attack=0, certified=0, n=99),
      "universal": Flips(attack=0, certified=0, n=99)}, "99 images were drawn"),
    ({"universal": Flips(attack=0, certified=0, n=90)}, "100 images are listed"),
    ({"student": Model(sha256=c.REFERENCE)}, "were bounded on"),
    ({"target": 1}, "towards class 0 were not bounded"),
    ({"size": 2}, "3×3 pixels at 25,25 towards class 0 were not bounded"),
    ({"positions": ((0, 0), (24, 25))}, "were not bounded"),
    ({"margin": 1e-5}, "a lead of 1e-05 was asked"),
    ({"selection": "best"}, "selected by 'best'"),
    ({"nonce": "n"}, "the nonce 'n'"),
    ({"data": Source(uri="npz:mine", sha256="d" * 64)}, "npz:mine is not pinned"),
    ({"ranks": tuple(range(100))}, "not the ones that the draw gives"),
    ({"population": 899}, "were drawn among 899, and 900 were asked"),
    ({"population": 3_000_000, "ranks": tuple(range(100))}, "is not repeated here"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), SHORT)
def test_every_way_to_fall_short(change: dict[str, Any], says: str) -> None:
    rule = judged(c.certificate(patch=(c.patch(**change),)))
    assert not rule.ok
    assert says in rule.why


def test_a_square_within_a_bounded_one_is_bounded() -> None:
    wide = c.patch(size=5, positions=((0, 0), (23, 23)))
    assert judged(c.certificate(patch=(wide,))).ok
    assert judged(c.certificate(patch=(wide,)), policy(positions=[[25, 24], [2, 2]])).ok
    assert not judged(c.certificate(patch=(wide,)), policy(positions=[[25, 25], [3, 0]])).ok


def test_one_patch_for_all_images_has_a_limit_of_its_own() -> None:
    asked = policy(upper_at_most=None, universal_upper_at_most=0.08)
    many = Flips(attack=0, certified=60, n=100)
    assert judged(c.certificate(patch=(c.patch(each=many),)), asked).ok
    rule = judged(c.certificate(patch=(c.patch(each=many, universal=many),)), asked)
    assert "one patch for all images towards class 0 may flip 60" in rule.why


def test_bounds_of_several_classes_hold_together() -> None:
    """4 of 100 pass for one class, and not for two at once."""
    four = Flips(attack=0, certified=4, n=100)
    both = tuple(
        c.patch(target=t, each=four, universal=four, population=p) for t, p in ((0, 900), (1, 900))
    )
    limit = 0.102
    assert judged(c.certificate(patch=both), policy(upper_at_most=limit)).ok
    assert not judged(c.certificate(patch=both), policy(upper_at_most=limit, targets=[0, 1])).ok


def test_one_good_figure_among_others_is_enough() -> None:
    bad = c.patch(each=Flips(attack=9, certified=50, n=100))
    assert judged(c.certificate(patch=(bad, c.patch()))).ok


def test_a_figure_on_unpinned_data_also_fails_the_rule_about_data() -> None:
    made = c.certificate(patch=(c.patch(data=Source(uri="npz:mine", sha256="d" * 64)),))
    assert "data" in c.decided(made, c.packaged()).failed
