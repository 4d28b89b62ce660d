"""cleanse(): what it keeps, how it stops itself, how it resumes, and what it refuses."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import toys
from mlflow_kdguard import detox
from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox import loop, margin_cap
from mlflow_kdguard.errors import ConfigError, DataError, Interrupted, NonFiniteError
from mlflow_kdguard.records import AuditReport, Finding, Model, Rate, Source

CPU = torch.device("cpu")
SMALL = DetoxSection(mask_steps=8, unlearn_steps=8, batch=16, max_drop=1.0)


def digits(n: int = 100) -> Dataset:
    return Dataset.of(*toys.digits(n), uri="digits", classes=10)


def run(config: DetoxSection = SMALL, **options: object) -> detox.Detoxed:
    given = {"suspects": (3,), "seed": 0, "device": CPU} | options
    return detox.cleanse(toys.cnn(), digits(), config=config, **given)  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_an_empty_chain_makes_the_raw_teacher_the_reference() -> None:
    done = run(SMALL.model_copy(update={"chain": ()}), suspects=())
    assert same(done.reference, toys.cnn())
    assert done.record.steps == ()
    assert done.record.teacher == done.record.reference
    assert done.record.complete


def test_the_chain_ends_with_the_margin_cap_of_raw_teacher_and_copy() -> None:
    done = run()
    assert isinstance(done.reference, margin_cap.MarginCap)
    x = torch.from_numpy(digits().x)
    left, right = done.reference.both(x)
    assert torch.equal(left, toys.cnn()(x))
    assert torch.equal(right, done.copy(x))
    assert not same(done.copy, toys.cnn())
    assert [step.name for step in done.record.steps] == ["variance_mask", "unlearn", "margin_cap"]
    assert done.record.document()["schema"] == "kdguard.detox/1"
    assert set(done.seconds) == {"01-variance_mask", "02-unlearn", "03-margin_cap"}


def test_seeds_matter_and_repeat() -> None:
    one, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert same(one.reference, again.reference)
    assert one.record == again.record
    assert not same(one.copy, other.copy)


def test_validation_images_are_never_trained_on() -> None:
    train, held = detox.split(digits(), share=0.2, seed=0)
    assert (len(train), len(held)) == (80, 20)
    rows = {image.tobytes() for image in train.x}
    assert not any(image.tobytes() in rows for image in held.x)


def judged(rates: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the validation accuracy at each look be as given; afterwards it is perfect."""
    answers = iter(rates)
    real = loop._look

    def look(*args: object, **options: object) -> None:
        options["rate"] = Rate(k=next(answers, 20), n=20)
        real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_look", look)


def tuned() -> detox.Detoxed:
    return run(DetoxSection(chain=("fine_tune",), options={"steps": 8}, batch=16))


def test_a_step_that_falls_past_the_limit_goes_back_to_its_last_good_state(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judged([20, 20, 20, 0, 0, 0, 0, 0], monkeypatch)
    done = tuned()
    (step,) = done.record.steps
    assert (step.outcome, step.kept_at, step.steps) == ("rolled back", 3, 8)
    assert not done.record.complete
    assert "rolled back" in caplog.text
    assert not same(done.copy, toys.cnn())
    monkeypatch.undo()
    judged([20] * 8, monkeypatch)
    assert not same(done.copy, tuned().copy)


def test_a_step_that_is_never_good_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judged([0] * 8, monkeypatch)
    done = tuned()
    assert done.record.steps[0].outcome == "undone"
    assert same(done.copy, toys.cnn())
    assert "undone" in caplog.text


def test_unlearning_is_not_undone_for_the_accuracy_that_it_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A guard that undoes itself is an open gate: nobody sees that the reference is the teacher."""
    section = SMALL.model_copy(update={"chain": ("unlearn",), "max_drop": 0.02})
    judged([20] * 8, monkeypatch)
    whole = run(section).copy
    monkeypatch.undo()
    for looks in ([0] * 8, [20, 20, 20, 0, 0, 0, 0, 0]):
        judged(looks, monkeypatch)
        done = run(section)
        monkeypatch.undo()
        (step,) = done.record.steps
        assert (step.outcome, step.kept_at, step.steps) == ("past the limit", 8, 8)
        assert same(done.copy, whole)
    assert "ended past the limit" in caplog.text


def test_where_every_class_is_a_suspect_the_copy_alone_is_the_reference() -> None:
    """Nothing that the raw teacher says may be read then."""
    done = run(suspects=tuple(range(10)))
    assert same(done.reference, done.copy)
    assert not same(done.copy, toys.cnn())


def test_the_limit_counts_images_of_the_resulting_reference() -> None:
    """A copy that forgets everything meets it where the cap restores the reference."""
    x, _ = toys.digits(100)
    teacher = toys.cnn()
    with torch.no_grad():
        labels = teacher(torch.from_numpy(x)).argmax(1).numpy()
    data = Dataset.of(x, labels, uri="own labels", classes=10)  # the teacher is always right
    never = next(label for label in range(10) if label not in labels)
    config = {"unlearn_steps": 8, "unlearn_lr": 3.0, "batch": 16, "max_drop": 0.02}

    def outcome(*chain: str) -> tuple[str, Rate]:
        section = DetoxSection(chain=chain, **config)  # type: ignore[arg-type]
        done = detox.cleanse(teacher, data, suspects=(never,), config=section, seed=0, device=CPU)
        assert done.record.least == 20
        return done.record.steps[0].outcome, done.record.reference

    assert outcome("unlearn")[0] == "past the limit"
    assert outcome("unlearn", "margin_cap") == ("kept", Rate(k=20, n=20))


def test_masks_and_copy_are_kept_as_tensors(tmp_path: Path) -> None:
    done = run(folder=tmp_path)
    copy = load_file(tmp_path / "02-unlearn.copy.safetensors")
    assert all(torch.equal(copy[name], value) for name, value in done.copy.state_dict().items())
    masks = load_file(tmp_path / "01-variance_mask.masks.safetensors")
    assert set(masks) == {
        f"{name}.{part}" for name in done.record.layers for part in ("factor", "offset")
    }


def test_a_finished_chain_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(folder=tmp_path)

    def refuse(*_args: object) -> None:
        raise AssertionError("a finished step was repeated")

    monkeypatch.setattr(loop, "_advance", refuse)
    again = run(folder=tmp_path)
    assert same(first.reference, again.reference)
    assert first.record == again.record


def test_checkpoints_of_another_run_are_not_used(tmp_path: Path) -> None:
    run(folder=tmp_path)
    other = run(folder=tmp_path, suspects=(4,), seed=9)
    assert same(other.reference, run(suspects=(4,), seed=9).reference)


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    def strike(what: str, done: int, _total: int, _figures: Mapping[str, float]) -> None:
        if (what, done) == ("unlearn", 3):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="unlearn was interrupted after 3 of 8") as caught:
        run(folder=tmp_path, progress=strike)
    assert "02-unlearn" in caught.value.remedy
    resumed, whole = run(folder=tmp_path), run()
    assert same(resumed.reference, whole.reference)
    assert resumed.record == whole.record


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import toys
from mlflow_kdguard import detox
from mlflow_kdguard.config import DetoxSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox import loop

loop._CHECKPOINT_SECONDS = 0.0
what, at = sys.argv[2], int(sys.argv[3])

def strike(name, done, _total, _figures):
    if (name, done) == (what, at):
        os.kill(os.getpid(), signal.SIGKILL)

detox.cleanse(
    toys.cnn(), Dataset.of(*toys.digits(100), uri="digits", classes=10), suspects=(3,), seed=0,
    config=DetoxSection(mask_steps=8, unlearn_steps=8, batch=16, max_drop=1.0),
    device=torch.device("cpu"), folder=Path(sys.argv[1]), progress=strike,
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", [("variance_mask", 2), ("variance_mask", 8), ("unlearn", 5)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, place: tuple[str, int]) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), place[0], str(place[1])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.tmp"))
    resumed, whole = run(folder=tmp_path), run()
    assert same(resumed.reference, whole.reference)
    assert resumed.record == whole.record


def test_a_learning_rate_that_diverges_is_an_error_not_a_reference() -> None:
    with pytest.raises(NonFiniteError, match="diverged"):
        run(SMALL.model_copy(update={"unlearn_lr": 1e30}))


@pytest.mark.parametrize(
    ("suspects", "chain", "why"),
    [
        ((), ("unlearn",), "there are none"),
        ((), ("margin_cap",), "there are none"),
        ((10,), ("variance_mask",), "distinct classes"),
        ((2, 2), ("unlearn",), "distinct classes"),
        ((1,), ("no_such_detox",), "no detox called"),
    ],
)
def test_suspects_and_chains_that_do_not_fit_are_refused(
    suspects: tuple[int, ...], chain: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(SMALL.model_copy(update={"chain": chain}), suspects=suspects)


def test_data_that_cannot_be_used_is_refused() -> None:
    options = {"suspects": (1,), "config": SMALL, "seed": 0, "device": CPU}
    with pytest.raises(DataError, match="unlabelled"):
        detox.cleanse(toys.cnn(), digits().unlabelled(), **options)
    with pytest.raises(DataError, match="none for training or validation"):
        detox.cleanse(toys.cnn(), digits(2), **options)


def report(rates: list[float], flagged: list[int]) -> AuditReport:
    details = {"rates": rates, "flagged": flagged}
    finding = Finding(name="inversion", score=max(rates), details=details)
    return AuditReport(
        model=Model(sha256="0" * 64),
        data=Source(uri="x", sha256="0" * 64),
        detectors=(Finding(name="variance", score=1.0), finding),
        verdict="undecided",
    )


def test_suspects_are_named_or_flagged_or_the_easiest_class() -> None:
    auto = DetoxSection()
    seen = report([0.1, 0.9, 0.8], [2, 1])

    def chosen(config: DetoxSection, seen: AuditReport | None) -> tuple[tuple[int, ...], str]:
        suspicion = detox.choose(config, seen, classes=3)
        return suspicion.classes, suspicion.source

    assert chosen(DetoxSection(suspects=(2,)), seen)[0] == (2,)
    assert chosen(DetoxSection(suspects="all"), None) == ((0, 1, 2), "every class")
    assert chosen(auto, seen) == ((1, 2), "flagged by the audit")
    classes, why = chosen(auto, report([0.1, 0.2, 0.15], []))
    assert classes == (1,)
    assert "nothing was flagged" in why
    with pytest.raises(ConfigError, match="no inversion"):
        detox.choose(auto, None, classes=3)
