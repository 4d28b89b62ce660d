"""certify(): statuses, the draw, the null model, limits, and what is refused."""

import numpy as np
import pytest
import torch

import effort
import toygraphs
import toys
from mlflow_kdguard import certify as package
from mlflow_kdguard import extensions, graph
from mlflow_kdguard.certify import Ball, Bounds, certify
from mlflow_kdguard.certify.witness import attained
from mlflow_kdguard.config import CertifySection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.draw import draw
from mlflow_kdguard.errors import (
    ConfigError,
    DataError,
    Interrupted,
    ModelError,
    SoundnessError,
)
from mlflow_kdguard.files import sha256
from mlflow_kdguard.graph.float32 import gap_margin
from mlflow_kdguard.records import CertifyReport, Status

SHAPE = (1, 2, 2)
REFERENCE, STUDENT = toys.onnx_tiny(seed=1), toys.onnx_tiny(seed=2)
QUICK = CertifySection(eps=0.02, samples=6, pgd_steps=5, restarts=2)


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    """Bounds hold for any effort; little of it is quick."""
    with effort.little(*effort.LINEAR):
        yield


def data(n: int = 9, labels=None, shape=SHAPE) -> Dataset:
    """Images labelled with what the reference says about them."""
    x = toys.images(n, shape)
    if labels is None:
        model = graph.read(REFERENCE, where="test")
        labels = graph.evaluate(model, x.astype(np.float64)).argmax(1)
    return Dataset.of(x, np.asarray(labels), uri="npz:toy", classes=3)


def set_up(**changes) -> CertifySection:
    return QUICK.model_copy(update=changes)


def test_the_report_is_bounds_on_the_drawn_images():
    images = data()
    report = certify(REFERENCE, STUDENT, images, config=QUICK, nonce="n")
    digests = sha256(REFERENCE), sha256(STUDENT), images.sha256
    assert tuple(sample.index for sample in report.samples) == draw(9, 6, *digests, "n")
    assert (report.reference.sha256, report.student.sha256, report.data.sha256) == digests
    assert (report.population, report.nonce, report.selection) == (9, "n", "uniform-seeded")
    models = [graph.read(b, where="test") for b in (REFERENCE, STUDENT)]
    for sample in report.samples:
        x = images.x[sample.index].astype(np.float64)
        exact = toygraphs.brute(*models, x, QUICK.eps)
        assert sample.lower <= exact + 1e-6
        assert exact <= sample.upper
        assert sample.reference_class == sample.label
        assert sample.method == "crown"
    uppers = [sample.upper for sample in report.samples]
    assert report.summary.n == 6
    assert report.summary.upper_mean == pytest.approx(np.mean(uppers))
    assert report.summary.upper_max == max(uppers)
    assert CertifyReport.model_validate(report.document()) == report


def test_the_same_question_has_the_same_answer():
    first, second = (certify(REFERENCE, STUDENT, data(), config=QUICK) for _ in range(2))
    assert _untimed(first) == _untimed(second)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        third = certify(REFERENCE, STUDENT, data(), config=QUICK)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert _untimed(third) == _untimed(first)
    other = certify(REFERENCE, STUDENT, data(), config=QUICK, nonce="another")
    assert [s.index for s in other.samples] != [s.index for s in first.samples]


def _untimed(report: CertifyReport) -> list[dict]:
    return [sample.model_dump(exclude={"seconds"}) for sample in report.samples]


@pytest.mark.parametrize("method", ["interval", "crown"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", ["all", "top"])
def test_every_question_is_answered(method, norm, classes):
    config = set_up(method=method, norm=norm, classes=classes, samples=3)
    report = certify(REFERENCE, STUDENT, data(), config=config)
    assert (report.norm, report.classes) == (norm, classes)
    assert all(s.lower <= s.upper <= 1.0 and s.method == method for s in report.samples)


def test_the_top_class_is_the_references_at_the_clean_image():
    images = data()
    every, top = (
        certify(REFERENCE, STUDENT, images, config=set_up(classes=c)) for c in ("all", "top")
    )
    models = [graph.read(b, where="test") for b in (REFERENCE, STUDENT)]
    for sample, whole in zip(top.samples, every.samples, strict=True):
        clean = toygraphs.gaps(*models, images.x[[sample.index]].astype(np.float64))[0]
        assert sample.upper >= clean[sample.reference_class]
        assert sample.upper <= whole.upper + 1e-6


def test_statuses_follow_from_the_bounds():
    gap = [s.upper for s in certify(REFERENCE, STUDENT, data(), config=QUICK).samples]
    proved = certify(REFERENCE, STUDENT, data(), config=set_up(delta=max(gap)))
    assert {s.status for s in proved.samples} == {Status.PROVED}
    refuted = certify(REFERENCE, STUDENT, data(), config=set_up(delta=1e-6))
    assert {s.status for s in refuted.samples} == {Status.REFUTED}
    assert refuted.summary.share_within["1e-06"] == 0.0


def test_a_bound_that_decides_nothing_is_undecided():
    config = set_up(method="interval", eps=0.5, delta=0.97, pgd_steps=0, restarts=1)
    report = certify(REFERENCE, STUDENT, data(), config=config)
    open_ = [s for s in report.samples if s.lower <= 0.97 < s.upper]
    assert open_
    assert {s.status for s in open_} == {Status.UNDECIDED}


def test_a_wrong_reference_proves_nothing():
    labels = (data().y + 1) % 3
    report = certify(REFERENCE, STUDENT, data(labels=labels), config=set_up(delta=1.0))
    assert {s.status for s in report.samples} == {Status.MISCLASSIFIED}
    assert set(report.summary.share_within.values()) == {0.0}


def test_a_network_is_faithful_to_itself():
    """But for what onnxruntime may round, which is another time where it runs twice."""
    report = certify(REFERENCE, REFERENCE, data(), config=set_up(delta=1e-4))
    assert {s.status for s in report.samples} == {Status.PROVED}
    assert report.summary.lower_mean == 0.0
    assert 0.0 <= report.summary.bound_mean < 1e-6 < report.summary.float32_margin_mean < 1e-4


def test_the_control_is_the_constant_network():
    images = data()
    report = certify(REFERENCE, STUDENT, images, config=set_up(delta=0.3))
    x = images.x[[s.index for s in report.samples]].astype(np.float64)
    answers = toygraphs.confidences(graph.read(REFERENCE, where="test"), x)
    gaps = np.abs(answers - answers.mean(0)).max(1)
    assert report.control.gap_mean == pytest.approx(gaps.mean())
    assert (report.control.within.k, report.control.within.n) == (int((gaps <= 0.3).sum()), 6)


def test_time_that_is_up_leaves_images_undecided():
    report = certify(REFERENCE, STUDENT, data(), config=set_up(seconds=1e-9, delta=1.0))
    assert {(s.method, s.lower, s.upper) for s in report.samples} == {("skipped", 0.0, 1.0)}
    assert {s.status for s in report.samples} == {Status.UNDECIDED}
    assert (report.summary.n, report.summary.upper_mean) == (6, 1.0)
    assert set(report.summary.share_within.values()) == {0.0}


def test_progress_is_told_and_can_interrupt(monkeypatch):
    monkeypatch.setattr(package, "_BATCH", 2)
    told = []

    def listen(what, done, total, figures):
        told.append((what, done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="4 of 6 images"):
        certify(REFERENCE, STUDENT, data(), config=QUICK, progress=listen)
    assert told == [("certify", 2, 6), ("certify", 4, 6)]


def unsound(joint, ball: Ball, classes, nodes: int) -> Bounds:
    return Bounds(torch.full((len(ball.centre),), 1e-9, dtype=torch.float64), 1)


def test_a_bound_below_a_witness_is_an_error(monkeypatch):
    monkeypatch.setattr(extensions, "load", lambda kind, name: unsound)
    with pytest.raises(SoundnessError, match=r"image \d+: a point of the ball has a gap"):
        certify(REFERENCE, STUDENT, data(), config=QUICK)


def test_the_float32_margin_hides_no_unsound_bound(monkeypatch):
    """What a witness is compared with is the bound alone, not the bound and the margin."""
    images, config = data(1), set_up(samples=1, eps=1e-7)
    found = certify(REFERENCE, STUDENT, images, config=config).samples[0]
    assert found.float32_margin > 1e-6

    def bound(joint, ball, classes, nodes):
        below = found.lower - found.float32_margin / 2
        return Bounds(torch.full((1,), below, dtype=torch.float64), 1)

    monkeypatch.setattr(extensions, "load", lambda kind, name: bound)
    with pytest.raises(SoundnessError, match="above the bound"):
        certify(REFERENCE, STUDENT, images, config=config)


@pytest.mark.parametrize("classes", ["all", "top"])
@pytest.mark.parametrize("method", ["interval", "crown", "branch"])
def test_every_gated_figure_is_the_bound_and_the_margin(method, classes):
    images, config = data(), set_up(method=method, classes=classes, nodes=10)
    report = certify(REFERENCE, STUDENT, images, config=config)
    models = [graph.read(b, where="test") for b in (REFERENCE, STUDENT)]
    for sample in report.samples:
        x = torch.from_numpy(images.x[[sample.index]])
        ball = Ball.around(x, eps=config.eps)
        margins = gap_margin(*models, ball.lo.numpy(), ball.hi.numpy())[0]
        top = graph.evaluate(models[0], x.double().numpy()).argmax()
        expected = margins.max() if classes == "all" else margins[top]
        assert sample.float32_margin == pytest.approx(expected, rel=1e-6)
        assert sample.bound + sample.float32_margin <= sample.upper <= 1.0
        assert sample.upper == pytest.approx(min(1.0, sample.bound + sample.float32_margin))
    assert report.summary.upper_mean > report.summary.bound_mean


def test_delta_between_bound_and_upper_is_not_proved():
    report = certify(REFERENCE, STUDENT, data(), config=QUICK)
    sample = report.samples[0]
    delta = (sample.bound + sample.upper) / 2
    again = certify(REFERENCE, STUDENT, data(), config=set_up(delta=delta))
    assert again.samples[0].bound <= delta < again.samples[0].upper
    assert again.samples[0].status is not Status.PROVED


def test_a_bound_that_is_no_number_is_one():
    from mlflow_kdguard.certify import gap
    from mlflow_kdguard.certify.propagate import relax

    joint = package.join(*(graph.read(REFERENCE, where="t") for _ in range(2)), device="cpu")
    ball = Ball.around(torch.full((2, *SHAPE), 0.5), eps=0.1)
    known = relax(joint, ball, tighten=False)
    assert gap.sound(torch.tensor([float("nan"), 2.0, -1.0]), known).tolist()[:2] == [1.0, 1.0]


def test_a_point_outside_its_ball_is_no_witness():
    models = [graph.read(b, where="test") for b in (REFERENCE, STUDENT)]
    ball = Ball.around(torch.full((1, *SHAPE), 0.5), eps=0.1)
    for norm in ("linf", "l2"):
        ball = Ball.around(torch.full((1, *SHAPE), 0.5), eps=0.1, norm=norm)
        attained(*models, ball, ball.nearest(ball.centre + 0.3), None)
        with pytest.raises(SoundnessError, match="left its ball"):
            attained(*models, ball, ball.centre + 0.1000001, None)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda: {"config": set_up(method="oracle")}, ConfigError, "oracle"),
        (lambda: {"data": data(shape=(1, 3, 2), labels=[0] * 9)}, DataError, r"\(1, 3, 2\)"),
        (lambda: {"data": data(labels=[-1] * 9)}, DataError, "labels outside"),
        (lambda: {"data": Dataset.of(toys.images(9, SHAPE), None, uri="u", classes=3)},
         DataError, "labels outside"),
        (lambda: {"student": toys.onnx_tiny(classes=4)}, ModelError, "no gap to bound"),
        (lambda: {"student": b"not a model"}, ModelError, "the student"),
        (lambda: {"reference": REFERENCE[:-40]}, ModelError, "the reference"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_by_name(change, error, words):
    asked = {"reference": REFERENCE, "student": STUDENT, "data": data(), "config": QUICK} | change()
    with pytest.raises(error, match=words):
        certify(**asked)
