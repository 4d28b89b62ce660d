"""certify_patch(): squares, statuses, the draw, interruptions, and what is refused."""

import os
import signal

import numpy as np
import pytest
import torch

import toys
from mlflow_kdguard import graph
from mlflow_kdguard.certify import contents, flips, join, patch, shared
from mlflow_kdguard.certify.contents import Scene
from mlflow_kdguard.certify.patch import certify_patch
from mlflow_kdguard.certify.picture import draw as picture
from mlflow_kdguard.certify.region import Region
from mlflow_kdguard.config import PatchSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.draw import draw
from mlflow_kdguard.errors import (
    ConfigError,
    DataError,
    Interrupted,
    ModelError,
    SoundnessError,
    UsageError,
)
from mlflow_kdguard.files import sha256
from mlflow_kdguard.flow.measuring import Nets
from mlflow_kdguard.records import Flips, PatchReport, Status
from mlflow_kdguard.records.gather import patch_of

SHAPE = (1, 2, 2)
STUDENT = toys.onnx_tiny(seed=6)
MODEL = graph.read(STUDENT, where="test")
QUICK = PatchSection(size=1, positions=("top-left",), samples=8, nodes=60, pgd_steps=4, restarts=1)


def data(n: int = 30, labels=None, shape=SHAPE) -> Dataset:
    """Images labelled with what the network says about them, or otherwise."""
    x = toys.images(n, shape)
    if labels is None:
        labels = graph.evaluate(MODEL, x.astype(np.float64)).argmax(1)
    return Dataset.of(x, np.asarray(labels), uri="npz:toy", classes=3)


def asked(**changes) -> PatchSection:
    return QUICK.model_copy(update=changes)


def report(images: Dataset | None = None, **changes) -> PatchReport:
    shown = data(labels=[0, 1, 2] * 10) if images is None else images
    nonce = changes.pop("nonce", "")
    return certify_patch(STUDENT, shown, target=1, config=asked(**changes), nonce=nonce)


def brute(image: np.ndarray, row: int, column: int) -> float:
    """The largest lead of class 1 over a fine grid of one pixel."""
    x = np.repeat(image[None].astype(np.float64), 401, 0)
    x[:, 0, row, column] = np.linspace(0.0, 1.0, 401)
    logits = graph.evaluate(MODEL, x)
    return float((logits[:, 1] - np.delete(logits, 1, 1).max(1)).max())


# ── Squares ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "row", "column"),
    [("top-left", 0, 0), ("top-right", 0, 5), ("bottom-left", 2, 0), ("bottom-right", 2, 5),
     ("1,4", 1, 4), ("2, 5", 2, 5)],
)  # fmt: skip
def test_positions_are_corners_or_the_top_left_pixel(text, row, column):
    assert Region.named(text, 3, (1, 5, 8)) == Region(row, column, 3)


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [("middle", 3, "no position"), ("1;2", 3, "no position"), ("-1,0", 3, "no position"),
     ("", 3, "no position"), ("3,0", 3, "leaves images of 5×8"), ("0,6", 3, "leaves images"),
     ("top-left", 6, "leaves images"), ("bottom-right", 9, "leaves images")],
)  # fmt: skip
def test_what_is_no_position(text, size, says):
    with pytest.raises(ConfigError, match=says):
        Region.named(text, size, (1, 5, 8))


def test_pasting_changes_the_square_and_nothing_else():
    images = torch.rand((2, 3, 6, 6), dtype=torch.float64)
    new = torch.rand((2, 3, 2, 2), dtype=torch.float64)
    pasted = Region(1, 3, 2).paste(images, new)
    assert torch.equal(pasted[:, :, 1:3, 3:5], new)
    same = torch.ones((6, 6), dtype=torch.bool)
    same[1:3, 3:5] = False
    assert torch.equal(pasted[:, :, same], images[:, :, same])
    assert not torch.equal(pasted, images)


# ── The report ──────────────────────────────────────────────────────────────────────────────────


def test_statuses_are_what_brute_force_says():
    images = data(labels=[0, 1, 2] * 10)
    found = report(images, samples=20, positions=("top-left", "bottom-right"))
    assert {s.status for s in found.samples} >= {Status.PROVED, Status.REFUTED}
    for sample in found.samples:
        leads = [brute(images.x[sample.index], *place) for place in ((0, 0), (1, 1))]
        for status, lead in zip(sample.at, leads, strict=True):
            assert lead < -1e-4 if status is Status.PROVED else lead > -0.02
        assert max(leads) <= sample.upper + 1e-9
        assert sample.lead <= sample.upper + 1e-9
        assert sample.lead == pytest.approx(max(leads), abs=0.05) or sample.status is Status.PROVED
        union = {Status.PROVED} == set(sample.at)
        assert (sample.status is Status.PROVED) == union
        assert (sample.status is Status.REFUTED) == (Status.REFUTED in sample.at)


def test_a_witness_in_the_report_flips_its_image():
    images = data(labels=[0, 1, 2] * 10)
    found = report(images, samples=20, positions=("top-left", "bottom-right"))
    for sample in found.samples:
        assert (sample.witness is None) == (sample.status is not Status.REFUTED)
        if sample.witness is not None:
            x = images.x[sample.index].astype(np.float64).copy()
            x[0, sample.witness.position[0], sample.witness.position[1]] = sample.witness.pixels[0]
            assert graph.evaluate(MODEL, x[None]).argmax() == 1
    for place in found.places:
        x = images.x[[s.index for s in found.samples]].astype(np.float64).copy()
        x[:, 0, place.position[0], place.position[1]] = place.patch[0]
        assert (graph.evaluate(MODEL, x).argmax(1) == 1).sum() == place.universal.attack


def test_counts_and_bounds_follow_from_the_samples():
    found = report(samples=20, positions=("top-left", "bottom-right"))
    states = [s.status for s in found.samples]
    assert found.each.attack == states.count(Status.REFUTED)
    assert found.each.certified == len(states) - states.count(Status.PROVED)
    for number, place in enumerate(found.places):
        at = [s.at[number] for s in found.samples]
        assert place.each.certified == len(at) - at.count(Status.PROVED)
        assert place.universal.attack <= place.universal.certified <= place.each.certified
    assert found.universal.certified == max(p.universal.certified for p in found.places)
    assert found.clean.k == sum(s.answer == 1 for s in found.samples)
    assert found.clean.k <= found.each.attack
    assert found.complete
    assert PatchReport.model_validate(found.document()) == found
    attack = found.each.attack / found.each.n
    assert found.each_lower < attack <= found.each.rate < found.each.upper
    with pytest.raises(ValueError, match="each_lower"):
        PatchReport.model_validate(found.document() | {"each_lower": 0.9})
    figure = patch_of(found)
    assert (figure.each, figure.positions) == (found.each, ((0, 0), (1, 1)))


def test_images_of_other_classes_are_drawn_from_the_digests():
    images = data(labels=[0, 1, 2] * 10)
    found = report(images, nonce="n")
    ranks = draw(20, 8, sha256(STUDENT), images.sha256, "target=1", "n")
    others = np.flatnonzero(images.y != 1)
    assert tuple(s.rank for s in found.samples) == ranks == patch_of(found).ranks
    assert [s.index for s in found.samples] == [int(others[rank]) for rank in ranks]
    assert (found.population, found.each.n) == (20, 8)
    assert [s.index for s in report(images).samples] != [s.index for s in found.samples]
    assert report(images, samples=99).each.n == 20


def test_the_same_question_has_the_same_answer():
    threads = torch.get_num_threads()
    try:
        first = report(samples=20)
        torch.set_num_threads(3)
        second = report(samples=20)
    finally:
        torch.set_num_threads(threads)
    assert _untimed(first) == _untimed(second)


def _untimed(found: PatchReport) -> dict:
    body = found.document()
    for sample in body["samples"]:
        del sample["seconds"]
    del body["seconds"]
    return body


def test_one_node_proves_less_and_says_so():
    few, many = report(samples=20, nodes=1), report(samples=20, nodes=60)
    assert few.each.certified >= many.each.certified
    assert all(s.nodes == 1 for s in few.samples)
    proved = [s.index for s in few.samples if s.status is Status.PROVED]
    assert set(proved) <= {s.index for s in many.samples if s.status is Status.PROVED}


def test_flips_are_ordered_and_print_their_bounds():
    one = Flips(attack=1, certified=2, n=10)
    assert (one.rate, one.upper) == (0.2, one.unproved.upper())
    for wrong in ({"attack": 3}, {"certified": 11}, {"rate": 0.5}):
        with pytest.raises(ValueError, match=r"attack|rate|exceeds"):
            Flips.model_validate(one.document() | wrong)


# ── Ending early, and bugs ──────────────────────────────────────────────────────────────────────


def test_ctrl_c_keeps_what_was_finished(monkeypatch):
    monkeypatch.setattr(patch, "_BATCH", 4)

    def listen(what, done, total, figures):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    shown = data(labels=[0, 1, 2] * 10)
    found = certify_patch(STUDENT, shown, target=1, config=asked(samples=20), progress=listen)
    whole = report(samples=20)
    assert not found.complete
    assert found.each.n == 20
    assert found.each.certified > whole.each.certified
    assert found.universal.certified == found.each.certified
    late = [s for s in found.samples if s.upper is None]
    assert late
    assert Status.UNDECIDED in {s.status for s in late}
    assert Status.PROVED not in {s.status for s in late}
    assert [s.status for s in found.samples[:8]] == [s.status for s in whole.samples[:8]]
    nets = Nets(student=STUDENT, teacher=b"", reference=b"")
    section = asked(samples=20, targets=(1,))
    with pytest.raises(Interrupted, match="towards class 1 was stopped"):
        nets.patched(shown, section, nonce="", device=torch.device("cpu"), progress=listen)


def test_progress_is_told():
    told = []
    shown = data(labels=[0, 1, 2] * 10)
    certify_patch(STUDENT, shown, target=1, config=QUICK, progress=lambda *item: told.append(item))
    assert [item[:3] for item in told] == [("certify-patch", 1, 1), ("one patch for all", 1, 1)]


def test_a_bound_below_a_lead_is_an_error(monkeypatch):
    real = contents.bounded

    def unsound(scene, parts):
        found = real(scene, parts)
        return contents.replace(found, upper=found.upper - 50.0)

    monkeypatch.setattr(contents, "bounded", unsound)
    with pytest.raises(SoundnessError, match=r"image \d+: a patch at 0,0 has a lead"):
        report(samples=20)


def test_a_count_below_an_attack_is_an_error(monkeypatch):
    monkeypatch.setattr(shared, "count", lambda *_, **__: shared.Counted(0, 1))
    with pytest.raises(SoundnessError, match="0 at most can be"):
        report(samples=20)


def test_a_patch_outside_of_the_pixel_range_is_no_witness():
    images = torch.rand((2, *SHAPE), dtype=torch.float64)
    nothing = torch.zeros((2, MODEL.classes - 1), dtype=torch.float64)
    scene = Scene(join(MODEL, MODEL, device="cpu"), images, Region(0, 0, 1), 1, 1e-4, nothing)
    flips.attained(MODEL, scene, torch.ones((2, 1, 1, 1)))
    for wrong in (torch.full((2, 1, 1, 1), 1.001), torch.full((2, 1, 1, 1), float("nan")),
                  torch.ones((2, 1, 2, 2))):  # fmt: skip
        with pytest.raises(SoundnessError, match="left the pixel range"):
            flips.attained(MODEL, scene, wrong)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"target": 3}, ConfigError, "no class 3"),
        ({"target": -1}, ConfigError, "no class -1"),
        ({"config": asked(size=3)}, ConfigError, "3×3 pixels at top-left leaves images of 2×2"),
        ({"config": asked(positions=("top-left", "0,0"))}, ConfigError, "two positions"),
        ({"data": data(labels=[0] * 30, shape=(1, 3, 2))}, DataError, r"\(1, 3, 2\)"),
        ({"data": data(labels=[1] * 30)}, DataError, "no image of a class other than 1"),
        ({"data": data(labels=[-1] * 30)}, DataError, "labels outside"),
        ({"student": b"not a model"}, ModelError, "the student"),
        ({"student": STUDENT[:-40]}, ModelError, "the student"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_by_name(change, error, says):
    given = {"student": STUDENT, "data": data(labels=[0, 2] * 15), "target": 1, "config": QUICK}
    given |= change
    with pytest.raises(error, match=says):
        certify_patch(given.pop("student"), given.pop("data"), **given)


def test_the_picture_is_the_same_from_run_to_run(tmp_path):
    images = data(labels=[0, 1, 2] * 10)
    found = report(images, samples=20, positions=("top-left", "bottom-right"))
    for name in ("a.png", "b.png"):
        picture(found, images, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError):
        picture(found, images, tmp_path / "a.png" / "b.png")
