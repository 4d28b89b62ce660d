"""certify_smooth(): how far apart the smoothed reference and student can be near drawn images.

A smoothed network answers the mean of its softmax over Gaussian noise on the image; it is that
pair of networks, and no answer without noise, that is bounded here, in l2 and at any size. Read
`layers` for the bound, `noise` for what is drawn; what the figures mean is in
`docs/reference/certify-smooth.md`.
"""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard import noise
from mlflow_kdguard.certify.layers import THRESHOLDS, Layers, Moments, counts
from mlflow_kdguard.certify.smoothed import Judged, Question, report
from mlflow_kdguard.config import SmoothSection
from mlflow_kdguard.data import Dataset
from mlflow_kdguard.draw import draw
from mlflow_kdguard.errors import ConfigError, DataError, ModelError
from mlflow_kdguard.records import Progress, SmoothReport, silent
from mlflow_kdguard.training.interrupt import Signals

Values = NDArray[np.float64]


class Classifier(Protocol):
    """ONNX bytes as a runtime answers them (`measure.Session`): N×C×H×W in, logits N×K out."""

    sha256: str
    provider: str

    def logits(
        self, x: NDArray[np.float32], batch: int = ..., *, indices: NDArray[np.int64] | None = ...
    ) -> NDArray[np.float32]:
        """Logits; raises where one is not finite."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The two networks that are smoothed."""

    reference: Classifier
    student: Classifier

    def confidences(self, x: NDArray[np.float32], batch: int, index: int) -> tuple[Values, Values]:
        """Softmax (N×K) of both; `index` names the image in messages."""
        names = np.full(len(x), index, np.int64)
        answers = [
            _softmax(net.logits(x, batch, indices=names)) for net in (self.reference, self.student)
        ]
        if answers[0].shape != answers[1].shape:
            raise ModelError(
                f"the reference has {answers[0].shape[1]} classes, the student "
                f"{answers[1].shape[1]}.",
                remedy="Certify a student and the network that it was distilled from.",
            )
        return answers[0], answers[1]


def certify_smooth(
    reference: Classifier,
    student: Classifier,
    data: Dataset,
    *,
    config: SmoothSection,
    nonce: str = "",
    entropy: str = "",
    progress: Progress = silent,
) -> SmoothReport:
    """Bounds on the smoothed pair's confidence gap in l2 balls around drawn images of `data`.

    Which images are judged follows from the digests and `nonce`, as for `certify`; their noise
    also from `entropy`, which a verifier draws where nobody else may know the noise beforehand.
    Ctrl-C and SIGTERM end the work early: the report holds the images that were finished, and is
    not `complete`.
    Raises ConfigError without a sigma, DataError for images that do not fit, ModelError for
    networks that do not fit together, NonFiniteError where one answers NaN or infinity.
    """
    question = _question((reference, student), data, config, nonce=nonce, entropy=entropy)
    pair = Pair(reference, student)
    judged: list[Judged] = []
    with Signals() as signals:
        for index in question.indices:
            found = _judge(pair, data, index, question, signals)
            if found is None:
                break
            judged.append(found)
            proved = sum(item.proved(question) for item in judged)
            progress("certify-smooth", len(judged), len(question.indices), {"proved": proved})
    return report(question, judged)


def _question(
    nets: tuple[Classifier, Classifier],
    data: Dataset,
    config: SmoothSection,
    *,
    nonce: str,
    entropy: str,
) -> Question:
    if config.sigma is None:
        raise ConfigError(
            "smooth.sigma is not set: there is no noise.", remedy="Name its deviation (--sigma)."
        )
    if len(data) == 0:
        raise DataError(f"{data.uri} has no images to certify on.", remedy="Name a test set.")
    digests = (nets[0].sha256, nets[1].sha256)
    indices = draw(len(data), config.samples, *digests, data.sha256, nonce)
    if data.y[list(indices)].min() < 0:
        raise DataError(
            f"{data.uri} has drawn images without a label.",
            remedy="Certify on labelled images; whether the reference is right is part of it.",
        )
    return Question(
        config, config.sigma, *digests, data.sha256, data.uri, len(data), nonce, entropy,
        nets[1].provider, indices,
    )  # fmt: skip


def _judge(
    pair: Pair, data: Dataset, index: int, question: Question, signals: Signals
) -> Judged | None:
    """All draws of one image; None where a signal came before the last of them."""
    began = time.perf_counter()
    x, labels = data.batch([index])
    image, config = np.ascontiguousarray(x[0], np.float32), question.config
    clear, _ = pair.confidences(image[None], config.batch, index)
    top = int(clear[0].argmax())
    seen = _Seen(clear.shape[1])
    random = noise.generator(*question.told, str(index))
    for copies in noise.noisy(image, sigma=question.sigma, draws=config.draws, random=random):
        if signals.struck:
            return None
        seen.add(*pair.confidences(copies, config.batch, index), top, config.classes)
    layers = Layers(seen.counts, seen.n, config.error, noise.slack(image.size, question.sigma))
    return Judged(
        index, int(labels[0]), top, seen.teacher / seen.n, seen.gaps / seen.n, layers,
        Moments(seen.n, seen.total, seen.squares), time.perf_counter() - began,
    )  # fmt: skip


class _Seen:
    """Sums over the draws so far; with `top`, differences of one class only."""

    def __init__(self, classes: int) -> None:
        self.n = 0
        self.gaps = 0.0
        self.counts = np.zeros(len(THRESHOLDS), np.int64)
        self.teacher, self.total, self.squares = (np.zeros(classes) for _ in range(3))

    def add(self, reference: Values, student: Values, top: int, classes: str) -> None:
        difference = student - reference
        if classes == "top":
            difference[:, np.arange(difference.shape[1]) != top] = 0.0
        gaps = np.abs(difference).max(1)
        self.n += len(gaps)
        self.gaps += float(gaps.sum())
        self.counts += counts(gaps)
        self.teacher += reference.sum(0)
        self.total += difference.sum(0)
        self.squares += (difference**2).sum(0)


def _softmax(logits: NDArray[np.float32]) -> Values:
    z = logits.astype(np.float64)
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(z / z.sum(axis=1, keepdims=True))
