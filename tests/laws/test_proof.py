"""Proofs: what is written is accepted, what is accepted is true, what is altered is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effort
import proofs
import toygraphs
from mlflow_kdguard import graph
from mlflow_kdguard.errors import CertificateError
from mlflow_kdguard.proof import Proof
from mlflow_kdguard.proof.document import sha256_of

QUICK = settings(max_examples=2, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
methods = st.sampled_from(["crown", "branch"])
ALTERATIONS = 60
"""Random alterations of each proof; `benchmarks.proof` tries a thousand."""


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    """Bounds hold for any effort; little of it is quick."""
    with effort.little(*effort.SEARCH):
        yield


def pair(kind: str, seed: int):
    """Two networks and an image."""
    student = toygraphs.KINDS["mlp" if kind == "capped" else kind]
    models = toygraphs.KINDS[kind](seed), student(seed + 77_777)
    x = np.random.default_rng(seed).uniform(-0.2, 1.2, models[0].input_shape).clip(0.0, 1.0)
    return models, x.astype(np.float32)


@pytest.mark.parametrize("kind", sorted(toygraphs.KINDS))
@QUICK
@given(
    seed=seeds,
    method=methods,
    eps=st.sampled_from([0.05, 0.15]),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_every_proof_is_accepted_and_true(kind, seed, method, eps, norm) -> None:
    models, x = pair(kind, seed)
    checker, proof, upper = proofs.written(models, x, eps, method=method, norm=norm)
    again = Proof.from_bytes(proof.to_bytes())
    bound = checker.check(again, x)
    assert again.to_bytes() == proof.to_bytes()
    assert bound == pytest.approx(upper, rel=2e-3, abs=1e-5)
    exact = toygraphs.brute(*models, x.astype(float), eps, seed=seed, norm=norm)
    assert exact <= bound <= proof.claim.upper


@QUICK
@given(seed=seeds, method=methods)
def test_the_top_class_alone(seed, method) -> None:
    models, x = pair("mlp", seed)
    klass = int(toygraphs.confidences(models[0], x[None].astype(float))[0].argmax())
    checker, proof, upper = proofs.written(models, x, 0.1, method=method, klass=klass)
    bound = checker.check(proof, x)
    assert bound == pytest.approx(upper, rel=2e-3, abs=1e-5)
    assert toygraphs.brute(*models, x.astype(float), 0.1, klass=klass) <= bound


def test_two_classes() -> None:
    models = tuple(
        toygraphs.finish((1, 1, 2), [*m.layers, _first_two(m)])
        for m in (toygraphs.mlp(1), toygraphs.mlp(77_778))
    )
    x = np.full((1, 1, 2), 0.4, dtype=np.float32)
    for method in ("crown", "branch"):
        checker, proof, upper = proofs.written(models, x, 0.1, method=method)
        bound = checker.check(proof, x)
        assert bound == pytest.approx(upper, rel=2e-3, abs=1e-5)
        assert toygraphs.brute(*models, x.astype(float), 0.1) <= bound


def _first_two(model: graph.Graph) -> graph.Layer:
    """The first two logits of a network."""
    return graph.Affine("two", (model.output,), (2,), np.eye(2, 3), np.zeros(2))


@QUICK
@given(seed=seeds)
def test_equal_networks_have_no_gap(seed) -> None:
    model, x = toygraphs.mlp(seed), pair("mlp", seed)[1]
    checker, proof, _ = proofs.written((model, model), x, 0.2, nodes=4)
    assert checker.check(proof, x) < 1e-9


@QUICK
@given(seed=seeds, method=methods)
def test_no_leaf_can_be_left_out(seed, method) -> None:
    """A proof holds nothing that it does not need: without any part, its claim does not follow."""
    models, x = pair("mlp", seed)
    checker, proof, _ = proofs.written(models, x, 0.4, method=method)
    assert len(proof.gaps.trees.at)
    for which in range(len(proof.gaps.trees.at)):
        with pytest.raises(CertificateError):
            checker.check(proofs.without_evaluation(proof, which), x)


def altered(proof: Proof, draw: np.random.Generator) -> Proof:
    """One number of one group of trees changed at random."""
    groups = {k: v for k, v in proofs.groups(proof).items() if len(v.number)}
    name = str(draw.choice(sorted(groups)))
    trees = groups[name]
    fields = [
        f
        for f in ("theta", "column", "node", "at", "splits", "number", "value", "free")
        if getattr(trees, f).size
    ]
    field = str(draw.choice(fields))
    values = getattr(trees, field).copy()
    at = tuple(int(draw.integers(side)) for side in values.shape)
    if field == "value":
        values[at] += draw.normal()
    elif field == "theta":
        values[at] = draw.integers(2**16)
    else:
        values[at] = max(0, values[at] + int(draw.integers(-3, 4)))
    return proofs.regrouped(proof, name, replace(trees, **{field: values}))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(seed=seeds)
def test_what_is_accepted_after_an_alteration_is_still_true(seed) -> None:
    """Any multipliers give a bound; splits that do not fit together give none."""
    models, x = pair("mlp", seed)
    checker, proof, _ = proofs.written(models, x, 0.2)
    exact = toygraphs.brute(*models, x.astype(float), 0.2, seed=seed)
    draw, refused = np.random.default_rng(seed), 0
    for _ in range(ALTERATIONS):
        try:
            bound = checker.bound(Proof.from_bytes(altered(proof, draw).to_bytes()), x)
        except CertificateError:
            refused += 1
        else:
            assert bound >= exact
    assert refused


@QUICK
@given(seed=seeds)
def test_a_lower_claim_is_refused(seed) -> None:
    models, x = pair("mlp", seed)
    checker, proof, _ = proofs.written(models, x, 0.2)
    for share in (0.999999, 0.9, 0.5, 0.0):
        low = replace(proof, claim=replace(proof.claim, upper=proof.claim.upper * share))
        with pytest.raises(CertificateError, match="claims a gap"):
            checker.check(low, x)


@QUICK
@given(seed=seeds)
def test_another_image_radius_or_network_is_not_proved_along(seed) -> None:
    """A proof of one question answers no other, but by what the checker derives for that one."""
    models, x = pair("mlp", seed)
    checker, proof, _ = proofs.written(models, x, 0.05)
    wide = replace(proof, claim=replace(proof.claim, eps=0.4))
    assert checker.bound(wide, x) >= toygraphs.brute(*models, x.astype(float), 0.4, seed=seed)
    other = (1.0 - x).astype(np.float32)
    with pytest.raises(CertificateError, match="other pixels"):
        checker.bound(proof, other)
    moved = replace(proof, claim=replace(proof.claim, image=sha256_of(other)))
    bound = checker.bound(moved, other)
    assert bound >= toygraphs.brute(*models, other.astype(float), 0.05, seed=seed)
    foreign = replace(proof, claim=replace(proof.claim, student="1" * 64))
    with pytest.raises(CertificateError, match="other networks"):
        checker.check(foreign, x)
