"""Networks of which every weight fits in float32, and whose products leave the range of float64."""

import numpy as np
import pytest
import torch

import toygraphs
from mlflow_kdguard import graph
from mlflow_kdguard.certify import Ball, join
from mlflow_kdguard.certify.relax import branch, crown, interval
from mlflow_kdguard.errors import NonFiniteError
from mlflow_kdguard.graph import Graph

CPU = torch.device("cpu")
SMALL, LARGE = 1e-33, 1e33


class Chain:
    """Affine layers on two pixels, with a Relu behind each but the last."""

    def __init__(self) -> None:
        self.net = toygraphs.Net((1, 1, 2), 0)
        self.at = self.net.flat(self.net.clip())

    def affine(self, weight, bias=(0.0, 0.0)) -> "Chain":
        """One affine layer."""
        values = np.array(weight, dtype=float)
        offset = np.array(bias, dtype=float)
        self.at = self.net.add(graph.Affine, [self.at], (len(values),), weight=values, bias=offset)
        return self

    def layers(self, count: int, factor: float) -> "Chain":
        """Layers that multiply by `factor`."""
        for _ in range(count):
            self.affine(np.eye(2) * factor)
            self.at = self.net.relu(self.at)
        return self

    def bent(self, weight, bias=(0.0, 0.0)) -> "Chain":
        """An affine layer and a Relu."""
        self.affine(weight, bias)
        self.at = self.net.relu(self.at)
        return self

    def logits(self, slope: float, other: float) -> Graph:
        """Two classes: the first pixel's value times `slope`, and a constant."""
        self.affine([[slope, 0.0], [0.0, 0.0]], [0.0, other])
        return self.net.done()


def still(other: float) -> Graph:
    """A network that hardly depends on the image."""
    chain = Chain().bent([[1.0, 1.0], [1.0, -1.0]], [-1.0, 0.0])
    chain.affine([[0.0, 0.0], [0.0, 1e-9]], [0.0, other])
    return chain.net.done()


def overflowing() -> Graph:
    """A switch whose float32 bound is -inf, though it is on."""
    chain = Chain().bent([[1.0, 0.0], [0.0, 0.0]], [-0.5, 1e19])
    chain.at = chain.net.relu(
        chain.net.add(
            graph.Affine, [chain.at], (1,), weight=np.array([[2e38, -3.5e19]]),
            bias=np.array([2.8e38]),
        )
    )  # fmt: skip
    chain.affine([[1e-36], [0.0]], [0.0, 10.0])
    return chain.net.done()


def short() -> Graph:
    """Coefficients whose squares underflow on the way back."""
    chain = Chain().layers(1, 1.0).layers(5, SMALL)
    chain.bent([[1.0, -1.0], [-1.0, 1.0]])
    return chain.layers(5, LARGE).logits(20.0, 5.0)


def vanishing(bias: float) -> Graph:
    """Coefficients that underflow on the way back, of values that are huge."""
    chain = Chain().layers(1, 1.0).layers(9, LARGE).layers(9, SMALL)
    chain.bent(np.array([[1.0, -1.0], [-1.0, 1.0]]) * SMALL, [bias, bias])
    return chain.layers(1, LARGE).logits(20.0, 5.0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("model", "other"),
    [
        (overflowing(), 10.0), (short(), 5.0), (vanishing(0.0), 5.0),
        (vanishing(float(np.float32(-1e-35))), 5.0),
    ],
    ids=["overflowing", "short", "vanishing", "vanishing-with-bias"],
)  # fmt: skip
def test_no_bound_is_below_a_witness(model, other, swapped, norm):
    pair = (model, still(other)) if swapped else (still(other), model)
    x = np.full((1, 1, 2), 0.5, dtype=np.float32)
    ball = Ball.around(torch.from_numpy(x)[None], eps=0.5, norm=norm)
    exact = toygraphs.brute(*pair, x.astype(float), 0.5, norm=norm)
    assert exact > 0.3
    for bound in (interval, crown, branch):
        assert float(bound(join(*pair, device=CPU), ball, None, 10).upper) >= exact


def test_values_that_underflow_are_not_taken_for_nothing():
    """In real numbers the first logit is ten times a pixel less 1e-5; float64 sees none of it."""
    chain = Chain().layers(10, SMALL).layers(10, LARGE).bent(np.eye(2), [-1e-5, -1e-5])
    pair = still(5.0), chain.logits(10.0, 5.0)
    ball = Ball.around(torch.full((1, 1, 1, 2), 0.5), eps=0.4)
    joint = join(*pair, device=CPU)
    true = 1.0 / (1.0 + np.exp(5.0 - 10.0 * (0.9 - 1e-5)))
    for bound in (interval, crown, branch):
        try:
            upper = float(bound(joint, ball, None, 10).upper)
        except NonFiniteError:
            continue
        assert upper >= true - 1.0 / (1.0 + np.exp(5.0))
