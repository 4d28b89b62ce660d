"""What is certified about a smoothed pair: image by image, and for several radii."""

from typing import Literal

from pydantic import Field

from mlflow_kdguard import intervals
from mlflow_kdguard.records.base import Count, Model, Rate, Record, Source
from mlflow_kdguard.records.bounds import Control, Status


class SmoothSample(Record):
    """Bounds on the smoothed pair's gap around one image, from `draws` noisy copies (0: none yet).

    `upper` holds in the whole ball, `lower` at the image itself; each is wrong with the report's
    `error` at most. `gap_mean` is the mean of what was drawn. `reference_class` is the reference's
    class at the image without noise.
    """

    index: int
    label: int
    reference_class: int
    draws: int = Field(ge=0)
    lower: float = Field(ge=0, le=1)
    gap_mean: float = Field(ge=0, le=1)
    upper: float = Field(ge=0, le=1)
    status: Status
    seconds: float = 0.0


class SmoothPoint(Record):
    """The same draws at another radius: mean bound, and share of images PROVED there."""

    radius: float = Field(ge=0)
    upper_mean: float = Field(ge=0, le=1)
    within: Rate


class SmoothReport(Record):
    """The gap between reference and student, each smoothed by noise (`kdguard.smooth/1`).

    The networks are those that answer the mean of the softmax over N(0, `sigma`² I) on the image;
    nothing is said about answers to one image without noise. `error` is the probability, an
    image, that PROVED is wrong. `nonce` and `noise` are what images and noise were drawn with
    beside the digests. `complete` is False where the work was stopped: images that were not
    judged have no draws and are UNDECIDED.
    """

    schema_: Literal["kdguard.smooth/1"] = Field("kdguard.smooth/1", alias="schema")
    norm: Literal["l2"] = "l2"
    sigma: float = Field(gt=0)
    radius: float = Field(gt=0)
    delta: float = Field(gt=0)
    classes: Literal["all", "top"]
    draws: int = Field(ge=1)
    error: float = Field(gt=0, lt=1)
    reference: Model
    student: Model
    data: Source
    population: Count
    selection: str
    nonce: str
    noise: str
    device: str
    complete: bool
    lower_mean: float
    upper_mean: float
    curve: tuple[SmoothPoint, ...]
    control: Control
    samples: tuple[SmoothSample, ...]
    seconds: float = 0.0

    @property
    def within(self) -> Rate:
        """PROVED among all drawn images."""
        proved = sum(sample.status is Status.PROVED for sample in self.samples)
        return Rate(k=proved, n=len(self.samples))

    def share_lower(self, confidence: float = intervals.CONFIDENCE) -> float:
        """The population's share for which the claim is true, at least."""
        return intervals.claimed_lower(self.within.k, self.within.n, self.error, confidence)
