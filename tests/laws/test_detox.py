"""Laws of the detox table: what the margin cap promises, and what every row must respect."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import toys
from mlflow_kdguard import detox, export, extensions, graph
from mlflow_kdguard.config import DetoxSection, ExportSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.detox.margin_cap import MarginCap
from mlflow_kdguard.detox.margin_swap import MarginSwap

CPU = torch.device("cpu")
K = 5
LOGITS = arrays(
    np.float64, (2, 3, K), elements=st.integers(-800, 800).map(lambda value: value / 16)
)
"""Logits of P and D that float64 adds without rounding."""
SUSPECTS = st.sets(st.integers(0, K - 1), min_size=1, max_size=K - 1).map(
    lambda classes: tuple(sorted(classes))
)


def capped(
    logits: np.ndarray, suspects: tuple[int, ...], kind: type[MarginCap] = MarginCap
) -> tuple[np.ndarray, list[int]]:
    """R by the module, in float64, and the classes that are no suspects."""
    unused = torch.nn.Identity()
    module = kind(unused, unused, suspects, K).double()
    raw, detoxed = torch.from_numpy(logits)
    rest = [label for label in range(K) if label not in suspects]
    return module.cap(raw, detoxed).numpy(), rest


@given(LOGITS, SUSPECTS)
def test_margins_of_suspects_are_the_smaller_of_the_two_exactly(
    logits: np.ndarray, suspects: tuple[int, ...]
) -> None:
    (p, d), (r, rest) = logits, capped(logits, suspects)
    for t in suspects:
        margins = [f[:, t] - f[:, rest].max(1) for f in (p, d, r)]
        np.testing.assert_array_equal(margins[2], np.minimum(margins[0], margins[1]))


@given(LOGITS, SUSPECTS)
def test_every_other_logit_is_the_raw_teachers_and_no_logit_rises(
    logits: np.ndarray, suspects: tuple[int, ...]
) -> None:
    (p, _), (r, rest) = logits, capped(logits, suspects)
    np.testing.assert_array_equal(r[:, rest], p[:, rest])
    assert (r <= p).all()


@given(LOGITS, SUSPECTS)
def test_where_the_copy_is_as_sure_the_reference_is_the_raw_teacher(
    logits: np.ndarray, suspects: tuple[int, ...]
) -> None:
    (p, d), (r, rest) = logits, capped(logits, suspects)
    sure = np.ones(len(p), bool)
    for t in suspects:
        sure &= d[:, t] - d[:, rest].max(1) >= p[:, t] - p[:, rest].max(1)
    np.testing.assert_array_equal(r[sure], p[sure])


@given(LOGITS, SUSPECTS)
def test_a_suspect_wins_only_where_teacher_and_copy_both_put_it_above_the_others(
    logits: np.ndarray, suspects: tuple[int, ...]
) -> None:
    (p, d), (r, rest) = logits, capped(logits, suspects)
    for row, winner in enumerate(r.argmax(1)):
        if winner in suspects:
            for f in (p, d):
                assert f[row, winner] >= f[row, rest].max()


@given(LOGITS, SUSPECTS)
def test_swapped_margins_are_the_copys_exactly_and_the_others_the_raw_teachers(
    logits: np.ndarray, suspects: tuple[int, ...]
) -> None:
    (p, d), (r, rest) = logits, capped(logits, suspects, MarginSwap)
    np.testing.assert_array_equal(r[:, rest], p[:, rest])
    for t in suspects:
        there, here = (f[:, t] - f[:, rest].max(1) for f in (d, r))
        np.testing.assert_array_equal(there, here)


@given(LOGITS, LOGITS, SUSPECTS)
def test_what_the_raw_teacher_says_of_a_suspect_reaches_no_swapped_logit(
    logits: np.ndarray, others: np.ndarray, suspects: tuple[int, ...]
) -> None:
    told = logits.copy()
    told[0][:, list(suspects)] = others[0][:, list(suspects)]
    r, s = (capped(each, suspects, MarginSwap)[0] for each in (logits, told))
    np.testing.assert_array_equal(r, s)


def test_float32_keeps_the_other_logits_bit_for_bit() -> None:
    x = torch.from_numpy(toys.images(30))
    teacher, copy = toys.cnn(), toys.cnn(seed=5)
    r, p, d = (f(x).detach() for f in (MarginCap(teacher, copy, (2, 7), 10), teacher, copy))
    rest = [label for label in range(10) if label not in (2, 7)]
    assert torch.equal(r[:, rest], p[:, rest])
    for t in (2, 7):
        margins = [f[:, t] - f[:, rest].amax(1) for f in (p, d, r)]
        assert torch.allclose(margins[2], torch.minimum(margins[0], margins[1]), atol=1e-5)


def digits(n: int) -> Dataset:
    return Dataset.of(*toys.digits(n), uri="digits", classes=10)


@pytest.mark.parametrize("arch", toys.ARCHES)
@pytest.mark.parametrize("preset", ["reference", "paper"])
@pytest.mark.parametrize("last", ["margin_cap", "margin_swap"])
def test_the_reference_of_the_whole_chain_exports_as_it_is(
    arch: str, preset: str, last: str, tmp_path: Path
) -> None:
    data = digits(120)
    config = DetoxSection(
        chain=("variance_mask", "unlearn", last), preset=preset, mask_steps=3, unlearn_steps=3,
        max_drop=1.0, batch=16,
    )  # fmt: skip
    made = detox.cleanse(toys.net(arch), data, suspects=(1, 6), config=config, seed=0, device=CPU)
    path = tmp_path / "reference.onnx"
    export.to_onnx(
        made.reference, path, shape=data.shape, classes=10, images=data.x,
        config=ExportSection(parity_images=100), device=CPU,
    )  # fmt: skip
    read = graph.read(path.read_bytes(), where="reference")
    logits = graph.evaluate(read, data.x[:8].astype(np.float64))
    with torch.no_grad():
        expected = made.reference(torch.from_numpy(data.x[:8])).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


PRUNING = {"anp", "clp", "fine_prune"}
"""Rows that say of a network without convolutions that it has nothing to prune."""
PLACES = [
    (row, arch)
    for row in extensions.names("detox")
    for arch in ("mlp:12,10", "cnn:4,6")
    if row not in PRUNING or arch.startswith("cnn")
]


@pytest.mark.parametrize(("row", "arch"), PLACES)
def test_a_row_leaves_the_teacher_alone_repeats_and_counts(
    row: str, arch: str, tmp_path: Path
) -> None:
    data, teacher = digits(100), toys.net(arch)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    known = getattr(sys.modules[extensions.load("detox", row).__module__], "OPTIONS", {})
    few = {"steps": 4.0} if "steps" in known else {}
    config = DetoxSection(
        chain=(row,), mask_steps=4, unlearn_steps=4, max_drop=1.0, batch=16, options=few
    )

    def run(folder: Path | None) -> detox.Detoxed:
        return detox.cleanse(
            teacher, data, suspects=(3,), config=config, seed=7, device=CPU, folder=folder
        )

    one, two = run(None), run(tmp_path)
    assert one.record == two.record
    for name, value in one.reference.state_dict().items():
        assert torch.equal(value, two.reference.state_dict()[name]), name
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    (step,) = one.record.steps
    assert (step.name, step.outcome) == (row, "kept")
    assert step.reference.n == step.detoxed.n == 20
    assert not one.reference.training
