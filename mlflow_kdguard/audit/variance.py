"""Feature variance on clean images: reported, never a verdict.

RobustKD (arXiv:2406.03409) starts from the observation that a backdoored teacher's features vary
more. On clean images that does not separate teachers once clean ones are trained equally long, and
on triggered images the direction depends on the trigger; so the figures describe, and flag nothing.
"""

import torch
from torch import Tensor, nn

from mlflow_kdguard import features
from mlflow_kdguard.audit.question import Answer, Question
from mlflow_kdguard.errors import UsageError
from mlflow_kdguard.nets.taps import Taps, auto
from mlflow_kdguard.records import Finding
from mlflow_kdguard.training import evaluating

_IMAGES = 256


class _Sums:
    """One layer's variances over images that arrive in parts."""

    def __init__(self) -> None:
        self._count = 0
        self._within = self._between = 0.0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, maps: Tensor) -> None:
        maps = maps.double()
        count, mean = len(maps), maps.mean(0)
        self._within += count * float(features.within_map(maps))
        self._between += count * float(features.between_channels(maps))
        squares = ((maps - mean) ** 2).sum(0)
        if self._mean is None or self._squares is None:
            self._mean, self._squares = mean, squares
        else:
            # Parts are merged by their means (Chan et al. 1983): no difference of large sums.
            total, shift = self._count + count, mean - self._mean
            self._squares = self._squares + squares + shift**2 * (self._count * count / total)
            self._mean = self._mean + shift * (count / total)
        self._count += count

    def report(self) -> dict[str, float]:
        assert self._squares is not None
        return {
            "A": self._within / self._count,
            "B": self._between / self._count,
            "C": float((self._squares / self._count).mean()),
        }


def variances(net: nn.Module, question: Question) -> dict[str, dict[str, float]]:
    """Readings A, B and C of each tapped layer, over all images; C takes them as one batch.

    Raises UsageError where no layer of the network can be tapped.
    """
    names = auto(net, question.data.shape)
    sums = {name: _Sums() for name in names}
    images = torch.from_numpy(question.data.x)
    with evaluating(net), torch.no_grad(), Taps(net, names) as taps:
        for start in range(0, len(images), _IMAGES):
            net(images[start : start + _IMAGES].to(question.device))
            for name in names:
                sums[name].add(taps.features[name])
    return {name: layer.report() for name, layer in sums.items()}


def examine(net: nn.Module, question: Question) -> Answer:
    """The variances in the details; the score is the mean of reading A over the layers."""
    try:
        layers = variances(net, question)
    except UsageError as error:
        finding = Finding(name="variance", score=0.0, details={"layers": {}, "why": str(error)})
        return Answer(finding, decides=False)
    score = sum(layer["A"] for layer in layers.values()) / len(layers)
    return Answer(Finding(name="variance", score=score, details={"layers": layers}), decides=False)
