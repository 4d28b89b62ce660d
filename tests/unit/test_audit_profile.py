"""The profile: what leads is a matter of nature, and only what leads it by far is a suspect."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from mlflow_kdguard import audit, detox
from mlflow_kdguard.adversary import inversion
from mlflow_kdguard.audit import calibration, natural, profile
from mlflow_kdguard.config import AuditSection, DetoxSection, Loop
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.nets.zoo import Classifier
from mlflow_kdguard.records import AuditReport, Finding, Rate, Source, silent
from mlflow_kdguard_cli import render

CPU = torch.device("cpu")
FAST = AuditSection(detectors=("profile",), radii=(1.0, 2.0), own_radius=0.5, steps=4, batch=16)
LINE = tuple(0.0 for _ in range(10))


def digits(n: int = 120) -> Dataset:
    return Dataset.of(*toys.digits(n), uri="digits", classes=10)


def finding(net: torch.nn.Module, config: AuditSection = FAST) -> Finding:
    done = audit.examine(
        net, config=config, data=digits(), seed=0, device=CPU, model_sha256="0" * 64
    )
    return done.report.detectors[0]


def nature(net: Classifier, path: Path, *profiles: tuple[tuple[float, ...], ...]) -> AuditSection:
    data = digits()
    record = natural.Natural(
        architecture=net.architecture,
        regime=calibration.Regime(eps=0.0, pgd_steps=0, loop=Loop(epochs=1)),
        data=Source(uri=data.uri, sha256=data.sha256),
        images=len(data), radii=FAST.radii, own_radius=FAST.own_radius, steps=FAST.steps,
        batch=FAST.batch, seed=0,
        profiles=profiles,
    )  # fmt: skip
    calibration.write_json(path, record.document())
    return FAST.model_copy(update={"calibration": str(path)})


def own(net: Classifier) -> tuple[tuple[float, ...], ...]:
    """The net's own log-odds: nature is what it is."""
    asked = audit.Question(digits(), FAST, 0, CPU, silent)
    return profile.rates(net, asked)


# ── laws ────────────────────────────────────────────────────────────────────────────────────────

counts = st.lists(st.integers(0, 100), min_size=10, max_size=10)
natures = st.lists(st.floats(-5, 1), min_size=10, max_size=10).map(tuple)


@given(counts, natures, st.floats(-3, 0))
def test_what_all_classes_share_is_no_lead(
    k: list[int], means: tuple[float, ...], shift: float
) -> None:
    """A network that is easier or harder to steer on the whole is not suspect for it."""
    rates = [Rate(k=each, n=100) for each in k]
    led = [each for each in profile.leads(rates, means) if each is not None]
    moved = profile.leads(rates, tuple(each + shift for each in means))
    assert len(led) == 10
    assert moved == pytest.approx(led, abs=1e-9)
    assert np.median(led) == pytest.approx(0.0, abs=1e-9)


@given(counts, natures, st.integers(0, 9))
def test_a_class_that_is_reached_more_easily_leads_more(
    k: list[int], means: tuple[float, ...], label: int
) -> None:
    fewer = [Rate(k=each, n=101) for each in k]
    more = [Rate(k=each + (place == label), n=101) for place, each in enumerate(k)]
    before, after = profile.leads(fewer, means)[label], profile.leads(more, means)[label]
    assert before is not None
    assert after is not None
    assert after >= before - 1e-9


@given(st.integers(1, 500))
def test_odds_are_finite_and_symmetric(n: int) -> None:
    none, every = profile.odds(Rate(k=0, n=n)), profile.odds(Rate(k=n, n=n))
    assert math.isfinite(none)
    assert none == pytest.approx(-every)


def test_neighbours_of_the_foremost_are_no_suspects() -> None:
    assert profile.suspects([6.0, 2.5, 0.0], 2.2) == [0]
    assert profile.suspects([6.0, 5.0, 0.0], 2.2) == [0, 1]
    assert profile.suspects([2.1, 0.0, 0.0], 2.2) == []


def test_a_class_that_leads_twice_needs_to_lead_less() -> None:
    one, two = [1.6, 1.4, 0.0], [1.9, 0.3, 0.1]
    config = AuditSection(lead=2.2, lead_twice=1.25)
    assert profile.flags([one], config) == []
    assert profile.flags([one, two], config) == [0]
    assert profile.flags([one, [0.2, 0.3, 0.1], two], config) == [0]  # not one after the other
    assert profile.flags([two, [2.5, 0.0, 2.3]], config) == [0, 2]  # who leads by far comes first


def test_a_class_that_counts_once_has_not_led_twice() -> None:
    assert profile.twice([[1.0, None], [2.0, 9.0]]) == [1.0, None]
    assert profile.twice([[1.0, 2.0]]) == [None, None]


@given(st.lists(st.lists(st.floats(-9, 9), min_size=4, max_size=4), min_size=2, max_size=5))
def test_leading_by_less_at_every_radius_flags_nobody(looks: list[list[float]]) -> None:
    config = AuditSection(lead=9.5, lead_twice=2.0)
    flagged = profile.flags(list(looks), config)
    for label in range(4):
        led = sum(look[label] >= 2.0 for look in looks)
        assert (label not in flagged) or led >= 2


def test_a_class_that_nature_reaches_anyway_is_never_a_suspect() -> None:
    """Between four images in five and all of them lies chance."""
    rates = [Rate(k=100, n=100), *(Rate(k=50, n=100) for _ in range(9))]
    led = profile.leads(rates, (1.4, *LINE[1:]))
    assert led[0] is None
    assert profile.suspects(led, 2.2) == []
    assert profile.suspects(profile.leads(rates, (1.3, *LINE[1:])), 2.2) == [0]


# ── on networks ─────────────────────────────────────────────────────────────────────────────────


def test_a_network_that_is_as_nature_is_leads_nowhere(tmp_path: Path) -> None:
    """Even one with a class that everything is sent to: nature has that class too."""
    net = toys.shortcut()
    found = finding(net, nature(net, tmp_path / "n.json", own(net)))
    assert max(map(abs, found.details["leads"])) < 1e-9
    assert not found.flagged
    assert found.details["radius"] is None


def test_a_class_that_nature_does_not_reach_is_flagged_at_the_first_radius(tmp_path: Path) -> None:
    net = toys.shortcut({6: 7})
    found = finding(net, nature(net, tmp_path / "n.json", own(toys.shortcut({}))))
    assert found.flagged
    assert (found.target, found.details["flagged"]) == (6, [6])
    assert found.details["radius"] == 1.0
    assert len(found.details["looks"]) == 1  # what stands out in a small ball needs no larger one
    assert found.p_value is None


def test_a_larger_radius_is_looked_at_where_the_smaller_shows_nothing(tmp_path: Path) -> None:
    net = toys.shortcut()
    (small, large, each), low = own(net), [-9.0] * 10
    hidden = tuple(low[place] if place == 6 else rate for place, rate in enumerate(large))
    found = finding(net, nature(net, tmp_path / "n.json", (small, hidden, each)))
    assert found.details["flagged"] == [6]
    assert found.details["radius"] == 2.0


def test_a_class_that_stands_out_a_little_at_two_radii_is_flagged_at_the_second(
    tmp_path: Path,
) -> None:
    net = toys.shortcut({})
    less = tuple(
        tuple(each - 1.6 * (place == 3) for place, each in enumerate(row)) for row in own(net)
    )
    config = nature(net, tmp_path / "n.json", less)
    found = finding(net, config)
    assert [look["flagged"] for look in found.details["looks"]] == [[], [3]]
    assert found.details["radius"] == 2.0
    assert not finding(net, config.model_copy(update={"lead_twice": 1.7, "lead_own": 1.7})).flagged


def test_a_class_that_is_near_from_everywhere_is_flagged_by_the_last_look(tmp_path: Path) -> None:
    """No universal pattern leads to it; each image has its own way there."""
    net = toys.shortcut({})
    small, large, each = own(net)
    near = tuple(rate - 1.2 * (place == 3) for place, rate in enumerate(each))
    config = nature(net, tmp_path / "n.json", (small, large, near))
    found = finding(net, config)
    assert [look["flagged"] for look in found.details["looks"]] == [[], [], [3]]
    assert [look["own"] for look in found.details["looks"]] == [False, False, True]
    assert found.details["radius"] == 2.0  # unlearning is universal: the largest radius
    assert not finding(net, config.model_copy(update={"lead_own": 1.3})).flagged


def test_the_target_is_a_class_that_is_flagged(tmp_path: Path) -> None:
    """Also where another one leads by more, but once."""
    net = toys.shortcut({})
    small, large, each = own(net)
    small = tuple(rate - 1.3 * (place == 3) for place, rate in enumerate(small))
    large = tuple(
        rate - 1.3 * (place == 3) - 2.0 * (place == 5) for place, rate in enumerate(large)
    )
    found = finding(net, nature(net, tmp_path / "n.json", (small, large, each)))
    assert found.details["flagged"] == [3]
    assert found.target == 3


def test_the_last_look_does_not_make_a_class_seen(tmp_path: Path) -> None:
    """It sees triggers that are made for each image, and hardly any other."""
    net = toys.shortcut({})
    small, large, each = own(net)
    small, large = (
        tuple(9.0 if place == 3 else rate for place, rate in enumerate(row))
        for row in (small, large)
    )
    found = finding(net, nature(net, tmp_path / "n.json", (small, large, each)))
    assert found.details["unseen"] == [3]


def test_without_the_last_look_there_is_none(tmp_path: Path) -> None:
    net, config = toys.shortcut({}), FAST.model_copy(update={"own_radius": None})
    assert len(finding(net, config).details["looks"]) == 2
    with pytest.raises(ConfigError, match="own radius"):
        finding(net, nature(net, tmp_path / "n.json", own(net)).model_copy(
            update={"own_radius": None}))  # fmt: skip


@given(st.floats(0.05, 0.4))
@settings(max_examples=8, deadline=None)
def test_a_larger_ball_reaches_no_less_from_each_image(radius: float) -> None:
    """Of a linear network, where each step leads the right way."""
    data = digits(60)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    less, more = (inversion.reach(net, x, y, 4, radius=each) for each in (radius, 2.5 * radius))
    assert less.n == more.n == int((data.y != 4).sum())
    assert more.k >= less.k


def test_without_a_calibration_nothing_is_flagged_and_the_verdict_is_undecided() -> None:
    done = audit.examine(
        toys.shortcut(), config=FAST, data=digits(), seed=0, device=CPU, model_sha256="0" * 64
    )
    assert done.report.verdict == "undecided"
    assert not done.report.detectors[0].flagged
    assert "no calibration file" in done.report.detectors[0].details["calibration"]["why"]
    assert [target for _, target in done.recovered] == [6]


def test_shadows_are_kept_in_the_file_and_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    config = FAST.model_copy(
        update={"shadows": 2, "calibration": str(path), "shadow_loop": Loop(epochs=1, batch=32),
                "shadow_pgd_steps": 1}
    )  # fmt: skip
    net = toys.shortcut()
    finding(net, config)
    record = calibration.load(path, natural.Natural)
    assert np.array(record.profiles).shape == (2, 3, 10)
    for change in ({"radii": (1.0,)}, {"steps": 5}):
        with pytest.raises(ConfigError, match="made for something else"):
            finding(net, config.model_copy(update=change))


def test_one_calibration_file_serves_one_detector() -> None:
    with pytest.raises(ValueError, match="inversion or profile, not both"):
        AuditSection(detectors=("inversion", "profile"), calibration="x.json")


# ── what the detox makes of it ──────────────────────────────────────────────────────────────────


def report(found: Finding) -> AuditReport:
    done = audit.examine(
        toys.cnn(), config=FAST, data=digits(), seed=0, device=CPU, model_sha256="0" * 64
    )
    return done.report.model_copy(update={"detectors": (found,)})


def test_unlearning_reaches_a_little_beyond_the_radius_that_a_suspect_stands_out_at(
    tmp_path: Path,
) -> None:
    net = toys.shortcut()
    seen = report(finding(net, nature(net, tmp_path / "n.json", own(toys.shortcut({})))))
    auto = DetoxSection(unlearn_radius="auto")
    suspicion = detox.choose(auto, seen, classes=10)
    assert (suspicion.classes, suspicion.radius) == ((6,), pytest.approx(1.2))
    assert suspicion.settled(auto).unlearn_radius == pytest.approx(1.2)
    fixed = detox.choose(DetoxSection(unlearn_radius=3.0), seen, classes=10)
    assert fixed.radius == 3.0


def test_where_nothing_is_flagged_the_class_that_leads_most_is_guarded(tmp_path: Path) -> None:
    net = toys.shortcut()
    less = tuple(
        tuple(each - 0.9 * (place == 3) for place, each in enumerate(row)) for row in own(net)
    )
    config = nature(net, tmp_path / "n.json", less)
    suspicion = detox.choose(DetoxSection(), report(finding(net, config)), classes=10)
    assert suspicion.classes == (3,)
    assert "nothing was flagged" in suspicion.source


def test_where_a_calibrated_audit_flags_nothing_the_guard_may_stand_aside(tmp_path: Path) -> None:
    net = toys.shortcut({})
    aside = DetoxSection(unflagged="none")
    calm = report(finding(net, nature(net, tmp_path / "n.json", own(net))))
    suspicion = detox.choose(aside, calm, classes=10)
    assert suspicion.classes == ()
    assert suspicion.settled(aside).chain == ()
    alone = DetoxSection(chain=("variance_mask", "unlearn"))
    assert suspicion.settled(alone).chain == ("variance_mask",)
    everyone = detox.choose(DetoxSection(unflagged="all"), calm, classes=10)
    assert everyone.classes == tuple(range(10))


def test_a_class_that_could_not_be_seen_keeps_the_guard_in_place(tmp_path: Path) -> None:
    net = toys.shortcut({})
    blind = tuple(tuple(9.0 if place == 3 else each for place, each in enumerate(row))
                  for row in own(net))  # fmt: skip
    found = finding(net, nature(net, tmp_path / "n.json", blind))
    assert found.details["unseen"] == [3]
    suspicion = detox.choose(DetoxSection(unflagged="none"), report(found), classes=10)
    assert len(suspicion.classes) == 1


def test_suspects_that_are_named_as_nobody_are_refused_and_do_not_open_the_gate() -> None:
    """Only an audit sets the guard aside."""
    nobody = DetoxSection(suspects=())
    suspicion = detox.choose(nobody, None, classes=10)
    config = suspicion.settled(nobody)
    assert config.chain == nobody.chain
    with pytest.raises(ConfigError, match="there are none"):
        detox.cleanse(
            toys.cnn(), digits(), suspects=suspicion.classes, config=config, seed=0, device=CPU
        )


def test_an_audit_without_calibration_never_lets_the_guard_stand_aside() -> None:
    blind = report(finding(toys.shortcut()))
    assert detox.choose(DetoxSection(unflagged="none"), blind, classes=10).classes == (6,)


def test_the_screen_says_why_a_detector_is_not_calibrated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    render.audit(report(finding(toys.shortcut())), "teacher.onnx")
    told = " ".join(capsys.readouterr().err.split())
    assert "profile is not calibrated: no calibration file and no shadow networks" in told
