"""What a certificate about a smoothed pair speaks of, served: mean softmax under noise.

The certificate says nothing about answers without noise. Whoever relies on it serves these.
"""

from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from mlflow_kdguard import noise
from mlflow_kdguard.measure.session import Floats, Session, softmax


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A classifier that answers the mean of `session`'s softmax over N(0, σ²I) on the image.

    The mean is taken over `draws` noisy copies, drawn as they are for the certificate. `seed`
    makes answers repeatable; whoever knows it can choose an image for the noise that will come,
    so leave it None (fresh entropy) where images come from strangers.
    """

    session: Session
    sigma: float
    draws: int = 1000
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma < float("inf") or self.draws < 1:
            raise ValueError(f"no noise of deviation {self.sigma} in {self.draws} draws")

    def predict(self, images: Floats, *, batch: int = 256) -> NDArray[np.float64]:
        """Mean confidences N×K of images N×C×H×W with pixels in [0, 1].

        Raises ModelError and NonFiniteError as Session does.
        """
        random = np.random.default_rng(self.seed)
        rows = [self._mean(image, batch, random) for image in np.asarray(images, np.float32)]
        return np.stack(rows) if rows else np.zeros((0, self.session.classes or 0))

    def half_width(self, error: float = 1e-3, *, classes: int | None = None) -> float:
        """How far an image's answer may lie from the mean over all noise, but for `error`.

        All of its classes together (Hoeffding); `classes` where the graph leaves their number
        open.
        """
        means = classes or self.session.classes
        if means is None:
            raise ValueError("the graph leaves the number of classes open: name it")
        return min(1.0, sqrt(log(2.0 * means / error) / (2.0 * self.draws)))

    def _mean(self, image: Floats, batch: int, random: np.random.Generator) -> NDArray[np.float64]:
        total = 0.0
        for copies in noise.noisy(image, sigma=self.sigma, draws=self.draws, random=random):
            total = total + softmax(self.session.logits(copies, batch)).sum(0)
        return np.asarray(total / self.draws)
